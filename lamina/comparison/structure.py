"""How two models differ as graphs, and whether they can be run side by side at all."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from lamina.comparison.verdict import Structure
from lamina.errors import DataError
from lamina.ir.names import every_graph, every_node
from lamina.ir.normalize import label
from lamina.ir.program import Interface, Port, Program
from lamina.ir.semantics import why_fenced


def compare_structure(first: Program, second: Program) -> Structure:
    """List every structural difference.

    Raises:
        DataError: The second model wants an input the first does not have (or of another dtype), or they have
            no output in common: nothing can be compared.
    """
    _comparable(first, second)
    versions = first.model.opset_imports, second.model.opset_imports
    domains = sorted(set(versions[0]) | set(versions[1]))
    counts = _operators(first.model), _operators(second.model)
    weights = _weights(first.model), _weights(second.model)
    return Structure(
        interface=differing_interface(first.interface, second.interface),
        shapes=(*_shapes(first.inputs, second.inputs), *_shapes(first.outputs, second.outputs)),
        opsets={
            d or "ai.onnx": (versions[0].get(d), versions[1].get(d))
            for d in domains
            if versions[0].get(d) != versions[1].get(d)
        },
        operators={
            name: (counts[0][name], counts[1][name])
            for name in sorted({*counts[0], *counts[1]})
            if counts[0][name] != counts[1][name]
        },
        nodes=(counts[0].total(), counts[1].total()),
        initializers=(len(weights[0]), len(weights[1])),
        initializer_bytes=(sum(weights[0]), sum(weights[1])),
        random=random_nodes(first, second),
    )


def differing_interface(first: Interface, second: Interface) -> tuple[str, ...]:
    """Every difference between the inputs and outputs of two models."""
    return (
        *_ports("input", first.inputs, second.inputs),
        *_ports("output", first.outputs, second.outputs),
    )


def random_nodes(*programs: Program) -> tuple[str, ...]:
    """The nodes that draw random numbers."""
    nodes = (n for program in programs for n in every_node(program.graph))
    return tuple(label(n) for n in nodes if "random" in (why_fenced(n) or ""))


def shared_outputs(first: Program, second: Program) -> tuple[Port, ...]:
    """The first model's outputs that the second has as well."""
    names = {p.name for p in second.outputs}
    return tuple(p for p in first.outputs if p.name in names)


def _comparable(first: Program, second: Program) -> None:
    given = {p.name: p.dtype for p in first.inputs}
    runs = all(given.get(p.name) == p.dtype for p in second.inputs)
    for what, possible, ports in (
        ("inputs", runs, (first.inputs, second.inputs)),
        ("outputs", bool(shared_outputs(first, second)), (first.outputs, second.outputs)),
    ):
        if not possible:
            raise differing(what, *ports, f"{first.source} and {second.source}")


def differing(what: str, one: tuple[Port, ...], other: tuple[Port, ...], where: str) -> DataError:
    """The error for models that cannot be run on the same data."""
    names = [p.name for p in one], [p.name for p in other]
    shown: tuple[object, object] = names
    if names[0] == names[1]:
        shown = [f"{p.name}: {p.dtype.name}" for p in one], [f"{p.name}: {p.dtype.name}" for p in other]
    return DataError(
        f"the models' {what} differ: {shown[0]} and {shown[1]}",
        where=where,
        advice="compare models with the same interface",
    )


def _ports(what: str, one: tuple[Port, ...], other: tuple[Port, ...]) -> list[str]:
    before, after = {p.name: p for p in one}, {p.name: p for p in other}
    found = [f"{what} '{name}' is missing in the second model" for name in before if name not in after]
    found += [f"{what} '{name}' is new in the second model" for name in after if name not in before]
    both = [name for name in before if name in after]
    for name in both:
        if before[name].dtype != after[name].dtype:
            dtypes = f"{before[name].dtype.name} and {after[name].dtype.name}"
            found.append(f"{what} '{name}' is {dtypes}")
        elif len(before[name].shape) != len(after[name].shape) and before[name].shape and after[name].shape:
            ranks = f"{len(before[name].shape)} and {len(after[name].shape)}"
            found.append(f"{what} '{name}' has rank {ranks}")
    if both != [name for name in after if name in before]:
        found.append(f"the {what}s are in another order: {list(before)} and {list(after)}")
    return found


def _shapes(one: tuple[Port, ...], other: tuple[Port, ...]) -> list[str]:
    """Fixed against dynamic, or two sizes: another name for the same dynamic dim is no difference."""
    after = {p.name: p for p in other}
    found = []
    for port in one:
        twin = after.get(port.name)
        if twin is None or len(twin.shape) != len(port.shape):
            continue
        fixed = [[d if isinstance(d, int) else None for d in p.shape] for p in (port, twin)]
        if fixed[0] != fixed[1]:
            found.append(f"'{port.name}' is declared {list(port.shape)} and {list(twin.shape)}")
    return found


def _operators(model: ir.Model) -> Counter[str]:
    return Counter(f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in every_node(model.graph))


def _weights(model: ir.Model) -> list[int]:
    tensors = (v.const_value for g in every_graph(model.graph) for v in g.initializers.values())
    return [t.nbytes for t in tensors if t is not None]
