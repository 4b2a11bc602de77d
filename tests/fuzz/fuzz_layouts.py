"""Pieces that move and reshape dims back and forth, as exporters of other layouts write it."""

from __future__ import annotations

import numpy as np
from fuzz_operators import reshape, slice_, softmax, squeeze, transpose, unsqueeze
from graphs import Builder, Val


def _known(x: Val) -> list[int] | None:
    dims = [d for d in x.shape if isinstance(d, int)]
    return dims if len(dims) == x.rank else None


def _mapped(b: Builder, x: Val) -> Val:
    """An elementwise operator, now and then with a number of one element."""
    if b.chance(0.5):
        name = b.one_of("Relu", "Sigmoid", "Tanh", "Neg", "Abs")
        exact = x.exact and name in ("Relu", "Neg", "Abs")
        return b.op(name, [x], x.shape, exact=exact, keep=b.chance(0.1))
    number = np.full((1,) * b.one_of(0, 0, min(1, x.rank), x.rank), 0.5, np.float32)
    return b.op(b.one_of("Mul", "Add", "Sub"), [x, number], x.shape, keep=b.chance(0.1))


def turned(b: Builder) -> None:
    """Elementwise operators, or a Softmax, between two transpositions, which may undo each other."""
    x = b.floats()
    if x.rank < 2:
        return
    perm = [int(i) for i in b.rng.permutation(x.rank)]
    y = transpose(b, x, *perm)
    for _ in range(b.one_of(1, 1, 2)):
        y = _mapped(b, y)
    if b.chance(0.4):
        axis = b.one_of(-1, perm.index(x.rank - 1)) if b.opset >= 13 else -1
        y = softmax(b, y, axis, keep=b.chance(0.1))
    back = [perm.index(i) for i in range(x.rank)]
    transpose(b, y, *(back if b.chance(0.6) else [int(i) for i in b.rng.permutation(x.rank)]))


def squeezed(b: Builder) -> None:
    """Dims of 1 put in, moved about and taken out, with elementwise operators or a Gather between."""
    x = b.floats()
    if x.rank > 3:
        return
    at = b.one_of(0, x.rank)
    y = unsqueeze(b, x, at, keep=b.chance(0.1))
    if b.chance(0.5):
        others = [i for i in range(y.rank) if i != at]
        at = int(b.rng.integers(y.rank))
        places = iter(others)
        old = y.shape.index(1) if y.shape.count(1) == 1 else None
        if old is None:
            return
        y = transpose(b, y, *(old if i == at else next(places) for i in range(y.rank)))
    if b.chance(0.5):
        y = _mapped(b, y)
    last = y.shape[-1]
    if b.chance(0.3) and at != y.rank - 1 and isinstance(last, int) and last > 1:
        shape = (*y.shape[:-1], 2, 2)
        indices = np.array([[0, 1], [1, 0]], np.int64)
        y = b.op("Gather", [y, indices], shape, exact=y.exact, axis=y.rank - 1)
    if b.chance(0.3):
        shape = (*y.shape[:at], *y.shape[at + 1 :])
        b.op("Gather", [y, np.array(0, np.int64)], shape, exact=y.exact, axis=at)
    elif b.chance(0.4) and (known := _known(y)):
        reshape(b, y, [*known[:-1], -1, 1], (*y.shape, 1))
    else:
        squeeze(b, y, at)


def shuffled(b: Builder) -> None:
    """Channels in two halves interleaved and taken apart again, in the two ways that is written."""
    x = b.floats()
    known = _known(x)
    if known is None or x.rank < 2 or known[-1] % 2:
        known = [1, b.one_of(2, 3), b.one_of(4, 6)]
        x = b.input(np.dtype(np.float32), tuple(known))
    rows, half = int(np.prod(known[:-1])), known[-1] // 2
    y = transpose(b, reshape(b, x, [rows, half, 2], (rows, half, 2)), *b.one_of((2, 0, 1), (2, 1, 0)))
    if b.chance(0.6):
        shape = (2, *(known[:-1] if y.shape[1] == rows else [rows]), half)
        shape = shape if int(np.prod(shape)) == rows * 2 * half and y.shape[1] == rows else (2, half, 1, rows)
        y = reshape(b, y, [*shape[:-1], -1], shape)
    for i in (0, b.one_of(1, -1)):
        b.op("Gather", [y, np.array(i, np.int64)], y.shape[1:], exact=y.exact, axis=0)


def stacked(b: Builder) -> None:
    """Two tensors joined along a new axis, which a transposition then moves."""
    x = b.floats()
    if not 1 <= x.rank <= 3 or b.opset < 4:
        return
    other = _mapped(b, x)
    axis, place = int(b.rng.integers(x.rank + 1)), int(b.rng.integers(x.rank + 1))
    parts = [unsqueeze(b, v, axis, keep=b.chance(0.1)) for v in (x, other)]
    shape = (*x.shape[:axis], 2, *x.shape[axis:])
    exact = all(p.exact for p in parts)
    y = b.op("Concat", parts, shape, exact=exact, keep=b.chance(0.1), axis=axis)
    rest = iter(i for i in range(y.rank) if i != axis)
    perm = [axis if i == place else next(rest) for i in range(y.rank)]
    transpose(b, y, *(perm if b.chance(0.8) else [int(i) for i in b.rng.permutation(y.rank)]))


def cut_twice(b: Builder) -> None:
    """Slices of two axes, one after the other."""
    x = b.floats()
    axes = [i for i, d in enumerate(x.shape) if isinstance(d, int) and d > 1]
    for axis in axes[-2:]:
        size = x.shape[axis]
        assert isinstance(size, int)
        step = b.one_of(1, 2) if b.opset >= 10 else 1
        x = slice_(b, x, axis, 0, b.one_of(size, 2**40), step, -(-size // step), keep=b.chance(0.1))
    if axes:
        b.op("Neg", [x], x.shape, exact=x.exact)


def biased(b: Builder) -> None:
    """A product of matrices and the Add of a bias, now and then of one that enlarges it."""
    x = b.pick(
        lambda v: v.dtype == np.float32 and v.rank == 2 and isinstance(v.shape[1], int) and v.shape[1] > 0,
        lambda: b.input(np.dtype(np.float32), b.default_shape(2)),
    )
    columns = b.one_of(1, 3, 4)
    product = b.op("MatMul", [x, b.weight(int(x.shape[1]), columns)], (x.shape[0], columns), keep=False)
    shapes = [(columns,), (1, columns), (1,), (), (1, 1, columns)]
    shape = shapes[int(b.rng.integers(len(shapes)))]
    result = product.shape if len(shape) < 3 else (1, *product.shape)
    reads = [product, b.weight(*shape)]
    b.op("Add", reads if b.chance(0.5) else reads[::-1], result)
