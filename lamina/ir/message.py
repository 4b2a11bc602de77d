"""Protobuf messages for this process's own use: what onnx's checker, its inference and runtimes read.

onnx_ir's serializer keeps documentation, metadata and annotations as well and costs several times as much,
which counts where a model of 100,000 nodes is checked, inferred and run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import onnx
import onnx_ir as ir

from lamina.ir.opaque import STANDARD

_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS


def message(
    model: ir.Model, *, outside: Collection[ir.Value] = (), described: bool = True
) -> onnx.ModelProto:
    """Write ``model`` as one message; it is not changed.

    Args:
        model: May hold functions and subgraphs.
        outside: Initializers of the main graph that become graph inputs: their data is left out.
        described: Whether values of the main graph carry their types and shapes. Those that operators of
            other domains give always do: nobody can infer them.

    Raises:
        SerdeError: Something in the model cannot be written.
    """
    proto = onnx.ModelProto(ir_version=model.ir_version, producer_name="lamina")
    for domain, version in model.opset_imports.items():
        proto.opset_import.add(domain=domain, version=version)
    for function in model.functions.values():
        proto.functions.append(ir.serde.serialize_function(function))
    _Writer(proto.graph, described).write(model.graph, set(outside))
    return proto


class _Writer:
    """Writes one main graph; equal types are built once."""

    def __init__(self, proto: onnx.GraphProto, described: bool) -> None:
        self._proto, self._described = proto, described
        self._types: dict[object, onnx.TypeProto] = {}

    def write(self, graph: ir.Graph, outside: set[ir.Value]) -> None:
        proto = self._proto
        proto.name = graph.name or "graph"
        for value in graph.inputs:
            self._describe(proto.input, value)
        for value in graph.initializers.values():
            if value in outside:
                if not value.is_graph_input():
                    self._describe(proto.input, value)
            elif value.const_value is not None:
                _write_tensor(proto.initializer, value.const_value, value.name)
        for node in graph:
            _write_node(proto.node, node)
            if self._described or node.domain not in STANDARD:
                for value in node.outputs:
                    if value.name and value.type is not None and not value.is_graph_output():
                        self._describe(proto.value_info, value)
        for value in graph.outputs:
            self._describe(proto.output, value)

    def _describe(self, place: Iterable[onnx.ValueInfoProto], value: ir.Value) -> None:
        info = place.add(name=value.name)  # type: ignore[attr-defined]
        tensor = value.const_value if value.is_initializer() else None
        dtype = value.dtype if tensor is None else tensor.dtype
        if tensor is None and type(value.type) is not ir.TensorType:
            ir.serde.serialize_value_into(info, value)
            return
        shape = value.shape if tensor is None else tensor.shape
        dims = None if shape is None else tuple([d if isinstance(d, int) else d.value for d in shape])
        key = (dtype, dims)
        kind = self._types.get(key)
        if kind is None:
            kind = self._types[key] = _tensor_type(dtype, dims)
        info.type.CopyFrom(kind)


def _write_tensor(tensors: Any, tensor: ir.TensorProtocol, name: str | None) -> None:
    # the name is the value's: models share tensors, and another thread may be at work on one of them
    if type(tensor) is ir.Tensor and tensor.dtype.bitwidth >= 8 and tensor.dtype is not ir.DataType.STRING:
        data, dims = tensor.tobytes(), tensor.shape.dims
        tensors.add(name=name, data_type=int(tensor.dtype), dims=dims, raw_data=data)
    else:
        proto = tensors.add()
        ir.serde.serialize_tensor_into(proto, from_=tensor)
        proto.name = name or ""


def _tensor_type(dtype: ir.DataType | None, dims: tuple[int | str | None, ...] | None) -> onnx.TypeProto:
    kind = onnx.TypeProto()
    kind.tensor_type.elem_type = int(dtype or ir.DataType.UNDEFINED)
    if dims is not None:
        kind.tensor_type.shape.SetInParent()
    for dim in dims or ():
        if isinstance(dim, int):
            kind.tensor_type.shape.dim.add(dim_value=dim)
        elif dim is None:
            kind.tensor_type.shape.dim.add()
        else:
            kind.tensor_type.shape.dim.add(dim_param=dim)
    return kind


def _write_node(nodes: Any, node: ir.Node) -> None:
    outputs = [v.name or "" for v in node.outputs]
    while outputs and not outputs[-1]:
        outputs.pop()
    inputs = ["" if v is None else v.name for v in node.inputs]
    proto = nodes.add(  # one call: each field that is set from Python costs as much as all of these
        op_type=node.op_type, domain=node.domain, name=node.name or "", input=inputs, output=outputs
    )
    if node.overload:
        proto.overload = node.overload
    for attribute in node.attributes.data.values():
        if attribute.is_ref():
            ir.serde.serialize_reference_attribute_into(proto.attribute.add(), from_=attribute)
        elif attribute.type is _INT:
            proto.attribute.add(name=attribute.name, type=onnx.AttributeProto.INT, i=attribute.value)
        elif attribute.type is _INTS:
            proto.attribute.add(name=attribute.name, type=onnx.AttributeProto.INTS, ints=attribute.value)
        else:
            ir.serde.serialize_attribute_into(proto.attribute.add(), from_=attribute)
