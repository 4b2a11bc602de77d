"""Check that a program is whole: structure after every pass, onnx's own checker at the end."""

from __future__ import annotations

import os
from collections.abc import Hashable

import onnx
import onnx_ir as ir

from lamina.errors import BudgetError, CaptureError, VerificationError
from lamina.ir.inference import follows_values
from lamina.ir.names import subgraphs
from lamina.ir.normalize import check_proto, label
from lamina.ir.program import Program
from lamina.ir.schemas import KNOWN_DOMAINS, fault_of_operator, fault_of_types, type_text
from lamina.ir.skeleton import skeleton
from lamina.ir.tensors import shape_of


def verify_all() -> bool:
    """Whether ``LAMINA_VERIFY=all`` asks for every check, execution included, after every single change.

    Raises:
        BudgetError: The variable says something else.
    """
    level = os.environ.get("LAMINA_VERIFY", "")
    if level not in ("", "all"):
        raise BudgetError(
            f"LAMINA_VERIFY={level} is not understood",
            advice="set it to all, or unset it for structure after every pass",
        )
    return level == "all"


def verify_structure(subject: Program | ir.Model, pass_name: str = "") -> None:
    """Check ownership, single definition, def before use, names, opsets, arity, types and interface.

    One walk over nodes and edges, subgraphs and what they capture included; initializers are held against
    their data.

    Args:
        subject: What to check; not changed.
        pass_name: The pass that ran last, for the message.

    Raises:
        VerificationError: An invariant is broken; names the pass, the node and the invariant.
    """
    _Verifier(subject.model if isinstance(subject, Program) else subject, pass_name).run()


def check(subject: Program | ir.Model, proto: onnx.ModelProto | None = None) -> None:
    """Run onnx's checker, and hold every known shape and dtype against shape inference.

    Args:
        subject: What to check; not changed.
        proto: The same as a message, where the caller has one at hand; it is used up.

    Raises:
        VerificationError: The checker objects, or a value's shape or dtype contradicts what is inferred.
    """
    model = subject.model if isinstance(subject, Program) else subject
    source = subject.source if isinstance(subject, Program) else model.graph.name or "the model"
    proto = skeleton(model)[0] if proto is None else proto
    try:
        check_proto(proto, source)
    except CaptureError as error:
        raise VerificationError(
            error.what, where=source, advice="this is a bug in lamina: report it"
        ) from error
    _check_types(model, proto)


