"""onnxscript's constant folding without asking about the same operator on the same inputs twice.

Networks repeat their layers: of the 12,000 nodes of a deep decoder a few dozen differ in what the library
reads (operator, attributes, input types, small constants, shapes it follows as values), and it serializes and
infers each.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Any

import onnx_ir as ir

_SMALL = 20  # elements: what the library hands to the inference as data
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_PLAIN = (
    ir.AttributeType.INT,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOAT,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRING,
    ir.AttributeType.STRINGS,
)
# The library's rules for these look at nothing but what is in _key: an answer holds for all nodes with that
# key. The other rules look at other values, or change what they look at.
_LOCAL_RULES = frozenset(
    {"Add", "Abs", "Gather", "Reshape", "Squeeze", "Cast", "CastLike", "Shape", "Size", "Concat", "Dropout"}
    | {"Expand"}
)


@cache
def remembering_pass() -> type | None:
    """Subclass onnxscript's pass to remember what it found; None where it has no such methods."""
    from onnxscript.optimizer import _constant_folding as library

    base = getattr(library, "FoldConstantsPass", None)
    methods = ("visit_node", "process_node", "_do_inference", "_reset")
    if base is None or not all(hasattr(base, name) for name in methods):
        return None
    rules = library.registry.op_evaluators  # (domain, operator) -> what it may become
    unforeseen = {key for key in rules if key[0] or key[1] not in _LOCAL_RULES}

    class RememberingPass(base):  # type: ignore[misc, valid-type]
        def _reset(self) -> None:
            super()._reset()
            self._known: dict[Hashable, list[_Output]] = {}
            self._inferred: dict[Hashable, list[_Output]] = {}

        def visit_node(self, node: ir.Node, root: ir.Graph | ir.Function) -> None:
            """Do as before where a node like this one was left as it is; else ask the library."""
            self._read_through(node)
            local = (node.domain, node.op_type) not in unforeseen and _is_computed(node)
            key = _key(node, self._state.symbolic_value_map) if local else None
            if key is None or not self._recall(node, self._known.get(key)):
                super().visit_node(node, root)
                if key is not None and node.graph is not None:  # it was not replaced
                    self._remember(node, self._known, key)

        def _do_inference(self, node: ir.Node) -> None:
            key = _key(node, {})
            if key is None or not self._recall(node, self._inferred.get(key)):
                super()._do_inference(node)
                if key is not None:
                    self._remember(node, self._inferred, key)

        def _read_through(self, node: ir.Node) -> None:
            """Read what an input is known to equal, as the library does first of all."""
            for i, value in enumerate(node.inputs):
                equal = self._state.get_sym_value(value)
                if isinstance(equal, ir.Value):
                    node.replace_input_with(i, equal)
                    self._modified = True

        def _recall(self, node: ir.Node, found: list[_Output] | None) -> bool:
            for value, known in zip(node.outputs, found or (), strict=found is not None):
                known.write(value, self._state)
            return found is not None

        def _remember(self, node: ir.Node, known: dict[Hashable, list[_Output]], key: Hashable) -> None:
            seen = [_Output.read(v, self._state) for v in node.outputs]
            whole = [output for output in seen if output is not None]
            if len(whole) == len(seen):
                known[key] = whole

    return RememberingPass


class _Output:
    """What the library found out about one output of a node."""

    def __init__(self, dtype: ir.DataType | None, shape: ir.Shape | None, content: ir.Shape | None) -> None:
        self._dtype, self._shape, self._content = dtype, shape, content

    @classmethod
    def read(cls, value: ir.Value, state: Any) -> _Output | None:
        """What is known of ``value``; None where it is no tensor or stands for another value."""
        content = state.get_sym_value(value)
        tensor = value.type is None or type(value.type) is ir.TensorType
        if not tensor or not (content is None or isinstance(content, ir.Shape)):
            return None
        return cls(value.dtype, None if value.shape is None else value.shape.copy(), content)

    def write(self, value: ir.Value, state: Any) -> None:
        """Say the same of ``value``."""
        if value.dtype != self._dtype:
            value.type = None if self._dtype is None else ir.TensorType(self._dtype)
        if value.shape is None or self._shape is None or value.shape.dims != self._shape.dims:
            value.shape = None if self._shape is None else self._shape.copy()
        if self._content is not None:
            state.set_sym_value(value, self._content)


def _is_computed(node: ir.Node) -> bool:
    """Whether something that ``node`` reads is not constant: else its result is computed, and differs."""
    return any([v is not None and v.const_value is None for v in node.inputs])


def _key(node: ir.Node, contents: dict[ir.Value, Any]) -> Hashable | None:
    """All that the library's view of ``node`` depends on; None where that is not cheap to say."""
    attributes = []
    for attribute in node.attributes.data.values():
        if attribute.type not in _PLAIN or attribute.is_ref():
            return None
        value = attribute.value
        content = tuple(value) if isinstance(value, (list, tuple)) else value
        attributes.append((attribute.name, attribute.type, content))
    inputs: list[Hashable] = []
    seen: dict[ir.Value, int] = {}
    large = followed = False
    for i, read in enumerate(node.inputs):
        if read is None:
            inputs.append(None)
            continue
        if seen.setdefault(read, i) != i:
            inputs.append(seen[read])  # one value read twice has one type
            continue
        known, tensor, content = _value(read), read.const_value, contents.get(read)
        if known is None or not (content is None or isinstance(content, ir.Shape)):
            return None
        large = large or (tensor is not None and tensor.size > _SMALL)
        followed = followed or content is not None
        inputs.append((known, _content(tensor), None if content is None else _dims(content)))
    if large and followed:
        return None
    # What an output is known to be is merged with what is inferred, so it is read as well.
    outputs = [(_value(v), bool(v.name)) for v in node.outputs]
    return (node.domain, node.op_type, node.overload, tuple(attributes), tuple(inputs), tuple(outputs))


def _value(value: ir.Value) -> Hashable | None:
    """Data type and shape; None for what is no tensor."""
    kind, shape = value.type, value.shape
    if kind is not None and type(kind) is not ir.TensorType:
        return None
    return (None if kind is None else kind.dtype, None if shape is None else _dims(shape))


def _dims(shape: ir.Shape) -> tuple[int | str | None, ...]:
    return tuple([d if isinstance(d, int) else d.value for d in shape])


def _content(tensor: ir.TensorProtocol | None) -> Hashable:
    """The data of a small constant, and of a large one that there is some."""
    if tensor is None:
        return None
    if tensor.size > _SMALL:
        return True
    if tensor.dtype == ir.DataType.STRING:
        return tuple(tensor.string_data())  # type: ignore[attr-defined]
    return tensor.tobytes()
