"""Programs for tests that need only an interface: inputs and outputs of given dtypes and shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir

from lamina.ir.program import Program

Spec = tuple[str, Sequence[int | str | None]]


def interface(
    inputs: Mapping[str, Spec],
    outputs: Mapping[str, Spec],
    *,
    last: str = "Identity",
    example: Mapping[str, np.ndarray] | None = None,
) -> Program:
    """A program of these ports; each output made by one ``last`` node; never run it."""
    first = next(iter(inputs))
    nodes = [onnx.helper.make_node(last, [first], [name], name=f"make_{name}") for name in outputs]
    graph = onnx.helper.make_graph(nodes, "interface", _values(inputs), _values(outputs))
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)])
    return Program(ir.serde.deserialize_model(model), source="interface", example=example or {})


def _values(specs: Mapping[str, Spec]) -> list[onnx.ValueInfoProto]:
    types = {
        "float32": 1,
        "uint8": 2,
        "int32": 6,
        "int64": 7,
        "string": 8,
        "bool": 9,
        "float16": 10,
        "float64": 11,
    }
    return [onnx.helper.make_tensor_value_info(n, types[t], list(shape)) for n, (t, shape) in specs.items()]
