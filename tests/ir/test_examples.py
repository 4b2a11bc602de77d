"""Made-up inputs: consistent sizes, indices inside their tables, the same every time."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import run

from lamina.errors import DataError
from lamina.ir.capture import capture


def _model(
    inputs: list[onnx.ValueInfoProto], nodes: list[onnx.NodeProto], **weights: np.ndarray
) -> onnx.ModelProto:
    outputs = [helper.make_tensor_value_info(o, 1, None) for o in nodes[-1].output]
    tensors = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    graph = helper.make_graph(nodes, "net", inputs, outputs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


_info = helper.make_tensor_value_info


def test_the_same_symbol_has_the_same_size() -> None:
    inputs = [
        _info("ids", TensorProto.INT64, ["batch", "seq"]),
        _info("attention_mask", TensorProto.INT64, ["batch", "past + seq"]),
        _info("past_key", TensorProto.FLOAT, ["batch", 2, "past", 4]),
        _info("flag", TensorProto.BOOL, []),
    ]
    nodes = [helper.make_node("Cast", ["ids"], ["y"], to=1)]
    example = capture(_model(inputs, nodes)).example
    batch = len(example["ids"])
    past = example["past_key"].shape[2]
    assert example["past_key"].shape == (batch, 2, past, 4)
    assert example["attention_mask"].shape[0] == batch
    assert (example["attention_mask"] == 1).all()
    assert example["flag"].shape == ()
    assert example["flag"].dtype == bool


def test_indices_stay_inside_the_smallest_table() -> None:
    rng = np.random.default_rng(0)
    inputs = [_info("ids", TensorProto.INT32, ["b", "s"])]
    nodes = [
        helper.make_node("Cast", ["ids"], ["wide"], to=TensorProto.INT64),
        helper.make_node("Reshape", ["wide", "flat"], ["long"]),
        helper.make_node("Gather", ["big", "long"], ["e1"], axis=1),
        helper.make_node("Gather", ["small", "long"], ["e2"]),
        helper.make_node("ReduceSum", ["e1"], ["s1"], keepdims=0),
        helper.make_node("Add", ["e2", "s1"], ["y"]),
    ]
    tables = {
        "big": rng.standard_normal((2, 900)).astype(np.float32),
        "small": rng.standard_normal((37, 2)).astype(np.float32),
        "flat": np.array([-1]),
    }
    program = capture(_model(inputs, nodes, **tables))
    assert program.example["ids"].max() < 37
    assert program.example["ids"].max() > 1
    assert np.isfinite(run(program.model, program.example)[0]).all()


def test_they_are_the_same_every_time_and_differ_between_inputs() -> None:
    inputs = [_info(n, TensorProto.FLOAT, ["b", 16]) for n in ("a", "b")]
    model = _model(inputs, [helper.make_node("Add", ["a", "b"], ["y"])])
    first, second = capture(model).example, capture(model).example
    np.testing.assert_array_equal(first["a"], second["a"])
    assert not np.array_equal(first["a"], first["b"])


def test_images_get_some_room() -> None:
    inputs = [_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])]
    example = capture(_model(inputs, [helper.make_node("Relu", ["image"], ["y"])])).example
    assert example["image"].shape[2:] == (64, 64)


def test_many_dynamic_dims_stay_small() -> None:
    inputs = [_info("x", TensorProto.FLOAT, [f"d{i}" for i in range(14)]), _info("y", 1, ["d3", "d4"])]
    example = capture(_model(inputs, [helper.make_node("Relu", ["x"], ["z"])])).example
    assert 1 < example["x"].size <= 1 << 24
    assert example["x"].shape[3:5] == example["y"].shape


def test_inputs_too_large_to_be_made_up_are_named() -> None:
    model = _model(
        [_info("x", TensorProto.FLOAT, ["n", 100_000, 100_000])], [helper.make_node("Relu", ["x"], ["y"])]
    )
    with pytest.raises(DataError, match="input 'x' has 10,000,000,000 elements") as caught:
        capture(model)
    assert "give example_inputs" in str(caught.value)
