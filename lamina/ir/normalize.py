"""Bring any valid model into the one form the rest of lamina relies on, in place, values unchanged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from lamina.errors import CaptureError, UnsupportedOperator
from lamina.ir import opset
from lamina.ir.function_calls import check_calls
from lamina.ir.inference import infer_shapes as infer_shapes
from lamina.ir.names import every_graph, every_node, make_names_unique, subgraphs
from lamina.ir.opaque import STANDARD, opaque_subgraphs_hidden
from lamina.ir.schemas import fault_of_types, type_text
from lamina.ir.skeleton import skeleton
from lamina.ir.tensors import ExternalFiles, own, shape_of

OLDEST = 13  # what older models are raised to
_EXPORT_AGAIN = "the model is invalid: export it again, or check it with onnx.checker"


def normalize(model: ir.Model, source: str, files: ExternalFiles) -> None:
    """Normalize ``model``, which lamina owns, in place.

    Functions are inlined, nodes sorted, constants lifted to initializers of the main graph, names made
    unique, shapes inferred, weights re-wrapped so that the caller's tensor objects are never renamed.

    Raises:
        CaptureError: The model is not valid ONNX.
        UnsupportedOperator: It uses an opset lamina does not know, or no operator of ONNX in ONNX's domain.
    """
    _default_domain(model)
    _check_opset(model, source)
    _check_operators(model, source)
    _inline(model, source)
    _check_references(model, source)
    _check_attributes(model, source)
    _sort(model, source)
    _own_tensors(model, source, files)
    with opaque_subgraphs_hidden(model):
        _lift_constants(model)
        common.LiftSubgraphInitializersToMainGraphPass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    make_names_unique(model)
    _tidy_interface(model, source)
    _trim_outputs(model.graph)
    model.ir_version = max(model.ir_version, onnx.helper.find_min_ir_version_for(_imports(model)), 4)
    _leave_deprecated(model)
    proto, _ = skeleton(model)
    check_proto(proto, source)
    infer_shapes(model, proto)
    _check_types(model, source)


def _imports(model: ir.Model) -> list[onnx.OperatorSetIdProto]:
    return [onnx.helper.make_opsetid(d, v) for d, v in model.opset_imports.items() if d in STANDARD]


def _default_domain(model: ir.Model) -> None:
    """Spell the default domain one way: ``""``."""
    for imports in (model.opset_imports, *(f.opset_imports for f in model.functions.values())):
        if "ai.onnx" in imports:
            version = imports.pop("ai.onnx")
            imports.setdefault("", version)
    for node in _every_node(model):
        if node.domain == "ai.onnx":
            node.domain = ""


def _every_node(model: ir.Model) -> Iterator[ir.Node]:
    yield from every_node(model.graph)
    for function in model.functions.values():
        yield from every_node(function)


def label(node: ir.Node) -> str:
    """How messages name a node: ``Conv 'conv1'``."""
    return f"{node.op_type} '{node.name or next((v.name for v in node.outputs if v.name), '')}'"


def _check_operators(model: ir.Model, source: str) -> None:
    """Operators of other domains are carried through, never looked into; ONNX's own must exist."""
    for node in _every_node(model):
        if node.domain not in STANDARD or node.op_identifier() in model.functions:
            continue
        if not onnx.defs.has(node.op_type):
            raise UnsupportedOperator(
                f"{label(node)} is not an ONNX operator", where=source, advice="export the model again"
            )


def _check_opset(model: ir.Model, source: str) -> None:
    version = model.opset_imports.get("")
    if version is None:
        if any(n.domain in STANDARD for n in _every_node(model)):
            raise CaptureError("the model does not say its opset", where=source, advice=_EXPORT_AGAIN)
        model.opset_imports[""] = 20
    elif not opset.OLDEST <= version <= onnx.defs.onnx_opset_version():
        newest = onnx.defs.onnx_opset_version()
        raise UnsupportedOperator(
            f"opset {version} is not supported",
            where=source,
            advice=f"export the model with opset {OLDEST} to {newest}; a newer onnx package knows newer ones",
        )


def _check_types(model: ir.Model, source: str) -> None:
    """What onnx's checker leaves out: whether the types of a node's inputs and outputs fit its operator."""
    for node in every_node(model.graph):
        if node.domain not in STANDARD:
            continue
        inputs, outputs = (tuple(map(type_text, values)) for values in (node.inputs, node.outputs))
        fault = fault_of_types("", node.op_type, model.opset_imports[""], inputs, outputs)
        if fault is not None:
            raise CaptureError(
                f"types of {label(node)} do not fit: {fault}", where=source, advice=_EXPORT_AGAIN
            )


