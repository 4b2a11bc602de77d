"""Multiply two constant projections into one where only products with activations lie between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, constant, is_op, rank_of, sole_consumer, substitute, sweep
from lamina.passes.fold.heads import permutation
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    left: ir.Value
    right: ir.Value
    weight: np.ndarray[Any, Any]
    query_key: bool


@dataclass(frozen=True)
class ComposeProjections(LocalFold):
    """Save a projection of single-head attention: matrix products associate.

    P (x V) O = P (x (V O)), and (x Q) (y K)^T = (x (Q K^T)) y^T: one weight instead of two. With several
    heads the product of one head's pair would be as wide as the model, so only the unsplit case pays.

    Fires: float32; both weights constant matrices; nothing but the one activation product, or the
    transposition of k, between them; the composed matrix no larger than the two, its width no wider.
    Refuses: a bias between the two; an intermediate value read elsewhere; a composed matrix that costs more.
    Effect: Rounding; the weights are multiplied in float64 and rounded once.
    Cost: O(MatMul nodes) and one small matrix product a match.
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    anchors: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """A product that ends in a constant weight (V and O), or in two projections (Q and K)."""
        last = _weight(node)
        return _query_key(node) if last is None else _value_output(node, last)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the composed projection, then the activation product."""
        where = node.name or "MatMul"
        weight = rewriter.constant(match.weight, f"{where}_composed")
        source = match.right if not match.query_key else match.left
        width = match.weight.shape[1]
        shape = None if source.shape is None else ir.Shape([*source.shape[:-1], width])
        rewriter.at(node)
        projected = rewriter.op(
            "MatMul", [source, weight], name=f"{where}_projection", dtype=ir.DataType.FLOAT, shape=shape
        )
        if not match.query_key:
            substitute(rewriter, node.outputs[0], "MatMul", [match.left, projected])
        else:
            turned = node.inputs[1].producer() if node.inputs[1] is not None else None
            old = None if turned is None else turned.inputs[0]
            assert turned is not None
            assert old is not None
            turned.replace_input_with(0, match.right)
            turned.outputs[0].shape = None if match.right.shape is None else _swapped(match.right.shape)
            sweep(rewriter, [p for p in [old.producer()] if p is not None])
            substitute(rewriter, node.outputs[0], "MatMul", [projected, turned.outputs[0]])
        rewriter.record(self.name, where, "two constant projections multiplied into one")


def _swapped(shape: ir.Shape) -> ir.Shape:
    return ir.Shape([*shape[:-2], shape[-1], shape[-2]])


def _weight(node: ir.Node) -> np.ndarray[Any, Any] | None:
    """The constant float32 matrix a MatMul multiplies by from the right."""
    value = node.inputs[1]
    if value is None or value.const_value is None or value.dtype is not ir.DataType.FLOAT:
        return None
    array = constant(value)
    return array if array is not None and array.ndim == 2 else None


def _projection(value: ir.Value | None) -> tuple[ir.Value, np.ndarray[Any, Any]] | None:
    """The input and weight of a projection that only one node reads."""
    node = None if value is None else value.producer()
    if value is None or node is None or not is_op(node, "MatMul") or sole_consumer(value) is None:
        return None
    weight, source = _weight(node), node.inputs[0]
    return None if weight is None or source is None else (source, weight)


def _value_output(node: ir.Node, last: np.ndarray[Any, Any]) -> _Match | str | None:
    inner = node.inputs[0]
    product = None if inner is None else inner.producer()
    if inner is None or product is None or not is_op(product, "MatMul") or _weight(product) is not None:
        return None
    left, values = product.inputs[0], _projection(product.inputs[1])
    if left is None or values is None:
        return None
    if sole_consumer(inner) is None or rank_of(product.inputs[1]) is None:
        return "the product between the two is read elsewhere"
    source, first = values
    if last.shape[1] > last.shape[0] or first.shape[0] * last.shape[1] > first.size + last.size:
        return "the composed matrix would cost more"
    return _Match(left, source, _product(first, last), query_key=False)


def _query_key(node: ir.Node) -> _Match | str | None:
    query = _projection(node.inputs[0])
    turned = node.inputs[1].producer() if node.inputs[1] is not None else None
    if query is None or turned is None or sole_consumer(turned.outputs[0]) is None:
        return None
    rank = rank_of(turned.inputs[0])
    if rank is None or permutation(turned) != (*range(rank - 2), rank - 1, rank - 2):
        return None
    key = _projection(turned.inputs[0])
    if key is None:
        return None
    (x, q), (y, k) = query, key
    if k.shape[0] > k.shape[1] or q.shape[0] * k.shape[0] > q.size + k.size:
        return "the composed matrix would cost more"
    return _Match(x, y, _product(q, k.T), query_key=True)


def _product(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (a.astype(np.float64) @ b.astype(np.float64)).astype(np.float32)
