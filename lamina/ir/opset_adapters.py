"""How single operators move to a newer opset where the schemas alone do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.errors import UnsupportedOperator
from lamina.ir.names import every_node


class Builder:
    """Adds constants to the main graph and nodes beside existing ones, all under fresh names."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
        for node in every_node(model.graph):
            self._taken.add(node.name)
            self._taken.update(v.name for v in node.outputs)

    def fresh(self, hint: str) -> str:
        """A name nothing in the model has."""
        name, i = hint, 1
        while name in self._taken:
            name, i = f"{hint}_{i}", i + 1
        self._taken.add(name)
        return name

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        """A new initializer of the main graph."""
        name = self.fresh(hint)
        tensor = ir.Tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def before(
        self, node: ir.Node, op_type: str, inputs: Iterable[ir.Value], attributes: dict[str, int]
    ) -> ir.Value:
        """A new node right before ``node``; its output."""
        made = ir.node(op_type, list(inputs), attributes, name=self.fresh(f"{node.name}_{op_type}"))
        made.outputs[0].name = self.fresh(f"{made.name}_out")
        made.outputs[0].type = node.inputs[0].type if node.inputs[0] is not None else None
        if op_type == "Shape":
            made.outputs[0].type = ir.TensorType(ir.DataType.INT64)
        made.metadata_props.update(node.metadata_props)
        owner = node.graph
        assert owner is not None
        owner.insert_before(node, made)
        return made.outputs[0]


def refusal(node: ir.Node, reason: str) -> UnsupportedOperator:
    """The error for a node that cannot be raised."""
    return UnsupportedOperator(
        f"{node.op_type} '{node.name}' cannot be raised to a newer opset: {reason}",
        advice="export the model with a newer opset",
    )


def _accept(node: ir.Node) -> None:
    """Any node of the type can be adapted."""


def _keep(node: ir.Node, builder: Builder) -> None:
    """The node means the same in the newer version."""


@dataclass(frozen=True)
class Adapter:
    """One step of one operator: ``check`` raises UnsupportedOperator or returns, ``change`` edits the node.

    Attributes:
        final: The result is valid in every later opset; no further step applies.
    """

    change: Callable[[ir.Node, Builder], None] = _keep
    check: Callable[[ir.Node], None] = _accept
    final: bool = False


# -- attributes that became inputs ----------------------------------------------------------------------


def _set_input(node: ir.Node, index: int, value: ir.Value) -> None:
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)


def _int64(node: ir.Node, attribute: str, index: int, builder: Builder, default: object = None) -> None:
    found = node.attributes.pop(attribute, None)
    content = found.value if found is not None else default
    if content is not None:
        value = builder.constant(np.array(content, np.int64), f"{node.name}_{attribute}")
        _set_input(node, index, value)


def _axes_to_input(node: ir.Node, builder: Builder) -> None:
    _int64(node, "axes", 1, builder)


def _split_to_input(node: ir.Node, builder: Builder) -> None:
    _int64(node, "split", 1, builder)


def _k_to_input(node: ir.Node, builder: Builder) -> None:
    found = node.attributes["k"].as_int()
    node.attributes["k"] = ir.AttrInt64s("k", [found])  # the input is a vector of one
    _int64(node, "k", 1, builder)


def _slice_to_inputs(node: ir.Node, builder: Builder) -> None:
    for i, name in enumerate(("starts", "ends", "axes"), 1):
        _int64(node, name, i, builder)


def _typed(node: ir.Node, number: float) -> np.ndarray:
    dtype = node.inputs[0].dtype if node.inputs[0] is not None else None
    return np.array(number, (dtype or ir.DataType.FLOAT).numpy())


def _pad_to_inputs(node: ir.Node, builder: Builder) -> None:
    _int64(node, "pads", 1, builder)
    fill = node.attributes.pop("value", None)
    if fill is not None and fill.as_float() != 0:
        _set_input(node, 2, builder.constant(_typed(node, fill.as_float()), f"{node.name}_value"))


def _clip_to_inputs(node: ir.Node, builder: Builder) -> None:
    for i, name in enumerate(("min", "max"), 1):
        limit = node.attributes.pop(name, None)
        if limit is not None:
            _set_input(node, i, builder.constant(_typed(node, limit.as_float()), f"{node.name}_{name}"))


def _dft_axis_to_input(node: ir.Node, builder: Builder) -> None:
    _int64(node, "axis", 2, builder, default=1)


# -- attributes that went, came or changed --------------------------------------------------------------


def _drop_ratio(node: ir.Node, builder: Builder) -> None:
    node.attributes.pop("ratio", None)  # without a training_mode input Dropout passes its input on


def _check_no_mask(node: ir.Node) -> None:
    if any(v.uses() or v.is_graph_output() for v in node.outputs[1:]):
        raise refusal(node, "its mask is used, whose dtype changed")


def _check_spatial(node: ir.Node) -> None:
    spatial = node.attributes.get("spatial")
    if spatial is not None and spatial.as_int() != 1:
        raise refusal(node, "spatial=0 has no newer form")


def _drop_spatial(node: ir.Node, builder: Builder) -> None:
    node.attributes.pop("spatial", None)


def _check_inference(node: ir.Node) -> None:
    if len(node.outputs) > 1:
        raise refusal(node, "it is in training mode")


def _split_count(node: ir.Node, builder: Builder) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.resize_inputs(1)
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _old_roi_align(node: ir.Node, builder: Builder) -> None:
    # trap: version 16 samples half a pixel further by default
    mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
    node.attributes.setdefault(mode.name, mode)


