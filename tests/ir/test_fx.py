"""The FX bridge: interface, names, errors, dynamic dims, types, recurrent and quantized forms."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import branching, mlp, proto, run

from lamina.errors import UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.fx import MissingTorch, initializer_names, to_fx, uncovered

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

_RNG = np.random.default_rng(0)


def _convnet() -> onnx.ModelProto:
    """Conv, BatchNormalization, computed Reshape target and Gemm, with names as exporters make them."""
    weights = {
        "layer1.0/conv.weight": _RNG.standard_normal((4, 3, 3, 3)).astype(np.float32),
        "onnx::Conv_12": _RNG.standard_normal(4).astype(np.float32),
        "bn.scale": np.ones(4, np.float32),
        "bn.bias": np.zeros(4, np.float32),
        "bn.mean": np.full(4, 0.1, np.float32),
        "bn.var": np.ones(4, np.float32),
        "forward": _RNG.standard_normal((4 * 8 * 8, 5)).astype(np.float32),
        "first": np.array([0], np.int64),
        "rest": np.array([-1], np.int64),
        "half": np.array(0.5, np.float32),
    }
    nodes = [
        helper.make_node(
            "Conv", ["x", "layer1.0/conv.weight", "onnx::Conv_12"], ["c"], "/l1/Conv", pads=[1] * 4
        ),
        helper.make_node(
            "BatchNormalization", ["c", "bn.scale", "bn.bias", "bn.mean", "bn.var"], ["n"], "/l1/bn"
        ),
        helper.make_node("Mul", ["n", "half"], ["m"], "scale it"),
        helper.make_node("Shape", ["m"], ["s"], "shape"),
        helper.make_node("Gather", ["s", "first"], ["b"], "batch"),
        helper.make_node("Concat", ["b", "rest"], ["t"], "target", axis=0),
        helper.make_node("Reshape", ["m", "t"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "forward"], ["y"], "classify"),
    ]
    return proto(nodes, {"x": ["b", 3, 8, 8]}, {"y": ["b", 5]}, weights)


def _feed(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


def _ulps(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / (np.abs(want).max() * 2**-23))


@pytest.mark.parametrize("batch", [1, 3])
def test_dynamic_dims_stay_dynamic(batch: int) -> None:
    model = _convnet()
    x = _feed(batch, 3, 8, 8)
    (got,) = to_fx(capture(model))(torch.from_numpy(x))
    (want,) = run(model, {"x": x})
    assert got.shape == (batch, 5)
    assert _ulps(got.detach().numpy(), want) < 8 * 8  # eight ulps for each of eight operators


def test_weights_are_parameters_and_the_rest_are_buffers() -> None:
    program = capture(_convnet())
    module = to_fx(program)
    names = initializer_names(module)
    parameters = {names[n] for n, _ in module.named_parameters()}
    buffers = {names[n] for n, _ in module.named_buffers()}
    assert parameters == {"layer1.0/conv.weight", "onnx::Conv_12", "bn.scale", "bn.bias", "forward"}
    assert buffers == {"bn.mean", "bn.var", "half", "first", "rest"}


def test_names_are_readable_unique_and_reversible() -> None:
    program = capture(_convnet())
    module = to_fx(program)
    names = initializer_names(module)
    assert names["layer1.0.conv.weight"] == "layer1.0/conv.weight"
    assert names["forward_"] == "forward"  # not over the module's own method
    assert len(set(names.values())) == len(names)
    state = module.state_dict()
    for path, initializer in names.items():
        tensor = program.graph.initializers[initializer].const_value
        assert tensor is not None
        assert np.array_equal(state[path].numpy(), tensor.numpy())


def test_a_name_that_is_also_a_folder_gets_a_number() -> None:
    from lamina.ir.fx_names import attribute_names

    made = attribute_names(["a", "a.b", "a/b", "1", "", "training", "é"])
    assert made == {
        "a": "a",
        "a.b": "a_b_1",
        "a/b": "a_b_2",
        "1": "_1",
        "": "initializer",
        "training": "training_",
        "é": "_",
    }


def test_fx_nodes_carry_the_onnx_node() -> None:
    module = to_fx(capture(_convnet()))
    calls = {n.name: n.meta for n in module.graph.nodes if n.op == "call_function"}
    assert calls["l1_Conv"] == {"onnx_name": "/l1/Conv", "op_type": "Conv"}
    assert calls["scale_it"]["op_type"] == "Mul"


def test_the_program_is_left_alone() -> None:
    program = capture(mlp())
    weight = program.graph.initializers["w1"].const_value
    assert weight is not None
    before = weight.numpy().copy()
    module = to_fx(program)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert np.array_equal(weight.numpy(), before)


def test_precision_replaces_every_floating_type() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], "narrow", to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["h"], ["w"], "wide", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "k"], ["y"], "product"),
    ]
    model = proto(nodes, {"x": ["b", 4]}, {"y": ["b", 4]}, {"k": np.eye(4, dtype=np.float32)})
    x = torch.full((1, 4), 1 / 3, dtype=torch.float64)
    (y,) = to_fx(capture(model), precision=torch.float64)(x)
    assert y.dtype == torch.float64
    assert torch.equal(y, x)


def test_all_uncovered_nodes_are_named_before_anything_runs() -> None:
    with pytest.raises(UnsupportedOperator) as caught:
        to_fx(capture(branching()))
    text = str(caught.value)
    assert re.search(r"If '[^']*': runs subgraphs", text)
    assert "fx_table.py" in text

    nodes = [
        helper.make_node("Own", ["x"], ["a"], "mine", domain="my.own"),
        helper.make_node("NonMaxSuppression", ["bb", "ss"], ["n"], "nms"),
        helper.make_node("Relu", ["a"], ["y"], "fine"),
    ]
    model = proto(nodes, {"x": [2], "bb": [1, 2, 4], "ss": [1, 1, 2]}, {"y": [2]})
    model.opset_import.append(helper.make_opsetid("my.own", 1))
    model.graph.output.append(helper.make_tensor_value_info("n", TensorProto.INT64, None))
    lines = uncovered(capture(model))
    assert lines == (
        "my.own.Own 'mine': is of a domain of its own",
        "NonMaxSuppression 'nms': has no FX form",
    )


def test_an_uncovered_type_is_named() -> None:
    weights = {"k": np.arange(2, dtype=np.uint64)}
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], "cast", to=TensorProto.UINT64),
        helper.make_node("Add", ["a", "k"], ["b"], "add"),
        helper.make_node("Cast", ["b"], ["y"], "back", to=TensorProto.FLOAT),
    ]
    lines = uncovered(capture(proto(nodes, {"x": [2]}, {"y": [2]}, weights)))
    assert lines[0] == "Cast 'cast': 'a' is of type uint64, which the FX bridge does not compute with"
    assert len(lines) == 3


def test_missing_torch_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "torch":
            raise ImportError(name)
        return real(name, *rest, **more)

    program = capture(mlp())
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingTorch, match=r"pip install 'lamina\[torch\]'"):
        to_fx(program)


@pytest.mark.parametrize(("op", "gates", "states"), [("LSTM", 4, 2), ("GRU", 3, 1), ("RNN", 1, 1)])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
def test_recurrent_forms_equal_the_runtime(op: str, gates: int, states: int, direction: str) -> None:
    ways, width, hidden, steps, batch = 1 + (direction == "bidirectional"), 3, 4, 5, 2
    weights = {
        "w": _feed(ways, gates * hidden, width),
        "r": _feed(ways, gates * hidden, hidden) / 2,
        "b": _feed(ways, 2 * gates * hidden) / 2,
        "lengths": np.array([5, 3], np.int32),
        "h": _feed(ways, batch, hidden),
        "c": _feed(ways, batch, hidden),
    }
    inputs = ["x", "w", "r", "b", "lengths", "h"] + (["c"] if states == 2 else [])
    outputs = {"y": [None] * 4, "yh": [None] * 3} | ({"yc": [None] * 3} if states == 2 else {})
    used = {k: v for k, v in weights.items() if k in inputs}
    options: dict[str, Any] = {"linear_before_reset": 1} if op == "GRU" else {}
    node = helper.make_node(
        op, inputs, list(outputs), "r", direction=direction, hidden_size=hidden, **options
    )
    model = proto([node], {"x": [steps, batch, width]}, outputs, used)
    x = _feed(steps, batch, width)
    got = to_fx(capture(model))(torch.from_numpy(x))
    for g, w in zip(got, run(model, {"x": x}), strict=True):
        assert _ulps(g.detach().numpy(), w) < 8 * 12 * steps  # a step is twelve operators


def test_quantization_passes_no_gradient() -> None:
    weights = {"s": np.float32(0.1), "z": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], "dequantize"),
    ]
    module = to_fx(capture(proto(nodes, {"x": [4]}, {"y": [4]}, weights)))
    x = torch.tensor([0.11, -0.32, 99.0, -99.0], requires_grad=True)
    (y,) = module(x)
    assert torch.allclose(y, torch.tensor([0.1, -0.3, 12.7, -12.8]))
    assert not y.requires_grad


def test_an_output_may_be_an_input_or_a_weight() -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], "relu")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, [2]) for n in ("y", "x", "w")],
        [numpy_helper.from_array(np.array([1, 2], np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    x = torch.tensor([-1.0, 1.0])
    answers = to_fx(capture(model))(x)
    assert [a.tolist() for a in answers] == [[0, 1], [-1, 1], [1, 2]]


def test_the_page_lists_the_table() -> None:
    from lamina.ir.fx_table import OPERATORS

    page = (Path(__file__).parents[2] / "docs" / "fx.md").read_text()
    listed = page.split("<!-- operators -->")[1].replace("\n", " ")
    assert re.findall(r"\w+", listed) == list(OPERATORS)


def test_every_table_entry_is_an_operator_and_takes_its_attributes() -> None:
    from lamina.ir.fx_cover import form
    from lamina.ir.fx_table import OPERATORS

    for op_type in OPERATORS:
        schema = onnx.defs.get_schema(op_type)
        takes = form(op_type).attributes
        missing = set() if takes is None else set(schema.attributes) - takes
        assert not missing, (op_type, missing)
        assert form(op_type).several == (schema.max_output > 1 or op_type == "BatchNormalization"), op_type


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_as_on_the_host() -> None:
    module = to_fx(capture(_convnet()))
    x = torch.from_numpy(_feed(2, 3, 8, 8))
    (host,) = module(x)
    (device,) = module.to("cuda")(x.to("cuda"))
    device.sum().backward()
    torch.testing.assert_close(device.cpu(), host, rtol=1e-3, atol=1e-3)  # TF32 products have ten bits
    assert all(p.grad is not None for p in module.parameters())
