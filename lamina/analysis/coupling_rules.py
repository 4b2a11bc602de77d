"""Which coupling rule an operator follows; what has none freezes the axes it touches."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from lamina.analysis import coupling_layout as layout
from lamina.analysis import coupling_linear as linear
from lamina.analysis import coupling_pointwise as pointwise
from lamina.analysis.coupling_relation import Relation
from lamina.analysis.flops import Tensors
from lamina.ir.names import subgraphs
from lamina.ir.semantics import why_fenced

_Rule = Callable[[Relation], None]


def _table(*rows: tuple[_Rule, str]) -> Mapping[str, _Rule]:
    return {name: rule for rule, names in rows for name in names.split()}


RULES: Mapping[str, _Rule] = _table(
    (
        pointwise.elementwise,
        "Add Sub Mul Div Pow Mod Max Min Sum Mean Abs Neg Sign Sqrt Exp Log Erf Reciprocal Floor Ceil Round "
        "Relu LeakyRelu PRelu Elu Selu Celu ThresholdedRelu Sigmoid HardSigmoid HardSwish Tanh Softplus "
        "Softsign Gelu Mish Swish Shrink Not And Or Xor Equal Greater GreaterOrEqual Less LessOrEqual IsNaN "
        "IsInf Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh BitShift BitwiseAnd BitwiseOr "
        "BitwiseXor BitwiseNot Where Identity FastGelu BiasGelu QuickGelu",
    ),
    (pointwise.first_only, "Cast CastLike Clip Dropout"),
    (pointwise.quantize, "QuantizeLinear DequantizeLinear"),
    (pointwise.dynamic_quantize, "DynamicQuantizeLinear"),
    (pointwise.softmax, "Softmax LogSoftmax"),
    (pointwise.lp_normalization, "LpNormalization"),
    (pointwise.along, "CumSum Hardmax TopK ArgMax ArgMin"),
    (
        pointwise.reduce,
        "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp "
        "ReduceSumSquare",
    ),
    (
        pointwise.pool,
        "MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool GridSample",
    ),
    (pointwise.batch_normalization, "BatchNormalization InstanceNormalization"),
    (
        pointwise.layer_normalization,
        "LayerNormalization RMSNormalization SimplifiedLayerNormalization SkipLayerNormalization "
        "SkipSimplifiedLayerNormalization",
    ),
    (pointwise.group_normalization, "GroupNormalization"),
    (pointwise.local_response, "LRN"),
    (pointwise.mean_variance, "MeanVarianceNormalization"),
    (linear.matmul, "MatMul MatMulInteger QLinearMatMul"),
    (linear.gemm, "Gemm"),
    (linear.conv, "Conv ConvInteger QLinearConv"),
    (linear.conv_transpose, "ConvTranspose"),
    (linear.einsum, "Einsum"),
    (linear.recurrent, "LSTM GRU RNN"),
    (linear.attention, "Attention MultiHeadAttention GroupQueryAttention"),
    (layout.reshape, "Reshape Flatten Squeeze Unsqueeze"),
    (layout.transpose, "Transpose"),
    (layout.concat, "Concat"),
    (layout.split, "Split"),
    (layout.slice_, "Slice"),
    (layout.gather, "Gather"),
    (layout.expand, "Expand"),
    (layout.tile, "Tile"),
    (layout.pad, "Pad"),
    (layout.resize, "Resize"),
    (layout.space_to_depth, "SpaceToDepth DepthToSpace"),
    (layout.constant_of_shape, "ConstantOfShape"),
    (layout.shape_of, "Shape"),
    (layout.triangle, "Trilu"),
)
# Operators of these domains that a rule is meant for; the same name elsewhere may be something else.
_CONTRIB = frozenset(
    (
        *("FastGelu", "BiasGelu", "QuickGelu", "Gelu", "MultiHeadAttention", "GroupQueryAttention"),
        *("SimplifiedLayerNormalization", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"),
    )
)


def relation_of(node: ir.Node, tensors: Tensors) -> Relation:
    """What a node ties and freezes, for concrete shapes."""
    relation = Relation(node, tensors)
    reason = _untouchable(node, relation)
    if reason is None:
        RULES[node.op_type](relation)
    else:
        relation.freeze_all(reason)
    return relation.finish()


def _untouchable(node: ir.Node, relation: Relation) -> str | None:
    if next(subgraphs(node), None) is not None:
        return "subgraphs are not looked into"
    fenced = why_fenced(node)
    if fenced is not None and node.op_type != "GroupQueryAttention":
        return fenced.partition(":")[0]
    own = node.domain in ("", "ai.onnx") or (node.domain == "com.microsoft" and node.op_type in _CONTRIB)
    if not own or node.op_type not in RULES:
        return "the operator has no rule"
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.name]
    if any(relation.shape(v) is None for v in values):
        return "a shape is not known"
    return None