def _inline(model: ir.Model, source: str) -> None:
    if not model.functions:
        return
    check_calls(model, source)
    try:
        common.InlinePass()(model)
    except Exception as error:  # the pass raises several types, all wrapped in its own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise CaptureError(
            f"the model's functions cannot be inlined: {reason}", where=source, advice=_EXPORT_AGAIN
        ) from error
    model.functions.clear()
    used = {n.domain for n in every_node(model.graph)}
    for domain in [d for d in model.opset_imports if d not in used and d not in STANDARD]:
        del model.opset_imports[domain]


def _check_references(model: ir.Model, source: str) -> None:
    """Every value read must be an input, an initializer or some node's output."""
    for graph in every_graph(model.graph):
        reads = [(v, label(n)) for n in graph for v in n.inputs if v is not None]
        reads += [(v, "the graph's outputs") for v in graph.outputs]
        for value, reader in reads:
            if value.producer() is None and not (value.is_graph_input() or value.is_initializer()):
                raise CaptureError(
                    f"value '{value.name}', read by {reader}, is produced by nothing",
                    where=source,
                    advice=_EXPORT_AGAIN,
                )


def _check_attributes(model: ir.Model, source: str) -> None:
    """With the functions inlined, no attribute may still stand for one of a function."""
    for node in every_node(model.graph):
        loose = next((a for a in node.attributes.values() if a.is_ref()), None)
        if loose is not None and node.domain in STANDARD:
            raise CaptureError(
                f"attribute '{loose.name}' of {label(node)} refers to '{loose.ref_attr_name}' of a function, "
                "but the node is in none",
                where=source,
                advice=_EXPORT_AGAIN,
            )


def _sort(model: ir.Model, source: str) -> None:
    if _is_sorted(model.graph, set()):
        return
    try:
        model.graph.sort()
    except ValueError:
        names = ", ".join(label(n) for n in _on_cycle(model.graph)[:5])
        raise CaptureError(
            f"the graph has a cycle through {names}", where=source, advice=_EXPORT_AGAIN
        ) from None


def _is_sorted(graph: ir.Graph, before: set[ir.Node]) -> bool:
    """Whether every node, subgraphs included, comes after those whose outputs it reads."""
    for node in graph:
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None and producer not in before:
                return False
        if not all(_is_sorted(inner, before) for inner in subgraphs(node)):
            return False
        before.add(node)
    producers = (v.producer() for v in graph.outputs)
    return all(p is None or p in before for p in producers)


def _on_cycle(graph: ir.Graph) -> list[ir.Node]:
    """One cycle, in the order of data flow."""
    waiting = {n: {p for p in _producers(n) if p.graph is graph} for n in graph}
    ready = [n for n, needs in waiting.items() if not needs]
    while ready:
        node = ready.pop()
        waiting.pop(node, None)
        for user in {u for v in node.outputs for u in v.consumers()}:
            if user in waiting:
                waiting[user].discard(node)
                if not waiting[user]:
                    ready.append(user)
    # Each node that is left waits for one that is left: walking backwards must come round.
    path = list(waiting)[:1]
    while path and len(set(path)) == len(path):
        path.append(next((p for p in waiting[path[-1]] if p in waiting), path[-1]))
    cycle = path[path.index(path[-1]) + 1 :][::-1] if path else []
    first = min(range(len(cycle)), key=lambda i: list(graph).index(cycle[i]), default=0)
    return cycle[first:] + cycle[:first]


def _producers(node: ir.Node) -> Iterator[ir.Node]:
    values: list[ir.Value | None] = list(node.inputs)
    for graph in subgraphs(node):
        values += [v for n in every_node(graph) for v in n.inputs] + list(graph.outputs)
    for value in values:
        producer = value.producer() if value is not None else None
        if producer is not None:
            yield producer


