"""How single operators move from the opsets 1 to 6, before numpy's broadcasting, to opset 7."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from lamina.ir.opset_adapters import Adapter, Builder, refusal

_BROADCASTING = ("Add", "Sub", "Mul", "Div", "Pow", "And", "Or", "Xor", "Equal", "Greater", "Less")
_RECURRENT = ("RNN", "GRU", "LSTM")


def _int(node: ir.Node, name: str) -> int | None:
    found = node.attributes.get(name)
    return None if found is None else found.as_int()


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


# -- broadcasting ---------------------------------------------------------------------------------------


def _missing_axes(node: ir.Node) -> int | None:
    """How many trailing dims of one the second operand needs; None where the ranks do not tell."""
    axis = _int(node, "axis")
    if not _int(node, "broadcast") or axis is None:
        return 0  # shapes are equal, or the operand is aligned at the end as numpy aligns it
    left, right = _rank(node.inputs[0]), _rank(node.inputs[1])
    if left is None or right is None:
        return None
    return left - right - (axis + left if axis < 0 else axis)


def _check_broadcast(node: ir.Node) -> None:
    missing = _missing_axes(node)
    if missing is None:
        raise refusal(node, "its operand is broadcast along an axis and the ranks are unknown")
    if missing < 0:
        raise refusal(node, "its operand reaches beyond the last axis")


def _numpy_broadcast(node: ir.Node, builder: Builder) -> None:
    missing = _missing_axes(node)
    node.attributes.pop("axis", None)
    node.attributes.pop("broadcast", None)
    if missing:
        rank = _rank(node.inputs[1]) or 0
        _unsqueeze(node, 1, list(range(rank, rank + missing)), builder)


def _unsqueeze(node: ir.Node, index: int, axes: list[int], builder: Builder) -> None:
    value = node.inputs[index]
    assert value is not None
    where = builder.constant(np.array(axes, np.int64), f"{node.name}_axes")
    node.replace_input_with(index, builder.before(node, "Unsqueeze", [value, where], {}))


def _check_slope(node: ir.Node) -> None:
    slope = node.inputs[1]
    if _rank(slope) is None or _rank(node.inputs[0]) is None:
        raise refusal(node, "the ranks of its operands are unknown")


def _slope_per_channel(node: ir.Node, builder: Builder) -> None:
    """A vector of slopes belonged to the channels, which are the second axis."""
    slope, rank = node.inputs[1], _rank(node.inputs[0])
    assert slope is not None
    assert slope.shape is not None
    if rank is not None and rank > 2 and len(slope.shape) == 1 and slope.shape[0] != 1:
        _unsqueeze(node, 1, list(range(1, rank - 1)), builder)


# -- attributes that went or changed --------------------------------------------------------------------


def _drop(name: str) -> Callable[[ir.Node, Builder], None]:
    def change(node: ir.Node, builder: Builder) -> None:
        node.attributes.pop(name, None)

    return change


def _check_single_output(node: ir.Node) -> None:
    # is_test defaults to 0, but a node with one output is the inference form by its own documentation.
    if _int(node, "is_test") == 0 or len(node.outputs) > 1:
        raise refusal(node, "it is in training mode")


def _check_dropout(node: ir.Node) -> None:
    if not _int(node, "is_test"):
        raise refusal(node, "it is in training mode")


def _axis_is_one(node: ir.Node, builder: Builder) -> None:
    node.attributes.setdefault("axis", ir.AttrInt64("axis", 1))


def _shape_to_input(node: ir.Node, builder: Builder) -> None:
    shape = node.attributes.pop("shape", None)
    target = np.array([] if shape is None else shape.as_ints(), np.int64)
    node.resize_inputs(2)
    node.replace_input_with(1, builder.constant(target, f"{node.name}_shape"))


def _rename_paddings(node: ir.Node, builder: Builder) -> None:
    paddings = node.attributes.pop("paddings")
    node.attributes["pads"] = ir.AttrInt64s("pads", list(paddings.as_ints()))


def _type_by_name(node: ir.Node) -> ir.DataType | None:
    return ir.DataType.__members__.get(node.attributes["to"].as_string().upper())


def _check_cast(node: ir.Node) -> None:
    if _type_by_name(node) is None:
        raise refusal(node, f"'{node.attributes['to'].as_string()}' is no data type")


def _type_as_number(node: ir.Node, builder: Builder) -> None:
    kind = _type_by_name(node)
    assert kind is not None
    node.attributes["to"] = ir.AttrInt64("to", kind.value)


def _scales_in_one(node: ir.Node, builder: Builder) -> None:
    height = node.attributes.pop("height_scale").as_float()
    width = node.attributes.pop("width_scale").as_float()
    node.attributes["scales"] = ir.AttrFloat32s("scales", [1.0, 1.0, height, width])


def _norm_order(node: ir.Node) -> float:
    order = node.attributes.get("p")
    return 2.0 if order is None else float(order.value)


def _check_norm_order(node: ir.Node) -> None:
    if _norm_order(node) != int(_norm_order(node)):
        raise refusal(node, "its norm is of a fractional order")


def _norm_order_as_int(node: ir.Node, builder: Builder) -> None:
    node.attributes["p"] = ir.AttrInt64("p", int(_norm_order(node)))


# (operator, the version whose definition it moves to) -> what to do; see ADAPTERS for the later ones.
LEGACY_ADAPTERS: dict[tuple[str, int], Adapter] = {
    ("GlobalLpPool", 2): Adapter(_norm_order_as_int, _check_norm_order),
    ("LpPool", 2): Adapter(_norm_order_as_int, _check_norm_order),
    ("Pad", 2): Adapter(_rename_paddings),
    ("Split", 2): Adapter(),  # sizes as an input, which version 13 has again
    ("Concat", 4): Adapter(_axis_is_one),
    ("Reshape", 5): Adapter(_shape_to_input),
    ("Cast", 6): Adapter(_type_as_number, _check_cast),
    **{(op, 7): Adapter(_numpy_broadcast, _check_broadcast) for op in _BROADCASTING},
    **{(op, 7): Adapter(_drop("output_sequence")) for op in _RECURRENT},
    ("BatchNormalization", 7): Adapter(_drop("is_test"), _check_single_output),
    ("Dropout", 7): Adapter(_drop("is_test"), _check_dropout),
    ("Gemm", 7): Adapter(_drop("broadcast")),
    ("PRelu", 7): Adapter(_slope_per_channel, _check_slope),
    ("Upsample", 7): Adapter(_scales_in_one),
}
