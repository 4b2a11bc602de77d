"""Round the weights of a plan's operators against calibration data, in order of execution.

Each operator is rounded for what it will really read: the outputs of operators that are rounded already. The
codes go into the options' parameters, so a plan repeats them without data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from lamina.analysis.instrument import feeds_of, fixed_batch
from lamina.analysis.matching import in_batches
from lamina.analysis.operators import WeightedOperator, weighted_operators
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.errors import BackendError, DataError, PassError, UnsupportedOperator
from lamina.ir.names import reads
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.coded import Coded, coded, from_rows, nearest, payload, to_rows
from lamina.passes.quantize.gptq import DAMP, descend, gptq
from lamina.passes.quantize.graph import constant_array
from lamina.passes.quantize.output_rounding import round_for_outputs
from lamina.passes.quantize.output_search import OutputSearch, Rounded
from lamina.passes.quantize.seen import Key, Seen, Work, moments_of, reads_of, weight_of
from lamina.passes.quantize.smoothing import factors
from lamina.quality import Metric

METHODS = ("nearest", "gptq", "descent", "output")
Chosen = Sequence[tuple[Site, Option]]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        method: ``nearest``; ``gptq``; ``descent``: gptq, then coordinate descent on codes and scales; or
            ``output``: descent, then codes of all operators together learned against the program's outputs
            (:mod:`lamina.passes.quantize.output_rounding`). Where those have no derivative that is known,
            where an operator was left out for want of time, or an option is rounded alone, ``output`` is
            ``descent``, and options name that.
        propagate: Share, 0 to 1, of the error that earlier operators made which a later one makes up for
            (qep, arXiv:2504.09629); 0 rounds for the values each operator should have read.
        rows: Samples to look at.
        vectors: Input vectors of an operator that enter its second moments, at least four times its width.
        sweeps: Most passes of the descent.
        passes: Most passes of ``output`` over the data.
        rounds: Most rounds of ``output`` behind them.
        damp: Added to the diagonal of the second moments, of its mean.
        weights: Extra or input ``[n, t]`` of the data that weighs tokens: row x counts ``r^2 x x'`` (rsq:
            :func:`lamina.passes.quantize.token_weights.attention_received`); None: all alike, padding none.
    """

    method: str = "descent"
    propagate: float = 0.5
    rows: int = 256
    vectors: int = 4096
    sweeps: int = 3
    passes: int = 12
    rounds: int = 12
    damp: float = DAMP
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PassError(f"rounding '{self.method}' is unknown", advice=f"choose one of {METHODS}")
        if not 0 <= self.propagate <= 1:
            raise PassError(f"propagate={self.propagate} is no share", advice="give 0 to 1")


@dataclass
class _Found:
    """A weight's codes, what its first operator read, and the operators that read it."""

    made: Coded
    seen: Seen
    items: list[Work] = field(default_factory=list)


def round_options(
    program: Program,
    chosen: Chosen,
    data: Dataset,
    how: Rounding | None = None,
    *,
    metric: Metric | None = None,
    threads: int | None = None,
    seconds: float = math.inf,
    learning: float = math.inf,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Option]:
    """The options with codes that answer for what the operators read; others as they are.

    Rounded are Conv, Gemm and MatMul of every form whose weights become integers; tables are rounded to the
    nearest, which for a table is best. A weight that several operators share is rounded once, for the first.

    Args:
        program: What the sites belong to; left unchanged.
        chosen: Sites of ``program`` and the option each takes.
        data: Calibration samples.
        how: Default: :class:`Rounding`.
        metric: The task's; where its loss has a derivative and the data what it reads, ``output`` looks at
            that too (:class:`lamina.analysis.output_loss.OutputLoss`).
        threads: Threads of a run.
        seconds: Of ``descent``; when they are over, what is left keeps its nearest codes.
        learning: Seconds that ``output`` may add to it.
        progress: Called with what is done, of how many, and of what: operators, then percents.

    Returns:
        One option for each of ``chosen``, in order.

    Raises:
        DataError: The data does not fit the program.
        BackendError: ONNX Runtime refuses a piece of it.

    Cost: two runs of the program over ``rows`` samples, second moments, and for each operator ``[n, k]``
    O(n k^2 + k^3). Memory: what later operators read of all those samples, twice.
    """
    how = how or Rounding()
    made = {site.name: option for site, option in chosen}
    data = in_batches(program, data, how.rows)
    batches = [b for b in data.batches() if fixed_batch(program) in (None, len(b))]
    feeds = [feeds_of(program, b, f"batch {i}") for i, b in enumerate(batches)]
    work = _work(program, chosen, feeds[0]) if how.method != "nearest" and feeds else []
    current = substitute(program, _tables(program, chosen))
    streams = Stream(feeds, threads=threads), Stream(feeds, threads=threads)
    found: dict[Key, _Found] = {}
    settled: dict[str, None] = {}
    done, start = 0, time.perf_counter()
    for wave in _waves(program, work):
        if time.perf_counter() - start > seconds:
            break
        settled.update((w.operator.activation, None) for w in wave)
        sums = moments_of(wave, current, program, streams, list(settled), batches, how.vectors, how.weights)
        weights = {}
        for item in wave:
            array, seen = weight_of(program, item), sums[reads_of(item.operator)]
            if item.key not in found:
                found[item.key] = _Found(_rounded(array, item, seen, how), seen)
            found[item.key].items.append(item)
            rows = found[item.key].made.rows() / factors(item.option.parameters)
            weights[item.place] = from_rows(rows, array.shape, item.axis)
        current = substitute(current, weights)
        done += len(wave)
        if progress is not None:
            progress(done, len(work), "operators")
    method = how.method
    if method == "output":
        args = program, current, found, data, how, metric, learning, threads, progress
        fits = done == len(work) > 0 and _for_outputs(*args)
        method = "output" if fits else "descent"
    for entry in found.values():
        for item in entry.items:
            made[item.site.name] = _carrying(program, item, entry, method)
    return [made[site.name] for site, _ in chosen]