def _own_tensors(model: ir.Model, source: str, files: ExternalFiles) -> None:
    for graph in every_graph(model.graph):
        for value in graph.initializers.values():
            if value.const_value is None:
                raise CaptureError(
                    f"initializer '{value.name}' has no data",
                    where=source,
                    advice="give the model with its weights",
                )
            value.const_value = own(value.const_value, files, source)
            value.const_value.name = value.name
            value.dtype = value.const_value.dtype
            shape = shape_of(value.const_value)
            if not (value.is_graph_output() and _allows(value.shape, shape)):  # what an interface says stays
                value.shape = shape
    for node in every_node(model.graph):
        for name, attribute in tuple(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref():
                tensor = own(attribute.value, files, source)
                node.attributes[name] = ir.AttrTensor(name, tensor)


def _allows(declared: ir.Shape | None, shape: ir.Shape) -> bool:
    """Whether data of ``shape`` is what was declared, where that leaves dims open."""
    if declared is None or len(declared) != len(shape):
        return False
    return all(not isinstance(d, int) or d == n for d, n in zip(declared, shape, strict=True))


def _lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes into initializers, but those that are an output: their graph must produce it."""
    for node in tuple(every_node(model.graph)):
        if node.op_type != "Constant" or node.domain not in STANDARD or len(node.attributes) != 1:
            continue
        output, graph = node.outputs[0], node.graph
        tensor = _constant_tensor(next(iter(node.attributes.values())))
        if tensor is None or output.is_graph_output() or not isinstance(graph, ir.Graph):
            continue
        name = output.name or f"{node.name}_value"
        output.name = None
        tensor.name = name
        lifted = ir.Value(
            name=name, shape=shape_of(tensor), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        lifted.metadata_props.update(output.metadata_props)
        output.replace_all_uses_with(lifted)
        graph.remove(node, safe=True)
        while lifted.name in graph.initializers:
            lifted.name = f"{lifted.name}_"
        graph.register_initializer(lifted)


def _constant_tensor(attribute: ir.Attr) -> ir.TensorProtocol | None:
    kind, value = attribute.name, attribute.value
    if attribute.is_ref():
        return None
    if kind == "value":
        found: ir.TensorProtocol = attribute.value
        return found
    if kind in ("value_int", "value_ints"):
        return ir.Tensor(np.array(value, np.int64))
    if kind in ("value_float", "value_floats"):
        return ir.Tensor(np.array(value, np.float32))
    if kind in ("value_string", "value_strings"):
        texts = [value] if isinstance(value, str) else list(value)
        shape = ir.Shape(()) if kind == "value_string" else ir.Shape((len(texts),))
        return ir.StringTensor([t.encode() for t in texts], shape=shape)
    return None  # sparse_value: left to the runtime


def _tidy_interface(model: ir.Model, source: str) -> None:
    if not model.graph.outputs:
        raise CaptureError("the model has no outputs", where=source, advice=_EXPORT_AGAIN)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if not value.name:
            raise CaptureError("an input or output has no name", where=source, advice=_EXPORT_AGAIN)
        if value.shape is not None and any(isinstance(d, int) and d < 0 for d in value.shape):
            # Some exporters write -1 for a dynamic dim; runtimes read it as one, onnx's checker does not.
            value.shape = ir.Shape([None if isinstance(d, int) and d < 0 else d for d in value.shape])


def _leave_deprecated(model: ir.Model) -> None:
    """GroupNormalization of opset 18 to 20 was withdrawn with 21: onnx's checker refuses it since."""
    if 18 <= model.opset_imports[""] < 21 and any(_is_group_norm(n) for n in every_node(model.graph)):
        infer_shapes(model)
        opset.raise_opset(model, 21)


def _is_group_norm(node: ir.Node) -> bool:
    return node.op_type == "GroupNormalization" and node.domain == ""


def _trim_outputs(graph: ir.Graph) -> None:
    """Drop trailing omitted optional outputs."""
    for node in every_node(graph):
        count = len(node.outputs)
        while count > 1 and not node.outputs[count - 1].name:
            count -= 1
        if count < len(node.outputs):
            node.resize_outputs(count)


def check_proto(proto: onnx.ModelProto, source: str) -> None:
    """Run onnx's checker on a model's skeleton.

    Raises:
        CaptureError: The checker objects; its message is passed on.
    """
    ports = [
        p.type.tensor_type
        for p in (*proto.graph.input, *proto.graph.output)
        if p.type.HasField("tensor_type")
    ]
    bare = [kind for kind in ports if not kind.HasField("shape")]
    for kind in bare:
        kind.shape.SetInParent()  # the checker insists on one; runtimes infer it
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        raise CaptureError(
            f"not a valid ONNX model: {message}", where=source, advice=_EXPORT_AGAIN
        ) from error
    for kind in bare:
        kind.ClearField("shape")
