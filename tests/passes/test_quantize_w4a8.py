"""``w4a8``: both runtimes agree, the range chooses how activations are rounded, nobody gets it unasked."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from quantize_tools import apply_quantize, calibrate, kernels, pick, program, relative_error, run, sites
from test_quantize_low_bits import in_onnxruntime

from lamina.analysis.inputs import InputStatistics
from lamina.errors import PassError
from lamina.passes.quantize import Quantize

rng = np.random.default_rng(11)
EVERY = Quantize(forms=("w4a8", "w4"))
DEPTH, WIDTH = 64, 48
WEIGHT, BIAS = (rng.standard_normal(s).astype(np.float32) for s in ((DEPTH, WIDTH), (WIDTH,)))


def product(op_type: str = "MatMul"):
    def build(r, x):
        w = r.constant(WEIGHT if op_type == "MatMul" else WEIGHT.T, "w")
        if op_type == "Gemm":
            return r.op("Gemm", [x, w, r.constant(BIAS, "b")], {"transB": 1, "alpha": 0.5}, name="op")
        y = r.op("MatMul", [x, w], name="op")
        return r.op("Add", [y, r.constant(BIAS, "b")], name="bias")

    return program(build, ("b", DEPTH))


def activations(largest: float, rows: int = 40) -> np.ndarray:
    """Rows whose largest magnitude is ``largest``; a few channels are outliers."""
    x = rng.standard_normal((rows, DEPTH)) * np.where(np.arange(DEPTH) % 16 == 3, 30.0, 1.0)
    return (x * largest / np.abs(x).max()).astype(np.float32)


def statistics(prog, x: np.ndarray):
    """Ranges, and the vectors that equalization is judged on."""
    low, high = x.min(axis=0)[None], x.max(axis=0)[None]
    seen = InputStatistics((x.T @ x)[None].astype(np.float64), len(x), x[:, None, :], low, high)
    return SimpleNamespace(ranges=calibrate(prog, x).ranges, inputs={"op": seen}, operators={})


def parameters(largest: float, op_type: str = "MatMul"):
    prog, x = product(op_type), activations(largest)
    return prog, x, pick(prog, sites(prog, EVERY)["op"], "w4a8", statistics(prog, x), EVERY)


CASES = {"static": 5.0, "equalized": 100.0, "by token": 1000.0}


@pytest.mark.parametrize("op_type", ["MatMul", "Gemm"])
@pytest.mark.parametrize("case", CASES)
def test_runtimes_agree_with_each_other_and_with_float(case, op_type):
    prog, x, option = parameters(CASES[case], op_type)
    made = apply_quantize(prog, {"op": option}, EVERY)
    assert made.opset == 21
    actual = in_onnxruntime(made, x)
    other = ReferenceEvaluator(ir.to_proto(made.model)).run(None, {"x0": x})[0]
    # an activation on the border of two codes may fall either way
    assert relative_error(actual, other) < 1e-3
    assert 0.01 < relative_error(actual, run(prog, x)) < 0.13


def test_the_range_chooses_how_activations_are_rounded():
    found = {case: parameters(largest)[2].parameters for case, largest in CASES.items()}
    assert "input" in found["static"]
    assert "smooth" not in found["static"]
    assert found["equalized"]["smooth"]["rule"] == "log"
    assert "input" not in found["by token"]
    prog = product()
    unknown = pick(prog, sites(prog, EVERY)["op"], "w4a8", None, EVERY).parameters
    assert "input" not in unknown


def test_a_scale_a_token_keeps_small_tokens_beside_large_ones():
    prog, x = product(), activations(1.0)
    x[0] *= 1000
    made = {}
    for largest in (5.0, 1000.0):
        option = parameters(largest)[2]
        if "input" in option.parameters:
            option.parameters["input"].update(scale=float(2000 / 255), zero_point=128)
        made[largest] = in_onnxruntime(apply_quantize(prog, {"op": option}, EVERY), x)[1:]
    expected = run(prog, x)[1:] - BIAS
    assert relative_error(made[1000.0] - BIAS, expected) < 0.13
    assert relative_error(made[5.0] - BIAS, expected) > 0.9


def test_it_is_offered_by_name_only_and_not_where_there_is_no_kernel_for_blocks():
    prog, x = product(), activations(5.0)
    site, stats = sites(prog)["op"], statistics(prog, x)
    assert "w4a8" not in {o.name for o in Quantize().options(site, prog, stats, None)}
    assert "w4a8" in {o.name for o in EVERY.options(site, prog, stats, "ort:cpu?threads=1")}
    with pytest.raises(PassError, match="no form 'w4a9'"):
        Quantize(forms=("w4a9",))


def test_onnxruntime_has_no_kernel_for_it():
    """Were there one, the form might pay: then it belongs among those that are offered to everybody."""
    ran = {
        case: kernels(apply_quantize(prog, {"op": option}, EVERY))
        for case, (prog, _, option) in {c: parameters(largest) for c, largest in CASES.items()}.items()
    }
    assert ran["static"]["DequantizeLinear"] == 2  # of the activation, and of the weight at every run
    assert ran["static"]["MatMulNBits"] == 0
    assert ran["by token"]["MatMulNBits"] == 1