def _carrying(program: Program, item: Work, found: _Found, method: str) -> Option:
    """The item's option with its codes."""
    given = item.option.parameters
    parameters = {**given, "rounding": method, "codes": payload(found.made)}
    if "bias_shift" in given:
        rows = found.made.rows() / factors(given)
        parameters["bias_shift"] = _shifted(program, item, rows, weight_of(program, item), found.seen.mean)
    return replace(item.option, parameters=parameters)


def _for_outputs(
    program: Program,
    current: Program,
    found: Mapping[Key, _Found],
    data: Dataset,
    how: Rounding,
    metric: Metric | None,
    seconds: float,
    threads: int | None,
    progress: Callable[[int, int, str], None] | None,
) -> bool:
    """Choose all codes anew against the outputs; whether that could be done."""
    places = {n.name or "": n for n in current.graph}
    rounded = []
    for entry in found.values():
        first, seen = entry.items[0], entry.seen
        factor, array = factors(first.option.parameters), weight_of(program, first)
        moments = seen.square / max(1, seen.count) / np.outer(factor, factor)
        ridge = how.damp * np.einsum("gkk->gk", moments).mean(axis=1)
        moments = moments + np.where(ridge > 0, ridge, 1.0)[:, None, None] * np.eye(moments.shape[1])
        names = [(places[i.place[0]].inputs[i.place[1]]).name or "" for i in entry.items]  # type: ignore[union-attr]
        operators, target = tuple(i.operator for i in entry.items), to_rows(array, first.axis) * factor
        where = factor, first.axis, array.shape, tuple(names), operators
        rounded.append(Rounded(entry.made, target.astype(np.float32), moments, *where))
    try:
        search = OutputSearch(program, current, rounded, data, metric=_read(metric, data), threads=threads)
    except (UnsupportedOperator, PassError, BackendError):  # no derivative, or not written out
        return False
    better = round_for_outputs(
        search, rounded, passes=how.passes, rounds=how.rounds, seconds=seconds, progress=progress
    )
    for entry, made in zip(found.values(), better, strict=True):
        entry.made = made
    return True


def _read(metric: Metric | None, data: Dataset) -> Metric | None:
    """The metric, where the data have what it reads."""
    try:
        if metric is not None:
            metric.check(data)
    except DataError:
        return None
    return metric


def substitute(program: Program, weights: Mapping[tuple[str, int], np.ndarray]) -> Program:
    """A clone in which (node, operand) read other weights; whoever shares one keeps the old."""
    if not weights:
        return program
    clone = program.clone()
    for node in clone.graph:
        for index, value in enumerate(node.inputs):
            array = weights.get((node.name or "", index))
            if array is None or value is None:
                continue
            # unique: a node of a program has a name of its own
            name = f"{node.name}.rounded{index}"
            fresh = ir.Value(name=name, type=value.type, shape=value.shape)
            fresh.const_value = ir.Tensor(array.astype(np.float32), name=name)
            clone.graph.register_initializer(fresh)
            node.replace_input_with(index, fresh)
            if not value.uses():
                clone.graph.initializers.pop(value.name or "", None)
    return clone


def _work(program: Program, chosen: Chosen, feeds: Mapping[str, np.ndarray]) -> list[Work]:
    """What can be rounded: operators with integer weights and a known way of reading."""
    operators, _ = weighted_operators(program, observed_shapes(program, feeds))
    found = []
    for site, option in chosen:
        operator = operators.get(site.nodes[0])
        if operator is None or "weight_bits" not in option.parameters:
            continue
        if option.parameters.get("grid") == "higgs":
            continue  # its codes are not even steps, and of rotated weights
        if operator.weight in program.graph.initializers:
            found.append(Work(site, option, operator))
    return found


