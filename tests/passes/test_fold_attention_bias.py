"""Biases of keys and values: where softmax makes them spare, and where it does not."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program

from lamina.passes.fold.catalog import load

WIDTH, HEADS = 8, 2
NAME = "drop_attention_bias"


def weights(seed: int = 0, kind: type = np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found = {f"w{p}": rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH) for p in "qkvo"}
    found |= {f"b{p}": rng.standard_normal(WIDTH) for p in "qkvo"}
    typed = {name: array.astype(kind) for name, array in found.items()}
    scale = np.array(1 / np.sqrt(WIDTH // HEADS), kind)
    shapes = {"split": np.array([0, 0, HEADS, WIDTH // HEADS]), "join": np.array([0, 0, WIDTH])}
    return {**typed, "scale": scale, **shapes, "low": np.array(-6e4, kind)}


def projections(context: str = "x") -> str:
    sources = {"q": "x", "k": context, "v": context}
    return " ".join(f"m{p} = MatMul ({s}, w{p}) {p} = Add (m{p}, b{p})" for p, s in sources.items())


HEADED = """
    qr = Reshape (q, split) kr = Reshape (k, split) vr = Reshape (v, split)
    qt = Transpose <perm = [0, 2, 1, 3]> (qr) kt = Transpose <perm = [0, 2, 3, 1]> (kr)
    vt = Transpose <perm = [0, 2, 1, 3]> (vr) s = MatMul (qt, kt) scaled = Mul (s, scale)
"""
AFTER = """
    c = MatMul (p, vt) ct = Transpose <perm = [0, 2, 1, 3]> (c) joined = Reshape (ct, join)
    mo = MatMul (joined, wo) y = Add (mo, bo)
"""
MASKED = "masked = Add (scaled, mask) p = Softmax <axis = -1> (masked)"


def attention(
    middle: str = MASKED,
    *,
    head: str = HEADED,
    tail: str = AFTER,
    extra: str = "",
    context: str = "x",
    kind: str = "float",
):
    inputs = f"{kind}[b, t, {WIDTH}] x, {kind}[b, 1, 1, t] mask"
    if context != "x":
        inputs = f"{kind}[b, t, {WIDTH}] x, {kind}[b, s, {WIDTH}] {context}, {kind}[b, 1, 1, s] mask"
    body = f"{projections(context)} {head} {middle} {tail}"
    text = f"g ({inputs}) => ({kind}[b, t, {WIDTH}] y{extra}) {{ {body} }}"
    numbers = weights(kind=np.float16 if kind == "float16" else np.float32)
    used = {
        k: v
        for k, v in numbers.items()
        if k in text.replace(",", " ").replace(")", " ").split() or f"({k}" in text
    }
    return program(text, used)


def feeds(*sizes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    found = []
    for b, t in sizes:
        mask = np.where(rng.random((b, 1, 1, t)) < 0.3, -1e9, 0).astype(np.float32)
        found.append({"x": rng.standard_normal((b, t, WIDTH)).astype(np.float32), "mask": mask})
    return found


def test_the_biases_of_keys_and_values_go() -> None:
    after = check(attention(), NAME, feeds((1, 3), (2, 5), (1, 1)), limit=64)
    assert ops(after)["Add"] == 3  # the query's, the mask and the output's
    assert {"bk", "bv"} & {v.name for n in after.graph for v in n.inputs if v is not None} == set()


def test_a_large_bias_makes_no_difference() -> None:
    before = attention()
    value = before.graph.initializers["bk"]
    value.const_value.numpy()[:] *= 30
    check(before, NAME, feeds((2, 5)), limit=2000)  # the original rounds large scores; the result does not


def test_one_head_without_reshapes() -> None:
    head = "kt = Transpose <perm = [0, 2, 1]> (k) scaled = MatMul (q, kt)"
    tail = "joined = MatMul (p, v) mo = MatMul (joined, wo) y = Add (mo, bo)"
    after = check(attention("p = Softmax (scaled)", head=head, tail=tail), NAME, feeds((2, 5)), limit=64)
    assert ops(after)["Add"] == 2


def test_keys_transposed_twice() -> None:
    head = HEADED.replace("<perm = [0, 2, 3, 1]> (kr)", "<perm = [0, 2, 1, 3]> (kr)")
    head = head.replace("kt = Transpose", "ku = Transpose").replace(
        "s = MatMul", "kt = Transpose <perm = [0, 1, 3, 2]> (ku) s = MatMul"
    )
    after = check(attention(head=head), NAME, feeds((2, 5)), limit=64)
    assert ops(after)["Add"] == 3


def gone(found) -> set[str]:
    from lamina.passes.fold import apply_named

    after = apply_named(found, [NAME])
    read = {v.name for n in after.graph for v in n.inputs if v is not None}
    return {"bk", "bv"} - read


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        # what Where puts in does not shift with the scores
        (
            {"middle": "hide = Less (mask, low) masked = Where (hide, low, scaled) p = Softmax (masked)"},
            {"bv"},
        ),
        ({"extra": f", float[b, t, {WIDTH}] k"}, {"bv"}),  # a cache of keys is an output
        ({"extra": f", float[b, t, {WIDTH}] v"}, {"bk"}),
        ({"middle": "p = Softmax <axis = 2> (scaled)"}, set()),
        ({"context": "z"}, {"bk"}),  # there may be queries and no keys
        ({"tail": AFTER.replace("y = Add (mo, bo)", "y = Relu (mo)")}, {"bk"}),
        ({"kind": "float16"}, set()),
        # the sum of two products: which of them shifts is not looked into
        ({"middle": "twice = MatMul (qt, kt) both = Add (scaled, twice) p = Softmax (both)"}, {"bv"}),
    ],
)
def test_what_is_left_alone(case, expected) -> None:
    assert gone(attention(**case)) == expected


def test_it_says_what_it_needs() -> None:
    fold = load(NAME)
    assert fold.name == "drop-attention-bias"
    assert fold.effect.ulps == 64
