from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lamina.backends.backend import Target
from lamina.backends.onnxruntime import OnnxRuntime
from lamina.backends.ort_audit import SURVIVING
from lamina.backends.ort_probe import kernels_of, probe
from lamina.errors import BackendError

ONE = Target("ort", "cpu", 1)
BACKEND = OnnxRuntime()

STATIC = """a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)
    c = DequantizeLinear<axis = {axis}>(w, ws, wz) [{name}] d = {op}(b, c)
    e = QuantizeLinear(d, s, z) y = DequantizeLinear(e, s, z)"""
WEIGHT_ONLY = "c = DequantizeLinear<axis = {axis}>(w, ws, wz) [{name}] d = {op}(x, c) y = Relu(d)"
DYNAMIC = """a, t, z = DynamicQuantizeLinear(x) [{name}] b = MatMulInteger(a, w, z, wz) c = Cast<to = 1>(b)
    u = Mul(t, ws) y = Mul(c, u)"""


def build(body: str, arrays: Mapping[str, Any], shape: str, out: str) -> ir.Model:
    declared = "".join(f", float {name}" for name in arrays)
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{head} m (float[{shape}] x{declared}) => (float[{out}] y) {{ {body} }}"
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        assert value.name
        array = np.asarray(arrays[value.name])
        value.const_value = ir.tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(value.const_value.dtype), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model


def conv(body: str, name: str = "conv1") -> ir.Model:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-99, 99, (8, 8, 3, 3)).astype(np.int8),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
        "s": np.float32(0.02),
        "z": np.uint8(128),
    }
    return build(body.format(axis=0, name=name, op="Conv"), arrays, "N,8,6,6", "N,8,4,4")


def matmul(body: str, name: str = "mm") -> ir.Model:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {
        "w": rng.integers(-99, 99, (32, 16)).astype(np.int8),
        "ws": np.full(16, 0.01, np.float32),
        "wz": np.zeros(16, np.int8),
    }
    if "s, z" in body.replace("t, z", ""):
        arrays |= {"s": np.float32(0.02), "z": np.uint8(128)}
    return build(body.format(axis=1, name=name, op="MatMul"), arrays, "N,32", "N,16")


def test_a_fused_static_convolution_is_as_planned() -> None:
    audit = BACKEND.audit(conv(STATIC), ONE, {"conv1": "w8a8-static"})
    assert audit.counts["QLinearConv"] == 1
    assert SURVIVING not in audit.counts
    assert audit.fell_back == ()


def test_a_weight_dequantized_on_every_run_fell_back() -> None:
    audit = BACKEND.audit(conv(WEIGHT_ONLY), ONE)
    assert audit.counts[SURVIVING] == 1
    assert audit.fell_back == ("conv1",)


def test_signed_activations_are_seen_to_break_the_fusion_or_not() -> None:
    """Whatever this runtime does with them, the audit's two answers agree."""
    body = STATIC.replace("x, s, z)", "x, s, sz)").replace("(a, s, z)", "(a, s, sz)")
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-99, 99, (8, 8, 3, 3)).astype(np.int8),
        "ws": np.full(8, 0.01, np.float32),
        "wz": np.zeros(8, np.int8),
        "s": np.float32(0.02),
        "z": np.uint8(128),
        "sz": np.int8(0),
    }
    model = build(body.format(axis=0, name="conv1", op="Conv"), arrays, "N,8,6,6", "N,8,4,4")
    audit = BACKEND.audit(model, ONE, {"conv1": "w8a8-static"})
    assert ("conv1" in audit.fell_back) == ("QLinearConv" not in audit.counts)


def test_dynamic_matmul_is_found_by_its_weight_when_the_name_differs() -> None:
    model = matmul(DYNAMIC, name="emitted_for_mm")
    audit = BACKEND.audit(model, ONE, {"emitted_for_mm": "w8a8-dynamic"})
    assert audit.counts == {"DynamicQuantizeMatMul": 1}
    assert audit.fell_back == ()


def test_emitted_names_are_matched_up_to_a_separator() -> None:
    model = matmul(DYNAMIC, name="mm_integer")
    assert BACKEND.audit(model, ONE, {"mm": "w8a8-dynamic"}).fell_back == ()
    assert BACKEND.audit(model, ONE, {"m": "w8a8-dynamic"}).fell_back == ("m",)


def test_a_planned_node_that_stays_float_fell_back() -> None:
    body = "[mm] y = MatMul(x, w)"
    model = build(body, {"w": np.ones((32, 16), np.float32)}, "N,32", "N,16")
    assert BACKEND.audit(model, ONE, {"mm": "w8a8-static"}).fell_back == ("mm",)
    assert BACKEND.audit(model, ONE, {"mm": "float16"}).fell_back == ()
    assert BACKEND.audit(model, ONE).fell_back == ()


def test_carriers_are_judged_by_what_they_compute() -> None:
    body = """a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)
        [one_pool] c = MaxPool<kernel_shape = [2, 2]>(b)
        d = QuantizeLinear(c, s, z) e = DequantizeLinear(d, s, z)
        [two_add] f = Add(e, e) g = QuantizeLinear(f, s, z) h = DequantizeLinear(g, s, z)
        [three_add] y = Add(h, h)"""
    model = build(body, {"s": np.float32(0.02), "z": np.uint8(128)}, "N,8,6,6", "N,8,5,5")
    planned = dict.fromkeys(("one", "two", "three"), "w8a8-static")
    audit = BACKEND.audit(model, ONE, planned)
    assert audit.counts["QLinearAdd"] == 1
    assert audit.fell_back == ("three",)


def test_a_basic_level_leaves_everything_unfused() -> None:
    audit = BACKEND.audit(
        conv(STATIC), Target("ort", "cpu", 1, {"opt": "disabled"}), {"conv1": "w8a8-static"}
    )
    assert audit.fell_back == ("conv1",)
    assert audit.counts["Conv"] == 1


def test_an_uncompilable_model_is_an_error() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[2] x) => (float[2] y) { y = No(x) }'
    )
    with pytest.raises(BackendError, match="ONNX Runtime refuses model 'g'"):
        BACKEND.audit(model, ONE)


def test_capabilities_come_from_real_attempts() -> None:
    found = BACKEND.capabilities(ONE)
    assert found["device"]
    assert {"MatMul", "Gemm"} <= set(found["forms"]["w4"])
    assert "Conv" in found["forms"]["w8a8-static"]
    assert "MatMul" in found["forms"]["w8a8-dynamic"]
    assert found["opset"] >= 21
    assert set(found["float16_kernels"]) <= {"MatMul", "Gemm", "Conv"}
    assert ("float16" in found["forms"]) == bool(found["float16_kernels"])
    assert BACKEND.capabilities(ONE) is found
    assert "w4" not in probe("disabled")["forms"], "nothing fuses where fusion is off"


def test_kernels_by_option_name() -> None:
    assert "QLinearConv" in (kernels_of("w8a8-static-percentile") or ())
    assert kernels_of("w8") == kernels_of("w4")
    assert kernels_of("w8") != kernels_of("w8a8-dynamic")
    assert kernels_of("float16") is None
    assert kernels_of("drop") is None