class _Verifier:
    def __init__(self, model: ir.Model, pass_name: str) -> None:
        self._model = model
        self._pass = pass_name
        self._opsets = model.opset_imports
        self._defined: dict[ir.Value, int] = {}
        self._value_names: set[str] = set()
        self._node_names: set[str] = set()
        self._fitting: set[tuple[object, ...]] = set()

    def run(self) -> None:
        graph = self._model.graph
        self._interface(graph)
        self._graph(graph)

    def _interface(self, graph: ir.Graph) -> None:
        if not graph.outputs:
            self._fail("the graph has no outputs", "its interface")
        for value in (*graph.inputs, *graph.outputs):
            if not value.name:
                self._fail("an input or output has no name", "its interface")
        for value in graph.outputs:
            if value.type is None:
                self._fail(f"output '{value.name}' has no type", "its interface")

    def _graph(self, graph: ir.Graph) -> None:
        for value in graph.inputs:
            self._define(value, 0, "the graph's inputs")
        for name, value in graph.initializers.items():
            if value.name != name:
                self._fail(
                    f"initializer '{value.name}' is registered as '{name}'", "the graph's initializers"
                )
            self._initializer(value)
            if value not in self._defined:  # one that is listed as an input as well is defined there
                self._define(value, 0, "the graph's initializers")
        for position, node in enumerate(graph, 1):
            self._node(node, graph, position)
        for value in graph.outputs:
            if value not in self._defined:
                self._fail(f"output '{value.name}' is produced by nothing in scope", "the graph's outputs")

    def _initializer(self, value: ir.Value) -> None:
        where = "the graph's initializers"
        tensor = value.const_value
        if tensor is None:
            self._fail(f"initializer '{value.name}' has no data", where)
            return
        if value.producer() is not None:
            self._fail(f"initializer '{value.name}' is the output of a node as well", where)
        if value.dtype is not None and value.dtype != tensor.dtype:
            dtypes = f"{value.dtype.name}, its data {tensor.dtype.name}"
            self._fail(f"initializer '{value.name}' is declared {dtypes}", where)
        if value.shape is not None and not _fits(value.shape, tensor):
            self._fail(
                f"initializer '{value.name}' is declared {value.shape}, its data {shape_of(tensor)}", where
            )

    def _define(self, value: ir.Value, position: int, where: str | ir.Node) -> None:
        if value in self._defined:
            self._fail(f"value '{value.name}' is defined twice", where)
        name = value.name
        if not name:
            if value.uses() or value.is_graph_output():
                self._fail("a value that is read has no name", where)
        elif name in self._value_names:
            self._fail(f"two values are called '{name}'", where)
        else:
            self._value_names.add(name)
        self._defined[value] = position

    def _node(self, node: ir.Node, graph: ir.Graph, position: int) -> None:
        if node.graph is not graph:
            self._fail(f"{label(node)} is listed in a graph that does not own it", label(node))
        if not node.name or node.name in self._node_names:
            what = (
                f"two nodes are called '{node.name}'" if node.name else f"a {node.op_type} node has no name"
            )
            self._fail(what, label(node))
        self._node_names.add(node.name or "")
        for i, value in enumerate(node.inputs):
            if value is not None and value not in self._defined:
                self._undefined(node, i, value, position)
        self._operator(node)
        for inner in subgraphs(node):
            self._scope(inner)
            if node.op_type == "If" and len(inner.outputs) != len(node.outputs):
                counts = f"{len(node.outputs)} outputs, its branch gives {len(inner.outputs)}"
                self._fail(f"{label(node)} has {counts}", label(node))
        for output in node.outputs:
            if output.producer() is not node:
                self._fail(f"value '{output.name}' names another producer", label(node))
            self._define(output, position, node)

    def _scope(self, graph: ir.Graph) -> None:
        """Check a subgraph, then forget what it defines: nothing outside may read it."""
        self._graph(graph)
        own = {*graph.inputs, *graph.initializers.values(), *(v for n in graph for v in n.outputs)}
        for value in graph.outputs:
            if value not in own:
                self._fail(
                    f"output '{value.name}' of a subgraph is a value of the graph around it", f"{graph.name}"
                )
        for value in own:
            self._defined.pop(value, None)

    def _operator(self, node: ir.Node) -> None:
        """Hold a node against its schema: it exists in the opset, has fitting counts and fitting types."""
        known = self._fits_schema(node)
        if known in self._fitting:
            return
        version = self._opsets.get(node.domain)
        if version is None:
            self._fail(f"the model imports no opset of domain '{node.domain or 'ai.onnx'}'", label(node))
        elif node.domain in KNOWN_DOMAINS:
            key = node.domain, node.op_type, version
            fault = fault_of_operator(*key, len(node.inputs), len(node.outputs))
            if fault is not None:
                kind, text = fault
                self._fail(text if kind == "existence" else f"{label(node)} {text}", label(node))
            inputs = tuple([type_text(v) for v in node.inputs])
            clash = fault_of_types(*key, inputs, tuple([type_text(v) for v in node.outputs]))
            if clash is not None:
                self._fail(f"types of {label(node)} do not fit: {clash}", label(node))
        self._fitting.add(known)

    @staticmethod
    def _fits_schema(node: ir.Node) -> tuple[object, ...]:
        """All that :meth:`_operator` looks at: nodes that agree in it fit or do not fit alike."""
        inputs = tuple([None if v is None else _kind(v) for v in node.inputs])
        return (node.op_type, node.domain, inputs, tuple([_kind(v) for v in node.outputs]))

    def _undefined(self, node: ir.Node, index: int, value: ir.Value, position: int) -> None:
        producer = value.producer()
        if producer is None:
            what, origin = f"value '{value.name}' is used but never defined", "defined by nothing"
        elif producer.graph is None:
            what = f"value '{value.name}' is used after its node was removed"
            origin = f"defined by {label(producer)}, which is in no graph"
        else:
            what = f"value '{value.name}' is used before it is defined, or out of its scope"
            at = next((i for i, n in enumerate(producer.graph, 1) if n is producer), 0)
            origin = f"defined by {label(producer)} at position {at}, used at {position}"
        self._fail(what, f"{label(node)}, input {index}; {origin}")

    def _fail(self, what: str, where: str | ir.Node) -> None:
        where = label(where) if isinstance(where, ir.Node) else where
        after = f"after {self._pass}: " if self._pass else ""
        culprit = "the pass" if self._pass else "lamina"
        raise VerificationError(
            after + what, where=where, advice=f"this is a bug in {culprit}: report it with the model"
        )


