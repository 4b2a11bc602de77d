"""Derivatives of operators that move a window over images: Conv, MaxPool, AveragePool."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis.adjoint_tape import Call, Rule
from lamina.analysis.operators import same_pads

Parts = Sequence[np.ndarray | None]


@dataclass(frozen=True)
class _Windows:
    """Where a window looks: each of its places is a strided part of the padded images."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    space: tuple[int, ...]
    out: tuple[int, ...]

    @staticmethod
    def of(node: ir.Node, kernel: tuple[int, ...], space: tuple[int, ...], out: tuple[int, ...]) -> _Windows:
        """The windows of a node over images of size ``space`` that make ones of size ``out``."""
        rank, get = len(kernel), node.attributes
        strides = tuple(get.get_ints("strides") or (1,) * rank)
        dilations = tuple(get.get_ints("dilations") or (1,) * rank)
        pads = tuple(get.get_ints("pads") or (0,) * (2 * rank))
        mode = get.get_string("auto_pad", "NOTSET")
        if mode in ("SAME_UPPER", "SAME_LOWER"):
            pads = same_pads(space, kernel, strides, dilations, mode == "SAME_LOWER")
        return _Windows(kernel, strides, dilations, pads, space, out)

    def padded(self, x: np.ndarray, fill: float = 0.0) -> np.ndarray:
        """Images with their border, wide enough for windows that ceil_mode lets hang over."""
        rank, border = len(self.kernel), []
        for i in range(rank):
            reach = (self.out[i] - 1) * self.strides[i] + (self.kernel[i] - 1) * self.dilations[i] + 1
            behind = max(self.pads[rank + i], reach - self.space[i] - self.pads[i])
            border.append((self.pads[i], behind))
        return np.pad(x, [(0, 0), (0, 0), *border], constant_values=fill)

    def places(self) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
        """Each place of the window, and the part of the padded images that it sees."""
        for spot in itertools.product(*map(range, self.kernel)):
            parts = zip(spot, self.dilations, self.strides, self.out, strict=True)
            seen = (slice(i * d, i * d + s * (n - 1) + 1, s) for i, d, s, n in parts)
            yield spot, (slice(None), slice(None), *seen)

    def inner(self, padded: np.ndarray) -> np.ndarray:
        """Padded images without their border."""
        kept = (slice(b, b + n) for b, n in zip(self.pads, self.space, strict=False))
        inner: np.ndarray = padded[_at(2, kept)]
        return inner


def _at(leading: int, places: Iterable[int | slice]) -> tuple[int | slice, ...]:
    """An index of everything in the leading axes, and of ``places`` in the axes behind them."""
    return (slice(None),) * leading + tuple(places)


def _conv(call: Call) -> Parts:
    x, weight, grad = call.read(0), call.read(1), call.grad
    groups, kernel = call.node.attributes.get_int("group", 1), weight.shape[2:]
    windows = _Windows.of(call.node, kernel, x.shape[2:], grad.shape[2:])
    padded = windows.padded(x)
    back = np.zeros(padded.shape, np.float32) if call.wants[0] else None
    kernels = np.zeros((groups, weight.shape[1], len(weight) // groups, *kernel), np.float32)
    # [b, g, n / g, positions]
    wide = grad.reshape(len(x), groups, -1, int(np.prod(grad.shape[2:])))
    split = weight.reshape(groups, -1, *weight.shape[1:])
    for spot, window in windows.places():
        if back is not None:
            tap = split[_at(3, spot)].swapaxes(1, 2)
            back[window] += (tap @ wide).reshape(len(x), -1, *grad.shape[2:])
        if call.wants[1]:
            seen = padded[window].reshape(len(x), groups, -1, wide.shape[-1])
            kernels[_at(3, spot)] = (seen @ wide.swapaxes(-1, -2)).sum(axis=0)
    return [
        None if back is None else windows.inner(back),
        kernels.swapaxes(1, 2).reshape(weight.shape) if call.wants[1] else None,
        grad.sum(axis=(0, *range(2, grad.ndim))) if call.given(2) is not None else None,
    ]


def _max_pool(call: Call) -> Parts:
    x, kernel = call.read(0), tuple(call.node.attributes.get_ints("kernel_shape") or ())
    windows = _Windows.of(call.node, kernel, x.shape[2:], call.grad.shape[2:])
    padded = windows.padded(x, -np.inf)
    back = np.zeros(padded.shape, np.float32)
    free = np.ones(call.grad.shape, bool)
    for _, window in windows.places():
        # of several that are largest the first one is taken
        largest = free & (padded[window] == call.made)
        back[window] += call.grad * largest
        free &= ~largest
    return [windows.inner(back)]


def _average_pool(call: Call) -> Parts:
    x, kernel = call.read(0), tuple(call.node.attributes.get_ints("kernel_shape") or ())
    windows = _Windows.of(call.node, kernel, x.shape[2:], call.grad.shape[2:])
    counted = np.zeros((1, 1, *windows.out), np.float32)
    rank = len(kernel)
    ones = np.ones((1, 1, *x.shape[2:]), np.float32)
    if call.node.attributes.get_int("count_include_pad", 0):
        given = zip(windows.pads[:rank], windows.pads[rank:], strict=True)
        wide = np.pad(ones, [(0, 0), (0, 0), *given], constant_values=1)
        short = zip(windows.padded(ones).shape[2:], wide.shape[2:], strict=True)
        there = np.pad(wide, [(0, 0), (0, 0), *((0, a - b) for a, b in short)])
    else:
        there = windows.padded(ones)
    for _, window in windows.places():
        counted += there[window]
    back = windows.padded(np.zeros(x.shape, np.float32))
    share = call.grad / np.maximum(counted, 1)
    for _, window in windows.places():
        back[window] += share
    return [windows.inner(back)]


WINDOWS: Mapping[str, Rule] = {"Conv": _conv, "MaxPool": _max_pool, "AveragePool": _average_pool}
