"""The centring of layer normalizations folded into the writers of the residual stream."""

from __future__ import annotations

import numpy as np
import pytest
from encoders import WORDS, F, Weights, build, embedding, encoder, ids, layer, linear, norm
from folding import check, ops, reasons, run

from lamina.ir.program import Program
from lamina.passes.fold import FORMS, apply_named, fold

NAME = "fold_layernorm_mean"
LIMIT = 64  # ulps of the largest output: 3.8e-6 to 7.6e-6 relative


def one_reason(program: Program) -> str:
    """The reason of a program with one stream, which is left as it is."""
    assert ops(apply_named(program, [NAME])) == ops(program)
    (reason,) = reasons(program, NAME)
    return reason


@pytest.mark.parametrize(
    ("depth", "width", "seed"), [(0, 8, 0), (1, 3, 1), (2, 16, 2), (4, 33, 3), (7, 64, 4)]
)
def test_pre_norm_encoders_lose_their_means(depth: int, width: int, seed: int) -> None:
    before = build(*encoder(depth, width, seed))
    after = check(before, NAME, ids((1, 5), (3, 1), (2, 16)), limit=LIMIT)
    assert ops(after)["RMSNormalization"] == ops(before)["LayerNormalization"] == 2 * depth + 1
    assert ops(after)["LayerNormalization"] == 0


def test_writers_are_centred_and_readers_keep_their_weights() -> None:
    before = build(*encoder(1, 8))
    after = apply_named(before, [NAME])
    weights = after.graph.initializers
    for name, axis in (("table", 1), ("positions", 1), ("o0_w", 1), ("down0_bias", 0)):
        assert name not in weights
        content = weights[f"{name}_centred"].const_value.numpy()
        assert np.abs(content.mean(axis=axis)).max() < 1e-7
    assert {"q0_w", "up0_w", "logits_w", "n0_g", "n0_b"} <= set(weights)
    assert sum(v.const_value.nbytes for v in weights.values()) == sum(
        v.const_value.nbytes for v in before.graph.initializers.values()
    )


def test_a_bias_of_zeros_leaves_and_epsilon_stays() -> None:
    text, w = encoder(0, 8)
    w["final_b"] = np.zeros(8, F)
    before = build(text.replace("epsilon=1e-5", "epsilon=0.25"), w)
    after = check(before, NAME, ids((2, 3)), limit=LIMIT)
    node = next(n for n in after.graph if n.op_type == "RMSNormalization")
    assert node.attributes["epsilon"].as_float() == 0.25
    assert (node.name, node.outputs[0].name) == ("node_final", "final")
    assert "final_b" not in after.graph.initializers


def test_a_mean_far_above_the_deviation_is_no_problem() -> None:
    text, w = encoder(2, 16)
    w["table"] += F(50)
    w["down0_bias"] -= F(20)
    after = apply_named(build(text, w), [NAME])
    exact = apply_named(build(text, {k: _centred(k, v) for k, v in w.items()}), [])
    (feed,) = ids((2, 5))
    got, expected = run(after, feed)[0], run(exact, feed)[0]
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def _centred(name: str, value: np.ndarray) -> np.ndarray:
    writes = name in ("table", "positions") or name.startswith(("o", "down"))
    if not writes or value.dtype != F:
        return value
    return (value - value.mean(axis=-1, keepdims=True, dtype=np.float64)).astype(F)


# -- other writers and ways -------------------------------------------------------------------------


def test_image_patches_a_class_token_and_pooling() -> None:
    w = Weights(1, 8)
    w.matrix("patch_w", 8, 3, 2, 2)
    w.vector("patch_b", 0.3)
    w["to3"] = np.array([0, 8, 16])
    w["cls"], w["pos"] = w.rng.normal(0.4, 1, (1, 1, 8)).astype(F), w.rng.normal(0.4, 1, (1, 17, 8)).astype(F)
    w["first"], w["axes"], w["scale"] = np.array(0), np.array([1]), F(2.5)
    w["zero"], w["one"] = np.array([0]), np.array([1])
    body, x = layer(w, 0, "x0")
    text = " ".join(
        [
            "c = Conv <strides=[2, 2]> (image, patch_w, patch_b) r = Reshape(c, to3)",
            "patches = Transpose <perm=[0, 2, 1]> (r) s = Shape(image) n = Slice(s, zero, one, zero)",
            "rest = Concat <axis=0> (n, one, one)",
            "token = Expand(cls, rest) both = Concat <axis=1> (token, patches) scaled = Mul(both, scale)",
            "x0 = Add(scaled, pos)",
            body,
            f"mean = ReduceMean <keepdims=0> ({x}, axes) picked = Gather <axis=1> ({x}, first)",
            "pooled = Sub(mean, picked)",
            norm(w, "final", "pooled"),
            linear(w, "logits", "final", 8, 5),
        ]
    )
    before = build(text, w, "float[N,3,8,8] image", "float[N,5] logits")
    feeds = [{"image": np.random.default_rng(n).normal(size=(n, 3, 8, 8)).astype(F)} for n in (1, 3)]
    after = check(before, NAME, feeds, limit=LIMIT)
    assert ops(after)["RMSNormalization"] == 3
    assert np.abs(after.graph.initializers["patch_w_centred"].const_value.numpy().mean(axis=0)).max() < 1e-7


