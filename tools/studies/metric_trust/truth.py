"""The truth: every site really changed by itself, and what that does to outputs and task."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
from lamina.quality.metric import Metric

WIDTHS = (8, 4, 3, 2)
# The product's own forms, beside plain rounding: blocks of 32 with clipping, and integer arithmetic.
FORMS = {"stored-w4": "w4 blocks", "w8a8-static": "w8a8"}
Variants = Mapping[str, Program]


def variants_of(program: Program, calibration: Dataset) -> Iterator[tuple[str, Variants]]:
    """Each kind of change with its variants: ``drop``, ``w8``, ``w4``, ``w3``, ``w2``, ``w4 blocks``, ``w8a8``."""
    yield "drop", drop_variants(program)
    for bits in WIDTHS:
        yield f"w{bits}", rounded_variants(program, bits)
    transform = Quantize(forms=tuple(FORMS), carriers=False)
    sites = [s for s in transform.sites(program) if isinstance(s, Site)]
    values = sorted({v for s in sites for v in (*s.inputs, *s.outputs)})
    statistics = collect(program, calibration, ranges=values, threads=1) if values else None
    moves = [
        Move(site, option)
        for site in sites
        if site.kind != "embedding"
        for option in transform.options(site, program, statistics, None)
    ]
    for form, label in FORMS.items():
        yield label, {m.site.nodes[0]: apply_moves(program, [m]) for m in moves if m.option.name == form}


def rounded_variants(program: Program, bits: int) -> dict[str, Program]:
    """Operator -> the program with its weights rounded to nearest, symmetric, one scale an output channel.

    Stored as float again, so that any width can be measured. An operator of two weights (recurrent ones) gets
    both rounded; a weight that other operators read stays as it was for those.
    """
    by_node: dict[str, list[WeightedOperator]] = {}
    for operator in weighted_operators(program):
        by_node.setdefault(operator.name, []).append(operator)
    found = {}
    for name, operators in by_node.items():
        changed = program.clone()
        for operator in operators:
            _round(changed, operator, bits)
        found[name] = changed
    return found


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
    other = ir.Value(name=name, shape=value.shape, type=value.type, const_value=ir.tensor(made.numpy(), name=name))
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


def measure(
    program: Program,
    variants: Variants,
    data: Dataset,
    task: str | None,
    told: Callable[[int], None] = lambda samples: None,
) -> dict[str, Any]:
    """Damage of every variant, on one thread.

    Args:
        program: The original.
        variants: Site -> changed program.
        data: Samples.
        task: lamina's metric of the task, or None.
        told: Called with the samples done so far, once a batch (and once more for each part the variants
            were split into).

    Returns:
        ``divergence`` and, with a task, ``task``: variant -> damage; ``halves``: the divergence on every other
        sample, twice; ``metric``, ``samples``, ``seconds``.
    """
    start = time.perf_counter()
    metrics: dict[str, Metric] = {"divergence": get_metric(None, program)}
    if task is not None:
        metrics["task"] = get_metric(task, program)
    features: dict[tuple[str, str], list[np.ndarray]] = {}
    base: dict[int, np.ndarray] = {}
    seen = 0
    for number, batch, original, changed in SingleSite(program, variants, threads=1).run(data):
        if task is not None and number not in base:
            base[number] = metrics["task"].features(original, batch, None)
        for name, outputs in changed:
            for label, metric in metrics.items():
                reference = original if label == "divergence" else None
                features.setdefault((label, name), []).append(metric.features(outputs, batch, reference))
        seen += batch.samples
        told(seen)
    rows = {key: np.concatenate(parts) for key, parts in features.items()}
    score = metrics["divergence"].score
    found: dict[str, Any] = {
        "metric": metrics["divergence"].name,
        "samples": data.samples,
        "divergence": {n: score(rows["divergence", n]) for n in variants},
        "halves": [{n: score(rows["divergence", n][i::2]) for n in variants} for i in (0, 1)],
    }
    if task is not None:
        metric = metrics["task"]
        before = metric.score(np.concatenate(list(base.values())))
        found["task"] = {n: metric.damage(before, metric.score(rows["task", n])) for n in variants}
        found["task_metric"] = metric.name
    found["seconds"] = time.perf_counter() - start
    return found
