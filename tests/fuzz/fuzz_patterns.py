"""Pieces that write what the folds and forms look for, in the ways exporters write it, and near misses."""

from __future__ import annotations

from typing import Any

import numpy as np
from fuzz_operators import (
    BIG,
    either,
    longs,
    matmul,
    pad,
    reduce,
    reshape,
    slice_,
    softmax,
    transpose,
    unsqueeze,
)
from graphs import FLOAT, Builder, Dim, Val


def _number(value: float, rank: int = 0) -> np.ndarray:
    return np.full((1,) * rank, value, np.float32)


def gelu(b: Builder) -> None:
    """Erf or tanh GELU; now and then with another number, which is none."""
    gelu_of(b, b.floats())


def gelu_of(b: Builder, x: Val) -> Val:
    wrong = b.chance(0.1)
    half = 0.4 if wrong else 0.5
    if b.opset >= 9 and b.chance(0.6):
        root = np.float32(2**0.5)
        scaled = (
            b.op("Div", [x, _number(root)], x.shape)
            if b.chance(0.6)
            else either(b, "Mul", x, _number(1 / root), x.shape, FLOAT)
        )
        inner = b.op("Erf", [scaled], x.shape)
    else:
        cube = b.op("Pow", [x, _number(3)], x.shape) if b.chance(0.5) else _cube(b, x)
        cubic = either(b, "Mul", cube, _number(0.044715), x.shape, FLOAT)
        total = either(b, "Add", x, cubic, x.shape, FLOAT)
        inner = b.op("Tanh", [either(b, "Mul", total, _number((2 / np.pi) ** 0.5), x.shape, FLOAT)], x.shape)
    plus = either(b, "Add", inner, _number(1), x.shape, FLOAT)
    order = b.rng.integers(3)
    if order == 0:
        return b.op("Mul", [b.op("Mul", [x, plus], x.shape), _number(half)], x.shape)
    if order == 1:
        return b.op("Mul", [b.op("Mul", [x, _number(half)], x.shape), plus], x.shape)
    return either(b, "Mul", x, b.op("Mul", [plus, _number(half)], x.shape), x.shape, FLOAT)


def _cube(b: Builder, x: Val) -> Val:
    return either(b, "Mul", b.op("Mul", [x, x], x.shape), x, x.shape, FLOAT)


def rms(b: Builder) -> None:
    rms_of(b, b.tokens())


def rms_of(b: Builder, x: Val) -> Val:
    square = b.op("Mul", [x, x], x.shape) if b.chance(0.5) else b.op("Pow", [x, _number(2)], x.shape)
    axis = -1 if b.chance(0.9) else -2
    mean = reduce(b, "ReduceMean", square, (axis,))
    shifted = either(b, "Add", mean, _number(1e-5), mean.shape, FLOAT)
    if b.chance(0.3):
        power = b.op("Pow", [shifted, _number(-0.5)], mean.shape)
        result = either(b, "Mul", x, power, x.shape, FLOAT)
    else:
        root = b.op("Sqrt", [shifted], mean.shape)
        if b.chance(0.5):
            result = b.op("Div", [x, root], x.shape)
        else:
            result = either(b, "Mul", x, b.op("Reciprocal", [root], mean.shape), x.shape, FLOAT)
    if isinstance(x.shape[-1], int) and b.chance(0.8):
        result = either(b, "Mul", result, b.weight(x.shape[-1]), x.shape, FLOAT)
    return result


def layer_norm(b: Builder) -> None:
    layer_norm_of(b, b.tokens())


def layer_norm_of(b: Builder, x: Val) -> Val:
    width = int(x.shape[-1])
    if b.opset >= 17 and b.chance(0.6):
        reads: list[Any] = [x, b.weight(width)]
        if b.chance(0.7):
            reads.append(b.weight(width))
        return b.op("LayerNormalization", reads, x.shape, axis=-1, epsilon=1e-5)
    centred = b.op("Sub", [x, reduce(b, "ReduceMean", x, (-1,))], x.shape)
    square = b.op("Pow", [centred, _number(2)], x.shape)
    variance = reduce(b, "ReduceMean", square, (-1,))
    root = b.op("Sqrt", [b.op("Add", [variance, _number(1e-5)], variance.shape)], variance.shape)
    scaled = b.op("Mul", [b.op("Div", [centred, root], x.shape), b.weight(width)], x.shape)
    return b.op("Add", [scaled, b.weight(width)], x.shape) if b.chance(0.7) else scaled


