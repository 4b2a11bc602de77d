"""RMS normalization, rotary embedding, attention, composed projections, convolved shortcut."""

from __future__ import annotations

import re

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program
from lamina.passes.fold import apply_named

F = np.float32
B, T, H, G, D = 2, 5, 4, 2, 6  # batch, length, heads, groups of heads, size of a head


def build(inputs: str, outputs: str, body: str, weights: dict[str, np.ndarray]) -> Program:
    used = {k: np.asarray(v) for k, v in weights.items() if re.search(rf"\b{k}\b", body)}
    return program(f"g ({inputs}) => ({outputs}) {{ {body} }}", used)


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- RMS normalization ------------------------------------------------------------------------------

RMS = {
    "mul, sqrt, reciprocal": "s = Mul(x, x) m = ReduceMean(s, last) a = Add(m, e) q = Sqrt(a)"
    " r = Reciprocal(q) n = Mul(x, r) y = Mul(n, w)",
    "pow, sqrt, div": "s = Pow(x, two) m = ReduceMean(s, two1) a = Add(e, m) q = Sqrt(a)"
    " n = Div(x, q) y = Mul(w, n)",
    "pow, sqrt, one over": "s = Pow(x, two) m = ReduceMean(s, last) a = Add(m, e) q = Sqrt(a)"
    " r = Div(one, q) n = Mul(r, x) y = Mul(n, w)",
    "power of -0.5": "s = Mul(x, x) m = ReduceMean(s, last) a = Add(m, e) r = Pow(a, mhalf) n = Mul(x, r)"
    " y = Mul(n, w)",
}


def rms(body: str, **other: np.ndarray) -> Program:
    weights = {
        "last": np.array([-1]),
        "two1": np.array([2]),
        "first": np.array([1]),
        "e": F(1e-5),
        "two": F(2),
        "one": F(1),
        "mhalf": F(-0.5),
        "w": random(8),
        **other,
    }
    return build("float[N,5,8] x", "float[N,5,8] z", f"{body} z = Neg(y)", weights)


def rms_feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": random(n, 5, 8, seed=n) * F(3)} for n in (1, 3)]


@pytest.mark.parametrize("body", RMS.values(), ids=RMS.keys())
def test_rms_normalization_fires(body: str) -> None:
    after = check(rms(body), "fuse_rms_normalization", rms_feeds(), limit=8)
    assert ops(after) == {"RMSNormalization": 1, "Neg": 1}
    node = next(iter(after.graph))
    assert (node.name, node.outputs[0].name) == ("node_y", "y")


def test_rms_normalization_without_weight_gets_ones() -> None:
    body = RMS["mul, sqrt, reciprocal"].replace("n = Mul(x, r) y = Mul(n, w)", "y = Mul(x, r)")
    assert ops(check(rms(body), "fuse_rms_normalization", rms_feeds(), limit=8))["RMSNormalization"] == 1


def test_rms_normalization_refuses_another_axis() -> None:
    before = rms(RMS["pow, sqrt, div"], two1=np.array([1]))
    assert reasons(before, "fuse_rms_normalization") == [
        "it is not the mean over the last axis, kept, plus a number"
    ]
    assert ops(check(before, "fuse_rms_normalization", rms_feeds()))["RMSNormalization"] == 0


def test_rms_normalization_refuses_a_root_read_elsewhere() -> None:
    body = RMS["mul, sqrt, reciprocal"].replace("y = Mul(n, w)", "u = Mul(n, w) y = Add(u, r)")
    before = rms(body)
    assert reasons(before, "fuse_rms_normalization") == [
        "x is not divided by its root, or the root is read elsewhere"
    ]


def test_rms_normalization_refuses_another_numerator() -> None:
    before = rms(RMS["pow, sqrt, div"].replace("n = Div(x, q)", "v = Exp(x) n = Div(v, q)"))
    assert ops(check(before, "fuse_rms_normalization", rms_feeds()))["RMSNormalization"] == 0


# -- rotary embedding -------------------------------------------------------------------------------

SPLIT = "r = Reshape(x, split) t = Transpose <perm=[0, 2, 1, 3]> (r)"
ROTARY = (
    "a = Slice(t, zero, big, three, two) b = Slice(t, one, big, three, two)"
    " m1 = Mul(a, c) m2 = Mul(b, s) d = Sub(m1, m2) m3 = Mul(a, s) m4 = Mul(b, c) u = Add(m3, m4)"
    " du = Unsqueeze(d, last) uu = Unsqueeze(u, last) k = Concat <axis=-1> (du, uu) y = Reshape(k, back)"
)