def _kind(value: ir.Value) -> object:
    """What distinguishes the types of two values."""
    kind = value.type
    return kind.dtype if type(kind) is ir.TensorType else kind


def _fits(declared: ir.Shape, tensor: ir.TensorProtocol) -> bool:
    """Whether data has the declared shape; the dims of an output may be dynamic and its data constant."""
    if declared.dims == tensor.shape.dims:
        return True
    dims = tensor.shape.numpy()
    pairs = zip(declared, dims, strict=False)
    return len(declared) == len(dims) and all(d == n for d, n in pairs if isinstance(d, int))


def _check_types(model: ir.Model, proto: onnx.ModelProto) -> None:
    """Infer anew from the interface and the weights alone, then compare with what the values say.

    ``proto`` is the model's skeleton; it is used up.
    """
    del proto.graph.value_info[:]
    for output in proto.graph.output:
        output.ClearField("type")
    try:
        inferred = onnx.shape_inference.infer_shapes(
            proto, check_type=False, strict_mode=False, data_prop=follows_values(model)
        )
    except onnx.shape_inference.InferenceError as error:
        raise VerificationError(
            f"shape inference fails: {str(error).splitlines()[0]}",
            advice="this is a bug in lamina: report it",
        ) from error
    infos = {info.name: info for info in (*inferred.graph.value_info, *inferred.graph.output)}
    alike: set[Hashable] = set()  # layers repeat: what was compared once need not be again
    for node in model.graph:
        for value in node.outputs:
            info = infos.get(value.name)
            if info is None:
                continue
            dims = None if value.shape is None else value.shape.dims
            key = (info.type.SerializeToString(), value.dtype, dims, value.is_graph_output())
            if key not in alike:
                _compare(node, value, info)
                alike.add(key)


def _compare(node: ir.Node, value: ir.Value, info: onnx.ValueInfoProto) -> None:
    if not info.type.HasField("tensor_type"):
        return
    tensor = info.type.tensor_type
    advice = "this is a bug in the pass that made the value: report it with the model"
    if value.dtype is not None and tensor.elem_type and value.dtype != tensor.elem_type:
        got = ir.DataType(tensor.elem_type).name
        raise VerificationError(
            f"value '{value.name}' is {value.dtype.name} but inferred as {got}",
            where=label(node),
            advice=advice,
        )
    if value.shape is None or not tensor.HasField("shape") or value.is_graph_output():
        return  # an interface shape is the user's own statement, right or wrong
    dims = [d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim]
    known = [d if isinstance(d, int) else None for d in value.shape]
    clash = len(dims) != len(known) or any(
        None not in (a, b) and a != b for a, b in zip(dims, known, strict=True)
    )
    if clash:
        raise VerificationError(
            f"value '{value.name}' has shape {value.shape} but inferred as {dims}",
            where=label(node),
            advice=advice,
        )
