"""What must hold of lossy moves: drops equal zeros, nothing chosen changes nothing, plans reproduce."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from fuzz_checks import Arrays, Outcome, Wrong, differs, run, same_interface

from lamina.analysis.statistics import Statistics
from lamina.backends.backend import Target
from lamina.ir.branches import sum_output
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import DropBranch, apply_drops
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan
from lamina.planner.realize import reproduce
from lamina.planner.space import Space, build_space
from lamina.planner.supergraph import FLAGS, build_supergraph

_TARGET = Target.parse("ort:cpu?threads=1")
_DROPS = 2  # branches dropped a model: each costs two sessions


def check_moves(
    subject: Any, program: Program, folded: Program, outcome: Outcome, rng: np.random.Generator
) -> None:
    """Check every lossy transform on a folded program.

    Raises:
        Wrong: A result is not what it must be.
    """
    _drops(subject, folded, outcome, rng)
    space = build_space(folded, [DropBranch(), Quantize()], Statistics(0), _TARGET)
    if not space.choices:
        return
    genome = tuple(int(rng.integers(len(c.options) + 1)) for c in space.choices)
    moves = space.moves(space.canonical(genome))
    _supergraph(subject, space, space.canonical(genome), outcome)
    _plan(subject, program, folded, moves, outcome)
    if outcome.made.spec.grid:
        _lossless(subject, program, outcome)


def _drops(subject: Any, folded: Program, outcome: Outcome, rng: np.random.Generator) -> None:
    sites = [s for s in DropBranch().sites(folded) if isinstance(s, Site)]
    for site in (sites[i] for i in rng.permutation(len(sites))[:_DROPS]):
        outcome.fired[f"drop {site.kind}"] += 1
        dropped = apply_drops(folded, [site.name])
        zeroed = _zeroed(folded, site)
        if zeroed is None:
            outcome.fired["drop without a zeroed twin"] += 1
            continue
        same_interface(f"drop {site.name}", folded, dropped)
        _equal(f"drop '{site.name}'", run(zeroed, subject.feeds), run(dropped.model, subject.feeds))


def _zeroed(program: Program, site: Site) -> ir.Model | None:
    """The program with the branch's output multiplied by zero where it is added."""
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    add = rewriter.node(site.nodes[-1])
    if add.op_type not in ("Add", "Sum") or len(add.inputs) != 2 or sum_output(add).dtype is None:
        return None
    names = [v.name if v is not None else None for v in add.inputs]
    body = add.inputs[1 - names.index(site.inputs[0])]
    assert body is not None
    zero = rewriter.constant(np.array(0, sum_output(add).dtype.numpy()), "fuzz_zero")
    rewriter.at(add)
    add.replace_input_with(1 - names.index(site.inputs[0]), rewriter.op("Mul", [body, zero], name="fuzz_off"))
    return clone.model


def _equal(what: str, want: list[Arrays], have: list[Arrays], budget: float = 0.0) -> None:
    for i, (expected, got) in enumerate(zip(want, have, strict=True)):
        if not all(np.isfinite(a).all() for a in expected if a.dtype.kind == "f"):
            continue  # zero times infinity is NaN: the twin says nothing
        for a, b in zip(expected, got, strict=True):
            reason = differs(a, b, budget)
            if reason:
                raise Wrong(f"{what} on feeds {i}: {reason}")


def _supergraph(subject: Any, space: Space, genome: tuple[int, ...], outcome: Outcome) -> None:
    """With every flag off it is the program, with a genome's flags on what its moves give."""
    outcome.fired["supergraph"] += 1
    graph = build_supergraph(space)

    def with_flags(chosen: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
        return [{**f, FLAGS: graph.flags(chosen)} for f in subject.feeds]

    try:
        both = run(graph.model, [*with_flags(space.nothing), *with_flags(genome)])
    except Exception as error:
        # trap: ONNX Runtime 1.32 loses the second of two Casts in a row when a subgraph reads it
        if "Missing Input" not in str(error):
            raise
        outcome.fired["supergraph that meets a bug of the runtime"] += 1
        return
    count = len(subject.feeds)
    plain = run(space.program.model, subject.feeds)
    raised = graph.model.opset_imports[""] != space.program.opset  # AveragePool 19 sums in another order
    budget = 8.0 if raised or _has_half(space.program) else 0.0
    for i, (want, have) in enumerate(zip(plain, both[:count], strict=True)):
        subject.compare("the supergraph with every flag off", i, want, have, budget)
    _chosen(subject, space, genome, both[count:])


def _chosen(subject: Any, space: Space, genome: tuple[int, ...], got: list[Arrays]) -> None:
    applied = apply_moves(space.program, space.moves(genome))
    names = [p.name for p in applied.outputs]
    kept = [[a for a, p in zip(row, space.program.outputs, strict=True) if p.name in names] for row in got]
    inputs = {p.name for p in applied.inputs}
    feeds = [{k: v for k, v in f.items() if k in inputs} for f in subject.feeds]
    if any(o.name.endswith("dynamic") for m in space.moves(genome) for o in [m.option]):
        return  # a step function: an ulp before it is a step behind it
    limit = 2.0**18 if _has_half(space.program) else 1024.0
    _equal(f"the supergraph at {genome}", run(applied.model, feeds), kept, limit)


def _has_half(program: Program) -> bool:
    """Whether the runtime computes half in float, leaving out casts that it keeps around subgraphs."""
    return any(v.dtype == ir.DataType.FLOAT16 for n in program.graph for v in n.outputs)


def _plan(subject: Any, program: Program, folded: Program, moves: tuple[Move, ...], outcome: Outcome) -> None:
    """A plan, written and read again, makes the same program from the captured one."""
    outcome.fired["plan"] += 1
    plan = Plan(program.fingerprint, subject.names, moves)
    again = reproduce(program, Plan.from_json(plan.to_json()))
    direct = apply_moves(folded, moves)
    if again.fingerprint != direct.fingerprint:
        raise Wrong(f"the plan of {len(moves)} moves does not reproduce the program")


def _lossless(subject: Any, program: Program, outcome: Outcome) -> None:
    """Weights that int8 and float16 hold exactly are stored so without any change of the outputs."""
    quantize = Quantize(clipping="minmax", forms=("stored-w8", "float16"))
    moves = []
    for site in quantize.sites(program):
        if not isinstance(site, Site) or not all(_on_grid(program, name) for name in site.weights[:1]):
            continue
        options = [o for o in quantize.options(site, program, Statistics(0), None) if _plain(o)]
        if options:
            moves.append(Move(site, options[len(moves) % len(options)]))
            outcome.fired[f"lossless {moves[-1].option.name}"] += 1
    if moves:
        stored = apply_moves(program, moves)
        same_interface("storing weights", program, stored)
        _equal(
            "storing weights losslessly", run(program.model, subject.feeds), run(stored.model, subject.feeds)
        )


def _plain(option: Option) -> bool:
    return option.name == "float16" or option.parameters.get("balance", "none") == "none"


def _on_grid(program: Program, name: str) -> bool:
    value = program.graph.initializers.get(name)
    if value is None or value.const_value is None:
        return False
    array = value.const_value.numpy().astype(np.float64) * 128
    if array.ndim < 2 or not np.array_equal(array, np.round(array)):
        return False
    peaks = [np.abs(array).max(axis=tuple(j for j in range(array.ndim) if j != i)) for i in range(array.ndim)]
    return all((peak == 127).all() for peak in peaks[:2])
