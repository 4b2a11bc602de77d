"""What a price is for, as text: the structure of a graph and of an option, without names and weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir

_SHOWN = 16  # elements of an integer constant that say something about structure: axes, shapes, pads


def describe(graph: ir.Graph) -> str:
    """The graph's structure as text: operators, attributes, shapes and dtypes; no names, no weights."""
    names: dict[ir.Value, str] = {}
    lines: list[str] = []

    def show(value: ir.Value | None) -> str:
        if value is None:
            return "-"
        if value not in names:
            names[value] = f"%{len(names)}:{_kind(value)}"
            return names[value]
        return names[value].partition(":")[0]

    for node in graph:
        read = ", ".join(show(v) for v in node.inputs)
        attributes = "".join(f" {a.name}={_attribute(a)}" for _, a in sorted(node.attributes.items()))
        made = ", ".join(show(v) for v in node.outputs)
        domain = f"{node.domain}." if node.domain else ""
        lines.append(f"{made} = {domain}{node.op_type}({read}{attributes})")
    return "; ".join([*lines, f"-> {', '.join(show(v) for v in graph.outputs)}"])


def structure(parameters: Any, key: str = "") -> Any:
    """What of an option's parameters changes the work to be done, not just its numbers."""
    if isinstance(parameters, Mapping):
        return {str(k): structure(v, str(k)) for k, v in sorted(parameters.items())}
    if key in ("base64", "donor"):  # which weights, whose
        return "weights"
    if isinstance(parameters, (bool, str)) or parameters is None:
        return parameters
    if isinstance(parameters, int):
        # a zero point at an end of the range says that a Relu or Clip became part of the quantizer
        return "int" if "zero" in key and parameters not in (0, 255) else parameters
    if isinstance(parameters, float):
        return "float"
    if isinstance(parameters, Iterable):
        items = [structure(v, key) for v in parameters]
        return items if len(items) <= 8 else f"list of {len(items)}"
    return type(parameters).__name__


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a value that never changes: an initializer nobody can replace, or a Constant node's."""
    if value.is_graph_input():
        return None  # a caller may replace it: the runtime cannot treat it as constant
    if value.const_value is not None:
        return value.const_value
    maker = value.producer()
    if maker is None or maker.op_type != "Constant":
        return None
    return ir.convenience.get_const_tensor(value)


def _kind(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = "?" if value.shape is None else ",".join(str(d) for d in value.shape)
    tensor = constant_of(value)
    if tensor is None:
        return f"{dtype}[{shape}]"
    if tensor.dtype in (ir.DataType.INT64, ir.DataType.INT32) and tensor.size <= _SHOWN:
        return f"{dtype}{tensor.numpy().tolist()}"
    return f"const {dtype}[{shape}]"


def _attribute(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.GRAPH:
        return "{" + describe(attribute.as_graph()) + "}"
    if attribute.type == ir.AttributeType.GRAPHS:
        return "{" + " | ".join(describe(g) for g in attribute.as_graphs()) + "}"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype.name.lower()}[{','.join(map(str, tensor.shape))}]"
    return str(attribute.value)
