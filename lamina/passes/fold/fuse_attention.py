"""Recognize scaled dot-product attention and write the standard operator."""

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
    substitute,
)
from lamina.passes.fold.heads import dimension, merged, packed, permutation, same_dim, same_dims, unrepeated
from lamina.passes.fold.masks import is_causal, may_hold_lowest
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class _Match:
    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    result: ir.Value
    heads: tuple[int, int] | None  # None: the operands are [b, h, t, d]
    causal: bool = False
    rows: ir.Value | None = None  # a value whose dimension 2 is t


@dataclass(frozen=True)
class _Core:
    """softmax(scale q k^T + mask) v, with q, k, v as the two products read them."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    result: ir.Value


@dataclass(frozen=True)
class FuseAttention(LocalFold):
    """Replace two MatMuls around a Softmax, scale and mask included, by ``Attention``.

    Heads that were repeated for grouped queries are read once; where heads are split off before and put
    together after, the operator takes and gives the unsplit tensors and four transposes go with it. A mask
    that is causal for every length becomes the operator's own.

    Fires: float32; q, k, v [b, h, t, d] with the heads known, or one head [b, t, d]; an additive mask
    that broadcasts to [b, h, t, s] and has all of s.
    Refuses: shapes that are not certain; scores or probabilities read elsewhere; k not transposed.
    Effect: Rounding, a few ulps of max|y|. A row masked by -inf throughout is
    NaN before and may not be after.
    Cost: O(Softmax nodes).
    Source: Vaswani et al. 2017, arXiv:1706.03762, eq. 1; Ainslie et al. 2023, arXiv:2305.13245.
    """

    effect: ClassVar[Effect] = Rounding(ulps=16)
    paper: ClassVar[str] = "arXiv:1706.03762"
    minimum_opset: ClassVar[int] = 23
    anchors: ClassVar[tuple[str, ...]] = ("Softmax",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """The attention around a Softmax."""
        core = _core(node)
        if core is None or isinstance(core, str):
            return core
        if core.q.dtype is not ir.DataType.FLOAT or any(rank_of(v) is None for v in (core.q, core.k, core.v)):
            return "its operands are not known to be float32 of known rank"
        rank = rank_of(core.q)
        if rank not in (3, 4) or rank_of(core.k) != rank or rank_of(core.v) != rank:
            return "its operands are not all [b, h, t, d] or all [b, t, d]"
        return _one_head(core) if rank == 3 else _many_heads(core)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the operator in place of the last product, or of what puts its heads together."""
        inputs = [match.q, match.k, match.v]
        if match.mask is not None:
            mask = _above_lowest(match.mask, rewriter.at(match.result.producer()))
            inputs.append(_whole_mask(match, mask, rewriter))
        attributes: dict[str, Any] = {"scale": match.scale}
        if match.causal:
            attributes["is_causal"] = 1
        if match.heads is not None:
            attributes |= {"q_num_heads": match.heads[0], "kv_num_heads": match.heads[1]}
        where = match.result.producer().name
        substitute(rewriter, match.result, "Attention", inputs, attributes)
        rewriter.record(self.name, where, "scaled dot-product attention")


def _core(softmax: ir.Node) -> _Core | str | None:
    scores, weights = softmax.inputs[0], softmax.outputs[0]
    product = sole_consumer(weights)
    if scores is None or product is None or not is_op(product, "MatMul") or product.inputs[0] is not weights:
        return None
    rank = rank_of(scores)
    if rank is None or attribute(softmax, "axis", -1) not in (-1, rank - 1):
        return "its softmax is not known to be over the last axis"
    scores, mask = _unmasked(scores)
    scores, scale = _unscaled(scores)
    dot = scores.producer()
    if dot is None or not is_op(dot, "MatMul") or sole_consumer(scores) is None:
        return "its scores are no product of two tensors, or are read elsewhere"
    q, turned, v = dot.inputs[0], dot.inputs[1], product.inputs[1]
    if q is None or turned is None or v is None:
        return None
    q, of_q = _unscaled(q)
    k, of_k = _transposed(turned)
    if k is None:
        return "k is not transposed right before the product"
    return _Core(q, k, v, mask, scale * of_q * of_k, product.outputs[0])