def norm_of(b: Builder, x: Val) -> Val:
    return layer_norm_of(b, x) if b.chance(0.6) else rms_of(b, x)


def linear_of(b: Builder, x: Val, width: int, *, bias: float = 0.6) -> Val:
    shape = (*x.shape[:-1], width)
    result = matmul(b, x, b.weight(int(x.shape[-1]), width), shape)
    return either(b, "Add", result, b.weight(width), shape, FLOAT) if b.chance(bias) else result


def activation_of(b: Builder, x: Val) -> Val:
    draw = b.rng.random()
    if draw < 0.4:
        return b.op("Relu", [x], x.shape, exact=x.exact)
    if draw < 0.75:
        return gelu_of(b, x)
    return either(b, "Mul", x, b.op("Sigmoid", [x], x.shape), x.shape, FLOAT)


def mlp_of(b: Builder, x: Val, *, normed: bool = False) -> Val:
    """From a stream and back to its width, normalized before or not."""
    width = int(x.shape[-1])
    h = norm_of(b, x) if not normed and b.chance(0.7) else x
    bias = 0.9 if normed else 0.6
    hidden = linear_of(b, h, 2 * width, bias=bias)
    if b.chance(0.3):
        gate = b.op("Sigmoid", [linear_of(b, h, 2 * width, bias=bias)], hidden.shape)
        return linear_of(b, either(b, "Mul", hidden, gate, hidden.shape, FLOAT), width, bias=bias)
    return linear_of(b, activation_of(b, hidden), width, bias=bias)


def residual_mlp(b: Builder) -> None:
    x = b.tokens()
    post = b.chance(0.3)  # as after the attention of a post-norm encoder
    x = layer_norm_of(b, x) if post else x
    result = either(b, "Add", x, mlp_of(b, x, normed=post), x.shape, FLOAT)
    if post or b.chance(0.3):
        layer_norm_of(b, result)


def parallel_branches(b: Builder) -> None:
    """``x + (f(x) + g(x))``, as parallel attention and MLP are written."""
    x = b.tokens()
    inner = either(b, "Add", mlp_of(b, x), mlp_of(b, x), x.shape, FLOAT)
    if b.chance(0.3):
        inner = either(b, "Add", inner, linear_of(b, x, int(x.shape[-1])), x.shape, FLOAT)
    if b.opset >= 8 and b.chance(0.3):
        b.op("Sum", [x, inner], x.shape)
    else:
        either(b, "Add", x, inner, x.shape, FLOAT)


# -- attention ----------------------------------------------------------------------------------------


def attention(b: Builder) -> None:
    """A residual multi-head attention with one of several masks, or a single head."""
    x = b.tokens()
    post = b.chance(0.3)
    x = layer_norm_of(b, x) if post else x
    h = norm_of(b, x) if not post and b.chance(0.6) else x
    body = _single_head(b, h) if b.chance(0.3) else _multi_head(b, h)
    either(b, "Add", x, body, x.shape, FLOAT)


def _single_head(b: Builder, h: Val) -> Val:
    width, length = int(h.shape[-1]), h.shape[1]
    inner = width if b.chance(0.7) else 2 * width
    q, k, v = (linear_of(b, h, inner, bias=0.15) for _ in range(3))
    turned = transpose(b, k, 0, 2, 1)
    scores = matmul(b, q, turned, (h.shape[0], length, length))
    if b.chance(0.6):
        scores = either(b, "Mul", scores, _number(inner**-0.5), scores.shape, FLOAT)
    mixed = matmul(b, softmax(b, scores), v, (*h.shape[:2], inner))
    return linear_of(b, mixed, width, bias=0.15)


def _multi_head(b: Builder, h: Val) -> Val:
    width = int(h.shape[-1])
    heads = 2 if width % 2 == 0 else 1
    size = width // heads
    groups = 1 if b.chance(0.25) else heads
    q, k = _heads(b, linear_of(b, h, width), heads), _heads(b, linear_of(b, h, groups * size), groups)
    v = _heads(b, linear_of(b, h, groups * size), groups)
    if size % 2 == 0 and isinstance(h.shape[1], int) and b.opset >= 10 and b.chance(0.4):
        q, k = rotary_of(b, q), rotary_of(b, k)
    if groups != heads:
        k, v = _repeat(b, k, heads), _repeat(b, v, heads)
    scores = _scores(b, q, k, size)
    mixed = matmul(b, softmax(b, scores), v, q.shape)
    joined = reshape(b, transpose(b, mixed, 0, 2, 1, 3), [0, 0, width], h.shape)
    return linear_of(b, joined, width)


