"""Standard operators written as the functions of others by which ONNX defines them."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter


def body_of(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    """The definition of a standard operator in force at ``opset``, if it is one by a function."""
    if not onnx.defs.has(op_type):
        return None
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return None
    has = schema.has_function or schema.has_context_dependent_function
    return schema if has else None


def instantiate(node: ir.Node, rewriter: Rewriter) -> list[ir.Value | None] | str:
    """Insert the function a node stands for at the anchor; one value an output, or why there is none."""
    opset = rewriter.model.opset_imports.get("", 1)
    schema = body_of(node.op_type, opset)
    if any(v is not None and v.type is None for v in node.inputs):
        return "the types of its inputs are unknown"
    function = None if schema is None else _function(node, schema, opset)
    if function is None:
        return f"opset {opset} defines no function for it"
    # The function of an operator with optional outputs names those it does not compute too.
    del function.output[len(node.outputs) :]
    if not {*function.output} <= {name for inner in function.node for name in inner.output}:
        return "its function does not compute all its outputs"
    return _inlined(node, ir.serde.deserialize_function(function), rewriter)


def _function(node: ir.Node, schema: onnx.defs.OpSchema, opset: int) -> onnx.FunctionProto | None:
    """The newest function not newer than ``opset``; it may depend on the types of the inputs."""
    proto = ir.to_proto(node)
    if schema.has_context_dependent_function:
        versions = [v for v in schema.context_dependent_function_opset_versions if v <= opset]
        if not versions:
            return None
        kinds = [_type_of(v).SerializeToString() for v in node.inputs]
        data = schema.get_context_dependent_function_with_opset_version(
            max(versions), proto.SerializeToString(), kinds
        )
    else:
        versions = [v for v in schema.function_opset_versions if v <= opset]
        data = schema.get_function_with_opset_version(max(versions)) if versions else b""
    if not data:
        return None
    function = onnx.FunctionProto()
    function.ParseFromString(data)
    return function


def _type_of(value: ir.Value | None) -> onnx.TypeProto:
    kind = onnx.TypeProto()
    if value is None or value.type is None:
        return kind
    ir.serde.serialize_type_into(kind, value.type)
    if value.shape is not None:
        ir.serde.serialize_shape_into(kind, value.shape)
    return kind


def _inlined(node: ir.Node, function: ir.Function, rewriter: Rewriter) -> list[ir.Value | None] | str:
    given: dict[ir.Value, ir.Value | None] = dict.fromkeys(function.inputs)
    given.update(zip(function.inputs, node.inputs, strict=False))
    if any(list(inner.attributes) and _has_graph(inner) for inner in function):
        return "its function has subgraphs"
    if any(v in given for v in function.outputs):
        return "its function returns an input"
    for inner in function:
        attributes = {k: _resolved(a, node, function) for k, a in inner.attributes.items()}
        inputs = [None if v is None else given[v] for v in inner.inputs]
        known = {k: a for k, a in attributes.items() if a is not None}
        _emit(inner, inputs, known, given, node, rewriter)
    return [given[v] for v in function.outputs[: len(node.outputs)]]


def _has_graph(node: ir.Node) -> bool:
    return any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values())


def _resolved(attribute: ir.Attr, node: ir.Node, function: ir.Function) -> ir.Attr | None:
    """What a reference to one of the function's attributes stands for in this node."""
    if not attribute.is_ref():
        return attribute
    source = attribute.ref_attr_name or ""
    found = node.attributes.get(source) or function.attributes.get(source)
    return None if found is None else ir.Attr(attribute.name, found.type, found.value)


def _emit(
    inner: ir.Node,
    inputs: list[ir.Value | None],
    attributes: dict[str, ir.Attr],
    given: dict[ir.Value, ir.Value | None],
    node: ir.Node,
    rewriter: Rewriter,
) -> None:
    label = rewriter.fresh(f"{node.name}_{inner.op_type}")
    made = ir.Node(
        "", inner.op_type, inputs, list(attributes.values()), num_outputs=len(inner.outputs), name=label
    )
    for old, new in zip(inner.outputs, made.outputs, strict=True):
        new.name = rewriter.fresh(f"{node.name}_{old.name or 'out'}")
        given[old] = new
    rewriter.insert(made)