def _unmasked(scores: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    node = scores.producer()
    if node is None or not is_op(node, "Add") or sole_consumer(scores) is None:
        return scores, None
    for i in (0, 1):
        inner, mask = node.inputs[i], node.inputs[1 - i]
        if inner is not None and mask is not None and _is_product(_unscaled(inner)[0]):
            return inner, mask
    return scores, None


def _is_product(value: ir.Value) -> bool:
    return is_op(value.producer(), "MatMul")


def _unscaled(value: ir.Value) -> tuple[ir.Value, float]:
    """``value`` without a factor that only it reads, and the factor."""
    node = value.producer()
    if node is None or not is_op(node, "Mul", "Div") or sole_consumer(value) is None:
        return value, 1.0
    for i in (0, 1) if node.op_type == "Mul" else (1,):
        factor, rest = scalar(node.inputs[i], rank_of(value)), node.inputs[1 - i]
        if factor and rest is not None:
            return rest, factor if node.op_type == "Mul" else 1 / factor
    return value, 1.0


def _transposed(value: ir.Value) -> tuple[ir.Value | None, float]:
    """K of k^T: the value before a transposition of the last two axes, factors on either side taken out.

    Straight from [b, t, h, d] to [b, h, d, t] counts too: then k^T itself is returned, see _many_heads.
    """
    value, outer = _unscaled(value)
    node = value.producer()
    perm = permutation(node)
    if node is None or perm not in ((0, 2, 1), (0, 1, 3, 2), (0, 2, 3, 1)) or node.inputs[0] is None:
        return None, 1.0
    if perm == (0, 2, 3, 1):
        return value, outer
    inner, factor = _unscaled(node.inputs[0])
    return inner, outer * factor


def _one_head(core: _Core) -> _Match | str:
    if core.mask is not None:
        return "a mask on [b, t, d] operands"
    if not same_dims(core.q, core.k, (0, 2)) or not same_dims(core.k, core.v, (0, 1)):
        return "its shapes are not certain to agree"
    return _Match(core.q, core.k, core.v, None, core.scale, core.result, (1, 1))


def _many_heads(core: _Core) -> _Match | str:
    turned = permutation(core.k.producer()) == (0, 2, 3, 1)  # k is [b, h, d, s] then
    k, v = core.k if turned else unrepeated(core.k), unrepeated(core.v)
    q_heads, kv_heads = (value.shape[1] if value.shape is not None else None for value in (core.q, k))
    if (
        core.q.shape is None
        or not isinstance(q_heads, int)
        or not isinstance(kv_heads, int)
        or q_heads % kv_heads
    ):
        return "its heads are not known"
    if not same_dims(core.q, core.k, (0, 1)) or not same_dims(k, v, (0, 1)) or not same_dims(core.q, k, (0,)):
        return "its shapes are not certain to agree"
    length = k.shape[3 if turned else 2] if k.shape is not None else None
    if core.mask is not None and not _mask_fits(core.mask, core.q, length):
        return "its mask is not known to broadcast to [b, h, t, s] with all of s"
    causal = core.mask is not None and same_dim(core.q.shape[2], length) and is_causal(core.mask)
    mask = None if causal else core.mask
    sources = packed(core.q), packed(k, (0, 2, 3, 1) if turned else (0, 2, 1, 3)), packed(v)
    if all(s is not None for s in sources):
        q3, k3, v3 = (s.value for s in sources if s is not None)
        width = v.shape[3] if v.shape is not None else None
        whole = merged(core.result, q_heads * width) if isinstance(width, int) else None
        if whole is not None:
            return _Match(q3, k3, v3, mask, core.scale, whole, (q_heads, kv_heads), causal, core.q)
    if turned:
        return "k is [b, t, h, d] while the other operands are split"
    return _Match(core.q, k, v, mask, core.scale, core.result, None, causal, core.q)


def _above_lowest(mask: ir.Value, rewriter: Rewriter) -> ir.Value:
    """The mask without the lowest float, which means to mask all the same.

    trap: ONNX Runtime's kernel gives zeros for a row in which every key has that very float; softmax gives
    the mean of the values.
    """
    if not may_hold_lowest(mask):
        return mask
    array = constant(mask)
    least = np.array(np.finfo(np.float32).min / 2, np.float32)
    if array is not None:
        return rewriter.constant(np.maximum(array, least), f"{mask.name}_above_lowest")
    floor = rewriter.constant(least, "lamina_mask_floor")
    return rewriter.op("Max", [mask, floor], dtype=mask.dtype, shape=mask.shape)


def _whole_mask(match: _Match, mask: ir.Value, rewriter: Rewriter) -> ir.Value:
    """The mask with all of t: ONNX Runtime does not broadcast that dimension, as the operator allows."""
    assert mask.shape is not None
    if match.rows is None or mask.shape[-2] != 1:
        return mask
    one = rewriter.constant(np.array([1], np.int64), "lamina_mask_one")
    rows = dimension(rewriter, match.rows, 2)
    size = rewriter.op("Concat", [rows, one], {"axis": 0}, dtype=ir.DataType.INT64)
    assert match.rows.shape is not None
    shape = ir.Shape([*mask.shape[:-2], match.rows.shape[2], mask.shape[-1]])
    return rewriter.op("Expand", [mask, size], dtype=mask.dtype, shape=shape)


def _mask_fits(mask: ir.Value, q: ir.Value, length: object) -> bool:
    if mask.shape is None or q.shape is None or mask.dtype is not q.dtype or not 2 <= len(mask.shape) <= 4:
        return False
    target = [*q.shape[:3], length]
    pairs = zip(mask.shape, target[4 - len(mask.shape) :], strict=True)
    fits = all(same_dim(have, want) or have == 1 for have, want in pairs)
    return fits and same_dim(mask.shape[-1], length)
