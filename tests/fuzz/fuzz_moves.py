"""What must hold of lossy moves: drops equal zeros, nothing chosen changes nothing, plans reproduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
from fuzz_checks import Arrays, Outcome, Wrong, differs, same_interface
from fuzz_truth import narrowest, near_truth, true_outputs

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
    subject: Any, again: Program, folded: Program, outcome: Outcome, rng: np.random.Generator
) -> None:
    """Check every lossy transform on a folded program.

    Args:
        subject: The model and what it gives.
        again: What the names of the folds made of the captured program: a plan's moves go on from there.
        folded: What folding made of it; it is equal, and another object.
        outcome: What is counted.
        rng: Draws branches and moves.

    Raises:
        Wrong: A result is not what it must be.
    """
    _drops(subject, folded, outcome, rng)
    space = build_space(folded, [DropBranch(), Quantize()], Statistics(0), _TARGET)
    if not space.choices:
        return
    genome = tuple(int(rng.integers(len(c.options) + 1)) for c in space.choices)
    moves = space.moves(space.canonical(genome))
    applied = apply_moves(folded, moves)
    _supergraph(subject, space, space.canonical(genome), applied, outcome)
    _plan(subject, again, applied, moves, outcome)
    if outcome.made.spec.grid:
        _lossless(subject, subject.captured, outcome)


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
        _equal(f"drop '{site.name}'", *(subject.run(m, subject.feeds) for m in (zeroed, dropped.model)))


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


def _equal(
    what: str,
    want: list[Arrays],
    have: list[Arrays],
    budget: float = 0.0,
    units: Sequence[np.dtype[Any] | None] | None = None,
) -> None:
    for i, (expected, got) in enumerate(zip(want, have, strict=True)):
        if not all(np.isfinite(a).all() for a in expected if a.dtype.kind == "f"):
            continue  # zero times infinity is NaN: the twin says nothing
        for a, b, unit in zip(expected, got, units or [None] * len(expected), strict=True):
            reason = differs(a, b, budget, unit)
            if reason:
                raise Wrong(f"{what} on feeds {i}: {reason}")


def _supergraph(
    subject: Any, space: Space, genome: tuple[int, ...], applied: Program, outcome: Outcome
) -> None:
    """With every flag off it is the program, with a genome's flags on what its moves give."""
    outcome.fired["supergraph"] += 1
    graph = build_supergraph(space)

    def with_flags(chosen: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
        return [{**f, FLAGS: graph.flags(chosen)} for f in subject.feeds]

    try:
        both = subject.run(graph.model, [*with_flags(space.nothing), *with_flags(genome)])
    except Exception as error:
        # trap: ONNX Runtime 1.32 loses the second of two Casts in a row when a subgraph reads it
        if "Missing Input" not in str(error):
            raise
        outcome.fired["supergraph that meets a bug of the runtime"] += 1
        return
    count = len(subject.feeds)
    raised = graph.model.opset_imports[""] != space.program.opset
    budget = _stated(space, raised)
    for i, (want, have) in enumerate(zip(subject.folded, both[:count], strict=True)):
        subject.compare("the supergraph with every flag off", i, want, have, budget)
    _chosen(subject, space, applied, space.moves(genome), both[count:], raised)


def _chosen(
    subject: Any,
    space: Space,
    applied: Program,
    moves: tuple[Move, ...],
    got: list[Arrays],
    raised: bool,
) -> None:
    names = [p.name for p in applied.outputs]
    kept = [[a for a, p in zip(row, space.program.outputs, strict=True) if p.name in names] for row in got]
    inputs = {p.name for p in applied.inputs}
    feeds = [{k: v for k, v in f.items() if k in inputs} for f in subject.feeds]
    if any(o.name.endswith("dynamic") for m in moves for o in [m.option]):
        return  # a step function: an ulp before it is a step behind it
    want = subject.run(applied.model, feeds, "what drops leave")
    stated = _stated(space, raised)
    units = narrowest(applied.model)
    try:
        _equal(
            f"the supergraph with {len(moves)} moves",
            want,
            kept,
            stated,
            [units[p.name] if stated else None for p in applied.outputs],
        )
    except Wrong:
        if not stated or not _near_truth(subject, applied, feeds, want, kept, stated):
            raise


def _stated(space: Space, raised: bool) -> float:
    """Ulps between a supergraph and what it stands for: none, unless it rounds otherwise.

    AveragePool 19 sums in another order. Half is computed in float, and the casts around subgraphs are kept.
    """
    return 8.0 if raised or _has_half(space.program) else 0.0


def _near_truth(
    subject: Any,
    applied: Program,
    feeds: list[dict[str, np.ndarray]],
    want: list[Arrays],
    have: list[Arrays],
    stated: float,
) -> bool:
    """Whether float64 says of every output that the supergraph's is as good as the program's own."""
    subject.judged["supergraph judged by float64"] += 1
    true, dtypes = true_outputs(ir.to_proto(applied.model), feeds), narrowest(applied.model)
    if true is None:
        return False
    for row in zip(want, have, true, strict=True):
        for port, a, b, t in zip(applied.outputs, *row, strict=True):
            if differs(a, b, stated, dtypes[port.name]) is None:
                continue
            if a.dtype.kind != "f" or not near_truth(a, b, t, dtypes[port.name], stated):
                return False
    return True


def _has_half(program: Program) -> bool:
    """Whether the runtime computes half in float, leaving out casts that it keeps around subgraphs."""
    return any(v.dtype == ir.DataType.FLOAT16 for n in program.graph for v in n.outputs)


def _plan(subject: Any, again: Program, applied: Program, moves: tuple[Move, ...], outcome: Outcome) -> None:
    """A plan, written and read again, makes the same program; its folds, those of ``again``, were applied."""
    outcome.fired["plan"] += 1
    plan = Plan(again.fingerprint, subject.names, moves)
    read = Plan.from_json(plan.to_json())
    if read.folds != tuple(subject.names) or read.fingerprint != plan.fingerprint:
        raise Wrong("writing a plan and reading it changed its folds")
    made = reproduce(again, replace(read, folds=()))
    if made.fingerprint != applied.fingerprint:
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
        both = (subject.run(m, subject.feeds) for m in (program.model, stored.model))
        _equal("storing weights losslessly", *both)


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
