"""The table of pieces, and those that write plain operators, odd types, shape arithmetic and subgraphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import fuzz_layouts as layouts
import fuzz_patterns as patterns
import fuzz_subgraphs as subgraphs
import numpy as np
from fuzz_operators import (
    BIG,
    clip,
    dropout,
    either,
    longs,
    reduce,
    reshape,
    slice_,
    softmax,
    split,
    squeeze,
    transpose,
    unsqueeze,
)
from graphs import BOOL, BYTE, DOUBLE, FLOAT, HALF, INT, LONG, Builder, Val, tensor_type

EXACT_UNARY = ("Relu", "Neg", "Abs", "Identity")
ROUNDED_UNARY = ("Sigmoid", "Tanh", "LeakyRelu", "Elu", "Softplus", "HardSigmoid", "Softsign")


def unary(b: Builder) -> None:
    x = b.floats()
    name = b.one_of(*EXACT_UNARY, *ROUNDED_UNARY)
    b.op(name, [x], x.shape, exact=x.exact and name in EXACT_UNARY)


def binary(b: Builder) -> None:
    """Two activations of one shape, or one with a constant that broadcasts."""
    x = b.floats()
    name = b.one_of("Add", "Sub", "Mul", "Add", "Mul")
    same = [v for v in b.values if v.dtype == x.dtype and v.shape == x.shape]
    if b.chance(0.6):
        b.op(name, [x, b.one_of(*same)], x.shape)
        return
    shape = tuple(d if isinstance(d, int) and b.chance(0.6) else 1 for d in x.shape)
    shape = shape[int(b.rng.integers(x.rank + 1)) :]
    reads = [x, b.weight(*shape)]
    b.op(name, reads if b.chance(0.5) else reads[::-1], x.shape)


def neutral(b: Builder) -> None:
    """x + 0, x * 1, x - 0, x / 1, also with a constant whose rank is higher."""
    x = b.floats()
    name, value = b.one_of(("Add", 0.0), ("Sub", 0.0), ("Mul", 1.0), ("Div", 1.0))
    rank = b.one_of(0, 1, x.rank, x.rank + 1)
    shape = (1,) * (rank - x.rank) + x.shape if rank > x.rank else x.shape
    b.op(name, [x, np.full((1,) * rank, value, np.float32)], shape, exact=x.exact)


def scale_chain(b: Builder) -> None:
    x = b.floats()
    for _ in range(b.one_of(2, 3)):
        value = b.one_of(2.0, 0.5, 3.0, -1.5)
        x = either(b, b.one_of("Mul", "Add"), x, np.array(value, np.float32), x.shape, FLOAT)


def relus(b: Builder) -> None:
    """Relu behind what cannot be negative."""
    x = b.floats()
    first = b.one_of("Relu", "Sigmoid", "Abs", "Neg")
    x = b.op(first, [x], x.shape, exact=x.exact and first != "Sigmoid")
    if b.chance(0.4):
        x = clip(b, x, b.one_of(0.0, -1.0, None), b.one_of(None, 6.0))
    if b.chance(0.3):
        x = either(b, "Add", x, b.op("Relu", [x], x.shape, exact=x.exact), x.shape, FLOAT)
    b.op("Relu", [x], x.shape, exact=x.exact)


def clips(b: Builder) -> None:
    x = b.floats()
    for _ in range(2):
        low = b.one_of(None, -1.0, 0.0, 2.0)
        x = clip(b, x, low, b.one_of(6.0, 3.0, None) if low != 2.0 else 3.0)


def identities(b: Builder) -> None:
    """Nothing at all, in several operators."""
    x = b.floats()
    for _ in range(b.one_of(1, 2, 3)):
        kind = b.one_of("Identity", "dropout", "cast", "transpose", "reshape")
        if kind == "dropout":
            x = dropout(b, x)
        elif kind == "cast":
            x = b.op("Cast", [x], x.shape, x.dtype, exact=x.exact, to=tensor_type(x.dtype))
        elif kind == "transpose":
            x = transpose(b, x, *range(x.rank)) if x.rank else x
        elif kind == "reshape":
            x = reshape(b, x, [0] * x.rank, x.shape) if x.rank else x
        else:
            x = b.op("Identity", [x], x.shape, x.dtype, exact=x.exact)


def duplicates(b: Builder) -> None:
    """The same expression twice, and one that nearly is."""
    x = b.floats()
    table = np.array(b.one_of(2.0, -3.0), np.float32)
    copies = [b.op("Mul", [x, table.copy()], x.shape) for _ in range(2)]
    near = b.op("Mul", [x, -table], x.shape)
    both = b.op("Add", copies, x.shape)
    b.op("LeakyRelu", [both], x.shape, alpha=0.1)
    b.op("LeakyRelu", [both], x.shape, alpha=b.one_of(0.1, 0.2))
    b.op("Add", [both, near], x.shape)


def reshapes(b: Builder) -> None:
    x = b.tokens()
    n, s, width = x.shape
    merged = reshape(b, x, [-1, int(width)], ("M", width)) if isinstance(s, str) else None
    if merged is None:
        merged = reshape(b, x, [0, int(s) * int(width)], (n, int(s) * int(width)))
        reshape(b, merged, [0, int(s), int(width)], x.shape)
        return
    b.values.remove(merged)  # its first dim has no name of the interface's
    b.op("Relu", [merged], merged.shape, exact=x.exact, keep=False)


def transposes(b: Builder) -> None:
    x = b.floats()
    for _ in range(b.one_of(1, 2, 3)):
        x = transpose(b, x, *(int(i) for i in b.rng.permutation(x.rank))) if x.rank else x


def unsqueezes(b: Builder) -> None:
    x = b.floats()
    if x.rank > 3:
        return
    y = unsqueeze(b, unsqueeze(b, x, b.one_of(0, x.rank)), 0)
    if b.chance(0.5):
        squeeze(b, y, 0)


def slices(b: Builder) -> None:
    x = b.tokens()
    width = int(x.shape[2])
    y = slice_(b, x, 2, 0, b.one_of(width, BIG), 1, width) if b.chance(0.5) else x
    y = slice_(b, y, 2, 1, b.one_of(width, BIG, width + 9), 1, width - 1)
    if b.opset >= 10 and b.chance(0.5):
        slice_(b, y, 2, -1, -BIG, -1, width - 1)


def concat_split(b: Builder) -> None:
    x = b.tokens()
    width = int(x.shape[2])
    if b.chance(0.5) and width > 1:
        parts = split(b, x, 2, [width // 2] * 2 if width % 2 == 0 and b.chance(0.5) else [1, width - 1])
        b.op(
            "Concat",
            parts[:: b.one_of(1, -1)],
            x.shape,
            exact=x.exact,
            axis=b.one_of(2, -1) if b.opset >= 11 else 2,
        )
    else:
        b.op("Concat", [x, x], (*x.shape[:2], 2 * width), exact=x.exact, axis=2)


def reductions(b: Builder) -> None:
    x = b.floats()
    if not x.rank:
        return
    kind = b.one_of("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2")
    reduce(b, kind, x, (b.one_of(-1, 0),), keep=b.chance(0.6))


def mixed_types(b: Builder) -> None:
    """Half or double arithmetic between casts."""
    x = b.floats()
    kind = b.one_of(HALF, DOUBLE)
    y = b.op("Cast", [x], x.shape, kind, exact=x.exact and kind == DOUBLE, to=tensor_type(kind))
    if b.chance(0.6):
        y = b.op("Relu", [y], x.shape, kind, exact=y.exact) if b.opset >= 8 else y
    y = b.op(b.one_of("Mul", "Add"), [y, np.array(b.one_of(0.5, 3.0), kind)], x.shape, kind)
    if b.chance(0.7):
        b.op("Cast", [y], x.shape, FLOAT, to=tensor_type(FLOAT))


def casts(b: Builder) -> None:
    """Chains of casts that narrow and widen; only the exact ones may go."""
    x = b.pick(
        lambda v: v.dtype in (FLOAT, LONG, INT) and v.exact, lambda: b.input(FLOAT, b.default_shape(2))
    )
    for kind in b.one_of((DOUBLE, FLOAT), (INT, LONG, FLOAT), (BOOL, FLOAT), (HALF, FLOAT), (INT, BYTE, INT)):
        if x.dtype.kind == "f" and kind in (INT, LONG):
            x = clip(b, x, -100.0, 100.0) if x.dtype == FLOAT else x
        exact = x.exact and (kind != HALF)
        x = b.op("Cast", [x], x.shape, kind, exact=exact, to=tensor_type(kind))


def integers(b: Builder) -> None:
    x = b.pick(lambda v: v.dtype in (LONG, INT), lambda: b.input(b.one_of(LONG, INT), b.default_shape(2)))
    y = either(b, b.one_of("Add", "Mul", "Sub"), x, np.array(3, x.dtype), x.shape, x.dtype)
    if b.opset >= 10 and b.chance(0.5):
        y = b.op("Mod", [y, np.array(b.one_of(2, 5), x.dtype)], x.shape, x.dtype, exact=True)
    if b.opset >= 9 and b.chance(0.6):
        test = b.op("Greater", [y, np.array(2, x.dtype)], x.shape, BOOL, exact=True)
        b.op("Where", [test, x, y], x.shape, x.dtype, exact=True)


def embedding(b: Builder) -> None:
    ids = b.pick(
        lambda v: v.dtype == LONG and v in b.inputs and v.rank == 2,
        lambda: b.input(LONG, b.default_shape(3)[:2]),
    )
    table = b.weight(4, b.width)
    y = b.op("Gather", [table, ids], (*ids.shape, b.width), exact=True, axis=0 if b.chance(0.3) else None)
    if b.chance(0.3):
        patterns.layer_norm_of(b, y)


def gathers(b: Builder) -> None:
    x = b.tokens()
    n, s, _width = x.shape
    if b.chance(0.5):
        b.op("Gather", [x, np.array(b.one_of(0, 1), np.int64)], (n, s), exact=x.exact, axis=2)
    else:
        b.op("Gather", [x, longs(1, 0, 1)], (n, s, 3), exact=x.exact, axis=2)


def wheres(b: Builder) -> None:
    if b.opset < 9:
        return
    x = b.floats()
    test = b.pick(lambda v: v.dtype == BOOL and v.shape == x.shape, lambda: b.input(BOOL, x.shape))
    other = np.array(b.one_of(0.0, -1e9), np.float32)
    b.op("Where", [test, x, other] if b.chance(0.5) else [test, other, x], x.shape, exact=x.exact)
    if b.chance(0.3):
        b.op("Where", [np.array(b.chance(0.5)), x, other], x.shape, exact=x.exact)


def steps(b: Builder) -> None:
    """Step functions of values without rounding: comparisons, sorting, rounding."""
    x = b.pick(
        lambda v: v.dtype == FLOAT and v.exact and v.rank >= 2, lambda: b.input(FLOAT, b.default_shape(2))
    )
    draw = int(b.rng.integers(5))
    if draw == 0:
        b.op(b.one_of("Floor", "Ceil"), [x], x.shape, exact=True)
    elif draw == 1:
        b.op(
            "Greater" if b.opset >= 9 else "Equal",
            [x if b.opset >= 9 else _longs_of(b, x), _other(b, x)],
            x.shape,
            BOOL,
            exact=True,
        )
    elif draw == 2 and isinstance(x.shape[-1], int):
        axis = x.rank - 1
        b.op("ArgMax", [x], (*x.shape[:-1], 1), LONG, exact=True, axis=axis)
    elif draw == 3 and b.opset >= 10 and isinstance(x.shape[-1], int):
        shape = (*x.shape[:-1], 1)
        b.ops("TopK", [x, longs(1)], [(shape, FLOAT), (shape, LONG)], exact=True)
    elif b.opset >= 9:
        b.op("Sign", [x], x.shape, exact=True)


def _longs_of(b: Builder, x: Val) -> Val:
    bounded = clip(b, x, -100.0, 100.0)
    return b.op("Cast", [bounded], x.shape, LONG, exact=True, to=tensor_type(LONG))


def _other(b: Builder, x: Val) -> np.ndarray:
    return np.array(0.25, np.float32) if b.opset >= 9 else np.array(1, np.int64)


# -- shapes -------------------------------------------------------------------------------------------


def shape_reshape(b: Builder) -> None:
    """Reshape to what Shape, Gather and Concat put together, as exporters write view()."""
    x = b.tokens()
    n, s, width = x.shape
    shape = b.op("Shape", [x], (3,), LONG, exact=True, keep=False)
    dims = [
        b.op("Gather", [shape, np.array(i, np.int64)], (), LONG, exact=True, axis=0, keep=False)
        for i in (0, 1)
    ]
    parts: list[Any] = [unsqueeze(b, d, 0, keep=False) for d in dims]
    half = int(width) // 2 if int(width) % 2 == 0 else int(width)
    parts += [longs(int(width) // half), longs(half)]
    target = b.op("Concat", parts, (4,), LONG, exact=True, axis=0, keep=False)
    b.op("Reshape", [x, target], (n, s, int(width) // half, half), exact=x.exact)


def shape_expand(b: Builder) -> None:
    x = b.tokens()
    if b.opset < 9:
        return
    shape = b.op("Shape", [x], (3,), LONG, exact=True, keep=b.chance(0.3))
    if b.chance(0.5):
        row = b.weight(int(x.shape[2]))
        spread = b.op("Expand", [row, shape], x.shape, exact=True)
    else:
        value = np.array([b.one_of(0.0, 1.5)], np.float32)
        from onnx import numpy_helper

        spread = b.op("ConstantOfShape", [shape], x.shape, exact=True, value=numpy_helper.from_array(value))
    either(b, "Add", x, spread, x.shape, FLOAT)


def shape_range(b: Builder) -> None:
    """Positions counted up to a dynamic length, and a table read by them."""
    x = b.tokens()
    if b.opset < 11:
        return
    shape = b.op("Shape", [x], (3,), LONG, exact=True, keep=False)
    length = b.op("Gather", [shape, np.array(1, np.int64)], (), LONG, exact=True, axis=0, keep=False)
    places = b.op(
        "Range",
        [np.array(0, np.int64), length, np.array(1, np.int64)],
        (x.shape[1],),
        LONG,
        exact=True,
        keep=False,
    )
    rows = b.op("Gather", [b.weight(8, int(x.shape[2])), places], (*x.shape[1:],), exact=True, keep=False)
    either(b, "Add", x, rows, x.shape, FLOAT)


def constant_expression(b: Builder) -> None:
    """Operators on constants alone, some too large to be worth storing."""
    rows = b.one_of(2, 3)
    left = b.op("MatMul", [b.weight(rows, 4), b.weight(4, b.width)], (rows, b.width), keep=False)
    total = reduce(b, "ReduceSum", left, (0,), keep=False)
    b.values.remove(total)
    x = b.pick(
        lambda v: v.dtype == FLOAT and v.rank > 0 and v.shape[-1] == b.width,
        lambda: b.input(FLOAT, b.default_shape(2)),
    )
    either(b, "Add", x, total, x.shape, FLOAT)


def scalars(b: Builder) -> None:
    x = b.pick(lambda v: v.dtype == FLOAT and v.rank == 0, lambda: b.input(FLOAT, ()))
    y = b.op("Mul", [x, np.array(3, np.float32)], ())
    unsqueeze(b, y, 0)
    wide = b.floats()
    either(b, "Mul", wide, y, wide.shape, FLOAT)


def empty(b: Builder) -> None:
    """Tensors without elements, joined with others and reduced away."""
    x = b.tokens()
    none = np.zeros((0, int(x.shape[2])), np.float32)
    rows = b.op(
        "Concat", [none, b.weight(2, int(x.shape[2]))], (2, x.shape[2]), exact=True, axis=0, keep=False
    )
    column = reduce(b, "ReduceSum", rows, (0,), keep=False)
    b.values.remove(column)
    either(b, "Add", x, column, x.shape, FLOAT)
    if b.opset >= 10:
        slice_(b, x, 2, 2, 2, 1, 0, keep=False)


def softmaxes(b: Builder) -> None:
    x = b.floats()
    if x.rank:
        softmax(b, x, -1)


def einsum(b: Builder) -> None:
    x = b.tokens()
    if b.opset >= 12:
        b.op("Einsum", [x, b.weight(int(x.shape[2]), 3)], (*x.shape[:2], 3), equation="bsd,de->bse")


def prelu(b: Builder) -> None:
    x = b.image()
    b.op("PRelu", [x, b.weight(int(x.shape[1]), 1, 1)], x.shape)


def recurrent(b: Builder) -> None:
    """LSTM or GRU with omitted inputs and outputs."""
    x = b.tokens()
    n, s, width = x.shape
    gates = b.one_of(("LSTM", 4), ("GRU", 3))
    reads: list[Any] = [x, b.weight(1, gates[1] * 3, int(width)), b.weight(1, gates[1] * 3, 3)]
    if b.chance(0.5):
        reads += [b.weight(1, gates[1] * 6)]
    b.op(gates[0], reads, (n, 1, s, 3), hidden_size=3)


def quantized(b: Builder) -> None:
    """QuantizeLinear and DequantizeLinear, twice: a quantized model's seams."""
    if b.opset < 10:
        return
    x = b.pick(lambda v: v.dtype == FLOAT and v.exact, lambda: b.input(FLOAT, b.default_shape(2)))
    scale, zero = np.array(0.05, np.float32), np.array(b.one_of(0, 128), np.uint8)
    q = b.op("QuantizeLinear", [x, scale, zero], x.shape, BYTE, exact=True, keep=False)
    y = b.op("DequantizeLinear", [q, scale, zero], x.shape, exact=True)
    if b.chance(0.6):
        q = b.op("QuantizeLinear", [y, scale, zero], x.shape, BYTE, exact=True, keep=b.chance(0.3))
        y = b.op("DequantizeLinear", [q, scale, zero], x.shape, exact=True)
    if b.chance(0.5):
        b.op("Relu", [y], x.shape, exact=True)


