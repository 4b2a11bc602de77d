"""The last bias of a branch moved into the normalization before it, and where that cannot be done."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program, reasons

NAME = "absorb_residual_bias"
WIDTH, INNER = 6, 10

MLP = """
    n = LayerNormalization <axis = -1> (x, g, h)
    m1 = MatMul (n, w1) a1 = Add (m1, b1) r = Relu (a1)
    m2 = MatMul (r, w2) a2 = Add (m2, b2) s = Add (n, a2)
    y = LayerNormalization <axis = -1> (s, g, h)
"""


def model(body: str = MLP, outputs: str = "", *, large: float = 1.0):
    rng = np.random.default_rng(4)
    shapes = {"g": WIDTH, "h": WIDTH, "b1": INNER, "b2": WIDTH, "b3": WIDTH}
    weights = {name: rng.standard_normal(size) for name, size in shapes.items()}
    weights["b2"] = weights["b2"] * large / np.abs(weights["b2"]).max() * np.abs(weights["g"]).max()
    weights |= {"w1": rng.standard_normal((WIDTH, INNER)), "w2": rng.standard_normal((INNER, WIDTH))}
    weights |= {"w3": rng.standard_normal((WIDTH, WIDTH)), "row": rng.standard_normal((3, WIDTH))}
    words = body.replace(",", " ").replace("(", " ").replace(")", " ").split()
    used = {k: v.astype(np.float32) for k, v in weights.items() if k in words}
    return program(f"t (float[b, 3, {WIDTH}] x) => (float[b, 3, {WIDTH}] y{outputs}) {{ {body} }}", used)


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((b, 3, WIDTH)).astype(np.float32)} for b in (1, 4)]


def test_the_bias_behind_an_mlp_goes() -> None:
    after = check(model(), NAME, feeds(), limit=64)
    assert ops(after)["Add"] == 2  # b1 and the residual sum
    total = next(n for n in after.graph if n.name == "node_s")
    assert {v.producer().op_type for v in total.inputs} == {"LayerNormalization", "MatMul"}


def test_a_normalization_without_bias_gets_one() -> None:
    first, rest = MLP.split("m1 =", 1)
    after = check(model(first.replace(", h)", ")") + "m1 =" + rest), NAME, feeds(), limit=64)
    assert ops(after)["Add"] == 2


def test_a_gemm_and_several_readers_take_it_back() -> None:
    body = MLP.replace("s = Add (n, a2)", "s = Sum (a2, n)").replace(
        "r = Relu (a1)", "r = Relu (a1) m3 = MatMul (n, w3) a3 = Add (m3, b3) z = Tanh (a3)"
    )
    after = check(model(body, f", float[b, 3, {WIDTH}] z"), NAME, feeds(), limit=64)
    assert ops(after)["Add"] == 2
    flat = "float[b, 6] x) => (float[b, 6] y"
    gemm = MLP.replace(
        "m1 = MatMul (n, w1) a1 = Add (m1, b1)", "a1 = Gemm <alpha = 0.5, beta = 2.0> (n, w1, b1)"
    )
    before = model(gemm)
    shaped = program(
        f"t ({flat}) {{ {gemm} }}",
        {k: v.const_value.numpy() for k, v in before.graph.initializers.items()},
    )
    rows = [{"x": f["x"].reshape(-1, WIDTH)} for f in feeds()]
    after = check(shaped, NAME, rows, limit=64)
    assert ops(after) == {"LayerNormalization": 2, "Gemm": 1, "Relu": 1, "MatMul": 1, "Add": 1}


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        (MLP, f", float[b, 3, {WIDTH}] n", "the interface shows 'n'"),
        (
            MLP.replace("a1 = Add (m1, b1) r = Relu (a1)", "r = Relu (m1)"),
            "",
            "has no bias to take it back in",
        ),
        (MLP.replace("m1 = MatMul (n, w1)", "q = Abs (n) m1 = MatMul (q, w1)"), "", "is not linear"),
        (MLP.replace("a2 = Add (m2, b2)", "a2 = Add (m2, row)"), "", None),  # another bias a row
        (MLP.replace("s = Add (n, a2)", "s = Add (n, a2) z = Relu (a2)"), f", float[b, 3, {WIDTH}] z", None),
        (MLP.replace("s = Add (n, a2)", "s = Mul (n, a2)"), "", None),
    ],
)
def test_what_is_left_alone(body: str, outputs: str, reason: str | None) -> None:
    before = model(body, outputs)
    after = check(before, NAME, feeds())
    assert ops(after) == ops(before)
    found = reasons(before, NAME)
    assert found == [] if reason is None else any(reason in r for r in found)


def test_a_bias_that_would_cost_digits_stays() -> None:
    assert reasons(model(large=2.5), NAME) == ["the bias is large beside what the normalization gives"]
    check(model(large=1.9), NAME, feeds(), limit=64)
