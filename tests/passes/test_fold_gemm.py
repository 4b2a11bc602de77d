"""MatMul and Add as one Gemm: held to execution."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program


def draw(*shape: int, kind: type = np.float32) -> np.ndarray:
    return np.random.default_rng(7).normal(size=shape).astype(kind)


def build(
    bias: np.ndarray, x: str = "N,5", kind: str = "float", body: str = "", y: str = "A,B", w: object = None
) -> Program:
    body = body or "a = MatMul(x, w) y = Add(a, b)"
    weight = draw(5, 4, kind={"float": np.float32, "double": np.float64, "float16": np.float16}[kind])
    weights = {"w": weight if w is None else w, "b": bias.astype(weight.dtype)}
    return program(f"g ({kind}[{x}] x) => ({kind}[{y}] y) {{ {body} }}", weights)


def feeds(*shape: int, kind: type = np.float32, batches: tuple[int, ...] = (1, 3, 0)) -> list[dict]:
    return [{"x": np.random.default_rng(n).normal(size=(n, *shape)).astype(kind)} for n in batches]


@pytest.mark.parametrize("shape", [(4,), (1, 4), (1,), (), (1, 1)])
def test_a_product_and_its_bias_become_one(shape: tuple[int, ...]) -> None:
    before = build(draw(*shape))
    full = [f for f in feeds(5) if len(f["x"])]
    assert ops(check(before, "fuse_gemm", full, 8)) == {"Gemm": 1}
    check(before, "fuse_gemm", feeds(5, batches=(0,)))


@pytest.mark.parametrize(("kind", "dtype"), [("double", np.float64), ("float16", np.float16)])
def test_in_other_types(kind: str, dtype: type) -> None:
    before = build(draw(4), kind=kind)
    assert ops(check(before, "fuse_gemm", feeds(5, kind=dtype, batches=(1, 3)), 8)) == {"Gemm": 1}


def test_a_bias_of_every_row_where_the_rows_are_known() -> None:
    before = build(draw(3, 4), x="3,5", y="3,4")
    assert ops(check(before, "fuse_gemm", feeds(5, batches=(3,)), 8)) == {"Gemm": 1}


def test_the_bias_may_stand_first() -> None:
    before = build(draw(4), body="a = MatMul(x, w) y = Add(b, a)")
    assert ops(check(before, "fuse_gemm", feeds(5, batches=(1, 3)), 8)) == {"Gemm": 1}


def test_shared_weights_stay_shared() -> None:
    body = "a = MatMul(x, w) c = Add(a, b) d = MatMul(x, w) e = Add(d, b) y = Mul(c, e)"
    after = check(build(draw(4), body=body), "fuse_gemm", feeds(5, batches=(1, 3)), 16)
    assert ops(after) == {"Gemm": 2, "Mul": 1}
    assert sorted(after.graph.initializers) == ["b", "w"]


@pytest.mark.parametrize(
    ("bias", "x", "y", "batches"),
    [
        (draw(3, 4), "N,5", "A,B", (1, 3)),
        (draw(3, 1), "N,5", "A,B", (1, 3)),
        (draw(2, 1, 4), "N,5", "A,B,C", (1, 3)),
        (draw(3, 4), "1,5", "A,B", (1,)),
        (draw(1, 1, 4), "N,5", "A,B,C", (1, 3)),
    ],
)
def test_a_bias_that_may_enlarge_the_product_stays(
    bias: np.ndarray, x: str, y: str, batches: tuple[int, ...]
) -> None:
    before = build(bias, x=x, y=y)
    assert ops(check(before, "fuse_gemm", feeds(5, batches=batches)))["Gemm"] == 0
    assert reasons(before, "fuse_gemm") == ["the bias may enlarge the product"]


def test_a_bias_wider_than_one_column_stays() -> None:
    before = build(draw(4), w=draw(5, 1))
    assert ops(check(before, "fuse_gemm", feeds(5)))["Gemm"] == 0
    assert reasons(before, "fuse_gemm") == ["the bias may enlarge the product"]


def test_other_ranks_stay() -> None:
    before = build(draw(4), x="N,2,5", y="A,B,C")
    assert ops(check(before, "fuse_gemm", feeds(2, 5)))["Gemm"] == 0
    assert reasons(before, "fuse_gemm") == ["its operands are not known to be matrices"]


def test_other_types_stay() -> None:
    weights = {"w": np.ones((5, 4), np.int32), "b": np.ones(4, np.int32)}
    text = "g (int32[N,5] x) => (int32[A,B] y) { a = MatMul(x, w) y = Add(a, b) }"
    before = program(text, weights)
    feed = {"x": np.arange(10, dtype=np.int32).reshape(2, 5)}
    assert ops(check(before, "fuse_gemm", [feed]))["Gemm"] == 0
    assert reasons(before, "fuse_gemm") == ["its type is none that the fold knows Gemm to take"]


@pytest.mark.parametrize(
    "body",
    [
        "a = MatMul(x, w) c = Add(a, b) d = Neg(a) y = Add(c, d)",
        "a = MatMul(x, w) y = Add(a, a)",
        "a = MatMul(x, w) y = Sub(a, b)",
        "r = Relu(x) k = MatMul(r, w) a = MatMul(x, w) y = Add(a, k)",
    ],
)
def test_near_misses_stay(body: str) -> None:
    assert ops(check(build(draw(4), body=body), "fuse_gemm", feeds(5)))["Gemm"] == 0


def test_a_product_that_is_an_output_stays() -> None:
    text = "g (float[N,5] x) => (float[A,B] y, float[C,D] a) { a = MatMul(x, w) y = Add(a, b) }"
    before = program(text, {"w": draw(5, 4), "b": draw(4)})
    assert ops(check(before, "fuse_gemm", feeds(5)))["Gemm"] == 0


def test_weights_that_callers_may_override_stay() -> None:
    text = "g (float[N,2] x, float[2] b = {1.0, 2.0}) => (float[A,B] y) { a = MatMul(x, w) y = Add(a, b) }"
    before = program(text, {"w": draw(2, 2)})
    assert ops(check(before, "fuse_gemm", []))["Gemm"] == 0