def late_operators(b: Builder) -> None:
    """Standard operators that newer opsets brought."""
    x = b.tokens()
    width = int(x.shape[2])
    if b.opset >= 23 and b.chance(0.5):
        b.op("RMSNormalization", [x, b.weight(width)], x.shape, axis=-1)
    elif b.opset >= 20 and b.chance(0.5):
        b.op("Gelu", [x], x.shape, approximate=b.one_of(None, "tanh"))
    elif b.opset >= 14:
        b.op("HardSwish", [x], x.shape)


def contrib(b: Builder) -> None:
    """ONNX Runtime's own operators, which are carried through."""
    x = b.tokens()
    b.op("Gelu", [x], x.shape, domain="com.microsoft")


Piece = Callable[[Builder], None]
PIECES: tuple[tuple[float, Piece], ...] = (
    (3, unary),
    (4, binary),
    (2, neutral),
    (2, scale_chain),
    (2, relus),
    (1, clips),
    (3, identities),
    (2, duplicates),
    (2, reshapes),
    (2, transposes),
    (1, unsqueezes),
    (2, slices),
    (2, concat_split),
    (2, reductions),
    (2, mixed_types),
    (2, casts),
    (2, integers),
    (2, embedding),
    (1, gathers),
    (2, wheres),
    (2, steps),
    (2, shape_reshape),
    (2, shape_expand),
    (2, shape_range),
    (2, constant_expression),
    (1, scalars),
    (1, empty),
    (1, softmaxes),
    (1, einsum),
    (1, prelu),
    (1, recurrent),
    (2, quantized),
    (1, late_operators),
    (1, contrib),
    (2, patterns.gelu),
    (2, patterns.rms),
    (3, patterns.layer_norm),
    (4, patterns.residual_mlp),
    (2, patterns.parallel_branches),
    (4, patterns.attention),
    (2, patterns.rotary),
    (4, patterns.conv),
    (2, patterns.conv_chain),
    (2, patterns.conv_transpose),
    (3, patterns.residual_conv),
    (2, patterns.parallel_convs),
    (2, patterns.option_a_shortcut),
    (1, patterns.batch_norm),
    (3, patterns.gemm),
    (2, patterns.linear_chain),
    (2, patterns.pool),
    (2, layouts.turned),
    (2, layouts.squeezed),
    (2, layouts.shuffled),
    (2, layouts.stacked),
    (1, layouts.cut_twice),
    (1, layouts.biased),
    (3, subgraphs.choice),
    (1, subgraphs.loop),
    (1, subgraphs.scan),
    (1, subgraphs.sequence),
)
