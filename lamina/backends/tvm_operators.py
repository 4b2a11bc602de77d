"""Which ONNX operators TVM's Relax front end may be given: what was seen to work, and known traps by name.

TVM 0.27 looks operators up by name alone, whatever their domain, and takes the nearest converter it has,
whatever the opset. So the list here is not its map but what passed onnx's own node tests (docs/tvm.md).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx
import onnx_ir as ir

NEWEST_OPSET = 22  # what TVM's converters were written and tested against

_STANDARD = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BitShift
BitwiseAnd BitwiseNot BitwiseOr BitwiseXor Cast CastLike Ceil Clip Compress Concat Constant
ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout
DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor Gather GatherElements
GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LayerNormalization
LeakyRelu Less LessOrEqual Log LogSoftmax LpPool MatMul MatMulInteger Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not Or PRelu Pad Pow
QuantizeLinear RMSNormalization Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax
ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize RoiAlign Round
ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus Softsign
SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unique
Unsqueeze Where Xor
"""
_CONTRIB = "Attention BiasGelu EmbedLayerNormalization FastGelu Gelu SkipLayerNormalization"

ALLOWED: frozenset[tuple[str, str]] = frozenset(
    [("", name) for name in _STANDARD.split()] + [("com.microsoft", name) for name in _CONTRIB.split()]
)

_D = ir.DataType
DTYPES = frozenset(
    {_D.FLOAT, _D.DOUBLE, _D.FLOAT16, _D.BOOL, _D.INT8, _D.INT16, _D.INT32, _D.INT64}
    | {_D.UINT8, _D.UINT16, _D.UINT32, _D.UINT64}
)

# Inputs TVM reads while it imports: they must be constants by then (after folding).
_CONSTANT_INPUTS: dict[str, tuple[int, ...]] = {
    **{
        f"Reduce{k}": (1,)
        for k in ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]
    },
    "CumSum": (1,),
    "Pad": (1, 3),
    "Resize": (1, 2, 3),
    "Split": (1,),
    "TopK": (1,),
}


@dataclass(frozen=True)
class Unimportable:
    """One node TVM cannot be given.

    Attributes:
        node: Its name.
        operator: ``domain.op``, or the operator alone in the default domain.
        reason: Why, to follow the operator's name in a sentence.
    """

    node: str
    operator: str
    reason: str


def unimportable(model: ir.Model) -> Iterator[Unimportable]:
    """Every node of ``model``, subgraphs included, that TVM would refuse or get wrong."""
    opset = model.opset_imports.get("", 1)
    for node in model.graph.all_nodes():
        reason = _reason(node, opset)
        if reason:
            operator = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            yield Unimportable(node.name or "", operator, reason)


def _reason(node: ir.Node, opset: int) -> str | None:
    if (node.domain, node.op_type) not in ALLOWED:
        return "has no importer that was seen to work"
    for value in (*node.inputs, *node.outputs):
        if value is not None and value.dtype is not None and value.dtype not in DTYPES:
            return f"works on {value.dtype.name.lower()} ('{value.name}')"
    if node.op_type.startswith("Reduce") and _empty(node.inputs[0]):
        return "reduces an empty tensor, which TVM gets wrong"
    for index in _CONSTANT_INPUTS.get(node.op_type, ()):
        value = _input(node, index)
        if value is not None and value.const_value is None:
            return f"needs a constant for its input {index} ('{value.name}')"
    check = _CHECKS.get(node.op_type)
    found = check(node) if check else None
    return found or _newer_than_known(node, opset)


def _newer_than_known(node: ir.Node, opset: int) -> str | None:
    """What opsets after the known one added, besides element types: new operators and attributes."""
    if node.domain or opset <= NEWEST_OPSET or node.op_type == "RMSNormalization":
        return None
    known = set(onnx.defs.get_schema(node.op_type, NEWEST_OPSET, "").attributes)
    added = [name for name in node.attributes if name not in known]
    return f"has the attribute '{added[0]}', newer than opset {NEWEST_OPSET}" if added else None


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _empty(value: ir.Value | None) -> bool:
    return value is not None and value.shape is not None and 0 in tuple(value.shape)


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_string()


def _used(node: ir.Node, index: int) -> bool:
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


def _first_output_only(node: ir.Node) -> str | None:
    index = next((i for i in range(1, len(node.outputs)) if _used(node, i)), None)
    return None if index is None else f"is asked for its output {index}, which TVM gets wrong"


def _batch_normalization(node: ir.Node) -> str | None:
    return "is in training mode" if _integer(node, "training_mode", 0) else None


def _dropout(node: ir.Node) -> str | None:
    training = _input(node, 2)
    if training is not None:
        constant = training.const_value
        if constant is None or bool(constant.numpy().any()):
            return "may be in training mode"
    return _first_output_only(node)


def _conv_transpose(node: ir.Node) -> str | None:
    return "has output_shape, which TVM ignores" if "output_shape" in node.attributes else None


def _linear_quantization(node: ir.Node) -> str | None:
    if _integer(node, "block_size", 0):
        return "is quantized in blocks"
    return "has precision, which TVM does not know" if _integer(node, "precision", 0) else None


def _eye_like(node: ir.Node) -> str | None:
    return "has dtype, which TVM refuses" if "dtype" in node.attributes else None


