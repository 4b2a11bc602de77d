"""Decomposed layer normalization in the spellings exporters use, and what is left alone."""

from __future__ import annotations

import re

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program
from lamina.passes.fold import apply_named, fold

F = np.float32
NAME = "fuse_layer_normalization"


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def build(body: str, x: str = "float[N,5,8] x", z: str = "float[N,5,8] z", **other: np.ndarray) -> Program:
    weights = {
        "last": np.array([-1]),
        "last2": np.array([1, 2]),
        "third": np.array([2]),
        "first": np.array([1]),
        "e": F(1e-5),
        "two": F(2),
        "one": F(1),
        "half": F(0.5),
        "mhalf": F(-0.5),
        "w": random(8, seed=1),
        "b": random(8, seed=2),
        **other,
    }
    text = f"{body} z = Neg(y)" if " z = " not in body else body
    used = {k: np.asarray(v) for k, v in weights.items() if re.search(rf"\b{k}\b", text)}
    return program(f"g ({x}) => ({z}) {{ {text} }}", used)


HEAD = "m = ReduceMean(x, last) d = Sub(x, m) s = Mul(d, d) v = ReduceMean(s, third) a = Add(v, e)"
SPELLINGS = {
    "pow, sqrt, div": "m = ReduceMean(x, last) d = Sub(x, m) s = Pow(d, two) v = ReduceMean(s, last)"
    " a = Add(v, e) q = Sqrt(a) n = Div(d, q) p = Mul(n, w) y = Add(p, b)",
    "mul, sqrt, reciprocal": f"{HEAD} q = Sqrt(a) r = Reciprocal(q) n = Mul(d, r)"
    " p = Mul(w, n) y = Add(b, p)",
    "one over": f"{HEAD} q = Sqrt(a) r = Div(one, q) n = Mul(r, d) p = Mul(n, w) y = Add(p, b)",
    "power of -0.5": f"{HEAD} r = Pow(a, mhalf) n = Mul(d, r) p = Mul(n, w) y = Add(p, b)",
    "power of 0.5": f"{HEAD} r = Pow(a, half) n = Div(d, r) p = Mul(n, w) y = Add(p, b)",
    "weight on the root": f"{HEAD} q = Sqrt(a) r = Reciprocal(q) g = Mul(r, w) n = Mul(d, g) y = Add(n, b)",
    "difference computed twice": f"{HEAD} q = Sqrt(a) d2 = Sub(x, m) n = Div(d2, q)"
    " p = Mul(n, w) y = Add(p, b)",
    "tensorflow": f"{HEAD} q = Sqrt(a) r = Reciprocal(q) g = Mul(r, w) p = Mul(x, g) o = Mul(m, g)"
    " t = Sub(b, o) y = Add(p, t)",
}
BARE = {
    "no affine": f"{HEAD} q = Sqrt(a) y = Div(d, q)",
    "weight only": f"{HEAD} q = Sqrt(a) n = Div(d, q) y = Mul(n, w)",
    "bias only": f"{HEAD} q = Sqrt(a) n = Div(d, q) y = Add(n, b)",
    "tensorflow without bias": f"{HEAD} r = Pow(a, mhalf) p = Mul(x, r) o = Mul(m, r) y = Sub(p, o)",
}


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": random(n, 5, 8, seed=n) * F(3) + F(1)} for n in (1, 3)]


@pytest.mark.parametrize("body", [*SPELLINGS.values(), *BARE.values()], ids=[*SPELLINGS, *BARE])
def test_every_spelling_becomes_one_operator(body: str) -> None:
    after = check(build(body), NAME, feeds(), limit=16)
    assert ops(after) == {"LayerNormalization": 1, "Neg": 1}
    node = next(iter(after.graph))
    assert (node.name, node.outputs[0].name) == ("node_y", "y")


@pytest.mark.parametrize("name", SPELLINGS)
def test_weight_and_bias_are_taken_as_they_are(name: str) -> None:
    node = next(iter(apply_named(build(SPELLINGS[name]), [NAME]).graph))
    assert [v.name for v in node.inputs] == ["x", "w", "b"]


def test_last_two_axes() -> None:
    body = SPELLINGS["pow, sqrt, div"].replace("last", "last2")
    after = check(build(body, w=random(5, 8), b=random(5, 8, seed=1)), NAME, feeds(), limit=16)
    node = next(iter(after.graph))
    assert (node.op_type, node.attributes["axis"].as_int()) == ("LayerNormalization", -2)


def test_a_vector_over_the_last_two_axes_stays_outside() -> None:
    after = check(build(SPELLINGS["pow, sqrt, div"].replace("last", "last2")), NAME, feeds(), limit=16)
    assert ops(after) == {"LayerNormalization": 1, "Mul": 1, "Add": 1, "Neg": 1}


def test_ones_in_front_of_the_weight_are_dropped() -> None:
    before = build(SPELLINGS["pow, sqrt, div"], w=random(1, 1, 8), b=random(1, 8, seed=3))
    after = check(before, NAME, feeds(), limit=16)
    assert ops(after) == {"LayerNormalization": 1, "Neg": 1}


