"""MatMul and Gemm in integers: values, kernels that ONNX Runtime makes of them, layouts, sharing."""

from __future__ import annotations

import json

import numpy as np
import pytest
from quantize_tools import (
    Ranges,
    apply_quantize,
    bytes_of,
    calibrate,
    kernels,
    pick,
    program,
    quantize_all,
    range_of,
    relative_error,
    run,
    sites,
)

from lamina.backends.ort_probe import probe
from lamina.passes.pass_ import Option
from lamina.passes.quantize import Quantize

rng = np.random.default_rng(1)
FORMS = ("w8a8-static", "w8a8-dynamic")


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def matmul(k=64, n=48, bias=None, left=False):
    weight = normal(k, n)

    def build(r, x):
        w = r.constant(weight, "w")
        y = r.op("MatMul", [w, x] if left else [x, w], name="fc")
        if bias is None:
            return y
        return r.op("Add", [r.constant(bias, "b"), y], name="fc_bias")

    return build


def gemm(k=64, n=48, bias=True, **flags):
    weight = normal(n, k) if flags.get("transB") else normal(k, n)
    vector = normal(n) if bias is True else bias

    def build(r, x):
        inputs = [x, r.constant(weight, "w")]
        if vector is not None and vector is not False:
            inputs.append(r.constant(vector, "b"))
        return r.op("Gemm", inputs, flags, name="fc")

    return build


