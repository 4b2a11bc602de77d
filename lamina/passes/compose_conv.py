"""Compose two convolutions into one: kernels, strides, dilations, groups, biases and padding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd, prod

import numpy as np

from lamina.errors import PassError

Ints = tuple[int, ...]


@dataclass(frozen=True)
class ConvShape:
    """A convolution without its numbers.

    Attributes:
        out: Channels it makes.
        width: Channels each of its groups reads.
        kernel: Taps a spatial axis.
        strides: One a spatial axis.
        dilations: Likewise.
        begins: Zeros put before each spatial axis.
        ends: Zeros put after it.
        group: Groups.
        biased: Whether its bias is anything but zero.
        edges: Whether padding makes it differ at the borders from the two that it was composed of.
    """

    out: int
    width: int
    kernel: Ints
    strides: Ints
    dilations: Ints
    begins: Ints
    ends: Ints
    group: int = 1
    biased: bool = False
    edges: bool = False

    @property
    def reach(self) -> Ints:
        """Positions a spatial axis from the first to the last tap."""
        return tuple(d * (k - 1) for d, k in zip(self.dilations, self.kernel, strict=True))

    @property
    def taps(self) -> int:
        """Multiply-adds an output position."""
        return self.out * self.width * prod(self.kernel)


@dataclass(frozen=True)
class ConvForm:
    """A convolution as numbers.

    Attributes:
        shape: All but the numbers.
        weight: Float64 ``[out, in / group, *kernel]``.
        bias: Float64 ``[out]``.
    """

    shape: ConvShape
    weight: np.ndarray
    bias: np.ndarray


def form_of(
    weight: np.ndarray,
    bias: np.ndarray,
    strides: Ints,
    dilations: Ints,
    begins: Ints,
    ends: Ints,
    group: int = 1,
) -> ConvForm:
    """A convolution from its arrays and attributes."""
    kernel = tuple(int(k) for k in weight.shape[2:])
    biased = bool(np.any(bias))
    shape = ConvShape(len(weight), weight.shape[1], kernel, strides, dilations, begins, ends, group, biased)
    return ConvForm(shape, weight, bias)


def compose_shapes(first: ConvShape, second: ConvShape) -> ConvShape:
    """The shape of :func:`compose`'s result; costs nothing.

    Raises:
        PassError: The channels do not fit.
    """
    if first.out != second.width * second.group:
        raise PassError(
            f"{first.out} channels go into a convolution of {second.width * second.group}",
            advice="this is a bug in the chain's search",
        )
    steps = [s * d for s, d in zip(first.strides, second.dilations, strict=True)]
    axes = list(zip(steps, second.kernel, first.dilations, first.kernel, strict=True))
    grid = tuple(_grid(*axis) for axis in axes)
    kernel = tuple(
        (step * (k2 - 1) + d1 * (k1 - 1)) // g + 1 for (step, k2, d1, k1), g in zip(axes, grid, strict=True)
    )
    group = gcd(first.group, second.group)
    begins, ends = (
        tuple(p1 + s1 * p2 for p1, s1, p2 in zip(own, first.strides, padded, strict=True))
        for own, padded in ((first.begins, second.begins), (first.ends, second.ends))
    )
    return ConvShape(
        second.out,
        first.width * first.group // group,
        kernel,
        tuple(a * b for a, b in zip(first.strides, second.strides, strict=True)),
        grid,
        begins,
        ends,
        group,
        first.biased or second.biased,
        first.edges or second.edges or why_edges(first, second) is not None,
    )


def compose(first: ConvForm, second: ConvForm) -> ConvForm:
    """The convolution that is ``second`` after ``first``.

    ``y[o] = sum_uv W2[u] W1[v] x[s1 s2 o + s1 d2 u + d1 v - (p1 + s1 p2)]`` on each spatial axis: kernel
    ``W2 * W1``, of ``s1 d2 (k2 - 1) + d1 (k1 - 1)`` positions from end to end, dilated by the greatest common
    divisor of the steps; stride ``s1 s2``; ``p1 + s1 p2`` zeros before and after; bias ``b2 + sum_u W2[u]
    b1``; groups ``gcd(g1, g2)``, dense within. The sizes are those of the two, whatever the input's:
    ``floor((floor(a / s1) + b) / s2) = floor((a + s1 b) / (s1 s2))``.

    Exact where ``second`` pads nothing, or pads with what ``first`` computes there anyway: zero, as its bias
    is zero and its taps lie in its own padding. Else the result differs at the borders, and says so by
    ``edges``. Source: Fu et al. 2023, arXiv:2301.12187; LayerMerge, Kim et al. 2024, arXiv:2406.12837.

    Raises:
        PassError: The channels do not fit.
    """
    shape = compose_shapes(first.shape, second.shape)
    group = shape.group
    one, two = _blocks(first, group), _blocks(second, group)
    made = np.zeros((*two.shape[:2], one.shape[2], *shape.kernel))
    steps = [s * d for s, d in zip(first.shape.strides, second.shape.dilations, strict=True)]
    for u in np.ndindex(*second.shape.kernel):
        for v in np.ndindex(*first.shape.kernel):
            axes = zip(steps, u, first.shape.dilations, v, shape.dilations, strict=True)
            at = (..., *((step * i + d1 * j) // g for step, i, d1, j, g in axes))
            now, then = (..., *u), (..., *v)
            made[at] += two[now] @ one[then]
    spread = two.reshape(*two.shape[:3], -1).sum(-1)  # [group, out / group, middle / group]
    bias = (spread @ first.bias.reshape(group, -1, 1)).reshape(-1) + second.bias
    return ConvForm(shape, made.reshape(-1, *made.shape[2:]), bias)


def why_edges(first: ConvShape, second: ConvShape) -> str | None:
    """Why the composition differs at the borders from the two in a row; None where it does not.

    Behind ``first`` the padding of ``second`` is zero; the composed kernel reads there what ``first`` would
    compute from its own padding: its bias, and, where its taps reach into the input, a part of its sum.
    """
    if not any(second.begins) and not any(second.ends):
        return None
    starts = zip(second.begins, first.begins, first.reach, first.strides, strict=True)
    # The last position before the first one lies a stride before it: its last tap must lie in the padding.
    if any(padded and own < reach - stride + 1 for padded, own, reach, stride in starts):
        return "the second pads, where the first still sees the input"
    # Behind the end the last position may stop short of the padding's end by less than a stride.
    stops = zip(second.ends, first.ends, first.reach, strict=True)
    if any(padded and own < reach for padded, own, reach in stops):
        return "the second pads, where the first still sees the input"
    if first.biased:
        return "the second pads with zeros, where the first gives its bias"
    return None


def scaled(form: ConvForm, scale: np.ndarray, shift: np.ndarray) -> ConvForm:
    """``scale * form(x) + shift`` a channel: a BatchNormalization behind a convolution."""
    weight = form.weight * scale.reshape(-1, *(1,) * (form.weight.ndim - 1))
    bias = form.bias * scale + shift
    return ConvForm(replace(form.shape, biased=bool(np.any(bias))), weight, bias)


def _grid(step2: int, kernel2: int, step1: int, kernel1: int) -> int:
    """Dilation of the composed kernel on one axis: the common divisor of the steps that are taken."""
    return gcd(step2 if kernel2 > 1 else 0, step1 if kernel1 > 1 else 0) or 1


def _blocks(form: ConvForm, group: int) -> np.ndarray:
    """The weight as ``[group, out / group, in / group, *kernel]``, zeros between its finer groups."""
    weight, own = form.weight, form.shape.group
    out, width = len(weight) // own, weight.shape[1]
    ratio = own // group
    made = np.zeros((group, ratio * out, ratio * width, *form.shape.kernel))
    for g in range(own):
        block, inner = divmod(g, ratio)
        rows, columns = inner * out, inner * width
        made[block, rows : rows + out, columns : columns + width] = weight[g * out : (g + 1) * out]
    return made
