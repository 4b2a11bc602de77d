"""Observed shapes: every value, whatever inference knows, without copying weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnx_tools import branching, mlp, proto

from lamina.errors import BackendError
from lamina.ir.capture import capture
from lamina.ir.shapes import observed_shapes

_F32 = np.dtype(np.float32)


def test_every_value_of_a_network() -> None:
    seen = observed_shapes(capture(mlp(64)), {"x": np.zeros((5, 64), np.float32)})
    assert seen["x"] == ((5, 64), _F32)
    assert seen["w1"] == ((64, 128), _F32)
    assert seen["h3"] == ((5, 128), _F32)
    assert seen["y"] == ((5, 64), _F32)
    assert set(seen) == {"x", "w1", "b1", "w2", "h1", "h2", "h3", "h4", "y"}


def test_shapes_that_depend_on_values() -> None:
    nodes = [helper.make_node("NonZero", ["x"], ["where"]), helper.make_node("Cast", ["where"], ["y"], to=1)]
    program = capture(proto(nodes, {"x": ["n"]}, {"y": [1, "k"]}))
    seen = observed_shapes(program, {"x": np.array([0, 1, 2, 0, 3], np.float32)})
    assert seen["where"] == ((1, 3), np.dtype(np.int64))
    assert seen["y"] == ((1, 3), _F32)


def test_values_behind_contrib_operators() -> None:
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft"),
        helper.make_node("Relu", ["g"], ["y"]),
    ]
    model = proto(nodes, {"x": ["n", 3]}, {"y": ["n", 3]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    seen = observed_shapes(capture(model), {"x": np.ones((2, 3), np.float32)})
    assert seen["g"] == seen["y"] == ((2, 3), _F32)


def test_control_flow_and_wrong_declarations() -> None:
    model = branching()
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 99
    seen = observed_shapes(capture(model), {"x": np.ones((3, 4), np.float32)})
    assert seen["y"] == ((3, 4), _F32)


def test_weights_numpy_cannot_hand_over() -> None:
    program = capture(mlp()).clone()
    tensor = ir.Tensor(np.ones(4096, np.uint16), ir.DataType.BFLOAT16, name="half")
    half = ir.Value(name="half", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape([4096]))
    program.graph.register_initializer(half)
    cast = ir.node("Cast", [half], {"to": TensorProto.FLOAT}, name="cast")
    cast.outputs[0].name = "wide"
    cast.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    program.graph.append(cast)
    seen = observed_shapes(program, {"x": np.zeros((1, 8), np.float32)})
    assert seen["wide"] == ((4096,), _F32)


def test_the_program_is_not_changed() -> None:
    program = capture(mlp(64))
    before = ir.to_proto(program.model).SerializeToString()
    observed_shapes(program, program.example)
    assert ir.to_proto(program.model).SerializeToString() == before


def test_feeds_that_do_not_run() -> None:
    with pytest.raises(BackendError, match="the model does not run on these inputs") as caught:
        observed_shapes(capture(mlp()), {"x": np.zeros((1, 7), np.float32)})
    assert caught.value.where == "net"