def _grid_sample_mode(node: ir.Node, builder: Builder) -> None:
    mode = node.attributes.get("mode")
    new = {"bilinear": "linear", "bicubic": "cubic"}.get(mode.as_string() if mode else "bilinear")
    if new:
        node.attributes["mode"] = ir.AttrString("mode", new)


def _check_no_scores(node: ir.Node) -> None:
    # Version 24 writes -inf where version 23 wrote the lowest number into the masked scores it hands out.
    if len(node.outputs) > 3 and node.outputs[3].name:
        raise refusal(node, "its qk_matmul_output changed meaning for masked positions")


# -- operators that became others -----------------------------------------------------------------------


def _rename_scatter(node: ir.Node, builder: Builder) -> None:
    node.op_type = "ScatterElements"


def _old_coordinates(node: ir.Node, builder: Builder) -> None:
    """Resize before version 11, and Upsample: (x, scales) with coordinates simply divided by the scale."""
    scales = node.attributes.pop("scales", None)
    if scales is not None:
        value = builder.constant(np.array(scales.as_floats(), np.float32), f"{node.name}_scales")
    else:
        assert node.inputs[1] is not None
        value = node.inputs[1]
    node.op_type = "Resize"
    node.resize_inputs(3)
    node.replace_input_with(1, builder.constant(np.zeros(0, np.float32), f"{node.name}_roi"))
    node.replace_input_with(2, value)
    mode = node.attributes.get("mode")
    if mode is not None and mode.as_string() == "bilinear":
        node.attributes["mode"] = ir.AttrString("mode", "linear")
    for name, text in (("coordinate_transformation_mode", "asymmetric"), ("nearest_mode", "floor")):
        node.attributes[name] = ir.AttrString(name, text)


# -- operators whose meaning changed --------------------------------------------------------------------


def _softmax_axis(node: ir.Node) -> int:
    axis = node.attributes.get("axis")
    return axis.as_int() if axis is not None else 1


def _check_softmax(node: ir.Node) -> None:
    if node.inputs[0] is None or node.inputs[0].shape is None:
        raise refusal(node, "the rank of its input is unknown")


def _softmax_over_one_axis(node: ir.Node, builder: Builder) -> None:
    """Before version 13 everything from ``axis`` on was normalized together."""
    data = node.inputs[0]
    assert data is not None
    assert data.shape is not None
    rank, axis = len(data.shape), _softmax_axis(node)
    axis = axis + rank if axis < 0 else axis
    node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if axis >= rank - 1:
        return
    flat = builder.before(node, "Flatten", [data], {"axis": axis})
    shape = builder.before(node, "Shape", [data], {})
    node.replace_input_with(0, flat)
    output, owner = node.outputs[0], node.graph
    restored = ir.node("Reshape", [output, shape], name=builder.fresh(f"{node.name}_Reshape"))
    restored.metadata_props.update(node.metadata_props)
    new = restored.outputs[0]
    new.type, new.shape = output.type, output.shape
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    restored.replace_input_with(0, output)
    new.name, output.name, output.shape = output.name, builder.fresh(f"{output.name}_flat"), None
    assert owner is not None
    owner.insert_after(node, restored)


def _check_group_norm(node: ir.Node) -> None:
    if _channels(node) is None or any(v is None or v.const_value is None for v in node.inputs[1:3]):
        raise refusal(node, "its scale and bias must be constants and its channels known")


def _channels(node: ir.Node) -> int | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    return channels if isinstance(channels, int) else None


def _group_norm_per_channel(node: ir.Node, builder: Builder) -> None:
    """Version 21 wants scale and bias per channel, version 18 had them per group."""
    channels = _channels(node)
    for i, value in enumerate(node.inputs[1:3], 1):
        if value is not None and value.const_value is not None and channels:
            array = value.const_value.numpy()
            wide = np.repeat(array, channels // len(array))
            node.replace_input_with(i, builder.constant(wide, f"{value.name}_per_channel"))


# (operator, the version whose definition it moves to) -> what to do.
ADAPTERS: dict[tuple[str, int], Adapter] = {
    ("BatchNormalization", 9): Adapter(_drop_spatial, _check_spatial),
    ("Upsample", 9): Adapter(),  # scales became an input; the next step takes either
    ("Dropout", 10): Adapter(check=_check_no_mask),
    ("Slice", 10): Adapter(_slice_to_inputs),
    ("TopK", 10): Adapter(_k_to_input),
    ("Upsample", 10): Adapter(_old_coordinates, final=True),
    ("Clip", 11): Adapter(_clip_to_inputs),
    ("Pad", 11): Adapter(_pad_to_inputs),
    ("Resize", 11): Adapter(_old_coordinates),
    ("Scatter", 11): Adapter(_rename_scatter, final=True),
    ("Dropout", 12): Adapter(_drop_ratio),
    ("ReduceSum", 13): Adapter(_axes_to_input),
    ("Split", 13): Adapter(_split_to_input),
    ("Squeeze", 13): Adapter(_axes_to_input),
    ("Unsqueeze", 13): Adapter(_axes_to_input),
    **{
        (op, 13): Adapter(_softmax_over_one_axis, _check_softmax)
        for op in ("Softmax", "LogSoftmax", "Hardmax")
    },
    ("BatchNormalization", 14): Adapter(check=_check_inference),
    ("RoiAlign", 16): Adapter(_old_roi_align),
    ("Split", 18): Adapter(_split_count),
    **{
        (f"Reduce{kind}", 18): Adapter(_axes_to_input)
        for kind in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")
    },
    ("Attention", 24): Adapter(check=_check_no_scores),
    ("DFT", 20): Adapter(_dft_axis_to_input),
    ("GridSample", 20): Adapter(_grid_sample_mode),
    ("GroupNormalization", 21): Adapter(_group_norm_per_channel, _check_group_norm),
}