def rotary(body: str = f"{SPLIT} {ROTARY} z = Neg(y)", rows: int = T, **other: np.ndarray) -> Program:
    angle = np.random.default_rng(1).uniform(0, 6, (rows, D // 2))
    weights = {
        "split": np.array([0, 0, H, D]),
        "back": np.array([0, H, T, D]),
        "zero": np.array([0]),
        "one": np.array([1]),
        "two": np.array([2]),
        "three": np.array([3]),
        "last": np.array([-1]),
        "big": np.array([2**63 - 1]),
        "c": np.cos(angle).astype(np.float32),
        "s": np.sin(angle).astype(np.float32),
        **other,
    }
    return build(f"float[N,{T},{H * D}] x", f"float[N,{H},{T},{D}] z", body, weights)


def rotary_feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": random(n, T, H * D, seed=n)} for n in (1, 3)]


def test_rotary_fires_on_the_unsplit_tensor() -> None:
    after = check(rotary(), "fuse_rotary", rotary_feeds(), limit=4)
    assert ops(after)["RotaryEmbedding"] == 1
    assert ops(after)["Slice"] == ops(after)["Sub"] == 0
    node = next(n for n in after.graph if n.op_type == "RotaryEmbedding")
    assert node.inputs[0].name == "x"
    assert next(n.op_type for n in after.graph if n.name == "node_y") == "Transpose"


def test_rotary_fires_on_split_heads() -> None:
    body = f"t0 = Reshape(x, split) t1 = Transpose <perm=[0, 2, 1, 3]> (t0) t = Neg(t1) {ROTARY} z = Neg(y)"
    after = check(rotary(body), "fuse_rotary", rotary_feeds(), limit=4)
    assert next(n.op_type for n in after.graph if n.name == "node_y") == "RotaryEmbedding"


def test_rotary_does_not_read_the_batch_off_an_activation() -> None:
    after = apply_named(rotary(), ["fuse_rotary"])
    assert next(n for n in after.graph if n.op_type == "Shape").inputs[0].name == "x"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("d = Sub(m1, m2)", "d = Sub(m2, m1)"),
        ("m3 = Mul(a, s) m4 = Mul(b, c)", "m3 = Mul(a, c) m4 = Mul(b, s)"),
        ("b = Slice(t, one, big, three, two)", "v = Neg(t) b = Slice(v, one, big, three, two)"),
    ],
)
def test_rotary_refuses_other_arithmetic(old: str, new: str) -> None:
    before = rotary(f"{SPLIT} {ROTARY} z = Neg(y)".replace(old, new))
    assert reasons(before, "fuse_rotary") == ["it does not rotate the even and odd elements of one tensor"]
    assert ops(check(before, "fuse_rotary", rotary_feeds()))["RotaryEmbedding"] == 0


def test_rotary_refuses_a_table_of_one_row() -> None:
    before = rotary(rows=1)
    assert reasons(before, "fuse_rotary") == ["cos and sin are not known to be [t, d/2]"]


# -- attention --------------------------------------------------------------------------------------


def heads(name: str, count: int, perm: str = "0, 2, 1, 3") -> str:
    return f"{name}r = Reshape({name}, split{count}) {name}t = Transpose <perm=[{perm}]> ({name}r)"


def repeat(name: str) -> str:
    return (
        f"{name}u = Unsqueeze({name}t, two) {name}e = Expand({name}u, times) {name}p = Reshape({name}e, all)"
    )


CORE = "s = MatMul(qt, kx) s1 = Mul(s, scale) s2 = Add(s1, m) p = Softmax <axis=-1> (s2) o = MatMul(p, vt)"
JOIN = "ot = Transpose <perm=[0, 2, 1, 3]> (o) y = Reshape(ot, join) z = Neg(y)"
PLAIN = (
    f"{heads('q', H)} {heads('k', H)} kx = Transpose <perm=[0, 1, 3, 2]> (kt) {heads('v', H)} {CORE} {JOIN}"
)
DIRECT = (
    f"{heads('q', H)} {heads('k', H, '0, 2, 3, 1').replace('kt =', 'kx =')} {heads('v', H)} {CORE} {JOIN}"
)
GROUPED = (
    f"{heads('q', H)} {heads('k', G)} {repeat('k')} kx = Transpose <perm=[0, 1, 3, 2]> (kp)"
    f" {heads('v', G)} {repeat('v')} {CORE.replace('vt', 'vp')} {JOIN}"
)
MASK = np.where(np.random.default_rng(5).random((T, T)) < 0.3, F(-3e38), F(0)).astype(np.float32)
CAUSAL = np.triu(np.full((T, T), -1e9, np.float32), 1)


