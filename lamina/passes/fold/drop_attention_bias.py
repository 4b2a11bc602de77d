"""Spare the biases of keys and values: softmax does not see the one, and hands the other on whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import (
    LocalFold,
    attribute,
    constant,
    is_op,
    rank_of,
    scalar,
    sole_consumer,
    sweep,
)
from lamina.passes.fold.heads import Packed, merged, packed, permutation, same_dim
from lamina.passes.pass_ import Effect, Rounding

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


@dataclass(frozen=True)
class _Match:
    add: ir.Node  # the bias that goes
    kept: ir.Value  # what it was added to
    later: ir.Node | None = None  # the Add behind the output projection, which takes a value's bias over
    bias: np.ndarray[Any, Any] | None = None  # what it adds then


@dataclass(frozen=True)
class DropAttentionBias(LocalFold):
    """Remove the bias of a key projection, and move that of a value projection behind the output projection.

    softmax(q (k + c)^T) = softmax(q k^T): q c^T is one number a query, and softmax is invariant to a shift.
    softmax(s) (v + c) O + b = softmax(s) v O + (c O + b): the rows of a softmax sum to one.

    Fires: a Softmax over the last axis; between it and the product only masks that are added and scaling by a
    number; heads split off by Reshape and Transpose, or one head without.
    Runs after the forms: fold_norm_affine puts a norm's bias into those of keys and values.
    Refuses: masks by Where, whose constants do not shift; rotated keys; an intermediate value that is read
    elsewhere, such as a cache; half precision; for values a key length that may be zero while queries are
    not, and an output projection without a bias.
    Effect: Rounding; both are identities of real arithmetic.
    Cost: O(Softmax nodes) and one vector-matrix product a match.
    Source: the shift invariance is folklore; Namazifar et al. 2023, arXiv:2302.08626, study the key's bias.
    """

    effect: ClassVar[Effect] = Rounding(ulps=64)
    anchors: ClassVar[tuple[str, ...]] = ("Softmax",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """A bias that can go."""
        rank = rank_of(node.inputs[0])
        if rank not in (3, 4) or attribute(node, "axis", -1) not in (-1, rank - 1):
            return None
        if node.outputs[0].dtype not in _FLOATS:
            return None
        return _key(node, rank) or _value(node, rank)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Read what the bias was added to; give the later Add its sum."""
        where = match.add.name or "Add"
        rewriter.replace_uses(match.add.outputs[0], match.kept)
        sweep(rewriter, [match.add])
        if match.later is not None:
            old = next(
                i for i, v in enumerate(match.later.inputs) if v is not None and constant(v) is not None
            )
            bias = rewriter.constant(match.bias, f"{match.later.name}_bias")
            match.later.replace_input_with(old, bias)
        why = "softmax ignores a key's bias" if match.later is None else "a value's bias moved behind"
        rewriter.record(self.name, where, why)


def _key(softmax: ir.Node, rank: int) -> _Match | None:
    value = softmax.inputs[0]
    while value is not None and sole_consumer(value) is not None:
        node = value.producer()
        if is_op(node, "MatMul") and node is not None:
            biased = _split(node.inputs[1], rank, turned=True)
            return None if biased is None else _bias(biased)
        value = None if node is None else _unshifted(node)
    return None


def _unshifted(node: ir.Node) -> ir.Value | None:
    """The operand of a masked sum or a scaling on which a shift stays a shift."""
    if is_op(node, "Mul", "Div") and scalar(node.inputs[1], rank_of(node.inputs[0])) is not None:
        return node.inputs[0]
    if not is_op(node, "Add"):
        return None
    products = [v for v in node.inputs if v is not None and _ends_in_product(v)]
    return products[0] if len(products) == 1 else None


def _ends_in_product(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and is_op(node, "Mul", "Div") and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return is_op(node, "MatMul")


def _value(softmax: ir.Node, rank: int) -> _Match | None:
    weights = softmax.outputs[0]
    product = sole_consumer(weights)
    if product is None or not is_op(product, "MatMul") or product.inputs[0] is not weights:
        return None
    if not _has_keys(weights):
        return None
    biased = _split(product.inputs[1], rank, turned=False)
    found = None if biased is None else _bias(biased)
    if found is None or biased is None or biased.shape is None:
        return None
    width = biased.shape[-1]
    mixed = product.outputs[0]
    joined = mixed if rank == 3 else merged(mixed, width) if isinstance(width, int) else None
    projection = None if joined is None else sole_consumer(joined)
    if projection is None or not is_op(projection, "MatMul") or projection.inputs[0] is not joined:
        return None
    last, later = constant(projection.inputs[1]), sole_consumer(projection.outputs[0])
    if last is None or last.ndim != 2 or later is None or not is_op(later, "Add"):
        return None
    bias = next((a for v in later.inputs if (a := constant(v)) is not None), None)
    bias_of_values = _vector(found.add)
    if bias is None or bias.ndim != 1 or bias_of_values is None or bias_of_values.size != last.shape[0]:
        return None
    moved = bias_of_values.astype(np.float64) @ last.astype(np.float64) + bias
    return _Match(found.add, found.kept, later, moved.astype(bias.dtype))


def _has_keys(weights: ir.Value) -> bool:
    """Whether there is a key wherever there is a query: without any, the rows sum to nothing."""
    if weights.shape is None:
        return False
    queries, keys = weights.shape[-2], weights.shape[-1]
    return same_dim(queries, keys) or (isinstance(keys, int) and keys > 0)


def _split(value: ir.Value | None, rank: int, *, turned: bool) -> ir.Value | None:
    """The [b, t, h d] projection that keys [.., d, t] (turned) or values [.., t, d] are read from."""
    if value is None or sole_consumer(value) is None:
        return None
    if rank == 3:
        node = value.producer()
        if not turned:
            return value
        return node.inputs[0] if node is not None and permutation(node) == (0, 2, 1) else None
    found: Packed | None = packed(value, (0, 2, 3, 1)) if turned else packed(value)
    if found is None and turned:
        node = value.producer()
        inner = node.inputs[0] if node is not None and permutation(node) == (0, 1, 3, 2) else None
        found = packed(inner) if inner is not None and sole_consumer(inner) is not None else None
    if found is None or sole_consumer(found.reshape.outputs[0]) is None:
        return None
    return found.value


def _bias(value: ir.Value) -> _Match | None:
    """The Add of a constant vector that gives ``value``, read once."""
    add = value.producer()
    if add is None or not is_op(add, "Add") or sole_consumer(value) is None or _vector(add) is None:
        return None
    kept = next((v for v in add.inputs if v is not None and constant(v) is None), None)
    if kept is None or rank_of(kept) != rank_of(value) or kept.dtype != value.dtype:
        return None
    return _Match(add, kept)


def _vector(add: ir.Node) -> np.ndarray[Any, Any] | None:
    """The constant an Add adds along the last axis."""
    array = next((a for v in add.inputs if (a := constant(v)) is not None), None)
    width = add.outputs[0].shape[-1] if add.outputs[0].shape is not None else None
    fits = array is not None and array.ndim == 1 and array.size == width and bool(np.isfinite(array).all())
    return array if fits else None
