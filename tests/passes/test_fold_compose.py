"""Chains of linear operators and of constant scales and shifts, composed: held to execution."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program
from lamina.passes.fold import fold

LIMIT = 64
COSTS = "the composed weight would cost more"


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of both signs that are not near zero, so that nothing cancels by chance."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def matrix_case(body: str, shapes: dict, x_dims: str = "N,6", y_dims: str = "N,4") -> tuple[Program, list]:
    rng = np.random.default_rng(len(body))
    weights = {k: random(rng, *s) for k, s in shapes.items()}
    before = program(f"g (float[{x_dims}] x) => (float[{y_dims}] y) {{ {body} }}", weights)
    sizes = [int(d) if d.isdigit() else 3 for d in x_dims.split(",")]
    return before, [{"x": rng.normal(size=sizes).astype(np.float32)}]


# -- MatMul and Gemm --------------------------------------------------------------------------------

A, B, a, b = (6, 8), (8, 4), (8,), (4,)


@pytest.mark.parametrize(("x_dims", "y_dims"), [("N,6", "N,4"), ("N,T,6", "N,T,4"), ("6", "4")])
@pytest.mark.parametrize(
    ("body", "shapes", "left"),
    [
        ("m = MatMul(x, p) y = MatMul(m, q)", {"p": A, "q": B}, {"MatMul": 1}),
        (
            "m = MatMul(x, p) n = MatMul(m, q) y = Add(n, t)",
            {"p": A, "q": B, "t": b},
            {"MatMul": 1, "Add": 1},
        ),
        (
            "m = MatMul(x, p) n = Add(m, s) y = MatMul(n, q)",
            {"p": A, "q": B, "s": a},
            {"MatMul": 1, "Add": 1},
        ),
        (
            "m = MatMul(x, p) n = Add(s, m) o = MatMul(n, q) y = Add(o, t)",
            {"p": A, "q": B, "s": a, "t": b},
            {"MatMul": 1, "Add": 1},
        ),
        (
            "m = MatMul(x, p) n = Add(m, s) o = MatMul(n, q) y = Add(o, t)",
            {"p": A, "q": B, "s": (1,), "t": ()},
            {"MatMul": 1, "Add": 1},
        ),
    ],
)
def test_products_and_their_biases(body: str, shapes: dict, left: dict, x_dims: str, y_dims: str) -> None:
    before, feeds = matrix_case(body, shapes, x_dims, y_dims)
    after = check(before, "compose_linear", feeds, LIMIT)
    assert ops(after) == left
    assert after.outputs[0].name == "y"


def test_a_bias_by_position_is_multiplied_too() -> None:
    body = "m = MatMul(x, p) n = Add(m, s) y = MatMul(n, q)"
    before, feeds = matrix_case(body, {"p": A, "q": B, "s": (5, 8)}, "N,5,6", "N,5,4")
    assert ops(check(before, "compose_linear", feeds, LIMIT)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize(("trans_a", "trans_b", "more_b"), list(product((0, 1), repeat=3)))
def test_gemm_chains(trans_a: int, trans_b: int, more_b: int) -> None:
    for s_shape, t_shape, factors in product(
        (None, (8,), (1, 8), ()), (None, (4,), (3, 4)), ("", ", alpha=0.5, beta=2.0")
    ):
        shapes = {"p": A[::-1] if trans_b else A, "q": B[::-1] if more_b else B}
        shapes |= {k: v for k, v in {"s": s_shape, "t": t_shape}.items() if v is not None}
        first = f"Gemm <transA={trans_a}, transB={trans_b}{factors}>(x, p{', s' if 's' in shapes else ''})"
        second = f"Gemm <transB={more_b}{factors}>(m, q{', t' if 't' in shapes else ''})"
        x_dims = "6,3" if trans_a else "3,6"
        before, feeds = matrix_case(f"m = {first} y = {second}", shapes, x_dims, "3,4")
        assert ops(check(before, "compose_linear", feeds, LIMIT)) == {"Gemm": 1}


@pytest.mark.parametrize(
    ("body", "extra", "left"),
    [
        ("m = MatMul(x, p) y = Gemm(m, q, t)", {"t": b}, {"Gemm": 1}),
        ("m = MatMul(x, p) n = Add(m, s) y = Gemm <alpha=2.0>(n, q)", {"s": a}, {"Gemm": 1}),
        ("m = Gemm <beta=0.5>(x, p, s) y = MatMul(m, q)", {"s": a}, {"Gemm": 1}),
        ("m = Gemm(x, p, s) n = MatMul(m, q) y = Add(n, t)", {"s": a, "t": b}, {"Gemm": 1, "Add": 1}),
    ],
)
def test_gemm_and_matmul_mix(body: str, extra: dict, left: dict) -> None:
    before, feeds = matrix_case(body, {"p": A, "q": B, **extra})
    assert ops(check(before, "compose_linear", feeds, LIMIT)) == left


def test_three_products_become_one() -> None:
    body = "m = MatMul(x, p) n = MatMul(m, q) y = MatMul(n, r)"
    before, feeds = matrix_case(body, {"p": A, "q": B, "r": (4, 4)})
    assert ops(check(before, "compose_linear", feeds, LIMIT)) == {"MatMul": 1}


@pytest.mark.parametrize(
    ("body", "shapes", "reason"),
    [
        ("m = MatMul(x, p) y = MatMul(m, q)", {"p": (6, 2), "q": (2, 4)}, COSTS),
        (
            "m = MatMul(x, p) n = MatMul(m, q) o = ReduceSum <keepdims=1> (m) y = Add(n, o)",
            {"p": A, "q": B},
            "the value between the two is read elsewhere",
        ),
        ("m = Gemm(x, p, s) y = Gemm(m, q)", {"p": A, "q": B, "s": (3, 8)}, "its bias varies over rows"),
        (
            "m = MatMul(x, p) n = MatMul(m, q) o = MatMul(x, p) r = MatMul(o, q) y = Add(n, r)",
            {"p": A, "q": B},
            "a weight is shared: a copy would grow the file",
        ),
    ],
)
def test_refuses(body: str, shapes: dict, reason: str) -> None:
    before, feeds = matrix_case(body, shapes, "3,6", "3,4")
    after = check(before, "compose_linear", feeds)
    assert ops(after) == ops(before)
    assert reasons(before, "compose_linear")[0] == reason


def test_refuses_weights_that_overflow_or_underflow() -> None:
    for factor in (1e30, 1e-30):
        weights = {k: np.full(s, factor, np.float32) for k, s in {"p": A, "q": B}.items()}
        text = "g (float[N,6] x) => (float[N,4] y) { m = MatMul(x, p) y = MatMul(m, q) }"
        found = reasons(program(text, weights), "compose_linear")
        assert found == ["the composed weight would overflow or underflow"]


def test_leaves_products_with_activations_and_integers() -> None:
    text = "g (float[N,6] x, float[6,8] w) => (float[N,4] y) { m = MatMul(x, w) y = MatMul(m, q) }"
    assert reasons(program(text, {"q": np.ones(B, np.float32)}), "compose_linear") == []
    text = "g (int32[N,6] x) => (int32[N,4] y) { m = MatMul(x, p) y = MatMul(m, q) }"
    weights = {"p": np.ones(A, np.int32), "q": np.ones(B, np.int32)}
    before = program(text, weights)
    assert ops(check(before, "compose_linear", [{"x": np.ones((2, 6), np.int32)}])) == ops(before)


# -- convolutions -----------------------------------------------------------------------------------


def conv_case(
    first: tuple[int, ...],
    second: tuple[int, ...],
    attributes: tuple[str, str] = ("", ""),
    biases: tuple[bool, bool] = (True, True),
    channels: tuple[int, int, int] = (4, 4, 3),
) -> tuple[Program, list]:
    rng = np.random.default_rng([*first, *second, *biases])
    c_in, c_mid, c_out = channels
    weights = {"p": random(rng, c_mid, c_in, *first), "q": random(rng, c_out, c_mid, *second)}
    weights |= {k: random(rng, n) for k, n, has in zip("st", (c_mid, c_out), biases, strict=True) if has}
    tails = [", s" if biases[0] else "", ", t" if biases[1] else ""]
    body = f"m = Conv {attributes[0]}(x, p{tails[0]}) y = Conv {attributes[1]}(m, q{tails[1]})"
    spatial = "HWD"[: len(first)]
    dims, out = ",".join(spatial), ",".join(f"P{s}" for s in spatial)
    before = program(
        f"g (float[N,{c_in},{dims}] x) => (float[N,{c_out},{out}] y) {{ {body} }}",
        weights,
    )
    sizes = [(9, 10, 6), (8, 7, 7)]
    return before, [{"x": rng.normal(size=(2, c_in, *s[: len(first)])).astype(np.float32)} for s in sizes]


@pytest.mark.parametrize("biases", list(product((True, False), repeat=2)))
@pytest.mark.parametrize(
    ("first", "second", "attributes"),
    [
        ((1, 1), (1, 1), ("", "")),
        ((1, 1), (1, 1), ("<strides=[2,1]>", "<strides=[2,3]>")),
        ((1, 1), (3, 2), ("", "<strides=[1,2], dilations=[2,1]>")),
        ((3, 2), (1, 1), ("<pads=[1,0,2,1], strides=[2,1], dilations=[1,2]>", "")),
        ((3, 2), (1, 1), ("<pads=[1,0,2,1], strides=[2,1]>", "<strides=[2,3]>")),
        ((3, 3), (1, 1), ('<auto_pad="SAME_UPPER">', "")),
        ((1, 1), (1, 1), ('<auto_pad="SAME_UPPER", strides=[2,2]>', '<auto_pad="VALID">')),
        ((1,), (3,), ("", "")),
        ((2, 2, 2), (1, 1, 1), ("", "<strides=[2,1,1]>")),
    ],
)
def test_a_pointwise_convolution_composes(
    first: tuple, second: tuple, attributes: tuple, biases: tuple
) -> None:
    before, feeds = conv_case(first, second, attributes, biases)
    assert ops(check(before, "compose_linear", feeds, LIMIT)) == {"Conv": 1}


@pytest.mark.parametrize("attributes", ["<pads=[1,1,0,1]>", '<auto_pad="SAME_LOWER">'])
def test_padding_behind_a_pointwise_convolution(attributes: str) -> None:
    before, feeds = conv_case((1, 1), (3, 3), ("", attributes), (False, True))
    assert ops(check(before, "compose_linear", feeds, LIMIT)) == {"Conv": 1}
    before, feeds = conv_case((1, 1), (3, 3), ("", attributes))
    assert ops(check(before, "compose_linear", feeds)) == {"Conv": 2}
    assert reasons(before, "compose_linear") == [
        "zero padding: the bias before it would not reach the border"
    ]


@pytest.mark.parametrize(
    ("first", "second", "attributes", "reason"),
    [
        ((1, 1), (3, 3), ("<strides=[2,1]>", ""), "the 1x1 convolution pads or strides"),
        ((1, 1), (3, 3), ("<pads=[1,1,1,1]>", ""), "the 1x1 convolution pads or strides"),
        ((3, 3), (1, 1), ("", "<pads=[0,1,0,0]>"), "the 1x1 convolution pads or strides"),
        ((3, 3), (1, 1), ('<auto_pad="SAME_UPPER">', "<strides=[2,2]>"), "its padding depends on its stride"),
        ((3, 3), (3, 3), ("", ""), None),
    ],
)
def test_refuses_convolutions_that_do_not_compose(
    first: tuple, second: tuple, attributes: tuple, reason: str | None
) -> None:
    before, feeds = conv_case(first, second, attributes)
    assert ops(check(before, "compose_linear", feeds)) == {"Conv": 2}
    assert reasons(before, "compose_linear") == ([] if reason is None else [reason])


def test_refuses_a_bottleneck_and_groups() -> None:
    before, _ = conv_case((1, 1), (1, 1), channels=(8, 2, 8))
    assert reasons(before, "compose_linear") == [COSTS]
    rng = np.random.default_rng(0)
    weights = {"p": random(rng, 4, 2, 1, 1), "q": random(rng, 4, 4, 1, 1)}
    body = "m = Conv <group=2> (x, p) y = Conv(m, q)"
    before = program(f"g (float[N,4,H,W] x) => (float[N,4,H,W] y) {{ {body} }}", weights)
    assert reasons(before, "compose_linear") == []


# -- scales and shifts ------------------------------------------------------------------------------


def chain(body: str, shapes: dict[str, tuple[int, ...]], dims: str = "N,3,4") -> tuple[Program, list]:
    rng = np.random.default_rng(len(body))
    weights = {k: random(rng, *s) for k, s in shapes.items()}
    before = program(f"g (float[{dims}] x) => (float[{dims}] y) {{ {body} }}", weights)
    sizes = [int(d) if d.isdigit() else 2 for d in dims.split(",")]
    return before, [{"x": rng.normal(size=sizes).astype(np.float32)}]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("m = Mul(x, p) y = Mul(q, m)", {"Mul": 1}),
        ("m = Div(x, p) y = Div(m, q)", {"Mul": 1}),
        ("m = Mul(x, p) y = Div(m, q)", {"Mul": 1}),
        ("m = Neg(x) y = Mul(m, q)", {"Mul": 1}),
        ("m = Add(x, p) y = Add(m, q)", {"Add": 1}),
        ("m = Sub(x, p) y = Add(q, m)", {"Add": 1}),
        ("m = Sub(p, x) y = Add(q, m)", {"Sub": 1}),
        ("m = Sub(p, x) y = Sub(q, m)", {"Add": 1}),
        ("m = Add(x, p) y = Neg(m)", {"Add": 1, "Neg": 1}),
        ("m = Mul(x, p) n = Add(m, q) y = Mul(n, r)", {"Mul": 1, "Add": 1}),
        ("m = Mul(x, p) n = Sub(q, m) y = Div(n, r)", {"Mul": 1, "Add": 1}),
        ("m = Add(x, p) n = Mul(m, q) y = Add(n, r)", {"Mul": 1, "Add": 1}),
        ("m = Sub(p, x) n = Div(m, q) y = Sub(r, n)", {"Mul": 1, "Add": 1}),
        ("m = Mul(x, p) n = Mul(m, q) o = Add(n, r) q2 = Mul(o, p2) y = Add(q2, r2)", {"Mul": 1, "Add": 1}),
        ("m = Neg(x) n = Neg(m) y = Relu(n)", {"Relu": 1}),
        ("r = Relu(x) m = Neg(r) y = Neg(m)", {"Relu": 1}),
    ],
)
@pytest.mark.parametrize("shape", [(), (4,), (3, 1), (3, 4), (1, 1, 1)])
def test_chains_of_constants(body: str, left: dict, shape: tuple[int, ...]) -> None:
    used = [k for k in ("p", "q", "r", "p2", "r2") if f" {k})" in body or f"({k}," in body]
    before, feeds = chain(body, {k: shape for k in used})
    assert ops(check(before, "compose_affine", feeds, LIMIT)) == left


def test_constants_that_widen_each_other_grow_and_stay() -> None:
    before, feeds = chain("m = Mul(x, p) y = Mul(m, q)", {"p": (3, 1), "q": (4,)})
    assert ops(check(before, "compose_affine", feeds)) == {"Mul": 2}
    assert reasons(before, "compose_affine") == ["the composed constants would be larger"]


@pytest.mark.parametrize("body", ["m = Mul(x, p) y = Mul(m, q)", "m = Add(x, p) y = Add(m, q)"])
def test_constants_that_widen_x_still_do(body: str) -> None:
    rng = np.random.default_rng(0)
    weights = {"p": random(rng, 2, 3, 1), "q": random(rng, 1)}
    before = program(f"g (float[4] x) => (float[2,3,4] y) {{ {body} }}", weights)
    after = check(before, "compose_affine", [{"x": rng.normal(size=4).astype(np.float32)}], LIMIT)
    assert len(after.graph) == 1


def test_refuses_chains_that_are_read_round_or_overflow() -> None:
    before, feeds = chain("m = Mul(x, p) n = Mul(m, q) y = Max(n, m)", {"p": (), "q": ()})
    assert ops(check(before, "compose_affine", feeds)) == ops(before)
    big = np.float32(12582912)
    text = "g (float[N] x) => (float[N] y) {{ {} }}"
    before = program(text.format("m = Add(x, p) y = Sub(m, p)"), {"p": big})
    feeds = [{"x": np.float32([0.4, 1.6, -2.3])}]
    assert ops(check(before, "compose_affine", feeds)) == ops(before)
    assert reasons(before, "compose_affine") == [
        "its shifts nearly cancel: the order of the additions matters"
    ]
    before = program(
        text.format("m = Mul(x, p) y = Mul(m, q)"), {"p": np.float32(1e30), "q": np.float32(1e30)}
    )
    assert reasons(before, "compose_affine") == ["the composed constants would overflow or underflow"]
    before = program(text.format("m = Div(x, p) y = Mul(m, q)"), {"p": np.float32(0), "q": np.float32(1)})
    assert reasons(before, "compose_affine") == ["the composed constants would overflow or underflow"]


def test_integers_stay() -> None:
    text = "g (int64[N] x) => (int64[N] y) { m = Div(x, p) n = Neg(m) y = Mul(n, q) }"
    before = program(text, {"p": np.int64(2), "q": np.int64(2)})
    assert ops(check(before, "compose_affine", [{"x": np.arange(-3, 4)}])) == ops(before)


def test_everything_together_reaches_one_operator() -> None:
    body = (
        "m = Mul(x, p) n = MatMul(m, A) o = Add(n, q) r = Neg(o) s = MatMul(r, B) t = Div(s, u) y = Sub(v, t)"
    )
    shapes = {"p": (6,), "A": (6, 8), "q": (8,), "B": (8, 4), "u": (4,), "v": (4,)}
    before, _ = matrix_case(body, shapes)
    after, _, records = fold(before)
    assert not [r for r in records if r.why.startswith(("undone", "stopped"))]
    assert ops(after) == {"Gemm": 1}
