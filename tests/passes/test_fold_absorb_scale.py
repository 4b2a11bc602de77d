"""AbsorbScale: powers of two in front of readers go into what made the value, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program

rng = np.random.default_rng(5)
WIDTH = 6
FACTOR = np.exp2(rng.integers(-3, 4, WIDTH)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(0.2, 1, shape).astype(np.float32)


def graph(body: str, factor: np.ndarray = FACTOR, outputs: str = "float[N,3,6] y", **weights: np.ndarray):
    given = {"c": factor, "c2": factor, "w": normal(WIDTH, WIDTH), "v": normal(WIDTH, WIDTH), **weights}
    given |= {"g": normal(WIDTH), "b": normal(WIDTH), "t": normal(1, 1, WIDTH)}
    used = {k: a for k, a in given.items() if f"({k})" in body or f", {k}" in body or f"({k}," in body}
    return program(f"g (float[N,3,6] x) => ({outputs}) {{ {body} }}", used, opset=21)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": normal(n, 3, WIDTH)} for n in (1, 4)]


MADE = {
    "norm": "a = LayerNormalization(x, g, b)",
    "gain": "s = Tanh(x) a = Mul(s, g)",
    "linear": "m = MatMul(x, v) a = Add(m, b)",
    "bias of full rank": "m = MatMul(x, v) a = Add(t, m)",
    "relu": "m = MatMul(x, v) p = Add(m, b) a = Relu(p)",
    "gated": "m = MatMul(x, v) s = Sigmoid(x) a = Mul(s, m)",
    "attention": "m = MatMul(x, v) s = Transpose <perm=[0,2,1]> (m) q = MatMul(x, s) p = Softmax(q)"
    " n = MatMul(x, w) a = MatMul(p, n)",
}


def test_several_heads_keep_their_channels_in_order():
    """Factors differ between heads and inside each."""
    body = (
        "q = MatMul(x, u) qs = Reshape(q, split) qt = Transpose <perm=[0,2,1,3]> (qs)"
        " kt = Transpose <perm=[0,2,3,1]> (qs) sc = MatMul(qt, kt) p = Softmax(sc)"
        " m = MatMul(x, v) n = Add(m, b) vs = Reshape(n, split) vt = Transpose <perm=[0,2,1,3]> (vs)"
        " o = MatMul(p, vt) ot = Transpose <perm=[0,2,1,3]> (o) a = Reshape(ot, joined)"
        " z = Mul(a, c) y = MatMul(z, w)"
    )
    more = {"split": np.array([0, 3, 2, 3]), "joined": np.array([0, 3, 6])}
    before = graph(body, u=normal(WIDTH, WIDTH), **more)
    assert "Mul" not in ops(check(before, "absorb_scale", feeds()))


@pytest.mark.parametrize("made", MADE)
def test_the_factor_goes_into_what_made_the_value(made):
    text = MADE[made] if made != "attention" else MADE[made].replace("(x, w)", "(x, u)")
    before = graph(f"{text} z = Mul(a, c) y = MatMul(z, w)", u=normal(WIDTH, WIDTH))
    after = check(before, "absorb_scale", feeds())
    assert ops(before)["Mul"] - ops(after)["Mul"] == 1


def test_quantized_weights_take_it_into_their_scales():
    codes = rng.integers(-127, 128, (WIDTH, WIDTH)).astype(np.int8)
    before = graph(
        "k = DequantizeLinear <axis=1> (codes, step) m = MatMul(x, k) z = Mul(m, c) y = MatMul(z, w)",
        codes=codes,
        step=np.abs(normal(WIDTH)) + np.float32(0.1),
    )
    assert "Mul" not in ops(check(before, "absorb_scale", feeds()))


def test_equal_factors_of_one_value_become_one_and_stay_beside_another_reader():
    body = "a = LayerNormalization(x, g, b) z = Mul(a, c) q = Mul(a, c2) d = MatMul(z, w) e = MatMul(q, v)"
    alone = check(graph(f"{body} y = Add(d, e)"), "absorb_scale", feeds())
    assert "Mul" not in ops(alone)
    shared = check(graph(f"{body} s = Add(d, e) y = Add(s, a)"), "absorb_scale", feeds())
    assert ops(shared)["Mul"] == 1


KEPT = {
    "not a power of two": ("a = LayerNormalization(x, g, b) z = Mul(a, c) y = MatMul(z, w)", FACTOR * 1.5),
    "nothing to put it into": ("a = Tanh(x) z = Mul(a, c) y = MatMul(z, w)", FACTOR),
    "a sum of activations": ("m = MatMul(x, v) a = Add(m, x) z = Mul(a, c) y = MatMul(z, w)", FACTOR),
    "weight read twice": ("m = MatMul(x, w) z = Mul(m, c) y = MatMul(z, w)", FACTOR),
    "product with a vector": (
        "s = Transpose <perm=[0,2,1]> (x) q = MatMul(s, x) m = MatMul(q, o) z = Mul(m, c)"
        " e = Unsqueeze(z, first) y = Add(x, e)",
        FACTOR,
    ),
    "gelu in between": ("m = MatMul(x, v) a = Sigmoid(m) z = Mul(a, c) y = MatMul(z, w)", FACTOR),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_cannot_take_it_keeps_it(case):
    body, factor = KEPT[case]
    vector = {"o": normal(WIDTH), "first": np.array([1])}
    before = graph(body, factor.astype(np.float32), **vector)
    assert ops(check(before, "absorb_scale", feeds())) == ops(before)


def test_a_value_the_caller_sees_keeps_its_size():
    before = graph(
        "a = LayerNormalization(x, g, b) z = Mul(a, c) y = MatMul(z, w)",
        outputs="float[N,3,6] y, float[N,3,6] a",
    )
    assert ops(check(before, "absorb_scale", feeds()))["Mul"] == 1
