"""Smoothing: outlier channels of an activation are scaled down, and the weights that read them scaled up.

``(x / s) (diag(s) W) = x W``: exact until either is rounded. Scales are powers of two, so that dividing,
multiplying and folding them into a producer are exact in floating point, and a plan carries small integers.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx_ir as ir

from lamina.analysis.inputs import InputStatistics
from lamina.analysis.operators import evenly
from lamina.analysis.ranges import choose_range
from lamina.analysis.streaming import RangeAccumulator
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.quantize.activations import value_named
from lamina.passes.quantize.graph import FLOAT, constant_tensor, is_op, shared
from lamina.passes.quantize.linear import Linear, read_linear
from lamina.passes.quantize.weights import quantize_channels

Rule = float | str
# Rules tried: SmoothQuant's alpha, and fptq's logarithmic equalization.
RULES: tuple[Rule, ...] = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, "log")
# The squared error has to fall below this share: a multiplication more must pay, and errors of one operator
# that fell by less made the whole of stories260k no better (docs/precision.md).
_WORTH = 0.5
# How many rules are judged with the range as it will be.
_FINALISTS = 2
# Scales span at most 2^12 to each side of their geometric mean.
_LARGEST = 12

# Columns of a weight that a rule is judged on, evenly spaced: each is quantized by itself.
_JUDGED = 512

_Known = dict[tuple[Any, ...], tuple[weakref.ref[InputStatistics], "Smoothing | None"]]
_CHOSEN: WeakKeyDictionary[ir.Model, _Known] = WeakKeyDictionary()
_SCALED: WeakKeyDictionary[ir.TensorProtocol, dict[str, ir.Value]] = WeakKeyDictionary()


def check_rules(rules: Sequence[Rule]) -> None:
    """Raise unless every rule is known.

    Raises:
        PassError: One is not.
    """
    for rule in rules:
        if rule != "log" and not (isinstance(rule, float) and 0.0 <= rule <= 1.0):
            raise PassError(
                f"smoothing rule {rule!r} is unknown", advice="give alphas from 0.0 to 1.0 or 'log'"
            )


@dataclass(frozen=True)
class Smoothing:
    """Scales for one activation, chosen for all operators that read it.

    Attributes:
        exponents: ``[K]``: the activation's channel j is divided by ``2^exponents[j]``.
        rule: The alpha, or ``log``.
        scale: Of the smoothed activation in uint8.
        zero_point: Likewise.
        error: Squared output error against that without smoothing, on calibration vectors.
    """

    exponents: tuple[int, ...]
    rule: Rule
    scale: float
    zero_point: int
    error: float

    def parameters(self) -> dict[str, Any]:
        """What a plan keeps."""
        return {"exponents": list(self.exponents), "rule": str(self.rule)}


def scales(rule: Rule, inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Exponents by a rule, int64 ``[K]``, about a geometric mean of 1.

    ``alpha``: ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (arXiv:2211.10438, eq. 4). ``log``:
    ``s_j = max|X_j| / log2(2 + max|X_j|)`` (arXiv:2308.15987, eq. 5).

    Args:
        rule: Which.
        inputs: ``[K]``: largest magnitude of each channel of the activation.
        weights: ``[K]``: largest magnitude of the weights that read it.
    """
    counted = (inputs > 0) & (weights > 0)
    x, w = np.where(counted, inputs, 1.0), np.where(counted, weights, 1.0)
    if isinstance(rule, str):
        exact = np.log2(x / np.log2(2 + x))
    else:
        exact = rule * np.log2(x) - (1 - rule) * np.log2(w)
    middle = exact[counted].mean() if counted.any() else 0.0
    moved = np.clip(np.rint(exact - middle), -_LARGEST, _LARGEST)
    return np.where(counted, moved, 0.0).astype(np.int64)


def choose_smoothing(
    program: Program,
    name: str,
    statistics: Any,
    *,
    rules: Sequence[Rule],
    bits: int,
    ranges: str | None,
) -> Smoothing | None:
    """The scales of activation ``name`` with the least error of what its readers give, or None for none.

    All linear operators that read the activation share it in 8 bits, so they share the scales. Each rule is
    judged on calibration vectors: activation and weights quantized, the sum over the readers of the squared
    error of their outputs, each relative to its own size.

    Args:
        program: The original.
        name: The activation.
        statistics: Its ``inputs`` holds calibration vectors by operator name.
        rules: What to choose from.
        bits: Of the weights.
        ranges: Method of the static range; None: the range of what is there at run time.
    """
    seen = getattr(statistics, "inputs", None) or {}
    readers = list(_readers(value_named(program, name)))
    stat = next((seen[n.name or ""] for n, _ in readers if n.name in seen), None)
    if stat is None or stat.kept.shape[1] != 1 or not len(stat.kept):
        return None
    known, key = _CHOSEN.setdefault(program.model, {}), (name, tuple(rules), bits, ranges)
    # vectors are a part of the data: all of it reaches this much further
    whole, looked = statistics.ranges.get(name), max(-stat.minimum, stat.maximum)
    beyond = 1.0 if whole is None or not looked else max(1.0, max(-whole.minimum, whole.maximum) / looked)
    if key not in known or known[key][0]() is not stat:
        known[key] = weakref.ref(stat), _choose([r for _, r in readers], stat, rules, bits, ranges, beyond)
    return known[key][1]


