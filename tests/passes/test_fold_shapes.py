"""Shape arithmetic: what is certain becomes constant, what is dynamic stays so, held to execution."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program

from lamina.ir.program import Program
from lamina.passes.fold.shape_values import Dim, ShapeValues

I64 = np.int64


def build(
    body: str, x: str = "N,T,64", y: str = "A,B,C,D", dtype: str = "float", **weights: object
) -> tuple[Program, list[dict[str, np.ndarray]]]:
    arrays = {k: np.asarray(v, I64) for k, v in weights.items()}
    before = program(f"g (float[{x}] x) => ({dtype}[{y}] y) {{ {body} }}", arrays)
    feeds = []
    for free in ((1, 1), (2, 5), (0, 3)):
        sizes = iter(free)
        shape = [int(d) if d.isdigit() else next(sizes) for d in x.split(",")]
        feeds.append({"x": np.random.default_rng(0).normal(size=shape).astype(np.float32)})
    return before, feeds


SPLIT = (
    "s = Shape(x) n = Gather(s, i0) t = Gather(s, i1) n1 = Unsqueeze(n, i0v) t1 = Unsqueeze(t, i0v)"
    " k = Concat <axis=0> (n1, t1, h, d) y = Reshape(x, k)"
)
INDEX = {"i0": 0, "i1": 1, "i0v": [0]}


def test_splitting_heads_copies_the_dynamic_dims() -> None:
    before, feeds = build(SPLIT, h=[8], d=[8], **INDEX)
    after = check(before, "fold_shapes", feeds)
    assert ops(after) == {"Reshape": 1}
    target = next(iter(after.graph)).inputs[1]
    assert target.const_value.numpy().tolist() == [0, 0, 8, 8]


def test_zeros_that_mean_zero_become_zeros_that_copy() -> None:
    before, feeds = build(SPLIT.replace("Reshape(", "Reshape <allowzero=1> ("), h=[8], d=[8], **INDEX)
    assert ops(check(before, "fold_shapes", feeds)) == {"Reshape": 1}
    body = SPLIT.replace("Reshape(", "Reshape <allowzero=1> (")
    before, _ = build(body, x="N,T,0", h=[0], d=[8], **INDEX)
    feeds = [{"x": np.ones((2, 3, 0), np.float32)}]
    after = check(before, "fold_shapes", feeds)
    assert ops(after)["Concat"] == 1


def test_a_last_entry_that_is_inferred_stays_inferred() -> None:
    before, feeds = build(SPLIT, h=[8], d=[-1], **INDEX)
    feeds = feeds[:2]  # the original cannot infer -1 for an empty batch either
    after = check(before, "fold_shapes", feeds)
    assert next(iter(after.graph)).inputs[1].const_value.numpy().tolist() == [0, 0, 8, -1]


def test_one_dynamic_product_is_inferred_beside_numbers() -> None:
    body = (
        "s = Shape <end=2> (x) m = ReduceProd <keepdims=1> (s) k = Concat <axis=0> (m, d) y = Reshape(x, k)"
    )
    before, feeds = build(body, y="A,B", d=[64])
    after = check(before, "fold_shapes", feeds)
    assert ops(after) == {"Reshape": 1}
    assert next(iter(after.graph)).inputs[1].const_value.numpy().tolist() == [-1, 64]


@pytest.mark.parametrize(
    ("body", "y"),
    [
        # dims in other places: neither copied nor the only one
        ("s = Shape(x) k = Gather(s, order) y = Reshape(x, k)", "A,B,C"),
        # a product of dims beside a copied one
        (
            "s = Shape(x) n = Slice(s, a0, a1) m = Slice(s, a1, a3) p = ReduceProd <keepdims=1> (m)"
            " k = Concat <axis=0> (n, p) y = Reshape(x, k)",
            "A,B",
        ),
    ],
)
def test_what_cannot_be_shown_stays_dynamic(body: str, y: str) -> None:
    weights = {"order": [1, 0, 2], "a0": [0], "a1": [1], "a3": [3]}
    used = {k: v for k, v in weights.items() if f" {k}" in body}
    x = "N,T,64" if "order" in body else "N,T,U"
    before = program(
        f"g (float[{x}] x) => (float[{y}] y) {{ {body} }}", {k: np.array(v) for k, v in used.items()}
    )
    feeds = [{"x": np.ones((2, 3, 64), np.float32)}]
    if "order" not in body:  # where -1 beside the copied batch would fail
        feeds.append({"x": np.zeros((0, 3, 64), np.float32)})
    after = check(before, "fold_shapes", feeds)
    assert ops(after)["Shape"] == 1


def test_equal_symbols_of_another_value_are_copied_made_up_ones_are_not() -> None:
    body = "r = Relu(x) s = Shape <end=2> (x) k = Concat <axis=0> (s, h, d) y = Reshape(r, k)"
    before, feeds = build(body, h=[8], d=[8])
    assert ops(check(before, "fold_shapes", feeds)) == {"Relu": 1, "Reshape": 1}
    text = (
        "g (float[N,4] x, float[M,4] z) => (float[A,B,C] y)"
        " { s = Shape <end=1> (z) k = Concat <axis=0> (s, q) y = Reshape(x, k) }"
    )
    before = program(text, {"q": np.array([2, -1])})
    feed = {"x": np.ones((6, 4), np.float32), "z": np.ones((3, 4), np.float32)}
    assert ops(check(before, "fold_shapes", [feed]))["Shape"] == 1


def test_an_expand_to_the_dims_that_are_there() -> None:
    body = "s = Shape(x) n = Gather(s, i) k = Concat <axis=0> (one, n) y = Expand(x, k)"
    before, feeds = build(body, x="N,1,64", y="A,B,C,D", i=[0, 1, 2], one=[3])
    feeds = [{"x": np.ones((n, 1, 64), np.float32)} for n in (1, 4)]
    after = check(before, "fold_shapes", feeds)
    assert next(iter(after.graph)).inputs[1].const_value.numpy().tolist() == [3, 1, 1, 64]


@pytest.mark.parametrize(
    ("body", "value"),
    [
        ("s = Shape(x) y = Gather(s, i)", 64),
        ("s = Shape <start=-1> (x) y = Squeeze(s, zero)", 64),
        ("s = Shape(x) g = Gather(s, i) y = Mul(g, four)", 256),
        ("s = Shape(x) g = Gather(s, i) y = Div(g, four)", 16),
        ("s = Shape(x) g = Gather(s, i) h = Sub(g, four) y = Max(h, four)", 60),
        ("s = Shape(x) t = Slice(s, two, big) m = Mul(t, four) y = ReduceProd <keepdims=0> (m)", 256),
        (
            "s = Shape(x) t = Slice(s, two, big) c = Cast <to=6> (t) e = Cast <to=7> (c)"
            " y = Squeeze(e, zero)",
            64,
        ),
        ("s = Shape(x) e = Equal(s, minus) g = Gather(s, i) w = Where(e, four, g) y = Gather(w, i)", 64),
    ],
)
def test_certain_numbers_reach_what_reads_them(body: str, value: int) -> None:
    weights = {"i": 2, "zero": [0], "four": 4, "two": [2], "big": [2**62], "minus": -1}
    used = {k: np.array(v, I64) for k, v in weights.items() if f" {k})" in body or f" {k}," in body}
    text = f"g (float[N,T,64] x) => (int64 o) {{ {body} o = Neg(y) }}"
    before = program(text, used)
    after = check(before, "fold_shapes", [{"x": np.ones((2, 3, 64), np.float32)}])
    assert ops(after) == {"Neg": 1}
    assert next(iter(after.graph)).inputs[0].const_value.numpy().tolist() == value


def test_static_shapes_fold_whole() -> None:
    body = "s = Shape(x) z = Size(x) u = Unsqueeze(z, zero) c = Concat <axis=0> (u, s) y = Neg(c)"
    before, _ = build(body, x="2,3,4", y="E", dtype="int64", zero=[0])
    after = check(before, "fold_shapes", [{"x": np.ones((2, 3, 4), np.float32)}])
    assert ops(after) == {"Neg": 1}


def test_interface_values_and_negative_divisions_stay() -> None:
    before, _ = build("y = Shape(x)", x="2,3,4", y="E", dtype="int64")
    assert ops(check(before, "fold_shapes", [{"x": np.ones((2, 3, 4), np.float32)}])) == {"Shape": 1}
    body = "s = Shape(x) m = Neg(s) d = Div(m, two) y = Neg(d)"
    before, _ = build(body, x="3,3,5", y="E", dtype="int64", two=2)
    after = check(before, "fold_shapes", [{"x": np.ones((3, 3, 5), np.float32)}])
    assert ops(after)["Div"] == 1


def test_int32_that_would_wrap_stays() -> None:
    body = "s = Shape(x) c = Cast <to=6> (s) m = Mul(c, big) y = Neg(m)"
    text = f"g (float[3,4] x) => (int32[2] y) {{ {body} }}"
    before = program(text, {"big": np.int32(2**30)})
    after = check(before, "fold_shapes", [{"x": np.ones((3, 4), np.float32)}])
    assert ops(after)["Mul"] == 1


def test_a_subgraph_reads_the_constant() -> None:
    body = (
        "s = Shape(x) n = Gather(s, i) r = ReduceSum <keepdims=0> (x) z = Cast <to=9> (r)"
        " y = If (z) <then_branch = t () => (int64 p) { p = Identity(n) },"
        " else_branch = e () => (int64 q) { q = Neg(n) }>"
    )
    before = program(f"g (float[N,4] x) => (int64 y) {{ {body} }}", {"i": np.array(1)})
    for i, node in enumerate(before.graph.all_nodes()):
        node.name = f"node_{i}"
    feeds = [{"x": np.full((2, 4), v, np.float32)} for v in (0, 1)]
    after = check(before, "fold_shapes", feeds)
    assert ops(after)["Shape"] == 0


def test_a_dim_is_known_by_where_it_comes_from() -> None:
    before, _ = build("s = Shape(x) y = Neg(s)", y="E", dtype="int64")
    values, x = ShapeValues(), before.graph.inputs[0]
    known = values.visit(next(iter(before.graph)))
    assert known is not None
    first = known.entries[0]
    assert isinstance(first, Dim)
    assert first.is_dim_of(x, 0)
    assert not first.is_dim_of(x, 1)
    assert known.entries[2] == 64
    assert known.numbers() is None
