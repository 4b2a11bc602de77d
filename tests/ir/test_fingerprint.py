"""Fingerprints: blind to names and order, sharp for everything that is computed."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_tools import branching, mlp, proto
from work import steps

from lamina.ir.capture import capture


def _of(model: onnx.ModelProto) -> str:
    return capture(model).fingerprint


def _renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    keep = {v.name for v in (*model.graph.input, *model.graph.output)}

    def rename(graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            tensor.name = tensor.name if tensor.name in keep else f"new_{tensor.name}"
        for value in (*graph.output, *graph.value_info):
            value.name = value.name if value.name in keep else f"new_{value.name}"
        for i, node in enumerate(graph.node):
            node.name = f"n{i}"
            node.doc_string = "words"
            node.metadata_props.add(key="k", value=str(i))
            node.input[:] = [v if v in keep or not v else f"new_{v}" for v in node.input]
            node.output[:] = [v if v in keep or not v else f"new_{v}" for v in node.output]
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    rename(attribute.g)

    rename(model.graph)
    return model


@pytest.mark.parametrize("make", [mlp, branching])
def test_names_and_documentation_do_not_count(make: object) -> None:
    assert _of(_renamed(make())) == _of(make())  # type: ignore[operator]


def test_node_order_does_not_count() -> None:
    def wide(order: list[int]) -> onnx.ModelProto:
        arms = [helper.make_node(op, ["x"], [op]) for op in ("Relu", "Neg", "Abs", "Exp")]
        last = helper.make_node("Sum", ["Relu", "Neg", "Abs", "Exp"], ["y"])
        return proto([*(arms[i] for i in order), last], {"x": [2]}, {"y": [2]})

    assert _of(wide([0, 1, 2, 3])) == _of(wide([3, 1, 0, 2]))


def test_dead_nodes_and_saving_do_not_count() -> None:
    model = mlp()
    model.graph.node.append(helper.make_node("Exp", ["h1"], ["unused"]))
    assert _of(model) == _of(mlp())
    program = capture(mlp())
    assert program.clone().fingerprint == program.fingerprint
    assert len(program.fingerprint) == 32
    int(program.fingerprint, 16)


def _weight(model: onnx.ModelProto) -> None:
    raw = bytearray(model.graph.initializer[0].raw_data)
    raw[0] ^= 1
    model.graph.initializer[0].raw_data = bytes(raw)


def _operator(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "Sigmoid"


def _wiring(model: onnx.ModelProto) -> None:
    model.graph.node[4].input[:] = ["h4", "x"]


def _attribute(model: onnx.ModelProto) -> None:
    model.graph.node[2].op_type = "LeakyRelu"


def _input_name(model: onnx.ModelProto) -> None:
    model.graph.input[0].name = "z"
    for node in model.graph.node:
        node.input[:] = ["z" if v == "x" else v for v in node.input]


def _output_name(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "z"
    model.graph.node[4].output[0] = "z"


def _shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3


def _opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 17


@pytest.mark.parametrize(
    "change", [_weight, _operator, _wiring, _attribute, _input_name, _output_name, _shape, _opset]
)
def test_what_is_computed_counts(change: object) -> None:
    model = mlp()
    change(model)  # type: ignore[operator]
    assert _of(model) != _of(mlp())


def test_attribute_values_and_sharing_count() -> None:
    def leaky(alpha: float) -> str:
        return _of(proto([helper.make_node("LeakyRelu", ["x"], ["y"], alpha=alpha)], {"x": [2]}, {"y": [2]}))

    assert leaky(0.1) != leaky(0.2)
    zero = proto(
        [helper.make_node("Add", ["x", "c"], ["y"])], {"x": [1]}, {"y": [1]}, {"c": np.zeros(1, "f")}
    )
    minus = proto(
        [helper.make_node("Add", ["x", "c"], ["y"])], {"x": [1]}, {"y": [1]}, {"c": -np.zeros(1, "f")}
    )
    assert _of(zero) != _of(minus)


def test_branches_of_an_if_count() -> None:
    model = branching()
    then = next(a.g for a in model.graph.node[2].attribute if a.name == "then_branch")
    then.node[1].op_type = "Sigmoid"
    assert _of(model) != _of(branching())
    swapped = branching()
    for attribute in swapped.graph.node[2].attribute:
        attribute.name = {"then_branch": "else_branch", "else_branch": "then_branch"}[attribute.name]
    assert _of(swapped) != _of(branching())


def _chain(length: int) -> onnx.ModelProto:
    names = ["x", *(f"v{i}" for i in range(length - 1)), "y"]
    pairs = list(pairwise(names))
    ops = random.Random(0).choices(["Relu", "Neg", "Abs"], k=length)
    nodes = [helper.make_node(op, [a], [b]) for op, (a, b) in zip(ops, pairs, strict=True)]
    # A diamond at each step would make a naive recursion exponential.
    nodes += [helper.make_node("Add", [a, b], [f"d{i}"]) for i, (a, b) in enumerate(pairs)]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_work_is_linear() -> None:
    from lamina.ir.fingerprint import fingerprint

    short, long = capture(_chain(200)).model, capture(_chain(1600)).model
    fingerprint(short)
    assert steps(lambda: fingerprint(long)) < 8.5 * steps(lambda: fingerprint(short))