def attention(body: str, kv: int = H, **other: np.ndarray) -> Program:
    weights = {
        f"split{H}": np.array([0, 0, H, D]),
        f"split{G}": np.array([0, 0, G, D]),
        "two": np.array([2]),
        "times": np.array([1, 1, H // G, 1, 1]),
        "all": np.array([0, H, T, D]),
        "join": np.array([0, 0, H * D]),
        "scale": F(0.3),
        "m": MASK,
        **other,
    }
    inputs = f"float[N,{T},{H * D}] q, float[N,{T},{kv * D}] k, float[N,{T},{kv * D}] v"
    return build(inputs, f"float[N,{T},{H * D}] z", body, weights)


def attention_feeds(kv: int = H) -> list[dict[str, np.ndarray]]:
    widths = {"q": H * D, "k": kv * D, "v": kv * D}
    return [{k: random(n, T, w, seed=n + w + ord(k)) for k, w in widths.items()} for n in (1, 3)]


@pytest.mark.parametrize(
    ("body", "kv"), [(PLAIN, H), (DIRECT, H), (GROUPED, G)], ids=["plain", "k", "grouped"]
)
@pytest.mark.parametrize(
    "mask",
    [MASK, MASK[None], MASK[None, None], np.stack([MASK, MASK.T, MASK * 0, CAUSAL]), MASK[:1]],
    ids=["2-D", "3-D", "4-D", "per head, 3-D", "per key"],
)
def test_attention_fires_on_unsplit_tensors(body: str, kv: int, mask: np.ndarray) -> None:
    after = check(attention(body, kv, m=mask), "fuse_attention", attention_feeds(kv), limit=16)
    assert set(ops(after)) <= {"Attention", "Neg", "Expand", "Concat"}
    node = next(n for n in after.graph if n.op_type == "Attention")
    assert (node.attributes["q_num_heads"].value, node.attributes["kv_num_heads"].value) == (H, kv)
    assert (node.name, node.outputs[0].name) == ("node_y", "y")


@pytest.mark.parametrize(("body", "kv"), [(PLAIN, H), (GROUPED, G)], ids=["plain", "grouped"])
def test_attention_fires_on_split_heads(body: str, kv: int) -> None:
    split = body.replace("y = Reshape(ot, join) z = Neg(y)", "y0 = Relu(ot) y = Reshape(y0, join) z = Neg(y)")
    after = check(attention(split, kv), "fuse_attention", attention_feeds(kv), limit=16)
    assert ops(after)["Attention"] == 1
    assert ops(after)["MatMul"] == ops(after)["Softmax"] == ops(after)["Expand"] == 0


def test_attention_without_mask_and_with_scaled_operands() -> None:
    body = PLAIN.replace("s1 = Mul(s, scale) s2 = Add(s1, m)", "s2 = Div(s, scale)").replace(
        "s = MatMul(qt, kx)", "qs = Mul(qt, scale) ks = Mul(kx, scale) s = MatMul(qs, ks)"
    )
    after = check(attention(body), "fuse_attention", attention_feeds(), limit=16)
    assert ops(after) == {"Attention": 1, "Neg": 1}
    assert next(iter(after.graph)).attributes["scale"].value == pytest.approx(0.3, rel=1e-6)


def test_attention_makes_a_causal_mask_its_own() -> None:
    after = check(attention(PLAIN, m=CAUSAL), "fuse_attention", attention_feeds(), limit=16)
    node = next(iter(after.graph))
    assert node.attributes["is_causal"].value == 1
    assert len(node.inputs) == 3


@pytest.mark.parametrize("change", [(0, 0, -1e9), (1, 0, 0.5), (0, 1, 0.0), (0, 1, -1e4)])
def test_attention_keeps_a_mask_that_is_nearly_causal(change: tuple[int, int, float]) -> None:
    mask = CAUSAL.copy()
    mask[change[0], change[1]] = change[2]
    after = check(attention(PLAIN, m=mask), "fuse_attention", attention_feeds(), limit=16)
    assert len(next(iter(after.graph)).inputs) == 4


def test_attention_on_one_unsplit_head() -> None:
    body = "kx = Transpose <perm=[0, 2, 1]> (k) s = MatMul(q, kx) s1 = Mul(scale, s)"
    body += " p = Softmax(s1) y = MatMul(p, v)"
    after = check(attention(f"{body} z = Neg(y)"), "fuse_attention", attention_feeds(), limit=16)
    assert ops(after) == {"Attention": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<axis=-1> (s2)", "<axis=2> (s2)", "its softmax is not known to be over the last axis"),
        (
            "Transpose <perm=[0, 1, 3, 2]> (kt)",
            "Reshape(kt, turn)",
            "k is not transposed right before the product",
        ),
        (
            "s1 = Mul(s, scale)",
            "s0 = Mul(s, scale) s1 = Mul(s0, s)",
            "its scores are no product of two tensors, or are read elsewhere",
        ),
    ],
)
def test_attention_refuses(old: str, new: str, reason: str) -> None:
    before = attention(PLAIN.replace(old, new), turn=np.array([0, H, D, T]))
    assert reasons(before, "fuse_attention") == [reason]
    assert ops(check(before, "fuse_attention", attention_feeds()))["Attention"] == 0


def test_attention_refuses_a_mask_of_another_length() -> None:
    before = attention(PLAIN, m=np.zeros((T, 1), np.float32))
    assert reasons(before, "fuse_attention") == [
        "its mask is not known to broadcast to [b, h, t, s] with all of s"
    ]


def test_attention_refuses_probabilities_read_elsewhere() -> None:
    before = attention(
        PLAIN.replace("o = MatMul(p, vt)", "o0 = MatMul(p, vt) o1 = ReduceSum(p) o = Mul(o0, o1)")
    )
    assert reasons(before, "fuse_attention") == []
    assert ops(check(before, "fuse_attention", attention_feeds()))["Attention"] == 0


# -- composed projections ---------------------------------------------------------------------------

SINGLE = (
    "q = MatMul(x, wq) k = MatMul(x, wk) kx = Transpose <perm=[0, 2, 1]> (k) s = MatMul(q, kx)"
    " p = Softmax <axis=-1> (s) v = MatMul(x, wv) o = MatMul(p, v) y = MatMul(o, wo) z = Neg(y)"
)


def single(body: str = SINGLE, width: int = 8, inner: int = 8) -> Program:
    weights = {k: random(width, inner, seed=i) for i, k in enumerate(("wq", "wk", "wv"))}
    weights |= {"wo": random(inner, width, seed=9), "bias": random(inner)}
    return build(f"float[N,5,{width}] x", f"float[N,5,{width}] z", body, weights)


def test_compose_saves_two_projections() -> None:
    after = check(single(), "compose_projections", rms_feeds(), limit=256)
    assert ops(after) == {"MatMul": 4, "Transpose": 1, "Softmax": 1, "Neg": 1}
    assert {n.name for n in after.graph} >= {"node_s", "node_y"}


def test_compose_then_attention() -> None:
    after = apply_named(single(), ["compose_projections", "fuse_attention", "remove_unused"])
    assert ops(after) == {"MatMul": 2, "Attention": 1, "Neg": 1}
    assert len(after.graph.initializers) == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("v = MatMul(x, wv)", "v0 = MatMul(x, wv) v = Add(v0, bias)"),
        ("y = MatMul(o, wo)", "y0 = MatMul(o, wo) y = Add(y0, o)"),
    ],
)
def test_compose_refuses_value_and_output(old: str, new: str) -> None:
    after = check(single(SINGLE.replace(old, new)), "compose_projections", rms_feeds(), limit=256)
    assert ops(after)["MatMul"] == 5  # query and key still compose


