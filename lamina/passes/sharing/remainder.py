"""Low-rank remainders of linear operators: ``W ~= W' + down up``, and the nodes that add them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter

# Share of the mean input energy added to every direction: one that calibration did not show still counts.
_DAMPING = 1e-3


def matrix_operand(node: ir.Node) -> int | None:
    """Which operand of a linear operator holds its matrix ``[in, out]`` or kernel; None: it has none.

    MatMul with a constant of rank 2 on either side, Gemm that does not transpose its activation, Conv.
    """
    if node.domain or node.op_type not in ("MatMul", "Gemm", "Conv"):
        return None
    if node.op_type == "Gemm" and (node.attributes.get_int("transA") or 0):
        return None
    for operand in (1, 0) if node.op_type == "MatMul" else (1,):
        value, other = node.inputs[operand], node.inputs[1 - operand]
        if value is None or value.const_value is None or other is None or other.const_value is not None:
            continue
        rank = len(value.const_value.shape)
        if rank > 2 if node.op_type == "Conv" else rank == 2:
            return operand
    return None


def as_matrices(node: ir.Node, array: np.ndarray) -> np.ndarray:
    """A linear operator's weight as float64 ``[group, in, out]``: ``y = x W`` for each group.

    Args:
        node: The operator; of a convolution, ``in`` counts the elements of a group's window.
        array: The weight as stored, the node's own or another of its shape.
    """
    wide = array.astype(np.float64)
    if node.op_type == "Conv":
        group = int(node.attributes.get_int("group", 1) or 1)
        return wide.reshape(group, wide.shape[0] // group, -1).transpose(0, 2, 1)
    return (wide.T if _flipped(node) else wide)[None]


def energy(matrices: np.ndarray, moments: np.ndarray | None) -> float:
    """Mean squared output of ``[group, in, out]``, up to a factor: ``tr(W' XtX W)``, or ``tr(W' W)``."""
    seen = matrices if moments is None else moments @ matrices
    return float(np.sum(matrices * seen))


def low_rank(difference: np.ndarray, moments: np.ndarray | None, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best ``down up`` of a rank for a difference of weights, by truncated singular values.

    With moments, what is least is the error of the outputs, ``L2(X (D - down up))``: singular values of
    ``L' D``, ``L L' = XtX``, slightly damped. At full rank the product is the difference.

    Args:
        difference: float64 ``[group, in, out]``.
        moments: XtX of what each group reads, ``[group, in, in]``; None: all directions alike.
        rank: At least 1; cut to what the shape allows.

    Returns:
        float64 ``[group, in, rank]`` and ``[group, rank, out]``.
    """
    rank = min(rank, *difference.shape[1:])
    if moments is None:
        u, s, v = np.linalg.svd(difference, full_matrices=False)
        return u[..., :rank] * s[:, None, :rank], v[:, :rank]
    width = difference.shape[1]
    level = np.trace(moments, axis1=1, axis2=2) / width
    root = np.linalg.cholesky(moments + (_DAMPING * level + 1e-30)[:, None, None] * np.eye(width))
    _, _, v = np.linalg.svd(root.transpose(0, 2, 1) @ difference, full_matrices=False)
    up = v[:, :rank]
    return difference @ up.transpose(0, 2, 1), up  # the projection on the leading outputs


def add_remainder(
    node: ir.Node, x: ir.Value, made: ir.Value, down: np.ndarray, up: np.ndarray, rewriter: Rewriter
) -> ir.Value:
    """``made`` plus what a remainder makes of ``x``: two operators and an Add.

    Args:
        node: The operator the remainder belongs to: names, attributes and orientation are taken from it.
        x: What it reads now.
        made: What it makes now.
        down: ``[group, in, rank]`` of :func:`low_rank`.
        up: ``[group, rank, out]``.
        rewriter: Where the nodes go.
    """
    label = f"{node.name}_remainder"
    kind = made.dtype or x.dtype or ir.DataType.FLOAT

    def weight(array: np.ndarray, part: str) -> ir.Value:
        return rewriter.constant(np.ascontiguousarray(array.astype(kind.numpy())), f"{label}_{part}_weight")

    def op(op_type: str, inputs: list[ir.Value], part: str, **attributes: object) -> ir.Value:
        return rewriter.op(op_type, inputs, attributes, name=f"{label}_{part}", dtype=kind)

    if node.op_type == "Conv":
        tensor = node.inputs[1].const_value if node.inputs[1] is not None else None
        assert tensor is not None
        taps = tuple(tensor.shape.numpy()[1:])
        group, _, rank = down.shape
        first = weight(down.transpose(0, 2, 1).reshape(group * rank, *taps), "down")
        attributes = {key: a.value for key, a in node.attributes.items()}
        narrow = op("Conv", [x, first], "down", **attributes)
        kernel = up.transpose(0, 2, 1).reshape(-1, rank, *(1,) * (len(taps) - 1))
        extra = op("Conv", [narrow, weight(kernel, "up")], "up", group=group)
    elif node.op_type == "MatMul" and matrix_operand(node) == 0:
        narrow = op("MatMul", [weight(down[0].T, "down"), x], "down")
        extra = op("MatMul", [weight(up[0].T, "up"), narrow], "up")
    else:
        scale = float(node.attributes.get_float("alpha", 1.0) or 0.0) if node.op_type == "Gemm" else 1.0
        narrow = op("MatMul", [x, weight(down[0], "down")], "down")
        extra = op("MatMul", [narrow, weight(scale * up[0], "up")], "up")
    total = op("Add", [made, extra], "add")
    total.shape = made.shape
    return total


def _flipped(node: ir.Node) -> bool:
    """Whether the stored matrix is ``[out, in]``."""
    if node.op_type == "Gemm":
        return bool(node.attributes.get_int("transB", 0))
    return matrix_operand(node) == 0