CASES = {
    "matmul": (matmul(), (10, 64)),
    "matmul 3-D": (matmul(), (2, 5, 64)),
    "matmul 4-D": (matmul(), (2, 3, 5, 64)),
    "matmul bias": (matmul(bias=normal(48)), (10, 64)),
    "matmul bias 3-D": (matmul(bias=normal(48)), (2, 5, 64)),
    "matmul bias [1, 1, n]": (matmul(bias=normal(1, 1, 48)), (2, 5, 64)),
    "weight left": (matmul(48, 64, left=True), (64, 7)),
    "weight left 3-D": (matmul(48, 64, left=True), (3, 64, 7)),
    "gemm": (gemm(), (10, 64)),
    "gemm no bias": (gemm(bias=None), (10, 64)),
    "gemm transB": (gemm(transB=1), (10, 64)),
    "gemm transB no bias": (gemm(transB=1, bias=None), (10, 64)),
    "gemm alpha beta": (gemm(alpha=-0.5, beta=2.0), (10, 64)),
    "gemm alpha transB": (gemm(alpha=3.0, transB=1, bias=False), (10, 64)),
    "gemm scalar bias": (gemm(bias=np.float32(2.5)), (10, 64)),
    "gemm [1, n] bias": (gemm(bias=normal(1, 48)), (10, 64)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_result_is_within_two_percent(case, form):
    build, shape = CASES[case]
    prog = program(build, shape)
    x = normal(*shape)
    quantized = quantize_all(prog, form, calibrate(prog, x))
    assert any("int" in name for name in quantized.graph.initializers)
    error = relative_error(run(quantized, x), run(prog, x))
    assert 1e-4 < error < 0.02


# -- kernels ---------------------------------------------------------------------------------------

STATIC = {
    "matmul": "MatMulIntegerToFloat",
    "matmul 3-D": "MatMulIntegerToFloat",
    "matmul bias": "QGemm",
    "matmul bias 3-D": "MatMulIntegerToFloat",
    "matmul bias [1, 1, n]": "MatMulIntegerToFloat",
    "weight left": "MatMulInteger",
    "gemm": "QGemm",
    "gemm no bias": "MatMulIntegerToFloat",
    "gemm transB": "QGemm",
    "gemm transB no bias": "QGemm",
    "gemm alpha beta": "QGemm",
    "gemm scalar bias": "QGemm",
}


@pytest.mark.parametrize("dims", ["known", "batch", "none"])
@pytest.mark.parametrize("case", STATIC)
def test_static_becomes_an_integer_kernel(case, dims):
    build, shape = CASES[case]
    known = {"known": shape, "batch": ("b", *shape[1:]), "none": tuple(f"d{i}" for i in range(len(shape)))}
    if case.startswith("weight left"):
        known["batch"] = shape
    prog = program(build, known[dims])
    counts = kernels(quantize_all(prog, "w8a8-static", Ranges({"x0": range_of(normal(100))})))
    assert counts[STATIC[case]] == 1
    assert counts["QuantizeLinear"] == 1
    assert not {"MatMul", "FusedMatMul", "Gemm", "FusedGemm", "DequantizeLinear"} & set(counts)


def test_bias_of_a_product_of_unknown_rank_stays_integer_and_keeps_the_rank():
    prog = program(matmul(bias=normal(48)), None)
    x = normal(10, 64)
    quantized = quantize_all(prog, "w8a8-static", Ranges({"x0": range_of(x)}))
    assert kernels(quantized)["MatMulIntegerToFloat"] == 1
    assert run(quantized, x).shape == (10, 48)


@pytest.mark.parametrize("case", [c for c in CASES if "left" not in c])
def test_dynamic_becomes_one_fused_kernel(case):
    build, shape = CASES[case]
    counts = kernels(quantize_all(program(build, ("b", *shape[1:])), "w8a8-dynamic"))
    assert counts == {"DynamicQuantizeMatMul": 1}


def test_dynamic_products_of_one_activation_share_its_quantization():
    weights = [normal(64, 32) for _ in range(3)]

    def build(r, x):
        parts = [r.op("MatMul", [x, r.constant(w, f"w{i}")], name=f"p{i}") for i, w in enumerate(weights)]
        return r.op("Concat", parts, {"axis": -1})

    prog = program(build, ("b", 64))
    counts = kernels(quantize_all(prog, "w8a8-dynamic"))
    assert counts["DynamicQuantizeLinear"] == 1
    assert counts["MatMulIntegerToFloat"] == 3
    x = normal(4, 64)
    assert relative_error(run(quantize_all(prog, "w8a8-dynamic"), x), run(prog, x)) < 0.02


# -- arithmetic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [63, 127])
@pytest.mark.parametrize("form", FORMS)
def test_numbers_on_the_grid_come_out_exactly(form, largest):
    """With weights, activations and bias that the integers represent, only float32 rounding is left."""
    if largest == 127 and probe()["saturates"]:
        pytest.skip("this CPU sums products of eight by eight bits in sixteen")
    codes = rng.integers(-largest, largest + 1, (64, 48))
    codes[0] = largest
    weight, bias = (codes / 64).astype(np.float32), rng.integers(-99, 99, 48).astype(np.float32)
    x = rng.integers(0, 256, (5, 64)).astype(np.float32)
    x[0, 0] = 255
    x[:, 1] = 0

    def build(r, v):
        inputs = [v, r.constant(weight, "w"), r.constant(bias, "b")]
        return r.op("Gemm", inputs, name="fc")

    prog = program(build, (5, 64))
    stats = Ranges({"x0": range_of(x)})
    transform = Quantize(ranges="minmax", clipping="minmax", reduce_range=largest == 63)
    quantized = quantize_all(prog, form, stats, transform)
    np.testing.assert_allclose(run(quantized, x), run(prog, x), rtol=2e-6, atol=2e-3)


def test_weights_keep_to_seven_bits_where_products_saturate_and_use_eight_elsewhere(monkeypatch):
    build, shape = CASES["gemm"]
    prog = program(build, shape)
    stats = calibrate(prog, normal(*shape))
    for saturates, bits in ((True, 7), (False, 8)):
        kernels = {**probe(), "saturates": saturates}
        monkeypatch.setattr("lamina.passes.quantize.transform._capabilities", lambda target, k=kernels: k)
        for form in FORMS:
            option = pick(prog, sites(prog)["fc"], form, stats)
            assert option.parameters["weight_bits"] == bits


def test_a_bias_too_large_for_its_scale_widens_only_that_channel():
    """A channel of nearly nothing with a real bias would need more than 32 bits."""
    weight, bias = normal(16, 4), normal(4)
    weight[:, 2] *= 1e-12

    def build(r, v):
        return r.op("Gemm", [v, r.constant(weight, "w"), r.constant(bias, "b")], name="fc")

    prog = program(build, (5, 16))
    x = normal(5, 16)
    quantized = quantize_all(prog, "w8a8-static", calibrate(prog, x))
    assert np.abs(run(quantized, x) - run(prog, x)).max() < 0.2  # the weights may have seven bits
    np.testing.assert_allclose(run(quantized, x)[:, 2], bias[2], rtol=1e-5)


def test_emitting_twice_writes_the_same_bytes():
    build, shape = CASES["gemm alpha beta"]
    prog = program(build, shape)
    stats = calibrate(prog, normal(*shape))
    for form in FORMS:
        first, second = (quantize_all(prog, form, stats) for _ in range(2))
        assert [n.name for n in first.graph] == [n.name for n in second.graph]
        for name, value in first.graph.initializers.items():
            assert value.const_value.tobytes() == second.graph.initializers[name].const_value.tobytes()


@pytest.mark.parametrize("form", FORMS)
def test_file_shrinks_to_a_quarter(form):
    prog = program(matmul(256, 256), ("b", 256))
    stats = Ranges({"x0": range_of(normal(100))})
    assert bytes_of(quantize_all(prog, form, stats)) < 0.28 * bytes_of(prog)


def test_a_shared_weight_is_stored_once():
    weight = normal(64, 64)

    def build(r, x):
        w = r.constant(weight, "w")
        return r.op("MatMul", [r.op("MatMul", [x, w], name="one"), w], name="two")

    prog = program(build, ("b", 64))
    for form in FORMS:
        quantized = quantize_all(prog, form, calibrate(prog, normal(9, 64)))
        codes = [v for v in quantized.graph.initializers.values() if v.const_value.size == 64 * 64]
        assert len(codes) == 1
        assert len(codes[0].uses()) == 2


def test_options_survive_json_and_emit_the_same():
    build, shape = CASES["matmul bias"]
    prog = program(build, shape)
    x = normal(*shape)
    stats = calibrate(prog, x)
    (site,) = sites(prog).values()
    for option in Quantize().options(site, prog, stats, None):
        text = json.dumps({"name": option.name, "parameters": dict(option.parameters)})
        again = Option(**json.loads(text), input_form=option.input_form, output_form=option.output_form)
        assert again == option
        one, two = (run(apply_quantize(prog, {"fc": o}), x) for o in (option, again))
        np.testing.assert_array_equal(one, two)


def test_static_reads_int8_and_writes_float():
    build, shape = CASES["matmul"]
    prog = program(build, shape)
    option = pick(prog, sites(prog)["fc"], "w8a8-static", calibrate(prog, normal(*shape)))
    assert (option.input_form, option.output_form) == ("int8", "float")
    scale = option.parameters["input"]["scale"]
    assert scale == float(np.float32(scale))


def test_the_interface_keeps_name_type_and_shape():
    build, _ = CASES["matmul bias"]
    prog = program(build, ("b", 64))
    before = prog.graph.outputs[0]
    before.shape = ["b", 48] and before.shape
    quantized = quantize_all(prog, "w8a8-dynamic")
    assert quantized.outputs == prog.outputs
    assert quantized.inputs == prog.inputs


def test_reduce_range_keeps_weights_to_seven_bits():
    build, shape = CASES["gemm"]
    prog = program(build, shape)
    transform = Quantize(reduce_range=True)
    x = normal(*shape)
    for form in FORMS:
        quantized = quantize_all(prog, form, calibrate(prog, x), transform)
        codes = [v.const_value.numpy() for v in quantized.graph.initializers.values()]
        largest = max(np.abs(c.astype(int)).max() for c in codes if c.dtype == np.int8)
        assert largest == 63
        assert relative_error(run(quantized, x), run(prog, x)) < 0.03