def test_compose_refuses_a_narrow_inner_width() -> None:
    before = single(inner=4)
    assert reasons(before, "compose_projections") == ["the composed matrix would cost more"] * 2


# -- convolved shortcut -----------------------------------------------------------------------------

SHORTCUT = "a = Slice(x, zero, big, two, two) b = Slice(a, zero, big, three, two) y = Pad(b, pads) z = Neg(y)"


def shortcut(body: str = SHORTCUT, **other: np.ndarray) -> Program:
    weights = {
        "zero": np.array([0]),
        "one": np.array([1]),
        "big": np.array([2**63 - 1]),
        "two": np.array([2]),
        "three": np.array([3]),
        "pads": np.array([0, 1, 0, 0, 0, 2, 0, 0]),
        "five": F(5),
        **other,
    }
    return build("float[N,3,7,6] x", "float[N,C,P,Q] z", body, weights)


def shortcut_feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": random(n, 3, 7, 6, seed=n)} for n in (1, 3)]


def test_shortcut_becomes_a_convolution_bit_for_bit() -> None:
    assert ops(check(shortcut(), "convolve_shortcut", shortcut_feeds())) == {"Conv": 1, "Neg": 1}


@pytest.mark.parametrize(
    "other",
    [
        {"zero": np.array([1])},
        {"pads": np.array([0, 1, 1, 0, 0, 2, 0, 0])},
        {"pads": np.array([0, -1, 0, 0, 0, 2, 0, 0])},
        {"big": np.array([4])},
    ],
)
def test_shortcut_refuses_other_slices_and_pads(other: dict[str, np.ndarray]) -> None:
    before = shortcut(**other)
    assert len(reasons(before, "convolve_shortcut")) == 1
    assert ops(check(before, "convolve_shortcut", shortcut_feeds()))["Conv"] == 0


def test_shortcut_refuses_another_padding_value() -> None:
    before = shortcut(SHORTCUT.replace("Pad(b, pads)", "Pad(b, pads, five)"))
    assert ops(check(before, "convolve_shortcut", shortcut_feeds()))["Conv"] == 0


def test_plain_padding_is_left_alone() -> None:
    before = shortcut("y = Pad(x, pads) z = Neg(y)")
    assert reasons(before, "convolve_shortcut") == []
