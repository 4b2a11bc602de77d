"""Sorted channels: the function stays, weights that are summed over lie by size, what is not proven stays."""

from __future__ import annotations

import numpy as np
import pytest
from encoders import F, build, encoder, ids
from folding import program, reasons, run

from lamina.ir.program import Program
from lamina.passes.fold import fold

NAME = "sort_channels"
T, H, D, WIDTH = 6, 2, 8, 12


def sorted_channels(before: Program, feeds: list[dict[str, np.ndarray]]) -> Program:
    after, names, records = fold(before, forms=[NAME], only=())
    assert not [r for r in records if r.why.startswith("undone")]
    assert NAME in names
    for feed in feeds:
        for want, got in zip(run(before, feed), run(after, feed), strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert fold(after, forms=[NAME], only=())[1] == ()
    return after


def weight(target: Program, output: str) -> np.ndarray:
    node = next(n for n in target.graph if n.outputs[0].name == output)
    return np.asarray(node.inputs[1].const_value.numpy())


def falls(sizes: np.ndarray) -> bool:
    return bool((np.diff(sizes) <= 1e-6 * sizes.max()).all())


@pytest.mark.parametrize(
    ("depth", "width", "seed"), [(0, 8, 0), (1, 3, 1), (2, 16, 2), (3, 33, 3), (5, 64, 4)]
)
def test_encoders_are_sorted_and_keep_their_function(depth: int, width: int, seed: int) -> None:
    before = build(*encoder(depth, width, seed))
    after = sorted_channels(before, ids((1, 5), (3, 1), (2, 16)))
    for i in range(depth):
        assert falls(np.linalg.norm(weight(after, f"down{i}_m"), axis=1))
        assert not falls(np.linalg.norm(weight(before, f"down{i}_m"), axis=1))
    readers = [f"{p}{i}_m" for i in range(depth) for p in ("q", "k", "v", "up")]
    stream = np.concatenate([weight(after, name) for name in [*readers, "logits_m"]], axis=1)
    assert falls(np.linalg.norm(stream, axis=1))


def attention(rotary: bool) -> Program:
    """Attention of two heads, queries and keys turned by a rotary embedding of half-split pairs or not."""
    rng = np.random.default_rng(4)
    weights = {name: rng.normal(size=(WIDTH, H * D)).astype(F) for name in ("wq", "wk", "wv")}
    weights |= {"wo": rng.normal(size=(H * D, WIDTH)).astype(F)}
    weights |= {"split": np.array([0, 0, H, D]), "join": np.array([0, 0, H * D])}
    text = [
        f"{p}m = MatMul(x, w{p}) {p}r = Reshape({p}m, split) {p} = Transpose <perm=[0, 2, 1, 3]> ({p}r)"
        for p in "qkv"
    ]
    q, k = "q", "k"
    if rotary:
        angle = rng.uniform(0, 6, (T, D // 2))
        weights |= {"c": np.cos(angle).astype(F), "s": np.sin(angle).astype(F), "ax": np.array([3])}
        weights |= {"lo": np.array([0]), "mid": np.array([D // 2]), "hi": np.array([D])}
        text += [_turned(p) for p in "qk"]
        q, k = "qy", "ky"
    text.append(f"kt = Transpose <perm=[0, 1, 3, 2]> ({k}) scores = MatMul({q}, kt)")
    text.append("p = Softmax <axis=-1> (scores) h = MatMul(p, v) ht = Transpose <perm=[0, 2, 1, 3]> (h)")
    text.append("hj = Reshape(ht, join) y = MatMul(hj, wo)")
    outputs = f"float[N,{T},{WIDTH}] y, float[N,{H},{T},{T}] scores"
    return program(f"g (float[N,{T},{WIDTH}] x) => ({outputs}) {{ {' '.join(text)} }}", weights)


def _turned(p: str) -> str:
    halves = f"{p}a = Slice({p}, lo, mid, ax) {p}b = Slice({p}, mid, hi, ax)"
    products = f"{p}1 = Mul({p}a, c) {p}2 = Mul({p}b, s) {p}3 = Mul({p}a, s) {p}4 = Mul({p}b, c)"
    return (
        f"{halves} {products} {p}5 = Sub({p}1, {p}2) {p}6 = Add({p}3, {p}4)"
        f" {p}y = Concat <axis=-1> ({p}5, {p}6)"
    )


def tokens() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).normal(size=(n, T, WIDTH)).astype(F)} for n in (1, 3)]


def test_queries_and_keys_move_together_inside_heads() -> None:
    before = attention(rotary=False)
    after = sorted_channels(before, tokens())
    q, k = (weight(after, name).reshape(WIDTH, H, D) for name in ("qm", "km"))
    assert falls(np.square(q).sum((0, 1)) + np.square(k).sum((0, 1)))


def test_rotary_pairs_move_together_with_their_angles() -> None:
    before = attention(rotary=True)
    after = sorted_channels(before, tokens())
    q, k = (weight(after, name).reshape(WIDTH, H, 2, D // 2) for name in ("qm", "km"))
    assert falls(np.square(q).sum((0, 1, 2)) + np.square(k).sum((0, 1, 2)))
    old, new = (weight(p, "q1") for p in (before, after))
    assert not np.array_equal(old, new)
    assert {c.tobytes() for c in old.T} == {c.tobytes() for c in new.T}


def test_what_the_interface_shows_stays() -> None:
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(6, 8)).astype(F), "b": rng.normal(size=(8, 4)).astype(F)}
    text = (
        "g (float[N,6] x) => (float[N,4] y, float[N,8] h) { m = MatMul(x, a) h = Relu(m) y = MatMul(h, b) }"
    )
    before = program(text, weights)
    assert fold(before, forms=[NAME], only=())[1] == ()


def test_a_group_that_is_not_proven_says_why() -> None:
    rng = np.random.default_rng(0)
    up = rng.normal(size=(6, 4)).astype(F)
    down = rng.normal(size=(8, 3)).astype(F) * F([[1], [1], [1], [1], [9], [1], [9], [1]])
    weights = {"up": up, "down": down, "mix": np.array([0, 1, 4, 5, 6, 7, 2, 3])}
    text = (
        "g (float[N,6] x) => (float[N,3] y) { h = MatMul(x, up) a = Relu(h) b = Tanh(h)"
        " c = Concat <axis=-1> (a, b) m = Gather <axis=-1> (c, mix) y = MatMul(m, down) }"
    )
    before = program(text, weights)
    assert fold(before, forms=[NAME], only=())[1] == ()
    assert reasons(before, NAME) == ["Gather 'node_m' may tell its channels apart"]


def test_a_model_that_does_not_run_stays() -> None:
    text = "g (float[N,6] x) => (float[N,4] y) { m = MatMul(x, a) h = Relu(m) y = MatMul(h, b) }"
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(6, 8)).astype(F), "b": rng.normal(size=(8, 4)).astype(F)}
    before = program(text, weights)
    next(n for n in before.graph if n.op_type == "Relu").domain = "ai.other"
    assert fold(before, forms=[NAME], only=())[1] == ()
