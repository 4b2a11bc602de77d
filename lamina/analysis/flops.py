"""How many operations one ONNX operator performs, from the concrete shapes it works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

Tensors = Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]
_Rule = Callable[[ir.Node, Tensors], int]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Moves or views data, computes shapes, or makes constants: no arithmetic.
_FREE = _names(
    "Identity Reshape Squeeze Unsqueeze Flatten Transpose Concat Slice Split Gather GatherND "
    "GatherElements Scatter ScatterND ScatterElements Expand Tile Pad Shape Size Constant "
    "ConstantOfShape Cast CastLike Dropout DepthToSpace SpaceToDepth NonZero Range Where EyeLike OneHot "
    "ReverseSequence Compress Trilu Bernoulli RandomNormal RandomUniform RandomNormalLike "
    "RandomUniformLike Multinomial SequenceConstruct SequenceAt SplitToSequence ConcatFromSequence "
    "SequenceInsert SequenceEmpty SequenceLength Unique BitCast"
)
# One operation an output element.
_ELEMENTWISE = _names(
    "Add Sub Mul Div Pow Mod Max Min Sum Mean Abs Neg Sign Sqrt Exp Log Erf Reciprocal Floor Ceil Round "
    "Relu LeakyRelu PRelu Elu Selu Celu ThresholdedRelu Sigmoid HardSigmoid HardSwish Tanh Softplus "
    "Softsign Gelu Mish Swish Clip Not And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual IsNaN "
    "IsInf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Shrink BitShift BitwiseAnd BitwiseOr "
    "BitwiseXor BitwiseNot QuantizeLinear DequantizeLinear DynamicQuantizeLinear Hardmax QuickGelu "
    "FastGelu BiasGelu"
)
# One operation an input element.
_REDUCTIONS = _names(
    "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
    "ReduceSumSquare GlobalAveragePool GlobalMaxPool GlobalLpPool ArgMax ArgMin CumSum CumProd TopK Det"
)
# Normalizations and softmax, as passes over the input: subtract, square or exponentiate, sum, divide, scale.
_PASSES = {
    "Softmax": 5,
    "LogSoftmax": 5,
    "LayerNormalization": 8,
    "SkipLayerNormalization": 9,
    "RMSNormalization": 5,
    "SimplifiedLayerNormalization": 5,
    "SkipSimplifiedLayerNormalization": 6,
    "InstanceNormalization": 8,
    "GroupNormalization": 8,
    "BatchNormalization": 2,
    "LpNormalization": 3,
    "MeanVarianceNormalization": 6,
    "LRN": 6,
    "RotaryEmbedding": 3,
}


def count_operations(node: ir.Node, tensors: Tensors) -> tuple[int, int, bool]:
    """Operations and multiply-adds of one node, and whether a rule knows its operator.

    Args:
        node: The node.
        tensors: Shape and dtype of every value it reads and writes.
    """
    kind = node.op_type
    if kind in _MULTIPLY_ADDS:
        macs = _MULTIPLY_ADDS[kind](node, tensors)
        return 2 * macs + _extra(node, tensors), macs, True
    if kind in _FREE:
        return 0, 0, True
    if kind in _ELEMENTWISE:
        return _written(node, tensors), 0, True
    if kind in _REDUCTIONS:
        return _elements(node, 0, tensors), 0, True
    if kind in _PASSES:
        return _PASSES[kind] * _elements(node, 0, tensors), 0, True
    if kind in ("AveragePool", "MaxPool", "LpPool"):
        return _written(node, tensors) * _product(_ints(node, "kernel_shape")), 0, True
    if kind in ("Resize", "Upsample", "GridSample"):
        taps = 1 if _text(node, "mode", "nearest") == "nearest" else 4
        return _written(node, tensors) * 2 * taps, 0, True
    return _written(node, tensors), 0, False


def _shape_of(value: ir.Value | None, tensors: Tensors) -> tuple[int, ...] | None:
    known = tensors.get(value.name or "") if value is not None else None
    return None if known is None else known[0]


def _shape(node: ir.Node, index: int, tensors: Tensors) -> tuple[int, ...]:
    """Shape of an input; () where it is absent or no tensor."""
    return _shape_of(node.inputs[index] if index < len(node.inputs) else None, tensors) or ()


def _present(node: ir.Node, index: int) -> bool:
    return index < len(node.inputs) and node.inputs[index] is not None


def _product(dims: tuple[int, ...]) -> int:
    return int(np.prod(dims, dtype=np.int64))


def _elements(node: ir.Node, index: int, tensors: Tensors) -> int:
    return _product(_shape(node, index, tensors))


def _written(node: ir.Node, tensors: Tensors) -> int:
    shape = _shape_of(node.outputs[0] if node.outputs else None, tensors)
    return 0 if shape is None else _product(shape)


def _ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return tuple(attribute.as_ints()) if attribute is not None else ()


def _int(node: ir.Node, name: str, default: int = 0) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None else default


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return attribute.as_string() if attribute is not None else default


def _extra(node: ir.Node, tensors: Tensors) -> int:
    """Operations beside the multiply-adds: a bias, an attention's softmax."""
    kind = node.op_type
    if kind in ("Gemm", "Conv", "ConvTranspose", "FusedConv", "FusedGemm") and _present(node, 2):
        return _written(node, tensors)
    if kind in ("LSTM", "GRU", "RNN"):
        # Gates' activations and the elementwise products of the cell.
        return {"LSTM": 9, "GRU": 8, "RNN": 1}[kind] * _states(node, tensors)
    if kind in _ATTENTION:
        batch, heads, queries, keys, _, _ = _attention_sizes(node, tensors)
        return _PASSES["Softmax"] * batch * heads * queries * keys
    return 0