def _choose(
    readers: Sequence[Linear],
    stat: InputStatistics,
    rules: Sequence[Rule],
    bits: int,
    ranges: str | None,
    beyond: float,
) -> Smoothing | None:
    x, peaks = stat.kept[:, 0], np.maximum(-stat.lows[0], stat.highs[0])
    whole = [product.columns() for product in readers]
    weights = np.max([np.abs(w).max(axis=1) for w in whole], axis=0)
    columns = [w[:, evenly(_JUDGED, w.shape[1])].astype(np.float32) for w in whole]
    wanted = [x @ w for w in columns]
    extremes = (np.stack([stat.lows[0], stat.highs[0]]) * beyond).astype(np.float32)

    def judge(exponents: np.ndarray, method: str | None) -> tuple[float, float, int]:
        factor = np.exp2(exponents).astype(np.float32)
        scale, zero = _range(x / factor, extremes / factor, method)
        codes = np.clip(np.rint(x / (factor * np.float32(scale))) + zero, 0, 255) - zero
        error = 0.0
        for w, y in zip(columns, wanted, strict=True):
            made = quantize_channels(w * factor[:, None], 1, bits=bits, clipping="minmax")
            got = (codes.astype(np.float32) * np.float32(scale)) @ (made.codes * made.scale)
            error += float(np.square(got - y).sum() / max(float(np.square(y).sum()), 1e-30))
        return error, scale, zero

    # The whole range says which rules are worth a search of the range, which costs more than all else here.
    found = {rule: scales(rule, peaks, weights) for rule in rules}
    ranked = sorted((r for r in found if found[r].any()), key=lambda r: judge(found[r], None)[0])
    plain = judge(np.zeros(len(peaks), np.int64), ranges)[0]
    best: Smoothing | None = None
    for rule in ranked[:_FINALISTS]:
        error, scale, zero = judge(found[rule], ranges)
        share = error / max(plain, 1e-30)
        if share < (_WORTH if best is None else best.error):
            best = Smoothing(tuple(int(e) for e in found[rule]), rule, scale, zero, share)
    return best


def _range(x: np.ndarray, extremes: np.ndarray, method: str | None) -> tuple[float, int]:
    """Scale and zero point for vectors, of which ``extremes`` bounds the channels over more of the data."""
    total = RangeAccumulator()
    total.add(x)
    if method is not None:
        total.add(extremes)
    return choose_range(total.result(), method or "minmax")


def _readers(value: ir.Value | None) -> Iterator[tuple[ir.Node, Linear]]:
    """Linear operators with the weight on the right that read ``value``."""
    for node in () if value is None else dict.fromkeys(u.node for u in value.uses()):
        if not is_op(node, "MatMul", "Gemm") or node.inputs[0] is not value:
            continue
        product = read_linear(node)
        if isinstance(product, Linear) and not product.left:
            tensor = constant_tensor(product.weight)
            if tensor is not None and len(tensor.shape) == 2 and tensor.dtype == FLOAT:
                yield node, product


def factors(parameters: Mapping[str, Any]) -> np.ndarray:
    """What the option divides the activation's channels by, float32 ``[K]``; one 1 where it does not."""
    given = parameters.get("smooth")
    exponents = np.zeros(1) if given is None else np.asarray(given["exponents"], np.float64)
    return np.exp2(exponents).astype(np.float32)


def smoothed(product: Linear, parameters: Mapping[str, Any], rewriter: Rewriter) -> Linear:
    """The product on the scaled activation and with the scaled weight, as the option says."""
    if "smooth" not in parameters:
        return product
    factor = factors(parameters)
    form = _form(factor)
    constant = shared(rewriter, product.activation, f"{form}.factor", np.float32(1.0) / factor)
    name = f"{product.activation.name}.{form}"
    x = rewriter.op("Mul", [product.activation, constant], name=name, dtype=FLOAT)
    x.shape = product.activation.shape
    return replace(product, activation=x, weight=smoothed_weight(product, parameters))


def smoothed_weight(product: Linear, parameters: Mapping[str, Any]) -> ir.Value:
    """The weight times its scales, as a constant that belongs to no graph yet; one a process."""
    if "smooth" not in parameters:
        return product.weight
    factor, tensor = factors(parameters), constant_tensor(product.weight)
    assert tensor is not None
    form = f"{_form(factor)}.axis{1 - product.channel_axis}"
    known = _SCALED.setdefault(tensor, {})
    if form not in known:
        array = tensor.numpy() * (factor if product.channel_axis == 0 else factor[:, None])
        name = f"{product.weight.name}.{form}"
        known[form] = ir.Value(name=name, const_value=ir.Tensor(array, name=name))
    return known[form]


def _form(factor: np.ndarray) -> str:
    return f"smooth.{zlib.crc32(factor.tobytes()):08x}"
