"""The truth: every site really changed by itself, and what that does to outputs and task."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis.gradient_operators import WeightedOperator, weighted_operators
from lamina.analysis.single_site import SingleSite
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.pass_ import Site
from lamina.passes.quantize.transform import Quantize
from lamina.passes.single_drops import drop_variants
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.quality import get_metric

WIDTHS = (8, 4, 2)
# The product's integer arithmetic with ranges from the calibration data, beside plain rounding.
FORM, INTEGER = "w8a8-static", "w8a8"
BITS = (*(f"w{b}" for b in WIDTHS), INTEGER)
KINDS = ("drop", *BITS)
Variants = Mapping[str, Program]


def variants_of(program: Program, calibration: Dataset, kind: str) -> Variants:
    """Site -> the program with that site changed; ``kind`` is one of :data:`KINDS`."""
    if kind == "drop":
        return drop_variants(program)
    if kind != INTEGER:
        return rounded_variants(program, int(kind[1:]))
    transform = Quantize(forms=(FORM,), carriers=False)
    sites = [s for s in transform.sites(program) if isinstance(s, Site)]
    values = sorted({v for s in sites for v in (*s.inputs, *s.outputs)})
    if not values:
        return {}
    statistics = collect(program, calibration, ranges=values, threads=1)
    moves = [
        Move(site, option)
        for site in sites
        if site.kind != "embedding"
        for option in transform.options(site, program, statistics, None)
        if option.name == FORM
    ]
    return {m.site.nodes[0]: apply_moves(program, [m]) for m in moves}


def rounded_variants(program: Program, bits: int) -> dict[str, Program]:
    """Operator -> the program with its weights rounded to nearest, symmetric, one scale an output channel."""
    names = dict.fromkeys(operator.name for operator in weighted_operators(program))
    return {name: rounded(program, [name], bits) for name in names}


def rounded(program: Program, names: Sequence[str], bits: int) -> Program:
    """The program with the weights of the named operators rounded.

    Stored as float again, so that any width can be measured. An operator of two weights (recurrent ones) gets
    both rounded; a weight that other operators read stays as it was for those.
    """
    changed = program.clone()
    for operator in weighted_operators(program):
        if operator.name in names:
            _round(changed, operator, bits)
    return changed


def _round(program: Program, operator: WeightedOperator, bits: int) -> None:
    value = program.graph.initializers[operator.weight]
    assert value.const_value is not None
    array = value.const_value.numpy()
    made = ir.tensor(round_weights(array, operator.channel_axis, bits), name=value.name)
    readers = {use.node.name for use in value.uses()}
    if operator.channel_axis is None or readers == {operator.name}:
        value.const_value = made
        return
    name = f"{value.name}.w{bits}"
    other = ir.Value(
        name=name, shape=value.shape, type=value.type, const_value=ir.tensor(made.numpy(), name=name)
    )
    program.graph.register_initializer(other)
    for use in value.uses():
        if use.node.name == operator.name:
            use.node.replace_input_with(use.idx, other)


def round_weights(array: np.ndarray, axis: int | None, bits: int) -> np.ndarray:
    """Symmetric round to nearest, ``2^(b-1) - 1`` steps each way, one scale a slice of ``axis``."""
    wide = array.astype(np.float64)
    rest = tuple(i for i in range(wide.ndim) if i != axis)
    most = 2 ** (bits - 1) - 1
    scale = np.abs(wide).max(axis=rest, keepdims=True) / most
    safe = np.where(scale == 0, 1.0, scale)
    return np.asarray(np.clip(np.rint(wide / safe), -most, most) * safe).astype(array.dtype)


@dataclass(frozen=True)
class Measured:
    """What single-site runs found.

    Attributes:
        metric: The divergence.
        rows: Site -> the divergence's features, a row a sample.
        score: Features of some samples -> their divergence.
        task: Site -> damage on the task; empty without one.
        setup_s: Seconds before the second batch: cutting the programs, compiling them, one batch.
        seconds: All of it.
    """

    metric: str
    rows: Mapping[str, np.ndarray]
    score: Callable[[np.ndarray], float]
    task: Mapping[str, float]
    setup_s: float
    seconds: float

    @property
    def samples(self) -> int:
        """How many were run."""
        return min((len(r) for r in self.rows.values()), default=0)

    def on(self, part: slice) -> dict[str, float]:
        """Site -> divergence on some of the samples."""
        return {name: float(self.score(rows[part])) for name, rows in self.rows.items()}


def measure(program: Program, variants: Variants, data: Dataset, task: str | None = None) -> Measured:
    """Divergence (and damage on the task) of every variant, on one thread; CPU seconds.

    Args:
        program: The original.
        variants: Site -> changed program.
        data: Samples.
        task: lamina's metric of the task, or None.
    """
    start = time.process_time()
    setup = 0.0
    divergence = get_metric(None, program)
    judge = None if task is None else get_metric(task, program)
    rows: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    judged: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    base: dict[int, np.ndarray] = {}
    for number, batch, original, changed in SingleSite(program, variants, threads=1).run(data):
        if number == 1 and not setup:
            setup = time.process_time() - start
        if judge is not None and number not in base:
            base[number] = judge.features(original, batch, None)
        for name, outputs in changed:
            rows[name].append(divergence.features(outputs, batch, original))
            if judge is not None:
                judged[name].append(judge.features(outputs, batch, None))
    harm: dict[str, float] = {}
    if judge is not None:
        before = judge.score(np.concatenate(list(base.values())))
        harm = {n: judge.damage(before, judge.score(np.concatenate(f))) for n, f in judged.items()}
    seconds = time.process_time() - start
    joined = {name: np.concatenate(parts) for name, parts in rows.items()}
    return Measured(divergence.name, joined, divergence.score, harm, setup or seconds, seconds)