# -- multiply-adds ------------------------------------------------------------------------------------


def _matmul(node: ir.Node, tensors: Tensors) -> int:
    left = _shape(node, 0, tensors)
    inner = left[-2] if _int(node, "transA") and len(left) > 1 else left[-1] if left else 1
    return _written(node, tensors) * inner


def _qlinear_matmul(node: ir.Node, tensors: Tensors) -> int:
    left = _shape(node, 0, tensors)
    return _written(node, tensors) * (left[-1] if left else 1)


def _matmul_nbits(node: ir.Node, tensors: Tensors) -> int:
    return _written(node, tensors) * _int(node, "K")


def _conv_with(weight: int) -> _Rule:
    def conv(node: ir.Node, tensors: Tensors) -> int:
        # W [C_out, C_in / group, *k]: each output element takes C_in / group * k multiply-adds.
        return _written(node, tensors) * _product(_shape(node, weight, tensors)[1:])

    return conv


def _conv_transpose(node: ir.Node, tensors: Tensors) -> int:
    # W [C_in, C_out / group, *k]: each input element is spread over C_out / group * k.
    return _elements(node, 0, tensors) * _product(_shape(node, 1, tensors)[1:])


def _states(node: ir.Node, tensors: Tensors) -> int:
    """Hidden elements a recurrent operator computes: steps x batch x directions x width."""
    x, weight = _shape(node, 0, tensors), _shape(node, 2, tensors)
    return _product(x[:2]) * weight[0] * weight[2] if len(x) == 3 and len(weight) == 3 else 0


def _recurrent(node: ir.Node, tensors: Tensors) -> int:
    # W [directions, gates * h, input], R [directions, gates * h, h]: both are used once a step and sample.
    x = _shape(node, 0, tensors)
    return _product(x[:2]) * (_elements(node, 1, tensors) + _elements(node, 2, tensors))


def _attention_sizes(node: ir.Node, tensors: Tensors) -> tuple[int, int, int, int, int, int]:
    """Batch, heads, queries, keys, width of a query head, width of a value head."""
    query, key, value = (_shape(node, i, tensors) for i in range(3))
    heads = _int(node, "q_num_heads") or _int(node, "num_heads")
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        width = _shape(node, 1, tensors)[-1] // 3
        return query[0], heads, query[1], query[1], width // heads, width // heads
    key, value = key or query, value or key or query
    if len(query) == 4:
        batch, heads, queries, width = query
        keys, value_width = key[2], value[3]
    else:
        batch, queries = query[:2]
        groups = _int(node, "kv_num_heads") or heads
        keys, width, value_width = key[1], query[2] // heads, value[2] // groups
    past = next((_shape(node, i, tensors) for i in _PAST.get(node.op_type, ()) if _present(node, i)), ())
    return batch, heads, queries, keys + (past[2] if len(past) == 4 else 0), width, value_width


def _attention(node: ir.Node, tensors: Tensors) -> int:
    batch, heads, queries, keys, width, value_width = _attention_sizes(node, tensors)
    macs = batch * heads * queries * keys * (width + value_width)
    if node.domain == "com.microsoft" and node.op_type == "Attention":
        # This one holds the projections too: input [b, t, d] by W [d, 3 * width].
        macs += _elements(node, 0, tensors) * _shape(node, 1, tensors)[-1]
    return macs


def _einsum(node: ir.Node, tensors: Tensors) -> int:
    equation = _text(node, "equation", "").replace(" ", "")
    terms = equation.split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for index, term in enumerate(terms):
        shape = _shape(node, index, tensors)
        if "." in term:
            # The ellipsis takes what letters leave; its dims line up from the right.
            before, after = term.split("...")
            middle = shape[len(before) : len(shape) - len(after)]
            sizes.update({f".{i}": max(d, sizes.get(f".{i}", 1)) for i, d in enumerate(reversed(middle))})
            sizes.update(zip(before, shape, strict=False))
            sizes.update(zip(reversed(after), reversed(shape), strict=False))
        else:
            sizes.update(zip(term, shape, strict=False))
    return _product(tuple(sizes.values())) * max(1, len(terms) - 1)


_PAST = {"Attention": (4,), "GroupQueryAttention": (3,), "MultiHeadAttention": (6,)}
_ATTENTION = frozenset(("Attention", "MultiHeadAttention", "GroupQueryAttention"))
_MULTIPLY_ADDS: Mapping[str, _Rule] = {
    "MatMul": _matmul,
    "Gemm": _matmul,
    "FusedMatMul": _matmul,
    "FusedGemm": _matmul,
    "MatMulInteger": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "QLinearMatMul": _qlinear_matmul,
    "QGemm": _qlinear_matmul,
    "MatMulNBits": _matmul_nbits,
    "Conv": _conv_with(1),
    "FusedConv": _conv_with(1),
    "ConvInteger": _conv_with(1),
    "QLinearConv": _conv_with(3),
    "ConvTranspose": _conv_transpose,
    "DeformConv": _conv_with(1),
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "Attention": _attention,
    "MultiHeadAttention": _attention,
    "GroupQueryAttention": _attention,
    "Einsum": _einsum,
}
