"""SplitResidualSum: the residual Add before a normalization, bit for bit."""

from __future__ import annotations

import numpy as np
from folding import check, ops, program, reasons


def residual(body: str, shape: str = "N,5,8") -> object:
    rng = np.random.default_rng(0)
    weights = {
        k: rng.normal(size=8).astype(np.float32)
        for k in ("w", "b", "bias")
        if f"{k})" in body or f"{k}," in body
    }
    return program(f"g (float[{shape}] x, float[{shape}] r) => (float[{shape}] z) {{ {body} }}", weights)


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{k: rng.normal(size=(n, 5, 8)).astype(np.float32) for k in "xr"} for n in (1, 3)]


def test_residual_add_becomes_sum_bit_for_bit() -> None:
    before = residual("y = Add(x, r) z = LayerNormalization <axis=-1> (y, w, b)")
    after = check(before, "split_residual_sum", feeds())
    assert ops(after) == {"Sum": 1, "LayerNormalization": 1}
    node = next(iter(after.graph))
    assert (node.name, node.outputs[0].name) == ("node_y", "y")


def test_sum_read_by_more_than_the_normalization_still_fires() -> None:
    before = residual("y = Add(x, r) n = LayerNormalization <axis=-1> (y, w, b) z = Add(n, y)")
    assert ops(check(before, "split_residual_sum", feeds())) == {"Sum": 1, "LayerNormalization": 1, "Add": 1}


def test_bias_is_refused() -> None:
    before = residual("a = Mul(x, r) y = Add(a, bias) z = LayerNormalization <axis=-1> (y, w, b)")
    assert reasons(before, "split_residual_sum") == ["one operand is a constant: a bias, not a residual"]
    assert ops(check(before, "split_residual_sum", feeds()))["Sum"] == 0


def test_add_elsewhere_is_left_alone() -> None:
    before = residual("y = Add(x, r) z = Relu(y)")
    assert reasons(before, "split_residual_sum") == []
    assert ops(check(before, "split_residual_sum", feeds())) == {"Add": 1, "Relu": 1}


def test_double_is_refused() -> None:
    body = "y = Add(x, r) z = LayerNormalization <axis=-1> (y, w)"
    before = program(
        f"g (double[N,5,8] x, double[N,5,8] r) => (double[N,5,8] z) {{ {body} }}",
        {"w": np.ones(8, np.float64)},
    )
    assert reasons(before, "split_residual_sum") == ["it is not known to be float32"]
