"""Round the weights of a plan's operators against calibration data, in order of execution.

Each operator is rounded for what it will really read: the outputs of operators that are rounded already. The
codes go into the options' parameters, so a plan repeats them without data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from lamina.analysis.instrument import feeds_of, fixed_batch
from lamina.analysis.matching import in_batches, places_of
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.operators import WeightedOperator, patches, weighted_operators
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.names import reads
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.coded import Coded, coded, form_name, from_rows, nearest, payload, to_rows
from lamina.passes.quantize.gptq import DAMP, descend, gptq
from lamina.passes.quantize.graph import constant_array
from lamina.passes.quantize.smoothing import factors

METHODS = ("nearest", "gptq", "descent")
Chosen = Sequence[tuple[Site, Option]]


@dataclass(frozen=True)
class Rounding:
    """How weights are rounded.

    Attributes:
        method: ``nearest``; ``gptq``; or ``descent``: gptq, then coordinate descent on codes and scales.
        propagate: Share, 0 to 1, of the error that earlier operators made which a later one makes up for
            (qep, arXiv:2504.09629); 0 rounds for the values each operator should have read.
        rows: Samples to look at.
        vectors: Input vectors of an operator that enter its second moments, at least four times its width.
        sweeps: Most passes of the descent.
        damp: Added to the diagonal of the second moments, of its mean.
        weights: Extra or input ``[n, t]`` of the data that weighs tokens: row x counts ``r^2 x x'`` (rsq:
            :func:`lamina.passes.quantize.token_weights.attention_received`); None: all alike, padding none.
    """

    method: str = "descent"
    propagate: float = 0.5
    rows: int = 256
    vectors: int = 4096
    sweeps: int = 3
    damp: float = DAMP
    weights: str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise PassError(f"rounding '{self.method}' is unknown", advice=f"choose one of {METHODS}")
        if not 0 <= self.propagate <= 1:
            raise PassError(f"propagate={self.propagate} is no share", advice="give 0 to 1")


@dataclass
class _Seen:
    """What operators read: sums of ``x x'`` and ``x0 x'``, float64 ``[g, k, k]``, and of x, ``[g, k]``.

    x is what is read, x0 what should be.
    """

    square: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    count: int = 0

    @property
    def mean(self) -> np.ndarray:
        """Mean of x, ``[g, k]``."""
        return self.total / max(1, self.count)


@dataclass(frozen=True)
class _Work:
    """One operator to round: where it stands and on which grid."""

    site: Site
    option: Option
    operator: WeightedOperator

    @property
    def axis(self) -> int:
        """The weight's axis that numbers output channels."""
        return int(self.operator.kind != "conv" and self.operator.flipped)