def _heads(b: Builder, x: Val, heads: int) -> Val:
    n, s, width = x.shape
    size = int(width) // heads
    split = reshape(b, x, [0, 0, heads, size] if b.chance(0.7) else [0, 0, heads, -1], (n, s, heads, size))
    return transpose(b, split, 0, 2, 1, 3)


def _repeat(b: Builder, x: Val, heads: int) -> Val:
    """Grouped heads spread over all: Unsqueeze, Expand, Reshape; before opset 8 a Concat."""
    n, groups, s, size = x.shape
    shape = (n, heads, s, size)
    if b.opset < 8 or not isinstance(s, int) or b.chance(0.3):
        return b.op("Concat", [x] * heads, shape, exact=x.exact, axis=1)
    wide = unsqueeze(b, x, 2)
    times = heads // int(groups)
    spread = b.op("Expand", [wide, longs(1, 1, times, 1, 1)], (n, groups, times, s, size), exact=x.exact)
    return reshape(b, spread, [0, heads, s, int(size)], shape)


def _scores(b: Builder, q: Val, k: Val, size: int) -> Val:
    n, heads, s, _ = q.shape
    turned = transpose(b, k, 0, 1, 3, 2)
    shape = (n, heads, s, s)
    root = float(np.float32(size**-0.5))
    if b.chance(0.2):
        q = either(b, "Mul", q, _number(root**0.5), q.shape, FLOAT)
        turned = either(b, "Mul", turned, _number(root**0.5), turned.shape, FLOAT)
        scores = matmul(b, q, turned, shape)
    else:
        scores = matmul(b, q, turned, shape)
        if b.chance(0.5):
            scores = b.op("Div", [scores, _number(1 / root)], shape)
        else:
            scores = either(b, "Mul", scores, _number(root), shape, FLOAT)
    return _masked(b, scores)


def _masked(b: Builder, scores: Val) -> Val:
    s = scores.shape[-1]
    draw = b.rng.random()
    if draw < 0.35:
        return scores
    if isinstance(s, int) and draw < 0.8:
        low = b.one_of(np.float32(-1e9), np.finfo(np.float32).min, np.float32(-1e4))
        mask = np.triu(np.full((s, s), low, np.float32), 1)
        if b.chance(0.3):
            mask = np.where(b.rng.random((s, s)) < 0.3, low, 0).astype(np.float32)
        mask = mask.reshape((1,) * b.one_of(0, 1, 2) + mask.shape)
        return either(b, "Add", scores, mask, scores.shape, FLOAT)
    mask = b.pick(
        lambda v: v.dtype == FLOAT and v.shape == (scores.shape[0], 1, 1, s),
        lambda: b.input(FLOAT, (scores.shape[0], 1, 1, s)),
    )
    return either(b, "Add", scores, mask, scores.shape, FLOAT)


def rotary(b: Builder) -> None:
    heads = b.pick(
        lambda v: (
            v.dtype == FLOAT
            and v.rank == 4
            and isinstance(v.shape[2], int)
            and isinstance(v.shape[3], int)
            and v.shape[3] % 2 == 0
        ),
        lambda: b.input(FLOAT, ("N", 2, 5, 4)),
    )
    if b.opset >= 10:
        rotary_of(b, heads)