def _tables(program: Program, chosen: Chosen) -> dict[tuple[str, int], np.ndarray]:
    """Embeddings as their options will store them."""
    weights = {}
    for site, option in chosen:
        if site.kind != "embedding" or "weight_bits" not in option.parameters:
            continue
        table = program.graph.initializers.get(site.weights[0])
        if table is not None:
            weights[site.nodes[0], 0] = coded(table, option.parameters, 0).rows()
    return weights


def _waves(program: Program, work: Sequence[Work]) -> Iterator[list[Work]]:
    """Operators in execution order, in runs of which none depends on another."""
    by_node = {w.operator.name: w for w in work}
    level: dict[ir.Value, int] = {}
    waves: dict[int, list[Work]] = {}
    for node in program.graph:
        depth = max((level.get(v, 0) for v in reads(node)), default=0)
        if (item := by_node.get(node.name or "")) is not None:
            waves.setdefault(depth, []).append(item)
            depth += 1
        level.update(dict.fromkeys(node.outputs, depth))
    for depth in sorted(waves):
        yield waves[depth]


def _rounded(array: np.ndarray, item: Work, seen: Seen, how: Rounding) -> Coded:
    """Codes of one weight: the target moves by what earlier errors lack, then is rounded."""
    # where the activation is divided by factors, the weight takes them
    factor = factors(item.option.parameters).astype(np.float64)
    target = to_rows(array, item.axis).astype(np.float64) * factor
    moments, cross = (a / np.outer(factor, factor) for a in (seen.square, seen.cross))
    target = target.reshape(len(moments), -1, target.shape[1])
    if how.propagate:
        target = target + how.propagate * _missing(target, moments, cross, how.damp)
    shaped = from_rows(target.reshape(-1, target.shape[2]).astype(np.float32), array.shape, item.axis)
    start = nearest(shaped, item.option.parameters, item.axis)
    return refine(target, moments, start, how)


def _shifted(
    program: Program, item: Work, rows: np.ndarray, array: np.ndarray, mean: np.ndarray
) -> list[float]:
    """The correction of the bias for the new codes: the mean output stays what it was meant to be."""
    factor, given = factors(item.option.parameters), item.option.parameters
    scaled = from_rows(to_rows(array, item.axis) * factor, array.shape, item.axis)
    old = nearest(scaled, given, item.axis).rows() / factor
    lost = (old - rows).reshape(len(mean), -1, mean.shape[1])
    node = next(n for n in program.graph if n.name == item.operator.name)
    alpha = node.attributes.get_float("alpha", 1.0) if item.operator.kind == "gemm" else 1.0
    moved = alpha * np.einsum("gnk,gk->gn", lost, mean).reshape(-1)
    return [float(np.float32(v)) for v in np.asarray(given["bias_shift"]) + moved]


def refine(target: np.ndarray, moments: np.ndarray, start: Coded, how: Rounding) -> Coded:
    """Other codes for ``[g, n, k]`` weights, as ``how`` says, on the grid of ``start``."""
    if how.method == "nearest":
        return start
    made = gptq(target, moments, start, damp=how.damp)
    if how.method == "gptq":
        return made
    ridge = how.damp * np.einsum("gkk->gk", moments).mean(axis=1)
    damped = moments + ridge[:, None, None] * np.eye(moments.shape[1])
    return descend(target, damped, made, sweeps=how.sweeps)


def round_alone(option: Option, operator: WeightedOperator, program: Program, moments: np.ndarray) -> Option:
    """One option with codes for inputs as the original makes them: what a search can measure beforehand.

    Args:
        option: With integer weights.
        operator: Its operator.
        program: Holds the weight.
        moments: Sum of x x' of what the operator reads, float64 ``[g, k, k]``.
    """
    how = Rounding(option.parameters["rounding"], propagate=0.0)
    array = constant_array(program.graph.initializers[operator.weight])
    assert array is not None
    axis = int(operator.kind != "conv" and operator.flipped)
    start = nearest(array, option.parameters, axis)
    rows = to_rows(array, axis).astype(np.float64)
    made = refine(rows.reshape(len(moments), -1, rows.shape[1]), moments, start, how)
    return replace(option, parameters={**option.parameters, "codes": payload(made)})


def _missing(target: np.ndarray, moments: np.ndarray, cross: np.ndarray, damp: float) -> np.ndarray:
    """``W (X0 - X) X' (X X' + damp)^-1``: the least-squares answer to inputs that are off."""
    ridge = damp * np.einsum("gkk->gk", moments).mean(axis=1)
    damped = moments + np.where(ridge > 0, ridge, 1.0)[:, None, None] * np.eye(moments.shape[1])
    lacking = target @ (cross - moments)
    found: np.ndarray = np.linalg.solve(damped, lacking.transpose(0, 2, 1)).transpose(0, 2, 1)
    return found