def round_options(
    program: Program,
    chosen: Chosen,
    data: Dataset,
    how: Rounding | None = None,
    *,
    threads: int | None = None,
    seconds: float = math.inf,
    progress: Callable[[int, int], None] | None = None,
) -> list[Option]:
    """The options with codes that answer for what the operators read; others as they are.

    Rounded are Conv, Gemm and MatMul of every form whose weights become integers; tables are rounded to the
    nearest, which for a table is best. A weight that several operators share is rounded once, for the first.

    Args:
        program: What the sites belong to; left unchanged.
        chosen: Sites of ``program`` and the option each takes.
        data: Calibration samples.
        how: Default: :class:`Rounding`.
        threads: Threads of a run.
        seconds: When they are over, what is left keeps its nearest codes.
        progress: Called with operators done and in all.

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
    known: dict[tuple[str, str, str], Coded] = {}
    settled: dict[str, None] = {}
    done, start = 0, time.perf_counter()
    for wave in _waves(program, work):
        if time.perf_counter() - start > seconds:
            break
        settled.update((w.operator.activation, None) for w in wave)
        sums = _moments(wave, current, program, streams, list(settled), batches, how)
        weights = {}
        for item in wave:
            given = item.option.parameters
            key = item.operator.weight, form_name(given, item.axis), str(given.get("smooth"))
            array = constant_array(program.graph.initializers[item.operator.weight])
            assert array is not None
            seen = sums[_reads(item.operator)]
            if key not in known:
                known[key] = _rounded(array, item, seen, how)
            rows = known[key].rows() / factors(given)
            operand = 1 if item.operator.kind != "matmul" else 1 - item.operator.side
            weights[item.operator.name, operand] = from_rows(rows, array.shape, item.axis)
            parameters = {**given, "rounding": how.method, "codes": payload(known[key])}
            if "bias_shift" in given:
                parameters["bias_shift"] = _shifted(program, item, rows, array, seen.mean)
            made[item.site.name] = replace(item.option, parameters=parameters)
        current = substitute(current, weights)
        done += len(wave)
        if progress is not None:
            progress(done, len(work))
    return [made[site.name] for site, _ in chosen]


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


def _work(program: Program, chosen: Chosen, feeds: Mapping[str, np.ndarray]) -> list[_Work]:
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
            found.append(_Work(site, option, operator))
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


def _waves(program: Program, work: Sequence[_Work]) -> Iterator[list[_Work]]:
    """Operators in execution order, in runs of which none depends on another."""
    by_node = {w.operator.name: w for w in work}
    level: dict[ir.Value, int] = {}
    waves: dict[int, list[_Work]] = {}
    for node in program.graph:
        depth = max((level.get(v, 0) for v in reads(node)), default=0)
        if (item := by_node.get(node.name or "")) is not None:
            waves.setdefault(depth, []).append(item)
            depth += 1
        level.update(dict.fromkeys(node.outputs, depth))
    for depth in sorted(waves):
        yield waves[depth]


def _reads(operator: WeightedOperator) -> tuple[object, ...]:
    """What operators with the same input vectors share."""
    window = operator.kernel, operator.strides, operator.pads, operator.dilations
    return operator.activation, operator.kind == "conv", operator.side, operator.group, window


def _moments(
    wave: Sequence[_Work],
    current: Program,
    original: Program,
    streams: tuple[Stream, Stream],
    settled: Sequence[str],
    batches: Sequence[Dataset],
    how: Rounding,
) -> dict[tuple[object, ...], _Seen]:
    """Sums over the data for the operators of one wave."""
    kinds = {_reads(w.operator): w for w in wave}
    wanted = list(dict.fromkeys(w.operator.activation for w in wave))
    sums: dict[tuple[object, ...], _Seen] = {}
    pairs = zip(
        batches,
        streams[0].run(original, wanted, settled),
        streams[1].run(current, wanted, settled),
        strict=True,
    )
    total = sum(map(len, batches))
    for batch, should, real in pairs:
        for key, item in kinds.items():
            name = item.operator.activation
            width = to_rows(_array(original, item), item.axis).shape[1]
            count = max(1, max(how.vectors, 4 * width) * len(batch) // total)
            x, x0 = (_vectors(v[name], item.operator, batch, count, how) for v in (real, should))
            if key not in sums:
                group, wide = x.shape[1:]
                empty = np.zeros((group, wide, wide))
                sums[key] = _Seen(empty, empty.copy(), np.zeros((group, wide)))
            seen = sums[key]
            # [g, k, n] @ [g, n, k]
            seen.square += x.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
            seen.cross += x0.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
            seen.total += x.sum(axis=0, dtype=np.float64)
            seen.count += len(x)
    return sums


def _array(program: Program, item: _Work) -> np.ndarray:
    array = constant_array(program.graph.initializers[item.operator.weight])
    assert array is not None
    return array


def _vectors(
    array: np.ndarray, operator: WeightedOperator, batch: Dataset, count: int, how: Rounding
) -> np.ndarray:
    """float32 ``[n, g, k]``: at most ``count`` evenly spaced rows that the operator multiplies."""
    if operator.kind == "conv":
        return patches(array, operator, count)
    moved = np.moveaxis(array, -2, -1) if operator.side else array
    rows = moved.reshape(-1, moved.shape[-1])
    mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
    places = places_of(moved.shape, mask, len(rows), count)
    taken = rows[places]
    if how.weights is not None:
        weights = batch.inputs.get(how.weights, batch.extras.get(how.weights))
        if weights is not None and moved.shape[: weights.ndim] == weights.shape and moved.ndim > weights.ndim:
            each = np.repeat(weights.reshape(-1), len(rows) // weights.size)
            taken = taken * each[places, None]
    return np.asarray(taken[:, None, :], np.float32)


def _rounded(array: np.ndarray, item: _Work, seen: _Seen, how: Rounding) -> Coded:
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
    program: Program, item: _Work, rows: np.ndarray, array: np.ndarray, mean: np.ndarray
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
