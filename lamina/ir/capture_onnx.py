"""Read ONNX models, from files and from memory, into normalized programs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from lamina.errors import CaptureError, UnsupportedOperator
from lamina.ir.inference import holds_map, infer_shapes
from lamina.ir.normalize import OLDEST, normalize
from lamina.ir.opaque import STANDARD
from lamina.ir.tensors import ExternalFiles

_DAMAGED = "the file is truncated or not an ONNX model: export or download it again"
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_PICKLES = {".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin", ".safetensors", ".pt2"}


def from_path(path: Path) -> ir.Model:
    """Read and normalize a file.

    Raises:
        CaptureError: The file is missing, damaged, not ONNX, or its external data is.
        UnsupportedOperator: It uses an operator, domain or opset lamina does not know.
    """
    source = str(path)
    if path.suffix.lower() in _PICKLES:
        raise CaptureError(
            f"'{path.name}' is not an ONNX file, and loading it could run code from it",
            where=source,
            advice="load it yourself and pass the torch.nn.Module, or export it to .onnx first",
        )
    proto = _read(path, source)
    _lift_plain_constants(proto.graph)
    files = ExternalFiles(path.parent)
    return _from_proto(proto, source, files)


def from_proto(proto: onnx.ModelProto, source: str) -> ir.Model:
    """Normalize a model in memory; ``proto`` is not changed.

    Raises:
        CaptureError: The model is not valid, or its weights lie in files.
        UnsupportedOperator: It uses an operator, domain or opset lamina does not know.
    """
    _check_shell(proto, source)
    return _from_proto(proto, source, ExternalFiles(None))


def from_ir(model: ir.Model, source: str) -> ir.Model:
    """Normalize a copy of ``model``; weights are shared.

    Raises:
        CaptureError: The model is not valid.
        UnsupportedOperator: It uses an operator, domain or opset lamina does not know.
    """
    try:
        copy = model.clone()
    except Exception:  # clone needs sorted nodes and raises nested RuntimeErrors without
        copy = ir.from_proto(ir.to_proto(model))
    return _finish(copy, source, ExternalFiles(None))


def _read(path: Path, source: str) -> onnx.ModelProto:
    advice = "give the path of an .onnx file"
    if not path.exists():
        raise CaptureError(f"there is no file '{path}'", advice=advice)
    if path.is_dir():
        raise CaptureError(f"'{path}' is a folder, not a model", advice=advice)
    if not path.is_file():  # a pipe would block, a device would never end
        raise CaptureError(f"'{path}' is not an ordinary file", advice="copy it to a file first")
    try:
        if path.stat().st_size == 0:
            raise CaptureError(f"'{path.name}' is empty", where=source, advice=_DAMAGED)
        proto = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise CaptureError(
            f"'{path}' cannot be read: {error.strerror or error}", advice="check the path and its permissions"
        ) from error
    except (DecodeError, ValueError, onnx.parser.ParseError) as error:
        raise CaptureError(
            f"'{path.name}' is not a readable ONNX model", where=source, advice=_DAMAGED
        ) from error
    _check_shell(proto, source)
    return proto


def _lift_plain_constants(graph: onnx.GraphProto) -> None:
    """Turn Constant nodes into initializers before they become objects, a third of what some exporters write.

    Only where all of them are tensors in one flat graph with nothing odd about it: what is left is lifted,
    or refused, by :func:`lamina.ir.normalize.normalize`, to the same result.
    """
    nodes = list(graph.node)
    constants = [n for n in nodes if _is_constant(n)]
    if not constants or not all(map(_is_plain, constants)):
        return
    taken = [port.name for ports in (graph.initializer, graph.input, graph.output) for port in ports]
    made = [name for node in nodes for name in node.output if name]
    if len(set(made)) < len(made) or not {n.output[0] for n in constants}.isdisjoint(taken):
        return
    if any([a.type in _GRAPHS for n in nodes for a in n.attribute]):
        return
    graph.initializer.extend([n.attribute[0].t for n in constants])
    for tensor, node in zip(graph.initializer[-len(constants) :], constants, strict=True):
        tensor.name = node.output[0]
    graph.node.sort(key=_is_constant)  # moves the messages; taking them out one by one would be quadratic
    del graph.node[len(nodes) - len(constants) :]


def _is_constant(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and node.domain in STANDARD


def _is_plain(node: onnx.NodeProto) -> bool:
    if len(node.attribute) != 1 or len(node.output) != 1 or node.input or node.metadata_props:
        return False
    attribute = node.attribute[0]
    tensor = attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR
    return tensor and attribute.HasField("t") and not attribute.ref_attr_name and bool(node.output[0])


def _check_shell(proto: onnx.ModelProto, source: str) -> None:
    """Bytes cut at a field border, and some that were never a model, still parse: look what is there."""
    if not proto.HasField("graph") or not proto.ir_version or not proto.graph.output:
        raise CaptureError("the model has no graph with outputs", where=source, advice=_DAMAGED)
    if not proto.opset_import:
        raise CaptureError("the model names no opset", where=source, advice=_DAMAGED)
    twice = [name for name, n in Counter(t.name for t in proto.graph.initializer).items() if n > 1]
    if twice:
        raise CaptureError(
            f"two weights are called '{twice[0]}'", where=source, advice="export the model again"
        )
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise UnsupportedOperator(
            f"weight '{name}' is stored sparse", where=source, advice="store it dense and try again"
        )
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        if holds_map(value.type):
            raise UnsupportedOperator(
                f"'{value.name}' is or holds a map",
                where=source,
                advice="export without maps, for scikit-learn with options={'zipmap': False}",
            )


def _from_proto(proto: onnx.ModelProto, source: str, files: ExternalFiles) -> ir.Model:
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # the reader wraps whatever went wrong, level by level
        if "Sparse tensors are not supported" in _root(error):
            raise UnsupportedOperator(
                "a constant is stored sparse", where=source, advice="store it dense and try again"
            ) from error
        raise CaptureError(
            f"not a valid ONNX model: {_root(error)}", where=source, advice="export the model again"
        ) from error
    _believe_inputs(model, proto)
    return _finish(model, source, files)


def _believe_inputs(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Give an input that is an output as well the shape it has as an input.

    trap: the reader lets the output's declaration win, which may say nothing.
    """
    declared = {info.name: info for info in proto.graph.input}
    for value in model.graph.inputs:
        if value.is_graph_output() and value.shape is None and value.name in declared:
            value.shape = ir.serde.deserialize_type_proto_for_shape(declared[value.name].type)


def _finish(model: ir.Model, source: str, files: ExternalFiles) -> ir.Model:
    normalize(model, source, files)
    if model.opset_imports[""] < OLDEST:
        from lamina.ir.upgrade import upgrade

        model = upgrade(model, source)
        infer_shapes(model)
    return model


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
