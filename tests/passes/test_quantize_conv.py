"""Conv in integers and what carries int8 on: values, kernels, fused activations, agreeing borders."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import (
    Ranges,
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

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.merge_qdq import MergeQdq
from lamina.passes.quantize import Quantize

rng = np.random.default_rng(2)
FLOATS = {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool"}


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def conv(shape, *, bias=True, act=None, name="conv", **flags):
    """A builder of one Conv with a random weight of ``shape``."""
    weight, vector = normal(*shape), normal(shape[0])

    def build(r, x):
        inputs = [x, r.constant(weight, f"{name}.w")]
        if bias:
            inputs.append(r.constant(vector, f"{name}.b"))
        y = r.op("Conv", inputs, flags, name=name)
        if act == "relu":
            y = r.op("Relu", [y], name=f"{name}.relu")
        elif act is not None:
            bounds = [r.constant(np.float32(a), f"{name}.bound") for a in act]
            y = r.op("Clip", [y, *bounds], name=f"{name}.clip")
        return y

    return build


def merged(prog):
    """What the clean-up after the moves leaves."""
    clone = prog.clone()
    MergeQdq().apply(Rewriter(clone.model))
    return clone


CASES = {
    "2-D": (conv((8, 4, 3, 3), pads=[1, 1, 1, 1]), (2, 4, 9, 9)),
    "no bias": (conv((8, 4, 3, 3), bias=False), (2, 4, 9, 9)),
    "strided dilated": (conv((8, 4, 3, 3), strides=[2, 2], dilations=[2, 2]), (2, 4, 11, 11)),
    "same": (conv((8, 4, 3, 3), auto_pad="SAME_UPPER", strides=[2, 2]), (2, 4, 9, 9)),
    "grouped": (conv((8, 4, 3, 3), group=4), (2, 16, 9, 9)),
    "depthwise": (conv((16, 1, 3, 3), group=16), (2, 16, 9, 9)),
    "1-D": (conv((8, 4, 5)), (2, 4, 30)),
    "3-D": (conv((8, 4, 3, 3, 3)), (1, 4, 6, 6, 6)),
    "1x1": (conv((8, 32, 1, 1)), (2, 32, 5, 5)),
    "relu": (conv((8, 4, 3, 3), act="relu"), (2, 4, 9, 9)),
    "relu6": (conv((8, 4, 3, 3), act=(0, 6)), (2, 4, 9, 9)),
    "hardtanh": (conv((8, 4, 3, 3), act=(-1, 1)), (2, 4, 9, 9)),
    "1-D depthwise relu6": (conv((8, 1, 5), act=(0, 6), group=8), (2, 8, 30)),
}


@pytest.mark.parametrize("case", CASES)
def test_static_is_within_two_percent_and_runs_in_integers(case):
    build, shape = CASES[case]
    prog = program(build, ("b", *shape[1:]))
    x = normal(*shape)
    quantized = quantize_all(prog, "w8a8-static", calibrate(prog, x))
    error = relative_error(run(quantized, x), run(prog, x))
    assert 1e-4 < error < (0.03 if case == "hardtanh" else 0.02)  # seven bits a weight without VNNI
    counts = kernels(quantized)
    assert counts["QLinearConv"] == 1
    assert not FLOATS & set(counts)


def test_relu_and_relu6_leave_no_node():
    for case in ("relu", "relu6", "1-D depthwise relu6"):
        build, shape = CASES[case]
        prog = program(build, ("b", *shape[1:]))
        quantized = quantize_all(prog, "w8a8-static", calibrate(prog, normal(*shape)))
        assert not {"Relu", "Clip"} & {n.op_type for n in quantized.graph}


def test_an_activation_the_range_does_not_imply_stays():
    build, shape = CASES["hardtanh"]
    prog = program(build, ("b", *shape[1:]))
    x = normal(*shape) * 3
    quantized = quantize_all(prog, "w8a8-static", calibrate(prog, x))
    result = run(quantized, x)
    assert np.abs(result).max() <= 1.01
    # the error is that of sums several times larger than what the bounds let through
    assert relative_error(result, run(prog, x)) < 0.06


def test_dynamic_conv_is_offered_on_request_only():
    build, shape = CASES["relu6"]
    prog = program(build, ("b", *shape[1:]))
    x = normal(*shape)
    site = sites(prog)["conv"]
    assert "w8a8-dynamic" not in [o.name for o in Quantize().options(site, prog, None, None)]
    transform = Quantize(dynamic_conv=True)
    for case in ("relu6", "depthwise", "1-D", "no bias", "2-D"):
        build, shape = CASES[case]
        prog = program(build, ("b", *shape[1:]))
        x = normal(*shape)
        quantized = quantize_all(prog, "w8a8-dynamic", None, transform)
        assert kernels(quantized)["ConvInteger"] == 1
        assert relative_error(run(quantized, x), run(prog, x)) < 0.02


# -- carriers --------------------------------------------------------------------------------------


def residual(r, x):
    a = conv((8, 8, 3, 3), pads=[1] * 4, act="relu", name="a")(r, x)
    b = conv((8, 8, 3, 3), pads=[1] * 4, name="b")(r, a)
    return r.op("Relu", [r.op("Add", [b, a], name="add")], name="out")


def test_a_residual_block_runs_in_integers_throughout():
    prog = program(residual, ("b", 8, 9, 9))
    x = normal(2, 8, 9, 9)
    found = sites(prog)
    assert found["add"].nodes == ("add", "out")
    quantized = merged(quantize_all(prog, "w8a8-static", calibrate(prog, x)))
    counts = kernels(quantized)
    assert counts["QLinearConv"] == 2
    assert counts["QLinearAdd"] == 1
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] == 1
    assert not FLOATS & set(counts)
    assert relative_error(run(quantized, x), run(prog, x)) < 0.025


def after_conv(tail, act=None):
    def build(r, x):
        y = conv((8, 4, 3, 3), act=act, pads=[1] * 4, name="first")(r, x)
        y.shape = ir.Shape(["b", 8, 9, 9])
        return tail(r, y)

    return build


def concat(r, y):
    other = conv((4, 8, 1, 1), name="second")(r, y)
    return r.op("Concat", [y, other], {"axis": 1}, name="join")


def pad(r, y):
    pads = r.constant(np.array([0, 2, 0, 0, 0, 2, 0, 0]), "pads")
    padded = r.op("Pad", [y, pads], name="pad")
    return conv((4, 12, 1, 1), name="last")(r, padded)


def mean(keepdims):
    def tail(r, y):
        return r.op("ReduceMean", [y], {"axes": [2, -1], "keepdims": keepdims}, name="mean")

    return tail


def pool(op, **flags):
    def tail(r, y):
        return r.op(op, [y], flags, name="pool")

    return tail


CARRIERS = {
    "concat": (concat, "QLinearConcat"),
    "pad": (pad, "Pad"),
    "mean": (mean(1), "QLinearGlobalAveragePool"),
    "mean flat": (mean(0), "QLinearGlobalAveragePool"),
    "global pool": (pool("GlobalAveragePool"), "QLinearGlobalAveragePool"),
    "average pool": (pool("AveragePool", kernel_shape=[2, 2], pads=[1] * 4), "QLinearAveragePool"),
    "max pool": (pool("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4), "NhwcMaxPool"),
}


@pytest.mark.parametrize("act", [None, "relu"])
@pytest.mark.parametrize("case", CARRIERS)
def test_a_carrier_spares_the_conversions(case, act):
    tail, kernel = CARRIERS[case]
    prog = program(after_conv(tail, act), ("b", 4, 9, 9))
    x = normal(2, 4, 9, 9)
    quantized = merged(quantize_all(prog, "w8a8-static", calibrate(prog, x)))
    counts = kernels(quantized)
    assert counts[kernel] == 1
    assert counts["QuantizeLinear"] == 1
    assert not FLOATS & set(counts)
    expected = run(prog, x)
    assert run(quantized, x).shape == expected.shape
    assert relative_error(run(quantized, x), expected) < 0.03


def test_only_what_int8_can_reach_is_a_carrier():
    def floats(r, x, y):
        return r.op("Add", [x, r.op("MaxPool", [y], {"kernel_shape": [1, 1]}, name="pool")], name="add")

    assert not sites(program(floats, ("b", 4, 9, 9), ("b", 4, 9, 9)))
    build = after_conv(pool("GlobalAveragePool"))
    assert "pool" in sites(program(build, ("b", 4, 9, 9)))
    assert "pool" not in sites(program(build, ("b", 4, 9, 9)), Quantize(carriers=False))


def test_neighbours_agree_on_the_value_between_them_even_through_a_reshape():
    def build(r, x):
        y = conv((8, 4, 3, 3), act="relu", name="conv")(r, x)
        y = r.op("MaxPool", [y], {"kernel_shape": [7, 7]}, name="pool")
        flat = r.op("Flatten", [y], {"axis": 1}, name="flat")
        return r.op("Gemm", [flat, r.constant(normal(8, 10), "w"), r.constant(normal(10), "b")], name="fc")

    prog = program(build, ("b", 4, 9, 9))
    x = normal(3, 4, 9, 9)
    stats = calibrate(prog, x)
    found = sites(prog)
    written = pick(prog, found["conv"], "w8a8-static", stats).parameters["output"]
    assert pick(prog, found["pool"], "w8a8-static", stats).parameters["inputs"] == [written]
    assert pick(prog, found["fc"], "w8a8-static", stats).parameters["input"] == written
    assert written["zero_point"] == 0
    counts = kernels(merged(quantize_all(prog, "w8a8-static", stats)))
    assert counts["QuantizeLinear"] == 1
    assert counts["QLinearConv"] == counts["QGemm"] == 1
    assert not FLOATS & set(counts)


def test_without_ranges_there_is_no_static_form():
    build, shape = CASES["2-D"]
    prog = program(build, shape)
    site = sites(prog)["conv"]
    for stats in (None, Ranges({}), Ranges({"x0": range_of(normal(9))})):
        assert "w8a8-static" not in [o.name for o in Quantize().options(site, prog, stats, None)]


def test_static_reads_and_writes_int8():
    build, shape = CASES["relu"]
    prog = program(build, shape)
    option = pick(prog, sites(prog)["conv"], "w8a8-static", calibrate(prog, normal(*shape)))
    assert (option.input_form, option.output_form) == ("int8", "int8")


def test_file_shrinks_to_a_quarter():
    prog = program(conv((64, 64, 3, 3)), ("b", 64, 9, 9))
    quantized = quantize_all(prog, "w8a8-static", calibrate(prog, normal(1, 64, 9, 9)))
    assert bytes_of(quantized) < 0.28 * bytes_of(prog)


def test_the_shape_and_type_of_the_output_are_kept():
    prog = program(conv((8, 4, 3, 3), act="relu"), ("b", 4, 9, 9))
    prog.graph.outputs[0].shape = ir.Shape(["b", 8, 7, 7])
    quantized = quantize_all(prog, "w8a8-static", calibrate(prog, normal(1, 4, 9, 9)))
    assert quantized.outputs == prog.outputs