def rotary_of(b: Builder, x: Val) -> Val:
    """[n, h, s, d] with its even and odd, or first and second, elements rotated."""
    length, size = int(x.shape[2]), int(x.shape[3])
    angle = b.rng.uniform(0, 6, (length, size // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return _rotate_halves(b, x, cos, sin) if b.chance(0.5) else _rotate_pairs(b, x, cos, sin)


def _rotate_pairs(b: Builder, x: Val, cos: np.ndarray, sin: np.ndarray) -> Val:
    half = int(x.shape[3]) // 2
    even, odd = (slice_(b, x, 3, i, BIG, 2, half) for i in (0, 1))
    parts = _turned(b, even, odd, cos, sin)
    stacked = [unsqueeze(b, p, 4) for p in parts]
    joined = b.op("Concat", stacked, (*x.shape[:3], half, 2), axis=-1)
    _n, h, s, d = x.shape
    return reshape(b, joined, [0, int(h), int(s), int(d)], x.shape) if isinstance(h, int) else joined


def _rotate_halves(b: Builder, x: Val, cos: np.ndarray, sin: np.ndarray) -> Val:
    half = int(x.shape[3]) // 2
    first, second = slice_(b, x, 3, 0, half, 1, half), slice_(b, x, 3, half, BIG, 1, half)
    if b.chance(0.5):
        return b.op("Concat", list(_turned(b, first, second, cos, sin)), x.shape, axis=-1)
    turned = b.op("Concat", [b.op("Neg", [second], second.shape), first], x.shape, axis=-1)
    wide = [np.concatenate([a, a], -1) for a in (cos, sin)]
    straight = either(b, "Mul", x, wide[0], x.shape, FLOAT)
    return either(b, "Add", straight, either(b, "Mul", turned, wide[1], x.shape, FLOAT), x.shape, FLOAT)


def _turned(b: Builder, a: Val, c: Val, cos: np.ndarray, sin: np.ndarray) -> tuple[Val, Val]:
    def times(v: Val, table: np.ndarray) -> Val:
        return either(b, "Mul", v, table, v.shape, FLOAT)

    real = b.op("Sub", [times(a, cos), times(c, sin)], a.shape)
    return real, either(b, "Add", times(a, sin), times(c, cos), a.shape, FLOAT)


# -- convolutions -------------------------------------------------------------------------------------


def _out(size: Dim, kernel: int, stride: int, pads: int) -> int:
    return (int(size) + pads - kernel) // stride + 1


def conv_of(b: Builder, x: Val, channels: int, kernel: int, *, stride: int = 1, same: bool = True) -> Val:
    n, c, h, w = x.shape
    groups = int(c) if channels % int(c) == 0 and b.chance(0.2) else 1
    edge = kernel // 2 if same else 0
    weight = b.weight(channels, int(c) // groups, kernel, kernel)
    reads: list[Any] = [x, weight]
    if b.chance(0.6):
        reads.append(b.weight(channels))
    shape = (n, channels, _out(h, kernel, stride, 2 * edge), _out(w, kernel, stride, 2 * edge))
    return b.op(
        "Conv",
        reads,
        shape,
        kernel_shape=[kernel, kernel] if b.chance(0.7) else None,
        pads=[edge] * 4 if edge or b.chance(0.2) else None,
        strides=[stride, stride] if stride > 1 or b.chance(0.2) else None,
        group=groups if groups > 1 or b.chance(0.2) else None,
    )


def batch_norm_of(b: Builder, x: Val) -> Val:
    channels = int(x.shape[1])
    variance = (b.rng.random(channels) + 0.3).astype(np.float32)
    reads = [x, b.weight(channels), b.weight(channels), b.weight(channels), variance]
    return b.op("BatchNormalization", reads, x.shape, epsilon=1e-3 if b.chance(0.5) else None)


def conv(b: Builder) -> None:
    """Convolution with padding before, normalization or an affine behind, and a Relu."""
    x = b.image()
    kernel = b.one_of(1, 3)
    if kernel == 3 and b.chance(0.3):
        x = pad(b, x, [0, 0, 1, 1, 0, 0, 1, 1], b.one_of(0.0, 0.0, 0.5))
    if b.chance(0.2):
        x = batch_norm_of(b, x)
    y = conv_of(b, x, b.one_of(2, 4, int(x.shape[1])), kernel, stride=b.one_of(1, 1, 2), same=b.chance(0.7))
    draw = b.rng.random()
    if draw < 0.5:
        y = batch_norm_of(b, y)
    elif draw < 0.7:
        y = either(b, "Mul", y, b.weight(int(y.shape[1]), 1, 1), y.shape, FLOAT)
        y = either(b, "Add", y, b.weight(1, int(y.shape[1]), 1, 1), y.shape, FLOAT)
    if b.chance(0.5):
        b.op("Relu", [y], y.shape)


def conv_chain(b: Builder) -> None:
    """Two or three linear 1x1 convolutions in a row."""
    x = b.image()
    for _ in range(b.one_of(2, 3)):
        x = conv_of(b, x, b.one_of(2, 3, 4), 1)


def conv_transpose(b: Builder) -> None:
    x = b.image()
    n, c, h, w = x.shape
    groups = b.one_of(1, int(c))
    channels = 2 * groups
    weight = b.weight(int(c), channels // groups, 2, 2)
    reads: list[Any] = [x, weight, b.weight(channels)] if b.chance(0.5) else [x, weight]
    y = b.op("ConvTranspose", reads, (n, channels, int(h) + 1, int(w) + 1), group=groups)
    if b.chance(0.7):
        batch_norm_of(b, y)


def residual_conv(b: Builder) -> None:
    """A ResNet block; its shortcut is the identity, or subsampled with zero channels."""
    x = b.image()
    channels = int(x.shape[1])
    y = batch_norm_of(b, conv_of(b, x, channels, 3))
    y = conv_of(b, b.op("Relu", [y], y.shape), channels, 3)
    if b.chance(0.6):
        y = batch_norm_of(b, y)
    y = either(b, "Add", x, y, x.shape, FLOAT)
    b.op("Relu", [y], y.shape)


def parallel_convs(b: Builder) -> None:
    """Parallel linear branches: 3x3, 1x1 and identity, as re-parameterizable networks train them."""
    x = b.image()
    channels = int(x.shape[1])
    first = batch_norm_of(b, conv_of(b, x, channels, 3))
    second = conv_of(b, x, channels, 1)
    y = either(b, "Add", first, second, x.shape, FLOAT)
    if b.chance(0.5):
        y = either(b, "Add", y, batch_norm_of(b, x) if b.chance(0.5) else x, x.shape, FLOAT)
    b.op("Relu", [y], y.shape)


def option_a_shortcut(b: Builder) -> None:
    x = b.image()
    _n, _c, h, w = x.shape
    if b.opset < 10:
        return
    rows = slice_(b, x, 2, 0, BIG, 2, (int(h) + 1) // 2)
    both = slice_(b, rows, 3, 0, BIG, 2, (int(w) + 1) // 2)
    pad(b, both, [0, 1, 0, 0, 0, b.one_of(1, 2), 0, 0])


def batch_norm(b: Builder) -> None:
    x = b.pick(
        lambda v: v.dtype == FLOAT and v.rank in (2, 3, 4) and isinstance(v.shape[1], int),
        lambda: b.input(FLOAT, b.default_shape(4)),
    )
    batch_norm_of(b, x)


def gemm(b: Builder) -> None:
    """Gemm with every attribute, a bias of any broadcastable shape or none, BatchNormalization behind."""
    x = b.floats(2)
    width, channels = x.shape[1], b.one_of(3, 4, 6)
    if not isinstance(width, int):
        return
    turned = b.chance(0.4)
    weight = b.weight(channels, width) if turned else b.weight(width, channels)
    reads: list[Any] = [x, weight]
    if b.opset < 11 or b.chance(0.7):
        reads.append(b.one_of(b.weight(channels), b.weight(1, channels), b.weight(), b.weight(1)))
    y = b.op(
        "Gemm",
        reads,
        (x.shape[0], channels),
        transB=1 if turned else None,
        alpha=0.5 if b.chance(0.2) else None,
        beta=2.0 if b.chance(0.2) else None,
    )
    if b.chance(0.4):
        batch_norm_of(b, y)


def linear_chain(b: Builder) -> None:
    """MatMul after MatMul, scales and biases between: linear all through."""
    x = b.pick(
        lambda v: v.dtype == FLOAT and v.rank in (2, 3) and isinstance(v.shape[-1], int),
        lambda: b.input(FLOAT, b.default_shape(2)),
    )
    for _ in range(b.one_of(2, 3)):
        x = linear_of(b, x, b.one_of(3, 4, 6), bias=0.4)
        if b.chance(0.4):
            x = either(b, "Mul", x, b.one_of(b.weight(int(x.shape[-1])), _number(2)), x.shape, FLOAT)


def pool(b: Builder) -> None:
    x = b.image()
    n, c, _h, _w = x.shape
    draw = b.rng.random()
    if draw < 0.3:
        kind = b.one_of("GlobalAveragePool", "GlobalMaxPool")
        b.op(kind, [x], (n, c, 1, 1), exact=x.exact and kind == "GlobalMaxPool")
        return
    kind = b.one_of("MaxPool", "AveragePool")
    x = pad(b, x, [0, 0, 1, 1, 0, 0, 1, 1]) if b.chance(0.3) else x
    shape = (n, c, _out(x.shape[2], 2, 2, 0), _out(x.shape[3], 2, 2, 0))
    b.op(kind, [x], shape, exact=x.exact and kind == "MaxPool", kernel_shape=[2, 2], strides=[2, 2])
