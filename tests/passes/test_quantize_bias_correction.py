"""Bias correction: the mean of the output returns to what it was, where there is a bias to put it in."""

from __future__ import annotations

import numpy as np
import pytest
from quantize_tools import apply_quantize, kernels, pick, program, run, sites

from lamina.analysis.needs import Looks, Need
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.passes.quantize import Quantize

rng = np.random.default_rng(21)
PLAIN = {"smoothing": (), "clipping": "minmax"}


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def linear(bias=True):
    weight, vector = normal(48, 24), normal(24)

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(weight, "w")], name="op")
        return r.op("Add", [y, r.constant(vector, "b")], name="add") if bias else y

    return program(build, ["n", 48]), normal(400, 48) + 0.7


def conv(bias=True, group=1, rank=2):
    weight = normal(8, 8 // group, *[3] * rank)
    inputs = [normal(8)] if bias else []

    def build(r, x):
        given = [x, r.constant(weight, "w"), *(r.constant(b, "b") for b in inputs)]
        return r.op("Conv", given, {"group": group, "pads": [1] * 2 * rank}, name="op")

    return program(build, ["n", 8, *[6] * rank]), normal(200, 8, *[6] * rank) + 0.7


def statistics(prog, x, kept=2048):
    names = [n for s in sites(prog).values() for n in (*s.inputs, *s.outputs)]
    looks = Looks(inputs=kept, kept=kept, patched=64, patched_of=1)
    data = Dataset({"x0": x}, {}, len(x))
    return collect(prog, data, ranges=names, needs=(Need.VECTORS,), looks=looks, threads=1)


def mean_error(prog, x, form, stats, bits=4, **options):
    """Largest mean error of a channel over its spread, with weights coarse enough to shift means."""
    site, transform = sites(prog)["op"], Quantize(dynamic_conv=True, **PLAIN, **options)
    coarse = pick(prog, site, form, stats, transform).parameters
    coarse = {**coarse, "weight_bits": bits, "balance": "none"}
    coarse.pop("bias_shift", None)
    if options.get("correct_bias", True):
        from lamina.passes.quantize.bias_correction import bias_shift

        nodes = {n.name: n for n in prog.graph}
        coarse["bias_shift"] = bias_shift(site, nodes, stats, coarse)
    option = type(pick(prog, site, form, stats, transform))(form, coarse)
    lost = run(apply_quantize(prog, {"op": option}, transform), x) - run(prog, x)
    lost = np.moveaxis(lost, 1, -1).reshape(-1, lost.shape[1])
    return np.abs(lost.mean(axis=0)).max() / lost.std()


CASES = {"linear": linear, "conv": conv, "conv without bias": lambda: conv(False)}
CASES |= {"depthwise": lambda: conv(group=8), "grouped": lambda: conv(group=2), "1d": lambda: conv(rank=1)}


@pytest.mark.parametrize("form", ["w8a8-static", "w8a8-dynamic"])
@pytest.mark.parametrize("case", CASES)
def test_the_mean_of_the_output_returns(case, form):
    prog, x = CASES[case]()
    stats = statistics(prog, x)
    before = mean_error(prog, x, form, stats, correct_bias=False)
    assert mean_error(prog, x, form, stats) < 0.35 * before


def test_a_product_without_bias_gets_none():
    prog, x = linear(bias=False)
    stats = statistics(prog, x)
    assert "bias_shift" not in pick(prog, sites(prog)["op"], "w8a8-static", stats).parameters


def test_a_mean_that_is_noise_is_left_alone():
    """Inputs about zero: nothing is shifted, and few vectors must not invent a shift."""
    prog, _ = linear()
    stats = statistics(prog, normal(64, 48), kept=32)
    option = pick(prog, sites(prog)["op"], "w8a8-dynamic", stats, Quantize(**PLAIN))
    x = normal(4000, 48)
    made = apply_quantize(prog, {"op": option}, Quantize(**PLAIN))
    lost = run(made, x) - run(prog, x)
    assert np.sqrt(np.mean(np.square(option.parameters["bias_shift"]))) < 0.2 * lost.std()


def test_it_costs_no_operator():
    prog, x = conv()
    stats = statistics(prog, x)
    option = pick(prog, sites(prog)["op"], "w8a8-static", stats)
    assert len(option.parameters["bias_shift"]) == 8
    assert kernels(apply_quantize(prog, {"op": option}))["QLinearConv"] == 1


def test_too_few_vectors_and_none_give_no_correction():
    prog, x = conv()
    assert "bias_shift" not in pick(prog, sites(prog)["op"], "w8a8-static", statistics(prog, x, 8)).parameters
    plain = Quantize(correct_bias=False)
    found = pick(prog, sites(prog)["op"], "w8a8-static", statistics(prog, x), plain)
    assert "bias_shift" not in found.parameters