def _is_inf(node: ir.Node) -> str | None:
    both = _integer(node, "detect_negative", 1) and _integer(node, "detect_positive", 1)
    return None if both else "looks for one sign only, which TVM ignores"


def _rms_normalization(node: ir.Node) -> str | None:
    value = _input(node, 0)
    rank = value.shape.rank() if value is not None and value.shape is not None else None
    axis = _integer(node, "axis", -1)
    over_all = axis == 0 or (rank is not None and axis == -rank)
    return "normalizes over every axis, which TVM cannot compile" if over_all else None


def _mod(node: ir.Node) -> str | None:
    value = _input(node, 0)
    floating = value is not None and value.dtype is not None and value.dtype.is_floating_point()
    return (
        "is an integer remainder of floats"
        if floating and not _integer(node, "fmod", 0)
        else _same_dtype(node)
    )


def _same_dtype(node: ir.Node) -> str | None:
    kinds = {v.dtype for v in node.inputs if v is not None and v.dtype is not None}
    return "mixes element types" if len(kinds) > 1 else None


def _pow(node: ir.Node) -> str | None:
    value = _input(node, 0)
    if value is not None and value.dtype is not None and not value.dtype.is_floating_point():
        return "is a power of integers"
    return _same_dtype(node)


def _not_boolean(node: ir.Node) -> str | None:
    value = _input(node, 0)
    return "reduces booleans" if value is not None and value.dtype == ir.DataType.BOOL else None


def _resize(node: ir.Node) -> str | None:
    for name in ("axes", "antialias"):
        if name in node.attributes and node.attributes[name].value:
            return f"has {name}, which TVM gets wrong"
    if _text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return "has keep_aspect_ratio_policy, which TVM refuses"
    if _text(node, "coordinate_transformation_mode", "half_pixel") == "half_pixel_symmetric":
        return "uses half_pixel_symmetric, which TVM does not know"
    scales, data = _input(node, 2), _input(node, 0)
    if _text(node, "mode", "nearest") == "nearest" or scales is None or scales.const_value is None:
        return None
    # TVM interpolates by the ratio of the sizes, ONNX by the scales: the same only when sizes come out whole
    sizes = data.shape if data is not None and data.shape is not None else ()
    factors = scales.const_value.numpy().ravel()
    whole = all(
        not isinstance(d, int) or float(d * f).is_integer() for d, f in zip(sizes, factors, strict=False)
    )
    return None if whole else "interpolates by scales that give no whole size, which TVM gets wrong"


def _roi_align(node: ir.Node) -> str | None:
    return "takes maxima, which TVM gets wrong" if _text(node, "mode", "avg") == "max" else None


def _split(node: ir.Node) -> str | None:
    sizes = _input(node, 1)
    constant = None if sizes is None else sizes.const_value
    return "has an empty part" if constant is not None and not constant.numpy().all() else None


def _tile(node: ir.Node) -> str | None:
    repeats = _input(node, 1)
    constant = None if repeats is None else repeats.const_value
    many = constant is not None and int((constant.numpy() != 1).sum()) > 2
    return "repeats more than two axes, which TVM gets wrong (it reads other memory)" if many else None


def _top_k(node: ir.Node) -> str | None:
    return None if _integer(node, "sorted", 1) else "does not ask for sorted values, which TVM refuses"


def _bit_shift(node: ir.Node) -> str | None:
    value = _input(node, 0)
    signed = value is not None and value.dtype is not None and value.dtype.is_signed()
    return "shifts signed integers, which TVM gets wrong" if signed else None


def _skip_layer_normalization(node: ir.Node) -> str | None:
    if _input(node, 3) is None or _input(node, 4) is None:
        return "lacks beta or bias, which TVM needs"
    return _first_output_only(node)


def _attention(node: ir.Node) -> str | None:
    if any(_input(node, i) is not None for i in range(3, 8)):
        return "has a mask, past or bias, which TVM gets wrong"
    if _integer(node, "unidirectional", 0):
        return "is unidirectional, which TVM refuses"
    return _first_output_only(node)


_CHECKS: dict[str, Callable[[ir.Node], str | None]] = {
    "Attention": _attention,
    "BatchNormalization": _batch_normalization,
    "BitShift": _bit_shift,
    "ConvTranspose": _conv_transpose,
    "DequantizeLinear": _linear_quantization,
    "Dropout": _dropout,
    "EyeLike": _eye_like,
    "IsInf": _is_inf,
    "LayerNormalization": _first_output_only,
    "MaxPool": _first_output_only,
    "Mod": _mod,
    "Pow": _pow,
    "QuantizeLinear": _linear_quantization,
    "RMSNormalization": _rms_normalization,
    "ReduceMax": _not_boolean,
    "ReduceMin": _not_boolean,
    "Resize": _resize,
    "RoiAlign": _roi_align,
    "SkipLayerNormalization": _skip_layer_normalization,
    "Split": _split,
    "Tile": _tile,
    "TopK": _top_k,
}

# Their kernels call routines that only the compiler's library has, not the runtime's.
NEED_COMPILER = frozenset({"NonMaxSuppression", "NonZero", "TopK"})


def plain_kernel(name: str) -> str:
    """A lowered function's name without the number that makes it unique: ``fused_matmul_add``."""
    return re.sub(r"(?<=[A-Za-z_])\d+$", "", name) or name
