"""Raise a model's opset without changing what it computes, its names or its metadata."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx
import onnx_ir as ir

from lamina.errors import UnsupportedOperator
from lamina.ir.names import subgraphs

NEWEST = 25
_REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


def raise_opset(model: ir.Model, version: int) -> None:
    """Convert ``model``, which the caller owns, to default opset ``version`` in place.

    Operators whose definition changed are adapted one by one; of the others the schemas say that what the
    model uses still means the same. Nothing is changed when this raises.

    Args:
        model: A normalized model (no functions), opset 13 or newer.
        version: At most 25; a version the model already has or exceeds changes nothing.

    Raises:
        UnsupportedOperator: An operator cannot be expressed in that opset; names it.
    """
    have = model.opset_imports.get("", 1)
    if have >= version:
        return
    if version > NEWEST or have < 13:
        raise UnsupportedOperator(
            f"opset {have} cannot be raised to {version}", advice="lamina handles opsets 13 to 25"
        )
    work = [
        (node, step)
        for node in _nodes(model.graph)
        if node.domain == ""
        for step in _steps(node, have, version)
    ]
    names = _Names(model)
    for node, step in work:
        step.check(node)
    for node, step in work:
        step.change(node, names)
    model.opset_imports[""] = version
    model.ir_version = max(
        model.ir_version, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    )


@dataclass(frozen=True)
class _Step:
    """One adaptation: ``check`` raises UnsupportedOperator or returns, ``change`` then edits the node."""

    check: Callable[[ir.Node], None]
    change: Callable[[ir.Node, _Names], None]


class _Names:
    """Adds small constants to the main graph under fresh names."""

    def __init__(self, model: ir.Model) -> None:
        self._graph = model.graph
        self._taken = {v.name for v in model.graph.inputs} | set(model.graph.initializers)
        self._taken |= {v.name for n in model.graph.all_nodes() for v in n.outputs}

    def constant(self, array: np.ndarray, hint: str) -> ir.Value:
        name, i = hint, 1
        while name in self._taken:
            name, i = f"{hint}_{i}", i + 1
        self._taken.add(name)
        tensor = ir.Tensor(array, name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self._graph.register_initializer(value)
        return value


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in tuple(graph):
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _steps(node: ir.Node, have: int, version: int) -> Iterator[_Step]:
    versions = sorted({_since(node, v) for v in range(have, version + 1)})
    for old, new in pairwise(versions):
        adapter = _ADAPTERS.get((node.op_type, new))
        if adapter is not None:
            yield adapter
        else:
            _check_compatible(node, old, new)


def _since(node: ir.Node, version: int) -> int:
    try:
        schema = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError as error:
        raise _refusal(node, f"opset {version} does not have it") from error
    if schema.deprecated:
        raise _refusal(node, f"opset {version} does not have it")
    return int(schema.since_version)


def _check_compatible(node: ir.Node, old: int, new: int) -> None:
    """Whether the newer schema takes the node as it is: attributes it sets and defaults it relies on."""
    before = onnx.defs.get_schema(node.op_type, old, "")
    after = onnx.defs.get_schema(node.op_type, new, "")
    for name in node.attributes:
        if name in before.attributes and name not in after.attributes:
            raise _refusal(node, f"attribute '{name}' is gone in version {new}")
    for name, attribute in after.attributes.items():
        if name in node.attributes:
            continue
        if attribute.required:
            raise _refusal(node, f"version {new} needs attribute '{name}'")
        known = before.attributes.get(name)
        if known is not None and known.default_value != attribute.default_value:
            raise _refusal(node, f"the default of attribute '{name}' changed in version {new}")
    if not after.min_input <= len(node.inputs) <= after.max_input:
        raise _refusal(node, f"version {new} takes {after.min_input} to {after.max_input} inputs")
    if not after.min_output <= len(node.outputs) <= after.max_output:
        raise _refusal(node, f"version {new} has {after.min_output} to {after.max_output} outputs")


def _refusal(node: ir.Node, reason: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"{node.op_type} '{node.name}' cannot be raised to a newer opset: {reason}",
        advice="export the model with a newer opset",
    )


def _accept(node: ir.Node) -> None:
    """Any node of the type can be adapted."""


# -- adapters: what the schemas alone do not tell -------------------------------------------------------


def _axes_to_input(node: ir.Node, names: _Names) -> None:
    axes = node.attributes.pop("axes", None)
    if axes is None:
        return
    value = names.constant(np.array(axes.as_ints(), np.int64), f"{node.name}_axes")
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _split_count(node: ir.Node, names: _Names) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.resize_inputs(1)
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


def _check_inference_batch_norm(node: ir.Node) -> None:
    if len(node.outputs) > 1:
        raise _refusal(node, "it is in training mode")


def _keep(node: ir.Node, names: _Names) -> None:
    """The node means the same in the newer version."""


def _old_roi_align(node: ir.Node, names: _Names) -> None:
    # trap: version 16 samples half a pixel further by default
    mode = ir.AttrString("coordinate_transformation_mode", "output_half_pixel")
    node.attributes.setdefault(mode.name, mode)


def _grid_sample_mode(node: ir.Node, names: _Names) -> None:
    mode = node.attributes.get("mode")
    new = {"bilinear": "linear", "bicubic": "cubic"}.get(mode.as_string() if mode else "bilinear")
    if new:
        node.attributes["mode"] = ir.AttrString("mode", new)


def _axis_to_input(node: ir.Node, names: _Names) -> None:
    axis = node.attributes.pop("axis", None)
    value = names.constant(np.array(axis.as_int() if axis else 1, np.int64), f"{node.name}_axis")
    node.resize_inputs(3)
    node.replace_input_with(2, value)


def _check_group_norm(node: ir.Node) -> None:
    if _channels(node) is None or any(v is None or v.const_value is None for v in node.inputs[1:3]):
        raise _refusal(node, "its scale and bias must be constants and its channels known")


def _channels(node: ir.Node) -> int | None:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return shape[1] if shape is not None and len(shape) > 1 and isinstance(shape[1], int) else None


def _group_norm_per_channel(node: ir.Node, names: _Names) -> None:
    """Version 21 wants scale and bias per channel, version 18 had them per group."""
    channels = _channels(node)
    for i, value in enumerate(node.inputs[1:3], 1):
        if value is not None and value.const_value is not None and channels:
            array = value.const_value.numpy()
            wide = np.repeat(array, channels // len(array))
            node.replace_input_with(i, names.constant(wide, f"{value.name}_per_channel"))


_ADAPTERS: dict[tuple[str, int], _Step] = {
    ("BatchNormalization", 14): _Step(_check_inference_batch_norm, _keep),
    ("RoiAlign", 16): _Step(_accept, _old_roi_align),
    ("Split", 18): _Step(_accept, _split_count),
    ("DFT", 20): _Step(_accept, _axis_to_input),
    ("GridSample", 20): _Step(_accept, _grid_sample_mode),
    ("GroupNormalization", 21): _Step(_check_group_norm, _group_norm_per_channel),
    **{(f"Reduce{kind}", 18): _Step(_accept, _axes_to_input) for kind in _REDUCTIONS},
}