@pytest.mark.parametrize("turned", [0, 1])
def test_gemm_writers(turned: int) -> None:
    w = Weights(2, 6)
    w.matrix("weight", *((6, 4) if turned else (4, 6)))
    w.vector("bias", 0.5)
    text = f"x0 = Gemm <transB={turned}, alpha=0.5, beta=2.0> (a, weight, bias) " + norm(w, "y", "x0")
    before = build(text + " z = Neg(y)", w, "float[N,4] a", "float[N,6] z")
    feeds = [{"a": np.random.default_rng(n).normal(size=(n, 4)).astype(F)} for n in (1, 5)]
    assert ops(check(before, NAME, feeds, limit=LIMIT))["RMSNormalization"] == 1


def test_a_weight_that_layers_share_is_centred_once() -> None:
    text, w = encoder(3, 8)
    for i in (1, 2):
        text = text.replace(f"o{i}_w", "o0_w").replace(f"down{i}_bias", "down0_bias")
    after = check(build(text, w), NAME, ids((2, 3)), limit=LIMIT)
    assert ops(after)["RMSNormalization"] == 7
    assert "o0_w_centred" in after.graph.initializers


def test_zeros_that_others_read_too_may_stay() -> None:
    text, w = encoder(1, 8)
    w["q0_bias"] = np.zeros(8, F)
    before = build(text.replace("o0_bias", "q0_bias"), w)
    assert ops(check(before, NAME, ids((2, 3)), limit=LIMIT))["RMSNormalization"] == 3


def test_an_embedding_norm_is_folded_where_the_stream_after_it_is_not() -> None:
    w = Weights(0, 8)
    body, x = layer(w, 0, "en")
    text = " ".join([embedding(w), norm(w, "en", "x0"), body, norm(w, "y", x), "z = Neg(y)"])
    before = build(text, w, outputs="float[N,T,8] z")
    assert [r.split(" (")[0] for r in reasons(before, NAME)] == [
        "3 normalizations of one residual stream: LayerNormalization 'node_en' writes to it"
    ]
    after = check(before, NAME, ids((2, 3)), limit=LIMIT)
    assert (ops(after)["RMSNormalization"], ops(after)["LayerNormalization"]) == (1, 3)


@pytest.mark.parametrize("uniform", [True, False])
def test_post_norm_is_folded_only_with_one_gain_for_all_channels(uniform: bool) -> None:
    w = Weights(3, 8)
    text = f"{embedding(w)} {norm(w, 'x1', 'x0')} u = Exp(more) {linear(w, 'f', 'u', 8, 8)}"
    text += " x2 = Add(x1, f) " + norm(w, "y", "x2")
    if uniform:
        w["x1_g"] = np.full(8, 1.5, F)
    inputs = "int64[N,T] ids, float[N,T,8] more"
    before = build(text + " z = Neg(y)", w, inputs, "float[N,T,8] z")
    rng = np.random.default_rng(0)
    feeds = [{**f, "more": rng.normal(size=(*f["ids"].shape, 8)).astype(F)} for f in ids((1, 4), (3, 2))]
    after = check(before, NAME, feeds, limit=LIMIT)
    assert ops(after)["RMSNormalization"] == (2 if uniform else 1)
    assert ("x1_b_centred" in after.graph.initializers) == uniform


# -- refusals ---------------------------------------------------------------------------------------


def test_a_stream_that_is_an_output_is_refused() -> None:
    text, w = encoder(2, 8)
    before = build(text, w, outputs=f"float[N,T,{WORDS}] logits, float[N,T,8] x1")
    assert one_reason(before) == "5 normalizations of one residual stream: it leaves as the output 'x1'"


def test_another_reader_is_named() -> None:
    text, w = encoder(2, 8, tail="other = Exp(h0)")
    before = build(text, w, outputs=f"float[N,T,{WORDS}] logits, float[N,T,8] other")
    assert one_reason(before).endswith(
        ": Exp 'node_other' reads it and is no layer normalization over its channels"
    )


def test_a_nonlinear_writer_is_named() -> None:
    text, w = encoder(1, 8)
    before = build(text.replace("o0 = Add(o0_m, o0_bias)", "o0s = Add(o0_m, o0_bias) o0 = Tanh(o0s)"), w)
    assert one_reason(before).endswith(
        ": Tanh 'node_o0' writes to it and is not linear with constant weights"
    )


def test_an_input_that_writes_is_named() -> None:
    w = Weights(0, 8)
    before = build(f"{norm(w, 'y', 'x')} z = Neg(y)", w, "float[N,8] x", "float[N,8] z")
    assert one_reason(before) == "1 normalization of one residual stream: the input 'x' writes to it"


