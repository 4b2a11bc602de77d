"""onnxscript's constant folding without inferring the shapes of the same operator on the same inputs twice.

Networks repeat their layers: of the 12,000 nodes of a deep decoder a few dozen differ in what shape inference
reads (operator, attributes, input types, small constants). The library serializes and infers each.
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


@cache
def remembering_pass() -> type | None:
    """Subclass onnxscript's pass to remember inferences; None where the library has no such method."""
    from onnxscript.optimizer import _constant_folding as library

    base = getattr(library, "FoldConstantsPass", None)
    methods = ("_do_inference", "process_node", "_reset")
    if base is None or not all(hasattr(base, name) for name in methods):
        return None
    rewritten = library.registry.op_evaluators  # (domain, operator) -> what it may become

    class RememberingPass(base):  # type: ignore[misc, valid-type]
        def _reset(self) -> None:
            super()._reset()
            self._known: dict[Hashable, list[tuple[Any, Any]]] = {}

        def process_node(self, node: ir.Node, is_function: bool) -> Any:
            """Infer, and skip what the library does further where it cannot come to anything."""
            if (node.domain, node.op_type) in rewritten or not self._is_computed(node):
                return super().process_node(node, is_function)
            self._do_inference(node)
            return None

        def _is_computed(self, node: ir.Node) -> bool:
            """Whether an input is not constant, none stands for another value, and no graph is inside."""
            computed = False
            for value in node.inputs:
                if value is not None:
                    computed = computed or value.const_value is None
                    if isinstance(self._state.get_sym_value(value), ir.Value):
                        return False
            return computed and not any(a.type in _GRAPHS for a in node.attributes.data.values())

        def _do_inference(self, node: ir.Node) -> None:
            key = _key(node)
            if key is None:
                super()._do_inference(node)
                return
            found = self._known.get(key)
            if found is None:
                super()._do_inference(node)
                if all(v.type is None or type(v.type) is ir.TensorType for v in node.outputs):
                    shapes = [None if v.shape is None else v.shape.copy() for v in node.outputs]
                    self._known[key] = [(v.dtype, s) for v, s in zip(node.outputs, shapes, strict=True)]
                return
            for value, (dtype, shape) in zip(node.outputs, found, strict=True):
                value.type = None if dtype is None else ir.TensorType(dtype)
                value.shape = None if shape is None else shape.copy()

    return RememberingPass


def _key(node: ir.Node) -> Hashable | None:
    """All that the library's inference of ``node`` depends on; None where that is not cheap to say."""
    attributes = []
    for attribute in node.attributes.data.values():
        if attribute.type not in _PLAIN or attribute.is_ref():
            return None
        value = attribute.value
        content = tuple(value) if isinstance(value, (list, tuple)) else value
        attributes.append((attribute.name, attribute.type, content))
    inputs: list[Hashable] = []
    seen: dict[ir.Value, int] = {}
    for i, read in enumerate(node.inputs):
        if read is None:
            inputs.append(None)
        elif seen.setdefault(read, i) != i:
            inputs.append(seen[read])  # one value read twice has one type
        else:
            known = _value(read)
            if known is None:
                return None
            inputs.append((known, _content(read.const_value)))
    # What an output is known to be is merged with what is inferred, so it is read as well.
    outputs = [(_value(v), bool(v.name)) for v in node.outputs]
    return (node.domain, node.op_type, node.overload, tuple(attributes), tuple(inputs), tuple(outputs))


def _value(value: ir.Value) -> Hashable | None:
    """Data type and shape; None for what is no tensor."""
    if value.type is not None and type(value.type) is not ir.TensorType:
        return None
    shape = value.shape
    dims = None if shape is None else tuple(d if isinstance(d, int) else d.value for d in shape.dims)
    return (value.dtype, dims)


def _content(tensor: ir.TensorProtocol | None) -> Hashable:
    if tensor is None or tensor.size > _SMALL:
        return None
    if tensor.dtype == ir.DataType.STRING:
        return tuple(tensor.string_data())  # type: ignore[attr-defined]
    return tensor.tobytes()
