"""ONNX Runtime's Attention and EmbedLayerNormalization in plain operators, where that is exact."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, rank_of
from lamina.passes.fold.unfuse_contrib import Chain, is_read, needed, operand


def attention(node: ir.Node, rewriter: Rewriter) -> list[ir.Value | None] | str:
    """Softmax(q k^T scale + mask) v, with q, k and v projected by one weight.

    Left alone: past and present keys, causal masks, rotary positions, masks given as lengths.
    """
    sizes = _sizes(node)
    reason = _attention_reason(node) if not isinstance(sizes, str) else sizes
    if reason is not None or isinstance(sizes, str):
        return reason or ""
    heads = int(attribute(node, "num_heads", 0))
    chain = Chain(node, rewriter)
    projected = chain.op("MatMul", needed(node, 0), needed(node, 1))
    bias = operand(node, 2)
    if bias is not None:
        projected = chain.op("Add", projected, bias)
    first = rewriter.op(
        "Split", [projected, chain.integers(*sizes)], {"axis": -1}, outputs=3, name=f"{node.name}_Split"
    )
    split = first.producer()
    assert split is not None
    for part in split.outputs:
        part.type = node.outputs[0].type
    query, key, value = (
        chain.op("Reshape", part, chain.integers(0, 0, heads, size // heads))
        for part, size in zip(split.outputs, sizes, strict=True)
    )
    query = chain.op("Transpose", query, perm=[0, 2, 1, 3])
    scores = chain.op("MatMul", query, chain.op("Transpose", key, perm=[0, 2, 3, 1]))
    scale = float(attribute(node, "scale", 0.0)) or 1 / math.sqrt(sizes[0] // heads)
    scores = _masked(node, chain, chain.op("Mul", scores, chain.number(scale)))
    weights = chain.op("Softmax", scores, axis=-1)
    mixed = chain.op("MatMul", weights, chain.op("Transpose", value, perm=[0, 2, 1, 3]))
    mixed = chain.op("Transpose", mixed, perm=[0, 2, 1, 3])
    return [chain.op("Reshape", mixed, chain.integers(0, 0, sizes[2]))]


def _sizes(node: ir.Node) -> tuple[int, int, int] | str:
    stated = attribute(node, "qkv_hidden_sizes", None)
    if stated:
        return int(stated[0]), int(stated[1]), int(stated[2])
    weight = needed(node, 1)
    width = weight.shape[-1] if weight.shape is not None else None
    if not isinstance(width, int) or width % 3:
        return "the width of its weight is unknown"
    return width // 3, width // 3, width // 3


def _attention_reason(node: ir.Node) -> str | None:
    """Why the plain form would not be exact."""
    mask = operand(node, 3)
    if operand(node, 4) is not None or is_read(node, 1):
        return "it keeps past keys and values"
    if attribute(node, "unidirectional", 0):
        return "it masks later positions"
    if attribute(node, "do_rotary", 0):
        return "it turns queries and keys by their positions"
    if mask is not None and rank_of(mask) not in (2, 3):
        return "its mask is not one of positions"
    return None


def _masked(node: ir.Node, chain: Chain, scores: ir.Value) -> ir.Value:
    """The scores, with the filter value added where the mask is not positive, and the attention bias."""
    mask, extra = operand(node, 3), operand(node, 5)
    if extra is not None:
        scores = chain.op("Add", scores, extra)
    if mask is None:
        return scores
    rewriter = chain.rewriter
    dtype = mask.dtype or ir.DataType.INT32
    zero = rewriter.constant(np.array(0, dtype.numpy()), f"{node.name}_zero")
    seen = rewriter.op("Greater", [mask, zero], name=f"{node.name}_Greater", dtype=ir.DataType.BOOL)
    low = chain.number(float(attribute(node, "mask_filter_value", -10000.0)))
    added = chain.op("Where", seen, chain.number(0), low)
    axes = chain.integers(1, 2) if rank_of(mask) == 2 else chain.integers(1)
    return chain.op("Add", scores, chain.op("Unsqueeze", added, axes))


def embed_layer_normalization(node: ir.Node, rewriter: Rewriter) -> list[ir.Value | None] | str:
    """LayerNormalization of the sum of word, position and segment embeddings, and that sum."""
    if is_read(node, 1):
        return "the lengths of its mask are read"
    ids, segments, positions = needed(node, 0), operand(node, 1), operand(node, 8)
    chain = Chain(node, rewriter)
    total = chain.op("Gather", needed(node, 2), ids)
    if positions is not None:
        total = chain.op("Add", total, chain.op("Gather", needed(node, 3), positions))
    else:
        shape = rewriter.op("Shape", [ids], name=f"{node.name}_Shape", dtype=ir.DataType.INT64)
        bounds = [chain.integers(1), chain.integers(2), chain.integers(0)]
        length = rewriter.op("Slice", [shape, *bounds], name=f"{node.name}_length", dtype=ir.DataType.INT64)
        total = chain.op(
            "Add", total, chain.op("Slice", needed(node, 3), chain.integers(0), length, chain.integers(0))
        )
    table = operand(node, 4)
    if segments is not None and table is not None:
        total = chain.op("Add", total, chain.op("Gather", table, segments))
    epsilon = float(attribute(node, "epsilon", 1e-12))
    result = chain.op("LayerNormalization", total, needed(node, 5), needed(node, 6), axis=-1, epsilon=epsilon)
    return [result, None, total if is_read(node, 2) else None]
