"""The part of a changed program that the change reaches, fed with what the original computes before it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lamina.ir.names import reads
from lamina.ir.program import Program


@dataclass(frozen=True)
class Suffix:
    """What remains to be run of a changed program once the original's values are known.

    Attributes:
        reads: Input of :meth:`open`'s program -> the original's value that goes there.
        makes: Label of a value wanted -> the value of the changed program, an output of :meth:`open`'s.
        keeps: Value that is wanted and that the change does not reach -> the original's value.
        weight_bytes: Bytes of the weights it holds.
    """

    reads: Mapping[str, str]
    makes: Mapping[str, str]
    keeps: Mapping[str, str]
    weight_bytes: int
    _changed: Program
    _border: Mapping[str, str]

    def open(self) -> Program:
        """A new copy of the changed program from the cut on; its inputs are those of :attr:`reads`."""
        return _open_at(self._changed, self._border, list(self.makes.values()))


def cut(
    changed: Program,
    digests: Mapping[ir.Value, bytes],
    original: Mapping[bytes, str],
    wanted: Mapping[str, str],
) -> Suffix:
    """Cut a changed program where it begins to differ.

    What depends on constants alone is copied, not fed, so that a runtime can still fold it.

    Args:
        changed: The changed program; left as it is.
        digests: Its values' digests (:func:`lamina.ir.fingerprint.value_digests`).
        original: Digest -> name of the original's value.
        wanted: What to compute: label -> value of the changed program.
    """
    values = {v.name or "": v for n in changed.graph for v in n.outputs}
    values |= {v.name or "": v for v in changed.graph.inputs if v.name not in changed.graph.initializers}
    targets = {label: values[name] for label, name in wanted.items() if name in values}
    known = {v: original[d] for v, d in digests.items() if d in original}
    keeps = {label: known[v] for label, v in targets.items() if v in known}
    makes = {label: v for label, v in targets.items() if v not in known}
    border, size = _border(changed.graph, set(makes.values()), known)
    fed = {f"lamina_cut_{i}": known[v] for i, v in enumerate(border)}
    inputs = {v.name or "": f"lamina_cut_{i}" for i, v in enumerate(border)}
    return Suffix(fed, {label: v.name or "" for label, v in makes.items()}, keeps, size, changed, inputs)


def open_after(
    program: Program, known: Collection[str], wanted: Collection[str]
) -> tuple[Program, dict[str, str]]:
    """The part of a program that makes ``wanted`` from values that are known already.

    Args:
        program: The program; left as it is.
        known: Names of values somebody has; those of unknown type are computed all the same.
        wanted: Names of values to make.

    Returns:
        The part, its outputs named as in the program, and its inputs: their name -> the known value fed.
    """
    values = {v.name or "": v for n in program.graph for v in n.outputs}
    makes = {name: values[name] for name in wanted if name in values}
    had = {v: n for n, v in values.items() if n in known}
    had |= {v: v.name or "" for v in program.graph.inputs if v.name in known}
    border, _ = _border(program.graph, set(makes.values()), had)
    labels = {v.name or "": f"lamina_cut_{i}" for i, v in enumerate(border)}
    return _open_at(program, labels, list(makes)), {label: name for name, label in labels.items()}


def activation_reads(graph: ir.Graph) -> dict[ir.Node, list[ir.Value]]:
    """Node -> the values it reads that depend on an input, through its subgraphs too."""
    constant = _constants(graph)
    return {node: [v for v in reads(node) if v not in constant] for node in graph}


def _border(
    graph: ir.Graph, made: set[ir.Value], known: Mapping[ir.Value, str]
) -> tuple[list[ir.Value], int]:
    """Known values that the computation of ``made`` reads, where the cut goes; bytes of weights behind it."""
    constant = _constants(graph)
    border: dict[ir.Value, None] = {}
    size = 0
    seen: set[ir.Value] = set(made)
    pending = list(made)
    while pending:
        maker = pending.pop().producer()
        for value in reads(maker) if maker is not None else ():
            if value in seen:
                continue
            # a value of unknown type cannot be an input: go on to what it is made from
            if value in known and value.dtype is not None and value not in constant:
                border[value] = None
                continue
            seen.add(value)
            pending.append(value)
            if value.const_value is not None and value.name in graph.initializers:
                size += value.const_value.nbytes
    return list(border), size


def _constants(graph: ir.Graph) -> set[ir.Value]:
    """Values that depend on no input."""
    found = set(graph.initializers.values())
    for node in graph:
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            continue
        if all(v in found for v in reads(node)):
            found.update(node.outputs)
    return found


def _open_at(changed: Program, inputs: Mapping[str, str], makes: Sequence[str]) -> Program:
    """A copy of what makes ``makes``, reading ``inputs`` (value -> input name) instead of computing them.

    Costs the nodes that are copied, not those of the program.
    """
    graph = changed.graph
    values = {v.name or "": v for n in graph for v in n.outputs}
    values |= {v.name or "": v for v in graph.inputs}
    fed = [values[name] for name in inputs]
    ends = [values[name] for name in makes]
    nodes, weights = _needed(ends, set(fed))
    view = ir.GraphView(
        fed,
        ends,
        nodes=[n for n in graph if n in nodes],
        initializers=[v for v in graph.initializers.values() if v in weights],
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    old = changed.model
    model = ir.Model(
        view.clone(), ir_version=old.ir_version, functions=[f.clone() for f in old.functions.values()]
    )
    for value, label in zip(model.graph.inputs, inputs.values(), strict=True):
        value.name = label
    return Program(model, changed.source, changed.example, changed.example_is_synthetic)


def _needed(ends: Sequence[ir.Value], fed: set[ir.Value]) -> tuple[set[ir.Node], set[ir.Value]]:
    """The nodes that make ``ends`` from ``fed``, and everything else they read that no node makes."""
    nodes: set[ir.Node] = set()
    given: set[ir.Value] = set()
    pending = list(ends)
    while pending:
        value = pending.pop()
        maker = value.producer()
        if value in fed or maker in nodes:
            continue
        if maker is None:
            given.add(value)
            continue
        nodes.add(maker)
        pending += reads(maker)
    return nodes, given
