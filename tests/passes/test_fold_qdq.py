"""MergeQdq and cleanup: conversions merge by content, round trips vanish, implied activations go."""

from __future__ import annotations

import re

import numpy as np
import pytest
from folding import check, ops, program, run

from lamina.passes.fold import cleanup

U8, I8, F = np.uint8, np.int8, np.float32


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"x": rng.normal(0, 3, (n, 6)).astype(np.float32)} for n in (1, 4)]


def graph(body: str, **weights: object) -> object:
    return program(
        f"g (float[N,6] x) => (float[N,6] y) {{ {body} }}",
        {k: np.asarray(v) for k, v in weights.items()},
        opset=21,
    )


def test_equal_content_merges_different_initializers() -> None:
    before = graph(
        "a = QuantizeLinear(x, s1, z1) b = DequantizeLinear(a, s1, z1)"
        " c = QuantizeLinear(x, s2, z2) d = DequantizeLinear(c, s2, z2) y = Add(b, d)",
        **{"s1": F(0.05), "z1": U8(7), "s2": F(0.05), "z2": U8(7)},
    )
    after = check(before, "merge_qdq", feeds())
    assert ops(after) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Add": 1}
    assert {n.name for n in after.graph} == {"node_a", "node_b", "node_y"}


@pytest.mark.parametrize(
    "other", [{"s2": F(0.06), "z2": U8(7)}, {"s2": F(0.05), "z2": U8(8)}, {"s2": F(0.05), "z2": I8(7)}]
)
def test_other_parameters_do_not_merge(other: dict[str, object]) -> None:
    before = graph(
        "a = QuantizeLinear(x, s1, z1) b = DequantizeLinear(a, s1, z1)"
        " c = QuantizeLinear(x, s2, z2) d = DequantizeLinear(c, s2, z2) y = Add(b, d)",
        **{"s1": F(0.05), "z1": U8(7), **other},
    )
    assert ops(check(before, "merge_qdq", feeds()))["QuantizeLinear"] == 2


def test_other_axis_does_not_merge() -> None:
    weights = {"s": np.linspace(0.05, 0.1, 6, dtype=F), "z": np.zeros(6, U8)}
    body = (
        "a = QuantizeLinear <axis=1> (x, s, z) b = DequantizeLinear <axis=1> (a, s, z)"
        " t = Transpose <perm=[1, 0]> (x) c = QuantizeLinear <axis=0> (t, s, z)"
        " d = DequantizeLinear <axis=0> (c, s, z) u = Transpose <perm=[1, 0]> (d) y = Add(b, u)"
    )
    assert ops(check(graph(body, **weights), "merge_qdq", feeds()))["QuantizeLinear"] == 2


def test_dynamic_quantization_merges_with_all_outputs() -> None:
    before = graph(
        "a, s, z = DynamicQuantizeLinear(x) b = DequantizeLinear(a, s, z)"
        " c, t, w = DynamicQuantizeLinear(x) d = DequantizeLinear(c, t, w) y = Add(b, d)"
    )
    assert ops(check(before, "merge_qdq", feeds())) == {
        "DynamicQuantizeLinear": 1,
        "DequantizeLinear": 1,
        "Add": 1,
    }


def test_round_trip_vanishes() -> None:
    before = graph(
        "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)"
        " c = QuantizeLinear(b, s2, z2) y = DequantizeLinear(c, s2, z2)",
        **{"s": F(0.031), "z": I8(-5), "s2": F(0.031), "z2": I8(-5)},
    )
    assert ops(check(before, "merge_qdq", feeds())) == {"QuantizeLinear": 1, "DequantizeLinear": 1}


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16])
def test_round_trip_is_exact_for_every_integer(dtype: type[np.integer]) -> None:
    limits = np.iinfo(dtype)
    every = np.arange(limits.min, limits.max + 1).astype(dtype)
    for scale, zero in ((F(0.0123), 3), (F(1 / 3), limits.min), (F(7.7e-5), limits.max)):
        text = "g (TYPE[N] q) => (TYPE[N] y) { a = DequantizeLinear(q, s, z) b = QuantizeLinear(a, s, z)"
        text = f"{text} y = Identity(b) }}".replace("TYPE", np.dtype(dtype).name)
        before = program(text, {"s": scale, "z": dtype(zero)}, 21)
        after = check(before, "merge_qdq", [{"q": every}])
        assert ops(after) == {"Identity": 1}


def test_round_trip_with_other_parameters_stays() -> None:
    before = graph(
        "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)"
        " c = QuantizeLinear(b, s2, z) y = DequantizeLinear(c, s2, z)",
        **{"s": F(0.03), "z": U8(5), "s2": F(0.04)},
    )
    assert ops(check(before, "merge_qdq", feeds()))["QuantizeLinear"] == 2