def test_tied_embeddings_are_refused() -> None:
    head = "turned = Transpose <perm=[1, 0]> (table) logits = MatMul(final, turned)"
    before = build(*encoder(1, 8, head=head))
    assert one_reason(before).endswith(
        ": 'table' writes to it, and Transpose 'node_turned' reads the same weight"
    )


def test_a_shared_bias_is_refused() -> None:
    text, w = encoder(1, 8)
    before = build(text.replace("q0_bias", "o0_bias"), w)
    assert one_reason(before).endswith("'o0_bias' writes to it, and Add 'node_q0' reads the same weight")


def test_a_weight_the_caller_can_override_is_refused() -> None:
    before = build(*encoder(1, 8))
    before.graph.inputs.append(before.graph.initializers["o0_w"])
    assert one_reason(before).endswith(
        "MatMul 'node_o0_m' writes to it with a weight that is not a float32 constant"
    )


def test_a_weight_shown_as_an_output_is_refused() -> None:
    before = build(*encoder(1, 8))
    before.graph.outputs.append(before.graph.initializers["o0_w"])
    assert reasons(before, NAME)[0].endswith("'o0_w' writes to it, and the interface reads the same weight")


def test_a_gain_on_a_branch_is_refused() -> None:
    text, w = encoder(1, 8)
    w.vector("gamma", 1)
    before = build(text.replace("h0 = Add(x0, o0)", "go = Mul(o0, gamma) h0 = Add(x0, go)"), w)
    assert one_reason(before).endswith(
        "Mul 'node_go' scales its channels: fold that into the weights before it first"
    )


def test_a_bias_broadcast_over_the_channels_is_refused() -> None:
    text, w = encoder(1, 8)
    w["o0_bias"] = np.array([0.5], F)
    assert one_reason(build(text, w)).endswith("is not linear with constant weights")


def test_a_normalization_of_rms_that_reads_the_stream_is_refused() -> None:
    text, w = encoder(1, 8, tail="other = RMSNormalization <axis=-1> (h0, n0_g)")
    before = build(text, w, outputs=f"float[N,T,{WORDS}] logits, float[N,T,8] other", opset=23)
    assert "RMSNormalization 'node_other' reads it" in one_reason(before)


def test_a_normalization_whose_mean_is_read_is_refused() -> None:
    text, w = encoder(1, 8)
    before = build(
        text.replace("nn0 = Layer", "nn0, mu = Layer"),
        w,
        outputs=f"float[N,T,{WORDS}] logits, float[N,T,1] mu",
    )
    assert "LayerNormalization 'node_nn0' reads it" in one_reason(before)


def test_a_reader_in_a_subgraph_is_refused() -> None:
    text, w = encoder(
        0,
        8,
        tail="other = If (flag) <then_branch = a () => (float[N,T,8] p1) { p1 = Neg(x0) },"
        " else_branch = b () => (float[N,T,8] p2) { p2 = Exp(x0) }>",
    )
    before = build(text, w, "int64[N,T] ids, bool flag", f"float[N,T,{WORDS}] logits, float[N,T,8] other")
    assert "of a subgraph reads it" in one_reason(before)


def test_one_refusal_a_stream_in_linear_time() -> None:
    before = build(*encoder(40, 4, tail="z = Neg(x3)"), outputs="float[N,T,4] z")
    assert one_reason(before).startswith("81 normalizations")


# -- exported models --------------------------------------------------------------------------------


def test_an_encoder_exported_by_torch() -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    before = _exported(torch)
    folded, _, _ = fold(before)
    after, names, _ = fold(before, forms=[NAME])
    assert NAME in names
    assert ops(after)["RMSNormalization"] == ops(folded)["LayerNormalization"] == 5
    for batch in (1, 3):
        feed = {"ids": np.random.default_rng(batch).integers(0, 50, (batch, 9))}
        for got, expected in zip(run(after, feed), run(before, feed), strict=True):
            assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def _exported(torch: object) -> Program:
    from lamina.ir.capture import capture

    nn = torch.nn  # type: ignore[attr-defined]

    class Net(nn.Module):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.table, self.positions = nn.Embedding(50, 32), nn.Parameter(torch.randn(1, 9, 32))
            block = nn.TransformerEncoderLayer(
                32, 4, 64, batch_first=True, norm_first=True, activation="gelu"
            )
            self.encoder = nn.TransformerEncoder(block, 2, norm=nn.LayerNorm(32), enable_nested_tensor=False)
            self.head = nn.Linear(32, 7)

        def forward(self, ids: object) -> object:
            return self.head(self.encoder(self.table(ids) + self.positions)[:, 0])

    torch.manual_seed(0)
    net = Net().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return capture(net, example_inputs=(torch.randint(0, 50, (2, 9)),), dynamic_shapes={"ids": {0: "batch"}})


def test_all_forms_together_keep_the_function() -> None:
    before = build(*encoder(3, 16, seed=8))
    after, _, records = fold(before, forms=FORMS)
    assert not [r for r in records if r.why.startswith("undone")]
    for feed in ids((1, 5), (3, 2)):
        got, expected = run(after, feed)[0], run(before, feed)[0]
        assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
