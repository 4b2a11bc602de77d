"""Parallel linear branches of one value, merged into one operator: held to execution."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program
from lamina.passes.fold import fold

LIMIT = 64
NEST = "the kernels do not nest, or their strides, groups or channels differ"
PASS = "merge_parallel_linear"


def random(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Numbers of both signs that are not near zero, so that nothing cancels by chance."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def case(body: str, shapes: dict[str, tuple[int, ...]], x_dims: str, y_dims: str) -> tuple[Program, list]:
    rng = np.random.default_rng(len(body))
    weights = {k: random(rng, *s) for k, s in shapes.items()}
    if "var" in weights:
        weights["var"] = np.abs(weights["var"])
    before = program(f"g (float[{x_dims}] x) => (float[{y_dims}] y) {{ {body} }}", weights)
    dims, sizes = x_dims.split(","), [[], []]
    for i, d in enumerate(dims):
        for k, free in enumerate((3, 6)):
            sizes[k].append(int(d) if d.isdigit() else free + i)
    return before, [{"x": rng.normal(size=s).astype(np.float32)} for s in sizes]


IMAGE, MAP = "N,6,H,W", "N,6,P,Q"
BN = {"g": (6,), "b": (6,), "mean": (6,), "var": (6,)}
NORM = "n = BatchNormalization(x, g, b, mean, var)"


@pytest.mark.parametrize("group", [1, 2, 6])
@pytest.mark.parametrize(
    ("body", "extra"),
    [
        ("l = Conv <{}, pads=[1,1,1,1]> (x, p, s) r = Conv <{}> (x, q, t) y = Add(l, r)", {}),
        ("l = Conv <{}> (x, q) r = Conv <{}, pads=[1,1,1,1]> (x, p) y = Add(l, r)", {}),
        ("l = Conv <{}, pads=[1,1,1,1]> (x, p) y = Add(x, l)", {}),
        ("l = Conv <{}, pads=[1,1,1,1]> (x, p) r = Conv <{}> (x, q, t) y = Sum(r, x, l)", {}),
        ("l = Conv <{}, pads=[1,1,1,1]> (x, p, s) " + NORM + " y = Sum(n, l, x)", BN),
        (
            "l = Conv <{}, pads=[1,1,1,1]> (x, p, s) r = Conv <{}> (x, q) "
            + NORM
            + " a = Add(l, r) y = Add(a, n)",
            BN,
        ),
        ("l = Conv <{}, pads=[2,2,2,2], dilations=[2,2]> (x, p) r = Conv <{}> (x, q) y = Add(l, r)", {}),
        ("l = Conv <{}, pads=[2,2,2,2], dilations=[2,2]> (x, p) y = Add(l, x)", {}),
        ("l = Conv <{}, pads=[1,1,1,1]> (x, p) m = Mul(x, v) y = Add(m, l)", {"v": (6, 1, 1)}),
        ("r = Conv <{}> (x, q, t) m = Add(x, v) y = Add(m, r)", {"v": (6, 1, 1)}),
    ],
)
def test_reparameterizable_blocks(body: str, extra: dict, group: int) -> None:
    c = 6 // group
    shapes = {"p": (6, c, 3, 3), "q": (6, c, 1, 1), "s": (6,), "t": (6,), **extra}
    used = {k: v for k, v in shapes.items() if f" {k}," in body or f" {k})" in body}
    before, feeds = case(body.replace("{}", f"group={group}"), used, IMAGE, MAP)
    assert ops(check(before, PASS, feeds, LIMIT)) == {"Conv": 1}


@pytest.mark.parametrize(
    ("kernels", "attributes"),
    [
        (((3, 3), (1, 1)), ("pads=[1,1,1,1], strides=[2,2]", "strides=[2,2]")),
        (((3, 3), (3, 1)), ("pads=[1,1,1,1]", "pads=[1,0,1,0]")),
        (((5, 3), (3, 3)), ("pads=[2,1,2,1]", "pads=[1,1,1,1]")),
        (((4, 4), (2, 2)), ("pads=[2,0,1,3]", "pads=[1,0,0,1]")),
        (((3, 3), (3, 3)), ("pads=[1,1,1,1]", "pads=[1,1,1,1]")),
        (((3, 3), (3, 3)), ('auto_pad="SAME_UPPER", strides=[2,1]', 'auto_pad="SAME_UPPER", strides=[2,1]')),
        (((3, 3), (3, 3)), ('auto_pad="VALID", dilations=[1,2]', "dilations=[1,2]")),
        (((3, 3), (2, 1)), ("pads=[0,0,3,3], dilations=[3,1]", "pads=[0,0,0,1], dilations=[3,7]")),
    ],
)
def test_kernels_that_nest(kernels: tuple, attributes: tuple) -> None:
    shapes = {"p": (4, 6, *kernels[0]), "q": (4, 6, *kernels[1]), "t": (4,)}
    body = f"l = Conv <{attributes[0]}> (x, p) r = Conv <{attributes[1]}> (x, q, t) y = Add(l, r)"
    before, feeds = case(body, shapes, "N,6,10,11", "N,4,P,Q")
    assert ops(check(before, PASS, feeds, LIMIT)) == {"Conv": 1}


@pytest.mark.parametrize(
    ("kernels", "attributes"),
    [
        (((3, 1), (1, 3)), ("pads=[1,0,1,0]", "pads=[0,1,0,1]")),
        (((3, 3), (1, 1)), ("pads=[1,1,1,1], strides=[2,2]", "strides=[2,2], pads=[0,0,0,0], group=2")),
        (((3, 3), (2, 2)), ("pads=[2,2,2,2], dilations=[2,2]", "pads=[0,0,1,1]")),
        (((3, 3), (3, 3)), ("pads=[1,1,1,1]", "pads=[2,2,2,2], dilations=[2,2]")),
        (((3, 3), (3, 3)), ('auto_pad="SAME_UPPER"', 'auto_pad="SAME_LOWER"')),
        (((3, 3), (1, 1)), ('auto_pad="SAME_UPPER"', "")),
    ],
)
def test_refuses_kernels_that_do_not_nest(kernels: tuple, attributes: tuple) -> None:
    group = 2 if "group" in attributes[1] else 1
    shapes = {"p": (4, 6, *kernels[0]), "q": (4, 6 // group, *kernels[1])}
    second = f"<{attributes[1]}>" if attributes[1] else ""
    body = f"l = Conv <{attributes[0]}> (x, p) r = Conv {second} (x, q) y = Add(l, r)"
    # The dilated 3x3 and the 2x2 give the same output on this size only.
    size = (5, 5) if kernels[1] == (2, 2) else (10, 11)
    before, feeds = case(body, shapes, f"N,6,{size[0]},{size[1]}", "N,4,P,Q")
    after = check(before, PASS, feeds)
    assert ops(after) == ops(before)
    assert reasons(before, PASS) == [NEST]


def test_x_beside_a_convolution_that_changes_its_shape_stays() -> None:
    for attributes, dims in (("pads=[1,1,1,1], strides=[2,2]", "N,6,1,1"), ("pads=[0,0,0,0]", "N,6,3,3")):
        body = f"l = Conv <{attributes}> (x, p) y = Add(l, x)"
        before, feeds = case(body, {"p": (6, 6, 3, 3)}, dims, MAP)
        assert ops(check(before, PASS, feeds)) == {"Conv": 1, "Add": 1}
        assert reasons(before, PASS) == [NEST]
    body = "l = Conv (x, p) y = Add(l, x)"  # one channel out broadcasts over x
    before, feeds = case(body, {"p": (1, 6, 1, 1)}, IMAGE, MAP)
    assert ops(check(before, PASS, feeds)) == {"Conv": 1, "Add": 1}


# -- matrices ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("x_dims", ["N,4", "N,T,4", "4"])
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("l = MatMul(x, p) r = MatMul(x, q) y = Add(l, r)", {"MatMul": 1}),
        ("l = MatMul(x, p) r = MatMul(x, q) m = Add(r, s) y = Add(l, m)", {"MatMul": 1, "Add": 1}),
        (
            "l = MatMul(x, p) n = Add(s, l) r = MatMul(x, q) m = Add(r, t) y = Sum(m, n)",
            {"MatMul": 1, "Add": 1},
        ),
        ("l = MatMul(x, p) y = Add(x, l)", {"MatMul": 1}),
        ("l = MatMul(x, p) m = Mul(x, s) y = Add(l, m)", {"MatMul": 1}),
        ("l = MatMul(x, p) n = Add(l, s) y = Sum(n, x)", {"MatMul": 1, "Add": 1}),
    ],
)
def test_products_of_the_same_input(body: str, left: dict, x_dims: str) -> None:
    shapes = {"p": (4, 4), "q": (4, 4), "s": (4,), "t": (4,)}
    used = {k: v for k, v in shapes.items() if f" {k})" in body or f"({k}," in body}
    before, feeds = case(body, used, x_dims, x_dims)
    assert ops(check(before, PASS, feeds, LIMIT)) == left


@pytest.mark.parametrize(("trans_a", "trans_b"), list(product((0, 1), repeat=2)))
def test_gemms_of_the_same_input(trans_a: int, trans_b: int) -> None:
    first, second = (
        f"Gemm <transA={trans_a}, alpha=0.5, beta=2.0>",
        f"Gemm <transA={trans_a}, transB={trans_b}>",
    )
    body = f"l = {first}(x, p, s) r = {second}(x, q, t) y = Add(r, l)"
    shapes = {"p": (5, 3), "q": (3, 5) if trans_b else (5, 3), "s": (3,), "t": (2, 3)}
    before, feeds = case(body, shapes, "5,2" if trans_a else "2,5", "2,3")
    assert ops(check(before, PASS, feeds, LIMIT)) == {"Gemm": 1}


def test_products_of_different_inputs_stay() -> None:
    rng = np.random.default_rng(0)
    weights = {"p": random(rng, 4, 4), "q": random(rng, 4, 4)}
    text = (
        "g (float[N,4] x, float[N,4] z) => (float[N,4] y) { l = MatMul(x, p) r = MatMul(z, q) y = Add(l, r) }"
    )
    before = program(text, weights)
    feed = {k: rng.normal(size=(2, 4)).astype(np.float32) for k in "xz"}
    assert ops(check(before, PASS, [feed])) == ops(before)


def test_a_sum_keeps_what_is_not_merged() -> None:
    rng = np.random.default_rng(0)
    weights = {k: random(rng, 4, 4) for k in "pqrs"}
    body = "a = MatMul(x, p) b = MatMul(z, r) e = Exp(x)"
    body += " c = MatMul(x, q) d = MatMul(z, s) y = Sum(a, b, e, c, d)"
    before = program(f"g (float[N,4] x, float[N,4] z) => (float[N,4] y) {{ {body} }}", weights)
    feed = {k: rng.normal(size=(2, 4)).astype(np.float32) for k in "xz"}
    after = check(before, PASS, [feed], LIMIT)
    assert ops(after) == {"MatMul": 2, "Exp": 1, "Sum": 1}


# -- refusals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("l = MatMul(x, p) r = MatMul(x, q) a = Add(l, r) y = Max(a, r)", "a branch is read elsewhere"),
        ("l = MatMul(x, p) m = Mul(x, s) a = Add(l, m) y = Max(a, m)", "a branch is read elsewhere"),
        ("l = MatMul(x, p) y = Add(l, l)", None),
        ("l = MatMul(x, p) r = Relu(l) y = Add(r, x)", None),
        (
            "l = MatMul(x, p) r = MatMul(x, q) a = Add(l, r) b = MatMul(x, p) c = MatMul(x, q) e = Neg(b)"
            " d = Max(e, c) y = Max(a, d)",
            "a weight is shared: a copy would grow the file",
        ),
    ],
)
def test_refuses(body: str, reason: str | None) -> None:
    shapes = {"p": (8, 8), "q": (8, 8), "s": (8,)}
    used = {k: v for k, v in shapes.items() if f" {k})" in body}
    before, feeds = case(body, used, "N,8", "N,8")
    after = check(before, PASS, feeds)
    assert ops(after) == ops(before)
    assert reasons(before, PASS)[:1] == ([] if reason is None else [reason])


def test_refuses_to_overflow() -> None:
    weights = {k: np.full((4, 4), 3e38, np.float32) for k in "pq"}
    text = "g (float[N,4] x) => (float[N,4] y) { l = MatMul(x, p) r = MatMul(x, q) y = Add(l, r) }"
    assert reasons(program(text, weights), PASS) == ["the summed weights would overflow or underflow"]


def test_a_repvgg_block_with_its_normalizations_becomes_one_convolution() -> None:
    names = [f"{k}{i}" for i in range(3) for k in ("g", "b", "mean", "var")]
    rng = np.random.default_rng(0)
    weights = {k: np.abs(random(rng, 6)) for k in names}
    weights |= {"p": random(rng, 6, 6, 3, 3), "q": random(rng, 6, 6, 1, 1)}
    bn = "BatchNormalization({0}, g{1}, b{1}, mean{1}, var{1})"
    body = (
        f"l = Conv <pads=[1,1,1,1]> (x, p) a = {bn.format('l', 0)} r = Conv(x, q) c = {bn.format('r', 1)}"
        f" d = {bn.format('x', 2)} e = Add(a, c) f = Add(e, d) y = Relu(f)"
    )
    before = program(f"g (float[N,6,H,W] x) => (float[N,6,P,Q] y) {{ {body} }}", weights)
    after, _, records = fold(before)
    assert not [r for r in records if r.why.startswith(("undone", "stopped"))]
    assert ops(after) == {"Conv": 1, "Relu": 1}