@pytest.mark.parametrize(("zero", "kept"), [(U8(0), 0), (U8(1), 1), (I8(-128), 0), (I8(0), 1)])
def test_relu_goes_where_the_range_starts_at_zero(zero: np.integer, kept: int) -> None:
    before = graph(
        "n = Neg(x) r = Relu(n) a = QuantizeLinear(r, s, z) y = DequantizeLinear(a, s, z)", s=F(0.05), z=zero
    )
    assert ops(check(before, "merge_qdq", feeds()))["Relu"] == kept


@pytest.mark.parametrize(("top", "kept"), [(6.0, 0), (5.0, 1), (6.5, 0)])
def test_clip_goes_where_the_range_ends_below_it(top: float, kept: int) -> None:
    before = graph(
        "n = Neg(x) r = Clip(n, low, high) a = QuantizeLinear(r, s, z) y = DequantizeLinear(a, s, z)",
        **{"low": F(0), "high": F(top), "s": F(6 / 255), "z": U8(0)},
    )
    assert ops(check(before, "merge_qdq", feeds()))["Clip"] == kept


def test_relu_read_elsewhere_stays() -> None:
    before = graph(
        "r = Relu(x) a = QuantizeLinear(r, s, z) b = DequantizeLinear(a, s, z) y = Add(b, r)",
        s=F(0.05),
        z=U8(0),
    )
    assert ops(check(before, "merge_qdq", feeds()))["Relu"] == 1


def test_per_channel_relu_needs_every_channel_at_the_bottom() -> None:
    scales = np.linspace(0.02, 0.05, 6, dtype=F)
    body = "r = Relu(x) a = QuantizeLinear <axis=1> (r, s, z) y = DequantizeLinear <axis=1> (a, s, z)"
    points = np.zeros(6, U8)
    assert ops(check(graph(body, s=scales, z=points), "merge_qdq", feeds()))["Relu"] == 0
    points[3] = 2
    assert ops(check(graph(body, s=scales, z=points), "merge_qdq", feeds()))["Relu"] == 1


def test_relu_between_interface_tensors_keeps_both_names() -> None:
    text = "g (float[N,6] x) => (float[N,6] y, float[N,6] r) { r = Relu(x) y = Relu(r) }"
    after = check(program(text), "drop_redundant_relu", feeds())
    assert ops(after) == {"Relu": 2}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("a = Relu(x) y = Relu(a)", 1),
        ("a = Sigmoid(x) y = Relu(a)", 0),
        ("a = Clip(x, zero) y = Relu(a)", 0),
        ("a = Clip(x, minus) y = Relu(a)", 1),
        ("a = Relu(x) b = Sigmoid(x) c = Add(a, b) y = Relu(c)", 1),
        ("a = Relu(x) c = Add(a, x) y = Relu(c)", 2),
        ("a = Relu(x) t = Transpose <perm=[1, 0]> (a) u = Transpose <perm=[1, 0]> (t) y = Relu(u)", 1),
        ("y = Relu(x)", 1),
        ("a = Relu(x) b = Sub(a, x) y = Relu(b)", 2),
        ("a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) y = Relu(b)", 0),
        ("a = QuantizeLinear(x, s, z5) b = DequantizeLinear(a, s, z5) y = Relu(b)", 1),
    ],
)
def test_relu_of_what_cannot_be_negative_goes(body: str, left: int) -> None:
    weights = {"zero": F(0), "minus": F(-1), "s": F(0.1), "z": U8(0), "z5": U8(5)}
    before = graph(body, **{k: v for k, v in weights.items() if re.search(rf"\b{k}\b", body)})
    assert ops(check(before, "drop_redundant_relu", feeds()))["Relu"] == left


def test_cleanup_removes_everything_sites_leave() -> None:
    before = graph(
        "r = Relu(x) a = QuantizeLinear(r, s1, z1) b = DequantizeLinear(a, s1, z1)"
        " c = QuantizeLinear(r, s2, z2) d = DequantizeLinear(c, s2, z2) e = Add(b, d) y = Relu(e) u = Neg(x)",
        **{"s1": F(0.05), "z1": U8(0), "s2": F(0.05), "z2": U8(0), "dead": F([1, 2, 3])},
    )
    after = cleanup(before)
    assert ops(after) == {"QuantizeLinear": 1, "DequantizeLinear": 1, "Add": 1}
    assert set(after.graph.initializers) == {"s1", "z1"}
    for feed in feeds():
        assert np.array_equal(run(after, feed)[0], run(before, feed)[0])
