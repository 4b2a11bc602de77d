"""Weighted operators as matrices: what each reads, column by column, and its weight ``[out, in]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.ir.shapes import Observed


@dataclass(frozen=True)
class WeightedOperator:
    """A MatMul, Gemm or Conv with a constant weight.

    Attributes:
        name: Node name.
        kind: ``matmul``, ``gemm`` or ``conv``.
        activation: Name of what it reads.
        weight: Name of its weight.
        flipped: Whether the stored matrix is ``[in, out]``.
        side: Which operand of a MatMul is the activation; 1 means ``W x``, with tokens along its last axis.
        group: Groups of a convolution.
        kernel: Its window; empty for matrices.
        strides: Its strides.
        pads: Padding before and after each axis: all befores, then all afters.
        dilations: Its dilations.
    """

    name: str
    kind: str
    activation: str
    weight: str
    flipped: bool = False
    side: int = 0
    group: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()

    def matrices(self, program: Program) -> np.ndarray:
        """The weight as float64 ``[group, out / group, in / group * window]``."""
        array = constant(_value(program, self.weight))
        assert array is not None
        wide = array.astype(np.float64)
        if self.kind == "conv":
            return wide.reshape(self.group, wide.shape[0] // self.group, -1)
        return (wide.T if self.flipped else wide)[None]


def weighted_operators(
    program: Program, shapes: Mapping[str, Observed]
) -> tuple[dict[str, WeightedOperator], dict[str, str]]:
    """Every operator with a trained matrix or kernel, and why the others of these types are left out.

    Args:
        program: The program.
        shapes: Observed shapes; the automatic padding of convolutions is resolved with them.
    """
    found: dict[str, WeightedOperator] = {}
    skipped: dict[str, str] = {}
    for node in program.graph:
        if node.domain or node.op_type not in ("MatMul", "Gemm", "Conv"):
            continue
        made = _conv(node, shapes) if node.op_type == "Conv" else _matrix(node)
        name = node.name or ""
        if isinstance(made, WeightedOperator):
            found[name] = made
        elif made is not None:
            skipped[name] = made
    return found, skipped


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of an initializer or a Constant node, or None."""
    tensor = None if value is None else value.const_value
    if tensor is None and value is not None and (maker := value.producer()) is not None:
        attribute = maker.attributes.get("value") if maker.op_type == "Constant" else None
        tensor = attribute.as_tensor() if attribute is not None else None
    return None if tensor is None else tensor.numpy()


def patches(x: np.ndarray, operator: WeightedOperator, count: int) -> np.ndarray:
    """Windows of images that a convolution multiplies with its kernel.

    Args:
        x: Images ``[b, c, *space]``.
        operator: The convolution.
        count: Windows wanted in all, at evenly spaced output positions.

    Returns:
        A copy ``[windows, group, c / group * window]``, in the dtype of ``x``.
    """
    rank, images = len(operator.kernel), len(x)
    parts = list(
        zip(x.shape[2:], operator.kernel, operator.strides, operator.dilations, operator.pads, strict=False)
    )
    space = [
        (size + before + operator.pads[rank + i] - dilation * (window - 1) - 1) // stride + 1
        for i, (size, window, stride, dilation, before) in enumerate(parts)
    ]
    total = images * int(np.prod(space, dtype=np.int64))
    taken = max(0, min(count, total))
    image, *places = np.unravel_index(evenly(taken, total), (images, *space))
    index, inside = [], np.ones((taken,) + (1,) * rank, dtype=bool)
    for axis, (size, window, stride, dilation, before) in enumerate(parts):
        spot = places[axis][:, None] * stride - before + dilation * np.arange(window)
        shape = [taken] + [window if i == axis else 1 for i in range(rank)]
        inside = inside & ((spot >= 0) & (spot < size)).reshape(shape)
        index.append(np.clip(spot, 0, size - 1).reshape(shape))
    place = (image.reshape((-1,) + (1,) * rank), slice(None), *index)
    picked = x[place]  # [n, *window, c]
    if not inside.all():
        picked = np.where(inside[..., None], picked, x.dtype.type(0))
    picked = np.moveaxis(picked, -1, 1)
    width = int(np.prod(picked.shape[1:])) // operator.group  # -1 has no meaning where nothing is taken
    return np.ascontiguousarray(picked.reshape(taken, operator.group, width))


def evenly(count: int, total: int) -> np.ndarray:
    """``count`` evenly spaced places of ``total``, int64; all of them where there are fewer."""
    taken = max(0, min(count, total))
    return np.asarray((np.arange(taken) * 2 + 1) * total // (2 * max(1, taken)))


def _value(program: Program, name: str) -> ir.Value | None:
    found = program.graph.initializers.get(name)
    if found is not None:
        return found
    return next((v for n in program.graph for v in n.outputs if v.name == name), None)


def _matrix(node: ir.Node) -> WeightedOperator | str | None:
    first, second = node.inputs[0], node.inputs[1]
    left, right = constant(first), constant(second)
    weight, other, side = (second, first, 0) if right is not None else (first, second, 1)
    array = right if right is not None else left
    if array is None or other is None or weight is None or constant(other) is not None:
        return None  # a product of two activations has no weight; one of two constants is a constant
    if array.ndim != 2:
        return f"its weight has rank {array.ndim}"
    if node.op_type == "Gemm":
        if side == 1 or node.attributes.get_int("transA") or 0:
            return "its activation is transposed"
        flipped = not (node.attributes.get_int("transB") or 0)
        return WeightedOperator(node.name or "", "gemm", other.name or "", weight.name or "", flipped)
    return WeightedOperator(node.name or "", "matmul", other.name or "", weight.name or "", side == 0, side)


def _conv(node: ir.Node, shapes: Mapping[str, Observed]) -> WeightedOperator | str | None:
    data, array = node.inputs[0], constant(node.inputs[1])
    if array is None or data is None or (data.name or "") not in shapes:
        return "its kernel is not constant"
    return convolution(node, data, array.shape, shapes)


def convolution(
    node: ir.Node, data: ir.Value, weight: tuple[int, ...], shapes: Mapping[str, Observed]
) -> WeightedOperator:
    """How a Conv with a kernel of shape ``weight`` reads ``data``.

    Args:
        node: The convolution.
        data: What it reads, or what that is made from in the same shape.
        weight: ``[out, in / group, *window]``.
        shapes: Of values for some feeds; hold that of ``data``.
    """
    rank = len(weight) - 2
    strides = tuple(node.attributes.get_ints("strides") or (1,) * rank)
    dilations = tuple(node.attributes.get_ints("dilations") or (1,) * rank)
    kernel = tuple(weight[2:])
    pads = tuple(node.attributes.get_ints("pads") or (0,) * (2 * rank))
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = same_pads(shapes[data.name or ""][0][2:], kernel, strides, dilations, mode == "SAME_LOWER")
    return WeightedOperator(
        node.name or "",
        "conv",
        data.name or "",
        (node.inputs[1].name if node.inputs[1] is not None else "") or "",
        group=int(node.attributes.get_int("group", 1) or 1),
        kernel=kernel,
        strides=strides,
        pads=pads,
        dilations=dilations,
    )


def same_pads(
    space: tuple[int, ...],
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    lower: bool,
) -> tuple[int, ...]:
    """Padding of automatic modes, all befores, then all afters; what is odd lies behind unless ``lower``."""
    before, after = [], []
    for size, window, stride, dilation in zip(space, kernel, strides, dilations, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + dilation * (window - 1) + 1 - size)
        small, large = total // 2, total - total // 2
        before.append(large if lower else small)
        after.append(small if lower else large)
    return (*before, *after)
