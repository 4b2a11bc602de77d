"""Fold a scale or shift that stands for a replaced branch into the weights that make the skip."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lamina.analysis.operators import constant
from lamina.ir.rewriter import Rewriter

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


def fold_replacement(node: ir.Node, rewriter: Rewriter) -> bool:
    """Fold a Mul or Add of a constant vector into what makes its input; whether it could be done.

    Exact but for rounding. Into the gain and shift of a LayerNormalization, the bias of a MatMul, Gemm or
    Conv, or, through residual sums, the bias of a branch before. Nothing else may read what changes.

    Args:
        node: A Mul or Add whose second input is an initializer nobody else reads; removed where folded.
        rewriter: Of the program.
    """
    value, vector = node.inputs[0], constant(node.inputs[1])
    if value is None or vector is None or node.op_type not in ("Mul", "Add"):
        return False
    done = _fold(value, vector, node, rewriter, scale=node.op_type == "Mul")
    if done:
        rewriter.replace_uses(node.outputs[0], value)
        rewriter.remove([node])
    return done


def _fold(value: ir.Value, vector: np.ndarray, reader: ir.Node, rewriter: Rewriter, *, scale: bool) -> bool:
    """Make ``value`` what ``reader`` makes of it."""
    maker = value.producer()
    alone = [use.node for use in value.uses()] == [reader] and not value.is_graph_output()
    if maker is None or not alone or maker.graph is not rewriter.graph:
        return False
    if maker.op_type in _NORMS:
        return _into_norm(maker, vector.reshape(-1), rewriter, scale=scale)
    if scale:
        return False
    if maker.op_type in ("Conv", "Gemm"):
        return _into_operand(maker, 2, vector.reshape(-1), rewriter)
    if maker.op_type != "Add":
        return False
    for operand in (1, 0):
        shift = maker.inputs[operand]
        if constant(shift) is not None:
            return _into_operand(maker, operand, vector, rewriter)
    return any(
        v is not None and _fold(v, vector, maker, rewriter, scale=False) for v in reversed(maker.inputs)
    )


def _into_norm(norm: ir.Node, vector: np.ndarray, rewriter: Rewriter, *, scale: bool) -> bool:
    """Of g (.) + h: times s it is s g (.) + s h, plus t it is g (.) + (h + t)."""
    operands = [i for i in (1, 2) if i < len(norm.inputs) and norm.inputs[i] is not None]
    arrays = [constant(norm.inputs[i]) for i in operands]
    if any(a is None or a.shape != vector.shape for a in arrays):
        return False
    if not scale and (2 not in operands or norm.op_type != "LayerNormalization"):
        return False
    for operand, array in zip(operands, arrays, strict=True):
        if array is not None and (scale or operand == 2):
            fresh = array.astype(np.float64) * vector if scale else array.astype(np.float64) + vector
            _write(norm, operand, fresh.astype(array.dtype), rewriter)
    return True


def _into_operand(node: ir.Node, operand: int, vector: np.ndarray, rewriter: Rewriter) -> bool:
    """Add ``vector`` to a bias that has its size."""
    given = node.inputs[operand] if operand < len(node.inputs) else None
    array = constant(given)
    if array is None or array.size != vector.size or array.shape != vector.shape:
        return False
    if node.op_type == "Gemm" and node.attributes.get_float("beta", 1.0) != 1.0:
        return False
    _write(node, operand, (array.astype(np.float64) + vector).astype(array.dtype), rewriter)
    return True


def _write(node: ir.Node, operand: int, array: np.ndarray, rewriter: Rewriter) -> None:
    old = node.inputs[operand]
    name = "weight" if old is None else old.name
    node.replace_input_with(operand, rewriter.constant(array, f"{name}_folded"))
