"""Shape inference that copes with big weights, wrong declarations and what onnx's own leaves open."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir

from lamina.errors import CaptureError
from lamina.ir.amplifiers import amplifies, heavy_nodes
from lamina.ir.names import every_node, subgraphs
from lamina.ir.opaque import STANDARD
from lamina.ir.skeleton import skeleton

_MAX_ROUNDS = 4
# A serialized type -> whether it holds a map, the type and the shape.
_Known = dict[bytes, tuple[bool, ir.TypeProtocol | None, ir.Shape | None]]


def infer_shapes(model: ir.Model, proto: onnx.ModelProto | None = None) -> None:
    """Fill in what inference can tell, in place; what the model declares about its interface stays as it is.

    Declared shapes of inner values are believed only where nothing can be inferred: exporters get them wrong,
    and passes leave them stale.

    Args:
        model: What to fill in.
        proto: Its skeleton where the caller has one at hand; it is used up.
    """
    follow = follows_values(model)
    _round(model, skeleton(model)[0] if proto is None else proto, forget=True, follow=follow)
    for _ in range(_MAX_ROUNDS):
        if not _add_ranks(model.graph):
            return
        _round(model, skeleton(model, described=True)[0], forget=False, follow=follow)


def follows_values(model: ir.Model) -> bool:
    """Whether inference may compute the constants of ``model`` on its way: none of them is enormous.

    Nodes must have names of their own.
    """
    if not any(amplifies(n) for n in every_node(model.graph)):
        return True
    scratch = model.clone()
    for node in every_node(scratch.graph):
        for value in node.outputs:
            value.shape = None  # what a file states of its inner values may be a lie
    _round(scratch, skeleton(scratch)[0], forget=True, follow=False)
    return not heavy_nodes(every_node(scratch.graph))


def _round(model: ir.Model, proto: onnx.ModelProto, *, forget: bool, follow: bool) -> None:
    if forget:
        opaque = {v.name for n in model.graph if n.domain not in STANDARD for v in n.outputs}
        kept = [info for info in proto.graph.value_info if info.name in opaque]
        del proto.graph.value_info[:]
        proto.graph.value_info.extend(kept)
    read = {v.name for v in model.graph.outputs if v.uses()}
    for output in proto.graph.output:
        if output.name in read:  # what it says of itself must not stand for what the nodes behind it get
            output.ClearField("type")
    try:
        done = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=follow)
    except onnx.shape_inference.InferenceError:
        return  # one operator's inference failed: shapes stay unknown, observed_shapes() still works
    _merge(model.graph, done.graph, {})


def _merge(graph: ir.Graph, proto: onnx.GraphProto, known: _Known) -> None:
    infos = {info.name: info for info in (*proto.value_info, *proto.output)}
    protos: dict[str, onnx.NodeProto] = {}
    for node in graph:
        for value in node.outputs:
            if not value.is_graph_output():  # what an earlier inference left in the file
                value.shape = known_dims(value.shape)
            if value.name in infos:
                _refine(value, infos[value.name], known)
        inside = list(subgraphs(node)) if node.attributes.data else []
        if inside:
            protos = protos or {n.name: n for n in proto.node}
            inner_protos = _graph_attributes(protos.get(node.name or ""))
            for inner_proto, inner in zip(inner_protos, inside, strict=False):
                _merge(inner, inner_proto, known)


def _graph_attributes(node: onnx.NodeProto | None) -> Iterable[onnx.GraphProto]:
    for attribute in node.attribute if node is not None else ():
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def holds_map(kind: onnx.TypeProto) -> bool:
    """Whether a type is a map, or a sequence or optional of one: onnx_ir has no such type."""
    inner = kind.WhichOneof("value")
    if inner in ("sequence_type", "optional_type"):
        return holds_map(getattr(kind, inner).elem_type)
    return inner == "map_type"


def _refine(value: ir.Value, info: onnx.ValueInfoProto, known: _Known) -> None:
    text = info.type.SerializeToString()
    found = known.get(text)
    if found is None:
        holds = holds_map(info.type)
        kind = None if holds else ir.serde.deserialize_type_proto_for_type(info.type)
        found = known[text] = (holds, kind, None if holds else _shape(info))
    holds, kind, shape = found
    if holds:
        return
    if shape is not None:
        shape = shape.copy()
    if type(kind) is ir.TensorType:
        kind = ir.TensorType(kind.dtype, denotation=kind.denotation)
    declared = value.is_graph_output()
    if kind is not None and (value.type is None or not declared):
        value.type = kind
    if shape is None:
        return
    if value.shape is None:
        value.shape = shape
    elif declared and value.uses():
        _hold(value, shape)
    elif not declared:
        same_rank = len(value.shape) == len(shape)
        pairs = zip(shape, value.shape, strict=True) if same_rank else ((d, d) for d in shape)
        value.shape = ir.Shape([_better(a, b) for a, b in pairs])


def _hold(value: ir.Value, shape: ir.Shape) -> None:
    """Refuse an output whose declared shape would mislead the nodes that read it."""
    declared = list(value.shape or ())
    pairs = zip(declared, shape, strict=False)
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if clash or len(declared) != len(shape):
        raise CaptureError(
            f"output '{value.name}' is declared as {value.shape} but computed as {shape}",
            advice="correct or remove its declared shape and save the model again",
        )


def _shape(info: onnx.ValueInfoProto) -> ir.Shape | None:
    return known_dims(ir.serde.deserialize_type_proto_for_shape(info.type))


def known_dims(shape: ir.Shape | None) -> ir.Shape | None:
    """``shape`` without the names onnx's inference makes up for dims it does not know.

    trap: each run of it counts from zero, so two values that say ``unk__0`` need not agree.
    """
    if shape is None or not any(_made_up(d) for d in shape):
        return shape
    return ir.Shape([None if _made_up(d) else d for d in shape])


def _made_up(dim: int | ir.SymbolicDim) -> bool:
    return not isinstance(dim, int) and str(dim.value).startswith("unk__")


def _better(inferred: int | ir.SymbolicDim, declared: int | ir.SymbolicDim) -> int | ir.SymbolicDim:
    """A number beats a name, the model's own name beats a made-up one, anything beats nothing."""
    if isinstance(inferred, int):
        return inferred
    if inferred.value is None:
        return declared if isinstance(declared, int) or declared.value is not None else inferred
    return inferred


def _add_ranks(graph: ir.Graph) -> bool:
    """Give Reshapes whose target is computed at least their rank: the length of the target."""
    found = False
    for node in graph:
        target = node.inputs[1] if node.op_type == "Reshape" and len(node.inputs) > 1 else None
        if target is None or target.shape is None or node.outputs[0].shape is not None:
            continue
        length = target.shape[0] if len(target.shape) == 1 else None
        if isinstance(length, int):
            node.outputs[0].shape = ir.Shape([None] * length)
            found = True
    return found
