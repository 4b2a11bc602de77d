"""Gain and bias of normalizations folded into the linear operators that read them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from encoders import F, Weights, build, encoder, ids, norm
from folding import check, ops, reasons, run, ulps

from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.fold import apply_named, fold
from lamina.passes.fold.fold_norm_affine import FoldNormAffine

NAME = "fold_norm_affine"
LIMIT = 64


def plain(after: Program, *op_types: str) -> bool:
    """Whether every normalization has a gain of ones, and a bias of zeros or none."""
    norms = [n for n in after.graph if n.op_type in op_types]
    return bool(norms) and all(
        (n.inputs[1].const_value.numpy() == 1).all()
        and not any(v.const_value.numpy().any() for v in n.inputs[2:3] if v is not None)
        for n in norms
    )


@pytest.mark.parametrize(("depth", "width"), [(0, 8), (1, 3), (3, 16), (2, 33)])
def test_encoders_keep_plain_normalizations(depth: int, width: int) -> None:
    before = build(*encoder(depth, width, depth))
    after = check(before, NAME, ids((1, 5), (3, 2)), limit=LIMIT)
    assert ops(after) == ops(before)
    assert plain(after, "LayerNormalization")
    assert all(len(n.inputs) == 2 for n in after.graph if n.op_type == "LayerNormalization")


def test_the_file_does_not_grow() -> None:
    before = build(*encoder(3, 16))
    after, _, _ = fold(before, forms=[NAME])
    size = [
        sum(v.const_value.nbytes for v in p.graph.initializers.values()) for p in (fold(before)[0], after)
    ]
    assert size[1] < size[0]


def test_after_centring_the_additions_leave_too() -> None:
    before = build(*encoder(2, 16, 3))
    after, names, _ = fold(before, forms=["fold_layernorm_mean", NAME])
    assert {"fold_layernorm_mean", NAME} <= set(names)
    folded, _, _ = fold(before)
    assert ops(after)["RMSNormalization"] == ops(folded)["LayerNormalization"] == 5
    assert ops(after)["Add"] == ops(folded)["Add"]
    assert plain(after, "RMSNormalization")
    for feed in ids((1, 5), (3, 2)):
        got, expected = run(after, feed)[0], run(before, feed)[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def reader(body: str, w: Weights, width: int, normalization: str = "", x: str = "float[N,5,6] x") -> Program:
    text = f"{normalization or norm(w, 'n', 'x')} {body}"
    return build(text, w, x, f"float[N,5,{width}] y" if "5" in x else f"float[N,{width}] y")


def feeds(*shape: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).normal(1, 2, (n, *shape)).astype(F)} for n in (1, 4)]


GEMM = ["transB=0", "transB=1", "transB=0, alpha=0.5, beta=2.0"]


@pytest.mark.parametrize("attributes", GEMM)
def test_gemm(attributes: str) -> None:
    w = Weights(1, 6)
    w.matrix("weight", *((4, 6) if "transB=1" in attributes else (6, 4)))
    w.vector("bias", 0, 4)
    before = reader(f"y = Gemm <{attributes}> (n, weight, bias)", w, 4, x="float[N,6] x")
    assert plain(check(before, NAME, feeds(6), limit=LIMIT), "LayerNormalization")


@pytest.mark.parametrize("kind", ["Batch", "Group", "Instance"])
@pytest.mark.parametrize("group", [1, 2, 6])
def test_convolutions_of_normalizations_over_channels(kind: str, group: int) -> None:
    w = Weights(2, 6)
    w["weight"] = w.rng.normal(size=(12, 6 // group, 3, 2)).astype(F)
    w.vector("bias", 0, 12)
    gain, shift = w.vector("gain", 1), w.vector("shift", 0)
    w["mean"], w["var"] = w.rng.normal(size=6).astype(F), w.rng.uniform(0.5, 2, 6).astype(F)
    operator = {
        "Batch": f"BatchNormalization (x, {gain}, {shift}, mean, var)",
        "Group": f"GroupNormalization <num_groups=3> (x, {gain}, {shift})",
        "Instance": f"InstanceNormalization (x, {gain}, {shift})",
    }[kind]
    text = f"n = {operator} y = Conv <group={group}> (n, weight, bias)"
    before = build(text, w, "float[N,6,5,4] x", "float[N,12,3,3] y", opset=21)
    after = check(before, NAME, feeds(6, 5, 4), limit=LIMIT)
    assert plain(after, f"{kind}Normalization")


def test_a_padded_convolution_takes_a_gain_but_no_bias() -> None:
    for shift, count in ((0.0, 0), (0.3, 1)):
        w = Weights(2, 6)
        w["weight"] = w.rng.normal(size=(4, 6, 3, 3)).astype(F)
        gain = w.vector("gain", 1)
        w["shift"], w["bias"] = np.full(6, shift, F), np.zeros(4, F)
        text = f"n = InstanceNormalization (x, {gain}, shift) y = Conv <pads=[1,1,1,1]> (n, weight, bias)"
        before = build(text, w, "float[N,6,5,5] x", "float[N,4,5,5] y")
        assert len(reasons(before, NAME)) == count
        after = check(before, NAME, feeds(6, 5, 5), limit=LIMIT)
        assert plain(after, "InstanceNormalization") == (count == 0)


def test_readers_behind_transpositions_and_selections() -> None:
    w = Weights(4, 6)
    w.matrix("a", 6, 4)
    w.matrix("b", 6, 4)
    w.vector("c", 0, 4)
    w["first"], w["flat"], w["back"] = np.array(0), np.array([-1, 6]), np.array([0, 1, 4])
    body = (
        "t = Transpose <perm=[1, 0, 2]> (n) am = MatMul(t, a) a1 = Add(am, c)"
        " at = Transpose <perm=[1, 0, 2]> (a1)"
        " p = Gather <axis=1> (n, first) q = Reshape(p, flat) bm = Gemm(q, b, d) br = Reshape(bm, back)"
        " y = Add(at, br)"
    )
    w.vector("d", 0, 4)
    before = reader(body, w, 4)
    assert plain(check(before, NAME, feeds(5, 6), limit=LIMIT), "LayerNormalization")


def test_what_follows_the_normalization_is_folded_with_it() -> None:
    w = Weights(5, 6)
    for name in ("g2", "h2", "c"):
        w.vector(name, 1)
    w["half"] = F(0.5)
    w.matrix("a", 6, 6)
    body = (
        "m = Mul(n, g2) s = Sub(m, h2) r = Mul(half, s) k = MatMul(r, a) u = Add(k, c)"
        " k2 = MatMul(r, b) v = Add(k2, e)"
    )
    w.matrix("b", 6, 6)
    w.vector("e", 1)
    w.vector("gain", 1)
    before = build(
        f"n = RMSNormalization <axis=-1> (x, gain) {body} y = Sub(u, v)",
        w,
        "float[N,5,6] x",
        "float[N,5,6] y",
        23,
    )
    after = check(before, NAME, feeds(5, 6), limit=LIMIT)
    assert plain(after, "RMSNormalization")
    assert ops(after) == {"RMSNormalization": 1, "MatMul": 2, "Add": 2, "Sub": 1}


def one_matmul(seed: int = 6) -> tuple[Weights, str]:
    w = Weights(seed, 6)
    w.matrix("a", 6, 4)
    w.vector("c", 0, 4)
    return w, "k = MatMul(n, a) y = Add(k, c)"


def test_a_reader_without_bias_is_refused_unless_asked() -> None:
    w, _ = one_matmul()
    before = reader("y = MatMul(n, a)", w, 4)
    assert reasons(before, NAME) == ["MatMul 'node_y' has no bias to take the normalization's"]
    clone = before.clone()
    replace(FoldNormAffine(), add_bias=True).apply(Rewriter(clone.model))
    assert ops(clone) == {"LayerNormalization": 1, "MatMul": 1, "Add": 1}
    for feed in feeds(5, 6):
        assert ulps(run(clone, feed)[0], run(before, feed)[0]) <= LIMIT


def test_without_a_bias_no_bias_is_needed() -> None:
    w, _ = one_matmul()
    before = reader("y = MatMul(n, a)", w, 4, f"n = LayerNormalization (x, {w.vector('g', 1)})")
    assert plain(check(before, NAME, feeds(5, 6), limit=LIMIT), "LayerNormalization")


def test_another_reader_is_named() -> None:
    w, body = one_matmul()
    before = build(
        f"{norm(w, 'n', 'x')} {body} z = Relu(n)", w, "float[N,5,6] x", "float[N,5,4] y, float[N,5,6] z"
    )
    assert reasons(before, NAME) == ["Relu 'node_z' reads it and is not linear with constant weights"]
    assert not plain(apply_named(before, [NAME]), "LayerNormalization")


def test_an_output_is_refused() -> None:
    w, body = one_matmul()
    before = build(f"{norm(w, 'n', 'x')} {body}", w, "float[N,5,6] x", "float[N,5,4] y, float[N,5,6] n")
    assert reasons(before, NAME) == ["the interface shows 'n'"]


def test_a_shared_weight_is_refused() -> None:
    w, body = one_matmul()
    before = build(
        f"{norm(w, 'n', 'x')} {body} z = MatMul(x, a)", w, "float[N,5,6] x", "float[N,5,4] y, float[N,5,4] z"
    )
    assert reasons(before, NAME) == [
        "the weight of MatMul 'node_k' is read elsewhere: a copy would grow the file"
    ]


def test_a_shared_bias_is_refused() -> None:
    w, body = one_matmul()
    before = build(
        f"{norm(w, 'n', 'x')} {body} z = Neg(c)", w, "float[N,5,6] x", "float[N,5,4] y, float[4] z"
    )
    assert reasons(before, NAME) == ["the bias of MatMul 'node_k' is read elsewhere"]


def test_a_product_with_activations_is_refused() -> None:
    w, _ = one_matmul()
    before = build(
        f"{norm(w, 'n', 'x')} y = MatMul(n, m)", w, "float[N,5,6] x, float[N,6,4] m", "float[N,5,4] y"
    )
    assert reasons(before, NAME) == ["MatMul 'node_y' reads it and is not linear with constant weights"]


def test_split_channels_are_refused() -> None:
    w, _ = one_matmul()
    w["heads"], w["small"] = np.array([0, 5, 2, 3]), w["a"][:3]
    before = build(
        f"{norm(w, 'n', 'x')} r = Reshape(n, heads) y = MatMul(r, small)",
        w,
        "float[N,5,6] x",
        "float[N,5,2,4] y",
    )
    assert reasons(before, NAME) == ["Reshape 'node_r' reads it and is not linear with constant weights"]


def test_a_weight_that_would_overflow_is_refused() -> None:
    w, body = one_matmul()
    w["a"] *= F(1e30)
    w["gain"] = np.full(6, 1e20, F)
    before = reader(body, w, 4, "n = LayerNormalization (x, gain)")
    assert reasons(before, NAME) == ["the weight of MatMul 'node_k' would overflow or underflow"]


def test_a_gain_the_caller_can_override_is_left_alone() -> None:
    before = build(*encoder(0, 8))
    before.graph.inputs.append(before.graph.initializers["final_g"])
    assert not FoldNormAffine().fires(before.model)


def test_nothing_to_do_is_no_refusal() -> None:
    w, body = one_matmul()
    w["one"] = np.ones(6, F)
    before = reader(f"{body}", w, 4, "n = LayerNormalization (x, one)")
    assert (reasons(before, NAME), FoldNormAffine().fires(before.model)) == ([], False)


def test_post_norm_keeps_its_affine() -> None:
    w, body = one_matmul()
    w.matrix("a", 6, 6)
    w.vector("c", 0)
    before = build(f"{norm(w, 'n', 'x')} {body} z = Add(n, y)", w, "float[N,5,6] x", "float[N,5,6] z")
    assert reasons(before, NAME) == ["Add 'node_z' reads it and is not linear with constant weights"]