def test_a_weight_that_adds_a_dimension_stays_outside() -> None:
    body = SPELLINGS["pow, sqrt, div"]
    before = build(body, z="float[1,N,5,8] z", w=random(1, 1, 1, 8))
    assert ops(check(before, NAME, feeds(), limit=16)) == {
        "LayerNormalization": 1,
        "Mul": 1,
        "Add": 1,
        "Neg": 1,
    }


def test_a_computed_weight_stays_outside() -> None:
    body = "u = Exp(w) " + SPELLINGS["pow, sqrt, div"].replace("Mul(n, w)", "Mul(n, u)")
    assert ops(check(build(body), NAME, feeds(), limit=16))["Mul"] == 1


def test_random_shapes_and_scales_keep_their_values() -> None:
    rng = np.random.default_rng(5)
    for width in (1, 3, 64, 257):
        weights = {"w": random(width, seed=1), "b": random(width, seed=2)}
        shape = f"float[N,T,{width}]"
        before = build(SPELLINGS["pow, sqrt, div"], f"{shape} x", f"{shape} z", **weights)
        x = (rng.normal(size=(2, 3, width)) * 10 ** rng.uniform(-2, 2)).astype(F)
        after = check(before, NAME, [{"x": x}], limit=32)
        assert ops(after)["LayerNormalization"] == 1


def test_before_opset_17_the_model_is_raised() -> None:
    body = re.sub(r"ReduceMean\(x, last\)", "ReduceMean <axes=[-1]> (x)", SPELLINGS["pow, sqrt, div"])
    body = re.sub(r"ReduceMean\(s, last\)", "ReduceMean <axes=[2]> (s)", body)
    weights = {"e": F(1e-5), "two": F(2), "w": random(8), "b": random(8, seed=1)}
    text = f"g (float[N,5,8] x) => (float[N,5,8] z) {{ {body} z = Neg(y) }}"
    before = program(text, weights, opset=13)
    after = check(before, NAME, feeds(), limit=16)
    assert (after.opset, ops(after)["LayerNormalization"]) == (17, 1)


REFUSED = {
    "another axis": (
        SPELLINGS["pow, sqrt, div"].replace("(s, last)", "(s, first)"),
        "its two means are not over the same last axes, kept, plus a number",
    ),
    "root read elsewhere": (
        SPELLINGS["pow, sqrt, div"] + " z = Mul(y, q)",
        "the difference is not divided by its root, or a value on the way is read elsewhere",
    ),
    "difference read elsewhere": (
        SPELLINGS["pow, sqrt, div"] + " z = Mul(y, d)",
        "the difference is not divided by its root, or a value on the way is read elsewhere",
    ),
    "another numerator": (
        SPELLINGS["pow, sqrt, div"].replace("Div(d, q)", "Div(x, q)"),
        "the difference is not divided by its root, or a value on the way is read elsewhere",
    ),
    "tensorflow with another bias": (
        SPELLINGS["tensorflow"].replace("Sub(b, o)", "Sub(one, o)"),
        "the difference is not divided by its root, or a value on the way is read elsewhere",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_near_misses_are_refused(name: str) -> None:
    body, reason = REFUSED[name]
    before = build(body)
    assert reasons(before, NAME) == [reason]
    assert ops(check(before, NAME, feeds())) == ops(before)


def test_a_difference_the_interface_shows_is_refused() -> None:
    before = build(SPELLINGS["pow, sqrt, div"], z="float[N,5,8] z, float[N,5,8] d")
    assert len(reasons(before, NAME)) == 1


def test_an_unknown_last_dimension_is_refused() -> None:
    before = build(SPELLINGS["pow, sqrt, div"], "float[N,T,D] x", "float[N,T,D] z")
    assert reasons(before, NAME) == ["it is not float32 with known last dimensions"]


def test_double_precision_is_refused() -> None:
    doubles = {k: np.array(v, np.float64) for k, v in {"e": 1e-5, "two": 2.0}.items()}
    weights = {"w": random(8).astype(np.float64), "b": random(8, seed=1).astype(np.float64)}
    before = build(SPELLINGS["pow, sqrt, div"], "double[N,5,8] x", "double[N,5,8] z", **doubles, **weights)
    assert reasons(before, NAME) == ["it is not float32 with known last dimensions"]


def test_epsilon_the_caller_can_override_is_left_alone() -> None:
    before = build(SPELLINGS["pow, sqrt, div"])
    before.graph.inputs.append(before.graph.initializers["e"])
    assert ops(apply_named(before, [NAME])) == ops(before)


def test_it_goes_before_the_rms_form() -> None:
    after, names, _ = fold(build(SPELLINGS["pow, sqrt, div"]), forms=("fuse_rms_normalization", NAME))
    assert NAME in names
    assert ops(after) == {"LayerNormalization": 1}  # the Neg is folded into its scale and bias
