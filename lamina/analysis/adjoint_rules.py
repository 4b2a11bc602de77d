"""Derivatives of element-wise operators, normalizations, and of operators that move or sum elements."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lamina.analysis.adjoint_tape import Call, Rule, narrowed
from lamina.errors import UnsupportedOperator

Parts = Sequence[np.ndarray | None]


def _unary(slope: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Rule:
    """A rule from the derivative as a function of input x and output y."""
    return lambda call: [call.grad * slope(call.read(0), call.made)]


def _two(*parts: Callable[[Call], np.ndarray]) -> Rule:
    """A rule for two broadcast inputs, each part computed where it is asked for."""

    def rule(call: Call) -> Parts:
        return [
            narrowed(part(call), call.read(i).shape) if call.wants[i] else None
            for i, part in enumerate(parts)
        ]

    return rule


def _sum(call: Call) -> Parts:
    wanted = enumerate(call.wants)
    return [narrowed(call.grad, call.read(i).shape) if wants else None for i, wants in wanted]


def _power(call: Call) -> Parts:
    base, power = call.read(0).astype(np.float32), call.read(1).astype(np.float32)
    return [narrowed(call.grad * power * base ** (power - 1), base.shape)]


def _clip(call: Call) -> Parts:
    x = call.read(0)
    low, high = call.given(1), call.given(2)
    least = call.node.attributes.get_float("min", -math.inf) if low is None else low  # before opset 11
    most = call.node.attributes.get_float("max", math.inf) if high is None else high
    return [call.grad * ((x >= least) & (x <= most))]


def _leaky(call: Call) -> Parts:
    slope = call.node.attributes.get_float("alpha", 0.01)
    return [call.grad * np.where(call.read(0) > 0, np.float32(1), np.float32(slope))]


def _hard_sigmoid(call: Call) -> Parts:
    slope = call.node.attributes.get_float("alpha", 0.2)
    return [call.grad * np.float32(slope) * ((call.made > 0) & (call.made < 1))]


def _hard_swish(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.where(x <= -3, np.float32(0), np.where(x >= 3, np.float32(1), x / 3 + np.float32(0.5)))


def _gelu(call: Call) -> Parts:
    x = call.read(0)
    if call.node.attributes.get_string("approximate", "none") == "tanh":
        root = math.sqrt(2 / math.pi)
        inner = np.tanh(root * (x + 0.044715 * x**3))
        slope = 0.5 * (1 + inner) + 0.5 * x * (1 - inner**2) * root * (1 + 3 * 0.044715 * x**2)
    else:
        # the output over the input is the normal distribution's share below it
        slope = np.divide(call.made, x, out=np.full_like(x, 0.5), where=x != 0)
        slope += x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return [(call.grad * slope).astype(np.float32)]


def _class_axes(call: Call) -> tuple[int, ...]:
    """What a Softmax sums over: before opset 13 its axis and all behind it."""
    rank = call.grad.ndim
    axis = call.node.attributes.get_int("axis", -1 if call.opset >= 13 else 1) % rank
    return (axis,) if call.opset >= 13 else tuple(range(axis, rank))


def _softmax(call: Call) -> Parts:
    axes = _class_axes(call)
    if axes == (call.grad.ndim - 1,):  # attention: the largest arrays there are, so none is made in vain
        mean = np.einsum("...i,...i->...", call.grad, call.made)[..., None]
    else:
        mean = (call.grad * call.made).sum(axis=axes, keepdims=True)
    slope = call.grad - mean
    slope *= call.made
    return [slope]


def _log_softmax(call: Call) -> Parts:
    return [call.grad - np.exp(call.made) * call.grad.sum(axis=_class_axes(call), keepdims=True)]


def _layer_norm(call: Call) -> Parts:
    x, gain = call.read(0), call.read(1)
    axis = call.node.attributes.get_int("axis", -1) % x.ndim
    axes = tuple(range(axis, x.ndim))
    centred = x - x.mean(axis=axes, keepdims=True)
    spread = np.sqrt(
        np.square(centred).mean(axis=axes, keepdims=True)
        + np.float32(call.node.attributes.get_float("epsilon", 1e-5))
    )
    unit, inner = centred / spread, call.grad * gain
    mean = inner.mean(axis=axes, keepdims=True)
    part = (inner - mean - unit * (inner * unit).mean(axis=axes, keepdims=True)) / spread
    shift = call.given(2)
    offset = None if shift is None else narrowed(call.grad, shift.shape)
    return [part, narrowed(call.grad * unit, gain.shape), offset]


def _batch_norm(call: Call) -> Parts:
    gain, variance = call.read(1), call.read(4)
    factor = gain / np.sqrt(variance + np.float32(call.node.attributes.get_float("epsilon", 1e-5)))
    return [call.grad * factor.reshape(-1, *(1,) * (call.read(0).ndim - 2))]


def _reduce(call: Call) -> Parts:
    x, given = call.read(0), call.given(1)
    axes = call.node.attributes.get_ints("axes") if given is None else given.reshape(-1).tolist()
    idle: int = call.node.attributes.get_int("noop_with_empty_axes", 0)
    if not axes and idle:
        return [call.grad]
    places = sorted(a % x.ndim for a in axes) if axes else range(x.ndim)
    kept = [1 if i in places else n for i, n in enumerate(x.shape)]
    count = math.prod(x.shape[i] for i in places) if call.node.op_type == "ReduceMean" else 1
    return [np.broadcast_to(call.grad.reshape(kept) / np.float32(count), x.shape)]


def _pool_all(call: Call) -> Parts:
    x = call.read(0)
    return [np.broadcast_to(call.grad / np.float32(math.prod(x.shape[2:])), x.shape)]


def _reshape(call: Call) -> Parts:
    return [call.grad.reshape(call.read(0).shape)]


def _transpose(call: Call) -> Parts:
    order = call.node.attributes.get_ints("perm") or range(call.grad.ndim)[::-1]
    return [call.grad.transpose(np.argsort(order))]


def _expand(call: Call) -> Parts:
    return [narrowed(call.grad, call.read(0).shape)]


def _concat(call: Call) -> Parts:
    axis = call.node.attributes.get_int("axis", 0)
    ends = np.cumsum([call.read(i).shape[axis] for i in range(len(call.inputs))])
    return np.split(call.grad, ends[:-1], axis=axis)


def _split(call: Call) -> Parts:
    axis, x = call.node.attributes.get_int("axis", 0), call.read(0)
    sizes, given = call.node.attributes.get_ints("split"), call.given(1)
    if given is not None:
        sizes = given.tolist()
    if sizes is None:
        size = -(-x.shape[axis] // len(call.grads))
        sizes = [min(size, x.shape[axis] - size * i) for i in range(len(call.grads))]
    parts = []
    for size, grad in zip(sizes, call.grads, strict=True):
        shape = [size if i == axis % x.ndim else n for i, n in enumerate(x.shape)]
        parts.append(np.zeros(shape, np.float32) if grad is None else grad)
    return [np.concatenate(parts, axis=axis)]


def _slice(call: Call) -> Parts:
    x, node = call.read(0), call.node
    given = [call.given(i) for i in range(1, 5)]
    starts, ends, axes = (
        [int(v) for v in (a if a is not None else node.attributes.get_ints(n) or ())]
        for a, n in zip(given[:3], ("starts", "ends", "axes"), strict=True)
    )
    axes = axes or list(range(len(starts)))
    steps = [1] * len(starts) if given[3] is None else [int(v) for v in given[3]]
    place = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        # a negative end that is still negative counted from the end of the axis is before its first element
        stop: int | None = end + size if end < 0 else end
        place[axis] = slice(start, None if step < 0 and stop is not None and stop < 0 else stop, step)
    whole = np.zeros(x.shape, np.float32)
    whole[tuple(place)] = call.grad
    return [whole]


def _gather(call: Call) -> Parts:
    x, index = call.read(0), call.read(1)
    axis = call.node.attributes.get_int("axis", 0) % x.ndim
    whole = np.zeros(x.shape, np.float32)
    lead = np.moveaxis(call.grad, tuple(range(axis, axis + index.ndim)), tuple(range(index.ndim)))
    np.add.at(np.moveaxis(whole, axis, 0), index, lead)
    return [whole]


def _pad(call: Call) -> Parts:
    x, given, axes = call.read(0), call.given(1), call.given(3)
    if call.node.attributes.get_string("mode", "constant") != "constant":
        raise UnsupportedOperator(
            "Pad has a derivative here in mode 'constant' alone", where=f"node '{call.node.name}'"
        )
    pads = [int(v) for v in (given if given is not None else call.node.attributes.get_ints("pads") or ())]
    places = list(range(x.ndim)) if axes is None else [int(a) % x.ndim for a in axes]
    kept = [slice(None)] * x.ndim
    for axis, before in zip(places, pads[: len(places)], strict=True):
        kept[axis] = slice(before, before + x.shape[axis])
    return [call.grad[tuple(kept)]]


def _where(call: Call) -> Parts:
    choice = call.read(0)
    parts: list[np.ndarray | None] = [None]
    for i, taken in ((1, choice), (2, ~choice)):
        wanted = call.wants[i]
        parts.append(narrowed(np.where(taken, call.grad, 0), call.read(i).shape) if wanted else None)
    return parts


POINTWISE: Mapping[str, Rule] = {
    "Add": _sum,
    "Sum": _sum,
    "Sub": _two(lambda c: c.grad, lambda c: -c.grad),
    "Mul": _two(lambda c: c.grad * c.read(1), lambda c: c.grad * c.read(0)),
    "Div": _two(lambda c: c.grad / c.read(1), lambda c: -c.grad * c.made / c.read(1)),
    "Pow": _power,
    "Neg": _unary(lambda x, y: -np.ones_like(x)),
    "Sqrt": _unary(lambda x, y: 0.5 / np.maximum(y, np.float32(1e-20))),
    "Reciprocal": _unary(lambda x, y: -y * y),
    "Exp": _unary(lambda x, y: y),
    "Log": _unary(lambda x, y: 1 / x),
    "Abs": _unary(lambda x, y: np.sign(x)),
    "Relu": _unary(lambda x, y: (x > 0).astype(np.float32)),
    "Sigmoid": _unary(lambda x, y: y * (1 - y)),
    "Tanh": _unary(lambda x, y: 1 - y * y),
    "Erf": _unary(lambda x, y: np.float32(2 / math.sqrt(math.pi)) * np.exp(-x * x)),
    "Softplus": _unary(lambda x, y: 1 - np.exp(-y)),
    "HardSwish": _unary(_hard_swish),
    "HardSigmoid": _hard_sigmoid,
    "LeakyRelu": _leaky,
    "Clip": _clip,
    "Gelu": _gelu,
    "Softmax": _softmax,
    "LogSoftmax": _log_softmax,
    "LayerNormalization": _layer_norm,
    "BatchNormalization": _batch_norm,
}
SHAPES: Mapping[str, Rule] = {
    "Cast": lambda c: [c.grad],
    "CastLike": lambda c: [c.grad, None],
    "Dropout": lambda c: [c.grad],
    "Identity": lambda c: [c.grad],
    "Reshape": _reshape,
    "Flatten": _reshape,
    "Squeeze": _reshape,
    "Unsqueeze": _reshape,
    "Transpose": _transpose,
    "Expand": _expand,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
    "Where": _where,
    "ReduceMean": _reduce,
    "ReduceSum": _reduce,
    "GlobalAveragePool": _pool_all,
}
