"""The rotation of residual streams: the function stays, weights are mixed, what cannot be turned is told."""

from __future__ import annotations

import numpy as np
import pytest
from encoders import WORDS, F, Weights, build, embedding, encoder, ids, layer, linear, norm
from folding import reasons, run

from lamina.ir.program import Program
from lamina.passes.fold import apply_named, fold
from lamina.passes.fold.orthogonal import turned

NAME = "rotate_fold"


def rotated(program: Program) -> Program:
    """``program`` with the form and what it builds on; nothing may have failed."""
    after, names, records = fold(program, forms=[NAME], only=())
    assert not [r for r in records if r.why.startswith("undone")]
    assert NAME in names
    return after


def plain(program: Program) -> Program:
    """``program`` as :func:`rotated` finds it."""
    below = ("fuse_layer_normalization", "fuse_rms_normalization", "fold_layernorm_mean", "fold_norm_affine")
    return fold(program, forms=below, only=())[0]


def same(before: Program, after: Program, feeds: list[dict[str, np.ndarray]]) -> None:
    for feed in feeds:
        for want, got in zip(run(before, feed), run(after, feed), strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def unevenness(program: Program, name: str) -> float:
    """Largest over root mean square of the weight that the product called ``name`` reads."""
    node = next(n for n in program.graph if n.outputs[0].name == name)
    weight = node.inputs[1].const_value.numpy()
    return float(np.abs(weight).max() / np.sqrt(np.square(weight).mean()))


@pytest.mark.parametrize("size", [2, 3, 8, 12, 33, 64, 96])
def test_turning_is_orthogonal_and_mixes_every_channel(size: int) -> None:
    matrix = turned(np.eye(size), 1)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-12
    assert (matrix != 0).all()
    array = np.random.default_rng(0).normal(size=(3, size, 2))
    assert np.allclose(turned(array, 1), np.einsum("aib,ij->ajb", array, matrix), atol=1e-12)
    assert not np.array_equal(matrix, turned(np.eye(size), 1, seed=1))
    assert np.array_equal(matrix, turned(np.eye(size), 1))


@pytest.mark.parametrize(
    ("depth", "width", "seed"), [(0, 8, 0), (1, 3, 1), (2, 16, 2), (3, 24, 3), (4, 33, 4), (7, 64, 5)]
)
def test_pre_norm_encoders_turn_and_keep_their_function(depth: int, width: int, seed: int) -> None:
    before = build(*encoder(depth, width, seed))
    after = rotated(before)
    same(before, after, ids((1, 5), (3, 1), (2, 16)))
    names = [v.name for v in after.graph.initializers.values() if (v.name or "").endswith("_rotated")]
    assert len(names) == 2 + 8 * depth + 1  # tables; q k v o up down and two biases; the head
    assert fold(after, forms=[NAME], only=())[1] == ()


def test_an_outlier_channel_spreads() -> None:
    text, w = encoder(1, 64)
    w["table"][:, 3] *= 40
    w["n0_g"][3] *= 40
    before = plain(build(text, w))
    after = rotated(before)
    same(before, after, ids((2, 7)))
    assert unevenness(before, "q0_m") > 2 * unevenness(after, "q0_m")


def test_a_rotation_repeats_to_the_bit() -> None:
    first, second = (rotated(build(*encoder(1, 12))) for _ in range(2))
    weights = [{k: v.const_value.numpy() for k, v in p.graph.initializers.items()} for p in (first, second)]
    assert weights[0].keys() == weights[1].keys()
    assert all(np.array_equal(weights[0][k], weights[1][k]) for k in weights[0])


def test_a_table_that_is_the_head_too_is_turned_once() -> None:
    w = Weights(0, 8)
    # one gain for all channels may stay where it is
    w["rows"], w["g"] = np.array([-1, 8]), np.full(8, 0.7, F)
    text = (
        f"{embedding(w)} n = RMSNormalization <axis=-1> (x0, g) {linear(w, 'u', 'n', 8, 16)} a = Relu(u)"
        f" {linear(w, 'd', 'a', 16, 8)} x1 = Add(x0, d) m = RMSNormalization <axis=-1> (x1, g)"
        " flat = Reshape(m, rows) logits = Gemm <transB=1> (flat, table)"
    )
    before = build(text, w, outputs=f"float[M,{WORDS}] logits", opset=23)
    after = rotated(before)
    same(before, after, ids((2, 5)))
    assert "table" not in after.graph.initializers
    assert [n.inputs[0].name for n in after.graph if n.op_type == "Gather"] == ["table_rotated"]


def test_a_weight_that_reads_and_writes_the_stream_is_turned_on_both_axes() -> None:
    w = Weights(3, 8)
    text = [embedding(w), norm(w, "n", "x0"), linear(w, "y", "n", 8, 8), "x1 = Add(x0, y)"]
    text += [norm(w, "final", "x1"), linear(w, "logits", "final", 8, WORDS)]
    before = build(" ".join(text), w)
    after = rotated(before)
    same(before, after, ids((2, 5)))
    weights = [
        n.inputs[1].const_value.numpy()
        for p in (plain(before), after)
        for n in p.graph
        if n.op_type == "MatMul"
    ]
    folded, got = weights[0], weights[2]
    both = turned(turned(folded.astype(np.float64), 0), 1)
    assert np.abs(got - both).max() <= 1e-6


def test_convolutions_write_and_read() -> None:
    w = Weights(1, 6)
    w.matrix("patch_w", 6, 3, 2)
    w.vector("patch_b", 0.3)
    w.matrix("head_w", 4, 6, 3)
    w["g"] = np.full(6, 1.5, F)
    text = (
        "c = Conv <strides=[2]> (x, patch_w, patch_b) t = Transpose <perm=[0, 2, 1]> (c)"
        " n = RMSNormalization <axis=-1> (t, g) b = Transpose <perm=[0, 2, 1]> (n)"
        " y = Conv <pads=[1, 1]> (b, head_w)"
    )
    before = build(text, w, "float[N,3,8] x", "float[N,4,4] y", opset=23)
    feed = [{"x": np.random.default_rng(n).normal(size=(n, 3, 8)).astype(F)} for n in (1, 3)]
    after = rotated(before)
    same(before, after, feed)
    assert {"patch_w_rotated", "patch_b_rotated", "head_w_folded_rotated"} <= set(after.graph.initializers)


def post_norm() -> Program:
    text, w = encoder(1, 8)
    return plain(build(text.replace("x1 = Add(down0, h0)", "x1 = Add(down0, nn0)"), w))


def nonlinear_writer() -> Program:
    w = Weights(0, 8)
    text = [embedding(w), "r = Relu(x0)", norm(w, "n", "r"), linear(w, "logits", "n", 8, WORDS)]
    return plain(build(" ".join(text), w))


def nonlinear_reader() -> Program:
    """Something sees the mean, so layer normalizations stay."""
    text, w = encoder(1, 8)
    more = " s = Sigmoid(x1)"
    return plain(build(text + more, w, outputs=f"float[N,T,{WORDS}] logits, float[N,T,8] s"))


def shown() -> Program:
    w = Weights(0, 8)
    w["g"] = np.ones(8, F)
    text = f"{embedding(w)} n = RMSNormalization <axis=-1> (x0, g) {linear(w, 'logits', 'n', 8, WORDS)}"
    return build(text, w, outputs=f"float[N,T,{WORDS}] logits, float[N,T,8] x0", opset=23)


def shared_gain() -> Program:
    """RMS normalizations whose gains cannot be folded, for two layers share a weight."""
    w = Weights(0, 8)
    body, x = layer(w, 0, "x0")
    more, x = layer(w, 1, x)
    text = " ".join([embedding(w), body, more, norm(w, "final", x), linear(w, "logits", "final", 8, WORDS)])
    return plain(build(text.replace("q1_w", "q0_w"), w))


def other_reader() -> Program:
    """The head's weight takes part in the result in another way."""
    w = Weights(0, 8)
    w.matrix("shared_w", 8, 8)
    w["g"] = np.ones(8, F)
    text = (
        f"{embedding(w)} n = RMSNormalization <axis=-1> (x0, g) y = MatMul(n, shared_w)"
        " s = Relu(y) z = MatMul(s, shared_w)"
    )
    return build(text, w, outputs="float[N,T,8] z", opset=23)


def strange_head() -> Program:
    """A normalization inside heads: what it reads was reshaped."""
    w = Weights(0, 8)
    w.matrix("q_w", 8, 8)
    w["four"], w["g"] = np.array([0, 0, 2, 4]), np.ones(4, F)
    text = (
        f"{embedding(w)} q = MatMul(x0, q_w) h = Reshape(q, four) n = RMSNormalization <axis=-1> (h, g)"
        " z = Neg(n)"
    )
    return build(text, w, outputs="float[N,T,2,4] z", opset=23)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (nonlinear_writer, "Relu 'node_r' writes to it and is not linear with constant weights"),
        (nonlinear_reader, "LayerNormalization 'node_n0' reads it and is neither linear"),
        (shown, "it leaves as the output 'x0'"),
        (shared_gain, "RMSNormalization 'node_n0_rms' reads it and is neither linear"),
        (other_reader, "'shared_w' belongs to it, and MatMul 'node_z' reads it another way"),
        (strange_head, "Reshape 'node_h' writes to it and is not linear with constant weights"),
    ],
)
def test_what_cannot_be_turned_stays_and_says_why(make, reason: str) -> None:
    before = make()
    (found,) = reasons(before, NAME)
    assert reason in found
    after = apply_named(before, [NAME])
    assert set(after.graph.initializers) == set(before.graph.initializers)


def test_a_post_norm_model_stays() -> None:
    before = post_norm()
    assert fold(before, forms=[NAME], only=())[1] == ()
