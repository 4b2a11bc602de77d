"""Operators that only reshape, merged: held to execution."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from folding import check, ops, program, reasons, run

from lamina.ir.program import Program
from lamina.passes.fold.views import viewed_shape

I64 = np.int64


def build(body: str, x: str = "1,4,6", y: str = "", **weights: object) -> Program:
    return program(
        f"g (float[{x}] x) => (float[{y}] y) {{ {body} }}", {k: np.asarray(v) for k, v in weights.items()}
    )


def feed(*shape: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(3).normal(size=shape).astype(np.float32)}]


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("t = Transpose <perm=[1,0,2]> (a) b = Squeeze(t, s)", {"s": I64([1])}),
        ("t = Squeeze(a, z) b = Unsqueeze(t, one)", {"z": I64([0]), "one": I64([1])}),
        ("t = Transpose <perm=[2,1,0]> (r) b = Reshape(t, s)", {"s": I64([6, 4])}),
        ("t = Flatten(a) b = Unsqueeze(t, s)", {"s": I64([2])}),
        ("t = Reshape(a, s) b = Transpose <perm=[1,2,0,3]> (t)", {"s": I64([1, 4, 1, 6])}),
        ("t = Transpose(r) u = Unsqueeze(t, s) b = Transpose <perm=[1,3,0,2]> (u)", {"s": I64([0])}),
        ("t = Gather <axis=0> (a, i) b = Unsqueeze(t, z)", {"i": I64([[0]]), "z": I64([-1])}),
        ("t = Unsqueeze(a, z) b = Gather <axis=2> (t, i)", {"i": I64([[-1]]), "z": I64([2])}),
    ],
)
def test_two_become_one(body: str, weights: dict) -> None:
    shape = (1, 4, 6)
    if "(r)" in body:  # 24 numbers of which no two dims are larger than 1
        body, weights = f"r = Reshape(a, v) {body}", {**weights, "v": I64([1, 24, 1])}
    before = build(f"a = Exp(x) {body} y = Neg(b)", x="1,4,6", **weights)
    assert ops(check(before, "merge_views", feed(*shape))) == {"Exp": 1, "Reshape": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("t = Squeeze(a, z) b = Unsqueeze(t, z)", {"z": I64([0])}),
        ("t = Squeeze(a, z) u = Unsqueeze(t, one) b = Transpose <perm=[1,0,2]> (u)", {"one": I64([1])}),
        ("t = Transpose <perm=[1,0,2]> (a) b = Reshape(t, s)", {"s": I64([1, 4, 6])}),
        ("t = Transpose <perm=[1,0,2]> (a) u = Gather <axis=1> (t, i) b = Unsqueeze(u, z)", {"i": I64(0)}),
    ],
)
def test_what_undoes_itself_goes(body: str, weights: dict) -> None:
    before = build(f"a = Exp(x) {body} y = Neg(b)", **{"z": I64([0]), **weights})
    assert ops(check(before, "merge_views", feed(1, 4, 6))) == {"Exp": 1, "Neg": 1}


@pytest.mark.parametrize(
    "between", ["Sigmoid(t)", "Clip(t, low)", "Mul(t, two)", "Sub(two, t)", "Pow(t, two)"]
)
def test_elementwise_operators_may_lie_between(between: str) -> None:
    body = (
        f"a = Exp(x) t = Transpose <perm=[0,2,1]> (a) u = {between} v = Neg(u) b = Unsqueeze(v, z) y = Abs(b)"
    )
    before = build(body, x="1,1,6", z=I64([0]), low=np.float32(0.5), two=np.float32([2]))
    after = check(before, "merge_views", feed(1, 1, 6))
    assert sorted(ops(after)) == sorted(["Exp", between.partition("(")[0], "Neg", "Reshape", "Abs"])
    assert str(next(n for n in after.graph if n.op_type == "Neg").outputs[0].shape) == "[1,1,6]"


def test_nothing_is_left_around_an_elementwise_operator() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) u = Tanh(t) b = Squeeze(u, z) y = Neg(b)"
    before = build(body, x="N,4,M", z=I64([1]))
    assert ops(check(before, "merge_views", feed(2, 4, 3) + feed(0, 4, 3))) == {"Exp": 1, "Tanh": 1, "Neg": 1}


def test_a_gather_along_a_kept_axis_may_lie_between() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) g = Gather <axis=3> (t, i) u = Transpose <perm=[0,1,4,3,2,5]> (g)"
    before = build(
        f"{body} b = Reshape(u, s) y = Neg(b)", x="1,3,1,7", z=I64([2]), s=I64([1, -1, 7]), i=I64([[0]])
    )
    after = check(before, "merge_views", feed(1, 3, 1, 7))
    assert ops(after) == {"Exp": 1, "Reshape": 1, "Neg": 1}
    wide = "a = Exp(x) t = Unsqueeze(a, z) g = Gather <axis=-1> (t, i) b = Reshape(g, s) y = Neg(b)"
    before = build(
        wide,
        x="1,3,1,7",
        z=I64([2]),
        s=I64([1, 9, 5]),
        i=I64([[0, 1, 2, 3, 4], [1, 2, 3, 4, 5], [6, 5, 4, 3, -7]]),
    )
    after = check(before, "merge_views", feed(1, 3, 1, 7))
    assert ops(after) == {"Exp": 1, "Gather": 1, "Reshape": 1, "Neg": 1}


def test_a_gather_along_an_axis_that_is_split_stays_behind() -> None:
    body = "a = Exp(x) t = Reshape(a, s) g = Gather <axis=1> (t, i) b = Unsqueeze(g, z) y = Neg(b)"
    before = build(body, x="1,6", s=I64([1, 2, 3]), i=I64([1, 0]), z=I64([0]))
    assert ops(check(before, "merge_views", feed(1, 6))) == ops(before)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_unknown_dim(n: int) -> None:
    body = "a = Exp(x) t = Squeeze(a, z) u = Unsqueeze(t, i) b = Transpose <perm=[1,0,2]> (u) y = Neg(b)"
    before = build(body, x="N,1,6", z=I64([1]), i=I64([0]))
    assert ops(check(before, "merge_views", feed(n, 1, 6))) in (
        {"Exp": 1, "Neg": 1},
        {"Exp": 1, "Reshape": 1, "Neg": 1},
    )


@pytest.mark.parametrize("n", [0, 1, 5])
def test_two_unknown_dims_that_stay(n: int) -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) b = Squeeze(t, i) y = Neg(b)"
    before = build(body, x="N,M,1,6", z=I64([4]), i=I64([2]))
    after = check(before, "merge_views", feed(n, 3, 1, 6) + feed(2, 0, 1, 6))
    assert ops(after) == {"Exp": 1, "Reshape": 1, "Neg": 1}


def test_two_unknown_dims_that_move_are_left_alone() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) b = Squeeze(t, i) y = Neg(b)"
    before = build(body, x="1,N,M,6", z=I64([4]), i=I64([0]))
    assert ops(check(before, "merge_views", feed(1, 2, 3, 6) + feed(1, 0, 3, 6))) == ops(before)
    assert reasons(before, "merge_views") == ["no constant says the merged shape"]


def test_a_dim_of_zero_is_left_alone() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) b = Squeeze(t, i) y = Neg(b)"
    before = build(body, x="1,0,6", z=I64([3]), i=I64([0]))
    assert ops(check(before, "merge_views", feed(1, 0, 6))) == ops(before)


def test_a_transposition_of_larger_dims_is_no_view() -> None:
    body = "a = Exp(x) t = Transpose <perm=[0,2,1]> (a) b = Squeeze(t, z) y = Neg(b)"
    assert ops(check(build(body, z=I64([0])), "merge_views", feed(1, 4, 6)))["Transpose"] == 1
    unknown = build(body, x="1,N,M", z=I64([0]))
    assert ops(check(unknown, "merge_views", feed(1, 4, 6)))["Transpose"] == 1


def test_a_gather_of_one_slice_of_several_is_no_view() -> None:
    body = "a = Exp(x) t = Gather <axis=1> (a, i) b = Unsqueeze(t, z) y = Neg(b)"
    assert ops(check(build(body, i=I64(0), z=I64([1])), "merge_views", feed(1, 4, 6)))["Gather"] == 1


def test_a_value_read_elsewhere_stays_but_its_copy_goes() -> None:
    body = "a = Exp(x) t = Squeeze(a, z) b = Unsqueeze(t, {}) y = Sum(b, t)"
    before = build(body.format("i"), z=I64([0]), i=I64([1]))
    assert ops(check(before, "merge_views", feed(1, 4, 6))) == ops(before)
    assert reasons(before, "merge_views") == ["the value in between is read elsewhere"]
    before = build(body.format("z"), z=I64([0]))
    assert ops(check(before, "merge_views", feed(1, 4, 6))) == {"Exp": 1, "Squeeze": 1, "Sum": 1}


def test_a_value_in_between_that_is_an_output_stays() -> None:
    body = "a = Exp(x) t = Squeeze(a, z) u = Neg(t) y = Unsqueeze(u, i)"
    text = f"g (float[1,4,6] x) => (float[A,B,C] y, float[D,E] t) {{ {body} }}"
    before = program(text, {"z": I64([0]), "i": I64([1])})
    assert ops(check(before, "merge_views", feed(1, 4, 6))) == ops(before)


def test_between_two_interface_tensors_nothing_is_won() -> None:
    before = build("t = Squeeze(x, z) y = Unsqueeze(t, z)", y="A,B,C", z=I64([0]))
    assert ops(check(before, "merge_views", feed(1, 4, 6))) == ops(before)


def test_a_number_that_raises_the_rank_stays_between() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) u = Mul(t, two) b = Squeeze(u, z) y = Neg(b)"
    before = build(body, x="4,6", z=I64([0]), two=np.float32([[[2]]]))
    assert ops(check(before, "merge_views", feed(4, 6))) == ops(before)


def test_a_vector_is_no_number() -> None:
    body = "a = Exp(x) t = Unsqueeze(a, z) u = Mul(t, two) b = Squeeze(u, z) y = Neg(b)"
    before = build(body, x="4,6", z=I64([0]), two=np.arange(6, dtype=np.float32))
    assert ops(check(before, "merge_views", feed(4, 6))) == ops(before)


def test_axes_that_callers_may_override_still_count() -> None:
    text = """g (float[1,4] x, int64[1] i = {0}) => (float[] y)
        { t = Squeeze(x, z) u = Unsqueeze(t, i) v = Neg(u) w = Squeeze(v, i) y = Abs(w) }"""
    before = program(text, {"z": I64([0])})
    check(before, "merge_views", [{**feed(1, 4)[0], "i": I64([n])} for n in (0, 1)])


def test_subgraphs_keep_what_they_read() -> None:
    body = (
        "a = Exp(x) t = Squeeze(a, z) u = Neg(t) b = Unsqueeze(u, i) s = ReduceSum <keepdims=0> (x) "
        "c = Greater(s, nil) y = If (c) <then_branch = g1 () => (float[A,B] p) { p = Abs(t) }, "
        "else_branch = g2 () => (float[C,D] q) { q = Abs(u) }> w = Squeeze(b, i) v = Unsqueeze(w, z)"
    )
    before = build(body, z=I64([0]), i=I64([1]), nil=np.float32(0))
    for inner in before.graph.all_nodes():
        inner.name = inner.name or f"node_{inner.outputs[0].name}"
    check(before, "merge_views", [feed(1, 4, 6)[0], {"x": -np.abs(feed(1, 4, 6)[0]["x"])}])


def test_heads_stay_for_the_fusion_that_looks_for_them() -> None:
    body = "a = Exp(x) r = Reshape(a, s) b = Transpose <perm=[0,2,1,3]> (r) y = Neg(b)"
    before = build(body, x="1,1,6", s=I64([1, 1, 3, 2]))
    assert ops(check(before, "merge_views", feed(1, 1, 6))) == ops(before)
    assert reasons(before, "merge_views") == ["it lays out attention heads"]
    keys = "a = Exp(x) r = Unsqueeze(a, s) k = Transpose <perm=[0,1,3,2]> (r) y = MatMul(r, k)"
    before = build(keys, x="1,1,6", s=I64([1]))
    assert ops(check(before, "merge_views", feed(1, 1, 6))) == ops(before)


def test_what_an_output_declares_is_not_believed() -> None:
    text = "g (float[1,4,6] x) => (float[] y) { t = Squeeze(x, z) u = Neg(t) y = Reshape(u, s) }"
    before = program(text, {"z": I64([0]), "s": I64([3, 8])})
    before.graph.outputs[0].shape = ir.Shape([6, 4])
    after = check(before, "merge_views", feed(1, 4, 6))
    assert ops(after) == {"Neg": 1, "Reshape": 1}


VIEWS = [
    ("Transpose <perm=[1,0,2]> (a)", {}),
    ("Transpose(a)", {}),
    ("Flatten(a)", {}),
    ("Flatten <axis=-1> (a)", {}),
    ("Flatten <axis=0> (a)", {}),
    ("Gather <axis=-3> (a, s)", {"s": I64([[0]])}),
    ("Gather <axis=0> (a, s)", {"s": I64(0)}),
    ("Reshape(a, s)", {"s": I64([0, 2, -1])}),
    ("Reshape(a, s)", {"s": I64([3, 0])}),
    ("Reshape <allowzero=1> (a, s)", {"s": I64([4, -1])}),
    ("Squeeze(a, s)", {"s": I64([-3])}),
    ("Squeeze(a)", {}),
    ("Unsqueeze(a, s)", {"s": I64([-1, 0])}),
]


@pytest.mark.parametrize(("view", "weights"), VIEWS)
def test_the_shape_of_a_view(view: str, weights: dict) -> None:
    text = f"g (float[1,4,3] x) => (float[] y) {{ a = Neg(x) y = {view} }}"
    before = program(text, weights)
    node = next(n for n in before.graph if n.outputs[0].name == "y")
    shape = viewed_shape(node)
    assert shape is None or tuple(shape) == run(before, feed(1, 4, 3)[0])[0].shape
    assert (shape is None) == (view == "Squeeze(a)")
