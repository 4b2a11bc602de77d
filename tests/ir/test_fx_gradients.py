"""Gradients of the FX forms: against finite differences in float64, and against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_tools import proto, run

from lamina.ir.capture import capture
from lamina.ir.fx import initializer_names, to_fx

torch = pytest.importorskip("torch", reason="the torch extra is not installed")


def _real(*shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(sum(shape) + len(shape))
    return rng.uniform(low, high, shape)


def _whole(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


_IMAGE = _real(2, 4, 5, 5)
# operator -> inputs (float64 ones are fed and differentiated), attributes, opset
_FORMS: dict[str, tuple[list[np.ndarray], dict[str, Any], int]] = {
    "Conv": ([_IMAGE, _real(4, 2, 3, 3), _real(4)], {"group": 2, "pads": [1, 0, 0, 1]}, 18),
    "ConvTranspose": ([_IMAGE, _real(4, 2, 3, 3), _real(2)], {"strides": [2, 2], "pads": [1, 1, 0, 0]}, 18),
    "MaxPool": ([_IMAGE], {"kernel_shape": [2, 2], "ceil_mode": 1, "strides": [2, 2]}, 18),
    "AveragePool": ([_IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, 18),
    "GlobalAveragePool": ([_IMAGE], {}, 18),
    "Gemm": ([_real(3, 4), _real(5, 4), _real(5)], {"transB": 1, "alpha": 0.5, "beta": 2.0}, 18),
    "MatMul": ([_real(2, 3, 4), _real(4, 5)], {}, 18),
    "Einsum": ([_real(2, 3, 4), _real(2, 4, 5)], {"equation": "bij,bjk->bik"}, 18),
    "Add": ([_real(2, 3), _real(3)], {}, 18),
    "Mul": ([_real(2, 3), _real(3)], {}, 18),
    "Div": ([_real(2, 3), _real(3, low=1, high=2)], {}, 18),
    "Pow": ([_real(2, 3, low=1, high=2), _real(3)], {}, 18),
    "Sqrt": ([_real(5, low=1, high=2)], {}, 18),
    "Erf": ([_real(5)], {}, 18),
    "Gelu": ([_real(5)], {}, 20),
    "Softplus": ([_real(5)], {}, 18),
    "HardSigmoid": ([_real(5)], {}, 18),
    "PRelu": ([_real(2, 3), _real(3)], {}, 18),
    "Clip": ([_real(6), np.array(-0.5), np.array(0.5)], {}, 18),
    "Softmax": ([_real(2, 5)], {}, 18),
    "LogSoftmax": ([_real(2, 5)], {"axis": 0}, 18),
    "ReduceMean": ([_real(2, 3, 4), _whole(1)], {}, 18),
    "ReduceL2": ([_real(2, 3, 4), _whole(0, 2)], {"keepdims": 0}, 18),
    "ReduceLogSumExp": ([_real(2, 3), _whole(1)], {}, 18),
    "CumSum": ([_real(2, 3), np.array(1, np.int64)], {"exclusive": 1, "reverse": 1}, 18),
    "LayerNormalization": ([_real(2, 3, 6), _real(6), _real(6)], {}, 18),
    "RMSNormalization": ([_real(2, 3, 6), _real(6)], {}, 23),
    "GroupNormalization": ([_IMAGE, _real(4), _real(4)], {"num_groups": 2}, 21),
    "InstanceNormalization": ([_IMAGE, _real(4), _real(4)], {}, 18),
    "BatchNormalization": ([_IMAGE, _real(4), _real(4), _real(4), _real(4, low=1, high=2)], {}, 18),
    "Gather": ([_real(4, 3), np.array([[0, -1], [2, 0]])], {}, 18),
    "GatherND": ([_real(3, 4, 2), np.array([[0, 1], [2, -1]])], {}, 18),
    "ScatterND": ([_real(4, 3), np.array([[1], [3]]), _real(2, 3)], {}, 18),
    "ScatterElements": ([_real(3, 3), np.array([[0, 1, 2]]), _real(1, 3)], {"reduction": "add"}, 18),
    "Slice": ([_real(5, 6), _whole(4, 0), _whole(-9, 6), _whole(0, 1), _whole(-2, 3)], {}, 18),
    "Pad": ([_real(3, 4), _whole(1, 2, 0, 1)], {"mode": "reflect"}, 18),
    "Expand": ([_real(3, 1), _whole(2, 3, 4)], {}, 18),
    "Tile": ([_real(2, 2), _whole(2, 3)], {}, 18),
    "Where": ([np.array([True, False, True]), _real(3), _real(2, 3)], {}, 18),
    "Trilu": ([_real(3, 4)], {"upper": 0}, 18),
    "DepthToSpace": ([_real(1, 8, 2, 2)], {"blocksize": 2, "mode": "CRD"}, 18),
    "Resize": ([_real(1, 1, 3, 3), np.zeros(0, np.float32), np.array([1, 1, 2, 1.5], np.float32)],
               {"mode": "cubic"}, 18),
    "LSTM": ([_real(3, 2, 4), _real(1, 12, 4), _real(1, 12, 3), _real(1, 24)], {"hidden_size": 3}, 18),
    "GRU": ([_real(3, 2, 4), _real(1, 9, 4), _real(1, 9, 3)], {"hidden_size": 3, "direction": "reverse"}, 18),
    "RNN": ([_real(3, 2, 4), _real(1, 3, 4), _real(1, 3, 3)], {"hidden_size": 3}, 18),
    "Attention": ([_real(1, 4, 3, 2), _real(1, 2, 3, 2), _real(1, 2, 3, 2)],
                  {"is_causal": 1, "softcap": 2.0}, 23),
    "RotaryEmbedding": ([_real(1, 2, 3, 4), _real(1, 3, 2), _real(1, 3, 2)], {"interleaved": 1}, 23),
}  # fmt: skip


def _module(op_type: str) -> tuple[Any, list[Any]]:
    arrays, attributes, opset = _FORMS[op_type]
    names = [f"i{k}" if a.size else "" for k, a in enumerate(arrays)]
    node = helper.make_node(op_type, names, ["y"], "node", **attributes)
    kinds = [TensorProto.FLOAT if a.dtype == np.float64 else 0 for a in arrays]
    inputs = [
        helper.make_tensor_value_info(n, kind, list(a.shape))
        for n, a, kind in zip(names, arrays, kinds, strict=True)
        if kind
    ]
    weights = [
        helper.make_tensor(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape, a.flatten())
        for n, a, kind in zip(names, arrays, kinds, strict=True)
        if not kind and n
    ]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "g", inputs, [out], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    values = [torch.from_numpy(a.copy()) for a, kind in zip(arrays, kinds, strict=True) if kind]
    return to_fx(capture(model), precision=torch.float64), [v.requires_grad_() for v in values]


@pytest.mark.parametrize("op_type", _FORMS)
def test_first_derivative(op_type: str) -> None:
    module, values = _module(op_type)
    assert torch.autograd.gradcheck(lambda *v: module(*v)[0], values)


_TWICE = [
    "Conv",
    "MatMul",
    "LayerNormalization",
    "Softmax",
    "Gelu",
    "Attention",
    "LSTM",
    "BatchNormalization",
]
_TWICE += ["Gather", "Resize", "RMSNormalization", "GRU", "AveragePool", "Erf"]


@pytest.mark.parametrize("op_type", _TWICE)
def test_second_derivative(op_type: str) -> None:
    module, values = _module(op_type)
    assert torch.autograd.gradgradcheck(lambda *v: module(*v)[0], values)


def test_a_networks_gradient_equals_finite_differences_through_the_runtime() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "k": (rng.standard_normal((4, 2, 3, 3)) / 4).astype(np.float32),
        "w": (rng.standard_normal((4, 3)) / 2).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Tanh", ["c"], ["t"], "tanh"),
        helper.make_node("GlobalAveragePool", ["t"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("MatMul", ["f", "w"], ["l"], "head"),
        helper.make_node("LogSoftmax", ["l"], ["y"], "logs"),
    ]
    x = rng.standard_normal((2, 2, 6, 6)).astype(np.float32)

    def loss(changed: dict[str, np.ndarray]) -> float:
        model = proto(nodes, {"x": [2, 2, 6, 6]}, {"y": [2, 3]}, changed)
        return float(-run(model, {"x": x})[0][:, 1].astype(np.float64).mean())

    program = capture(proto(nodes, {"x": [2, 2, 6, 6]}, {"y": [2, 3]}, weights))
    module = to_fx(program)
    (-module(torch.from_numpy(x))[0][:, 1].mean()).backward()
    names = initializer_names(module)
    step = 2.0**-6
    for name, parameter in module.named_parameters():
        gradient = parameter.grad.numpy()
        direction = np.sign(gradient).astype(np.float32)
        key = names[name]
        ends = [loss({**weights, key: weights[key] + sign * step * direction}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        # central differences: an error of the third derivative times step squared, and float32's of the loss
        assert slope == pytest.approx(float(np.abs(gradient).sum()), rel=step, abs=2**-22 / step)
