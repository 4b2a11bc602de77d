"""Smoothing: the rules, the choice by output error, exactness, and where the scales end up."""

from __future__ import annotations

import json

import numpy as np
import pytest
from quantize_tools import (
    apply_quantize,
    kernels,
    pick,
    program,
    relative_error,
    run,
    sites,
)

from lamina.analysis.needs import Need
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.passes.fold import cleanup
from lamina.passes.pass_ import Option
from lamina.passes.quantize import Quantize
from lamina.passes.quantize.smoothing import choose_smoothing, scales
from lamina.planner.realize import LOOKS

rng = np.random.default_rng(11)
WIDTH, FORMS = 64, ("w8a8-static", "w8a8-dynamic")
OUTLIERS = np.ones(WIDTH, np.float32)
OUTLIERS[[3, 17, 40]] = 60.0, 35.0, 90.0


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def two_readers(norm=True, residual=False, left=False):
    """A normalization whose gain makes outlier channels, read by two products."""
    gain, bias, first, second = OUTLIERS, normal(WIDTH), normal(WIDTH, 48), normal(WIDTH, 32)

    def build(r, x):
        if norm:
            inputs = [x, r.constant(gain, "gain"), r.constant(bias, "bias")]
            x = r.op("LayerNormalization", inputs, name="norm")
        else:
            x = r.op("Mul", [r.op("Tanh", [x], name="tanh"), r.constant(gain, "gain")], name="norm")
        a = r.op("MatMul", [x, r.constant(first, "w1")], name="one")
        b = r.op("MatMul", [x, r.constant(second, "w2")], name="two")
        y = r.op("Concat", [a, b] + ([x] if residual else []), {"axis": 2}, name="both")
        y.shape = None
        return y

    made = program(build, ["n", 5, WIDTH])
    for node in made.graph:
        node.outputs[0].shape = node.outputs[0].shape or made.graph.inputs[0].shape
    return made


def statistics(prog, x):
    names = [n for s in sites(prog).values() for n in (*s.inputs, *s.outputs)]
    return collect(
        prog, Dataset({"x0": x}, {}, 100), ranges=names, needs=(Need.VECTORS,), looks=LOOKS, threads=1
    )


def quantized(prog, stats, form, **options):
    transform = Quantize(**options)
    found = sites(prog, transform)
    return cleanup(apply_quantize(prog, {n: pick(prog, s, form, stats, transform) for n, s in found.items()}))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_alpha_is_the_formula_of_the_paper(alpha):
    x, w = np.abs(normal(40)) * 8, np.abs(normal(40))
    exact = np.log2(x**alpha / w ** (1 - alpha))
    np.testing.assert_array_equal(scales(alpha, x, w), np.rint(exact - exact.mean()))


def test_log_is_the_formula_of_the_paper_and_channels_that_never_vary_stay():
    x, w = np.abs(normal(40)) * 300, np.abs(normal(40))
    x[7], w[9] = 0.0, 0.0
    made = scales("log", x, w)
    assert made[7] == made[9] == 0
    counted = np.delete(np.arange(40), [7, 9])
    exact = np.log2(x[counted] / np.log2(2 + x[counted]))
    np.testing.assert_array_equal(made[counted], np.rint(exact - exact.mean()))


@pytest.mark.parametrize("form", FORMS)
def test_outlier_channels_cost_less(form):
    # few channels make the range, and many vectors must have been seen to know theirs
    prog, x = two_readers(), normal(800, 5, WIDTH)
    stats, test = statistics(prog, x), normal(16, 5, WIDTH)
    before = run(prog, test)
    plain = relative_error(run(quantized(prog, stats, form, smoothing=()), test), before)
    smooth = relative_error(run(quantized(prog, stats, form), test), before)
    assert smooth < 0.5 * plain


@pytest.mark.parametrize("form", FORMS)
def test_readers_share_one_quantization_and_the_norm_takes_the_scales(form):
    prog = two_readers()
    stats = statistics(prog, normal(64, 5, WIDTH))
    counts = kernels(quantized(prog, stats, form))
    assert "Mul" not in counts
    if form == "w8a8-static":
        assert counts["QuantizeLinear"] == 1
        assert counts["MatMulIntegerToFloat"] == 2
    else:
        assert counts["DynamicQuantizeLinear"] == 1


@pytest.mark.parametrize("form", FORMS)
def test_a_value_that_others_read_keeps_one_multiplication(form):
    """As behind a post-norm layer: the residual reads what the products do."""
    prog = two_readers(residual=True)
    stats = statistics(prog, normal(64, 5, WIDTH))
    made, test = quantized(prog, stats, form), normal(8, 5, WIDTH)
    assert sum(n.op_type == "Mul" and "smooth" in (n.name or "") for n in made.graph) == 1
    np.testing.assert_array_equal(run(made, test)[..., 80:], run(prog, test)[..., 80:])


def test_the_rule_with_the_least_output_error_is_chosen():
    prog, x = two_readers(), normal(64, 5, WIDTH)
    stats = statistics(prog, x)
    name = sites(prog)["one"].inputs[0]
    options = {"bits": 8, "ranges": "mse"}
    single = {r: choose_smoothing(prog, name, stats, rules=(r,), **options) for r in (0.1, 0.5, 0.8)}
    errors = {r: s.error for r, s in single.items() if s is not None}
    best = choose_smoothing(prog, name, stats, rules=(0.1, 0.5, 0.8), **options)
    assert best.error == min(errors.values())
    assert best.rule == min(errors, key=errors.get)


def test_even_channels_are_left_alone():
    weight = np.sign(normal(WIDTH, 32))
    prog = program(lambda r, x: r.op("MatMul", [x, r.constant(weight, "w")], name="fc"), ["n", 5, WIDTH])
    stats = statistics(prog, normal(64, 5, WIDTH))
    assert "smooth" not in pick(prog, sites(prog)["fc"], "w8a8-dynamic", stats).parameters


@pytest.mark.parametrize("form", FORMS)
def test_a_plan_replays_without_data(form):
    prog = two_readers()
    stats = statistics(prog, normal(64, 5, WIDTH))
    options = {n: pick(prog, s, form, stats) for n, s in sites(prog).items()}
    read = {n: json.loads(json.dumps(o.parameters)) for n, o in options.items()}
    assert all("smooth" in p for p in read.values())
    again = apply_quantize(prog, {n: Option(form, p) for n, p in read.items()})
    x = normal(4, 5, WIDTH)
    np.testing.assert_array_equal(run(again, x), run(apply_quantize(prog, options), x))


def test_without_vectors_nothing_is_smoothed():
    prog = two_readers()
    option = pick(prog, sites(prog)["one"], "w8a8-dynamic", None)
    assert "smooth" not in option.parameters


@pytest.mark.parametrize("rule", [1.5, -0.1, "sqrt"])
def test_unknown_rules_are_refused(rule):
    with pytest.raises(PassError) as caught:
        Quantize(smoothing=(rule,))
    assert str(caught.value) == f"smoothing rule {rule!r} is unknown\n  give alphas from 0.0 to 1.0 or 'log'"
