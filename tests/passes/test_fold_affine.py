"""Scales, shifts and normalizations folded into the linear operator before or after them, by execution."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program

LIMIT = 64


def random(rng: np.random.Generator, *shape: int, dtype: type = np.float32) -> np.ndarray:
    """Numbers of both signs that are not near zero, so that nothing cancels by chance."""
    return (rng.uniform(0.5, 1.5, shape) * rng.choice([-1, 1], shape)).astype(dtype)


def affine_text(kind: str, source: str, result: str) -> str:
    return {
        "mul": f"{result} = Mul({source}, s)",
        "mul_left": f"{result} = Mul(s, {source})",
        "div": f"{result} = Div({source}, s)",
        "add": f"{result} = Add({source}, t)",
        "sub": f"{result} = Sub({source}, t)",
        "sub_left": f"{result} = Sub(t, {source})",
        "neg": f"{result} = Neg({source})",
        "mul_add": f"m = Mul({source}, s) {result} = Add(m, t)",
        "bn": f"{result} = BatchNormalization <epsilon=0.01> ({source}, g, b, mean, var)",
    }[kind]


KINDS = ("mul", "mul_left", "div", "add", "sub", "sub_left", "neg", "mul_add", "bn")


def affine_weights(kind: str, rng: np.random.Generator, shape: tuple[int, ...], channels: int) -> dict:
    if kind == "bn":
        return {
            "g": random(rng, channels),
            "b": random(rng, channels),
            "mean": random(rng, channels),
            "var": np.abs(random(rng, channels)),
        }
    found = {"s": random(rng, *shape), "t": random(rng, *shape)}
    uses = {"add": "t", "sub": "t", "sub_left": "t", "neg": "", "mul_add": "st"}.get(kind, "s")
    return {k: v for k, v in found.items() if k in uses}


def dims(rank: int, channels: int) -> str:
    return ",".join(["N", str(channels), *"HWD"[: rank - 2]])


def conv_case(
    kind: str,
    rng: np.random.Generator,
    *,
    after: bool,
    transposed: bool = False,
    groups: int = 1,
    rank: int = 4,
    bias: bool = True,
    per_channel: bool = True,
    attributes: str = "",
) -> tuple[Program, list[dict[str, np.ndarray]]]:
    c_in, c_out, kernel = 2 * groups, 3 * groups, tuple(int(k) for k in rng.integers(1, 4, rank - 2))
    shape = (c_in, c_out // groups, *kernel) if transposed else (c_out, c_in // groups, *kernel)
    channels = c_out if after else c_in
    per = [(channels,) + (1,) * (rank - 2), (1, channels) + (1,) * (rank - 2)][int(rng.integers(2))]
    scalar = [(), (1,), (1,) * rank][int(rng.integers(3))]
    weights = {
        "w": random(rng, *shape),
        **affine_weights(kind, rng, per if per_channel else scalar, channels),
    }
    if bias:
        weights["c"] = random(rng, c_out)
    op, tail = "ConvTranspose" if transposed else "Conv", ", c" if bias else ""
    conv = f"{op} <group={groups}{attributes}>"
    body = (
        f"a = {conv}(x, w{tail}) {affine_text(kind, 'a', 'y')}"
        if after
        else f"{affine_text(kind, 'x', 'a')} y = {conv}(a, w{tail})"
    )
    before = program(
        f"g (float[{dims(rank, c_in)}] x) => (float[{dims(rank, c_out)}] y) {{ {body} }}", weights
    )
    sizes = [7, 8, 6][: rank - 2]
    feeds = [{"x": rng.normal(size=(n, c_in, *sizes)).astype(np.float32)} for n in (1, 2)]
    return before, feeds


# -- behind a linear operator -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("transposed", "groups"), [(False, 1), (False, 3), (True, 1), (True, 2)])
def test_after_a_convolution(kind: str, transposed: bool, groups: int) -> None:
    rng = np.random.default_rng([KINDS.index(kind), transposed, groups])
    attributes = ", strides=[2,1], pads=[0,1,1,0], dilations=[1,2]"
    for bias, per_channel in product((True, False), (True, False)):
        before, feeds = conv_case(
            kind,
            rng,
            after=True,
            transposed=transposed,
            groups=groups,
            bias=bias,
            per_channel=per_channel,
            attributes=attributes,
        )
        after = check(before, "fold_affine", feeds, LIMIT)
        assert ops(after) == {"ConvTranspose" if transposed else "Conv": 1}


@pytest.mark.parametrize("rank", [3, 5])
@pytest.mark.parametrize("after", [True, False])
def test_other_ranks(rank: int, after: bool) -> None:
    rng = np.random.default_rng(rank)
    for kind in ("bn", "mul_add"):
        before, feeds = conv_case(kind, rng, after=after, rank=rank, groups=2)
        assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"Conv": 1}


def test_after_a_convolution_that_pads_itself() -> None:
    rng = np.random.default_rng(0)
    before, feeds = conv_case("bn", rng, after=True, attributes=', auto_pad="SAME_UPPER"')
    assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"Conv": 1}


# -- in front of a convolution ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [1, 3])
def test_before_a_convolution_without_padding(kind: str, groups: int) -> None:
    rng = np.random.default_rng([KINDS.index(kind), groups])
    for bias, per_channel in product((True, False), (True, False)):
        before, feeds = conv_case(
            kind,
            rng,
            after=False,
            groups=groups,
            bias=bias,
            per_channel=per_channel,
            attributes=", strides=[1,2], dilations=[2,1]",
        )
        assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"Conv": 1}


@pytest.mark.parametrize("kind", ["mul", "div", "neg"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_scale_before_passes_padding_and_transposed_convolutions(kind: str, groups: int) -> None:
    rng = np.random.default_rng(groups)
    for transposed in (False, True):
        attributes = ", pads=[1,0,0,1], strides=[2,2]"
        before, feeds = conv_case(
            kind, rng, after=False, transposed=transposed, groups=groups, attributes=attributes
        )
        assert ops(check(before, "fold_affine", feeds, LIMIT))["Conv" + "Transpose" * transposed] == 1
        assert len(check(before, "fold_affine", feeds, LIMIT).graph) == 1


@pytest.mark.parametrize("attributes", [", pads=[1,0,0,0]", ', auto_pad="SAME_LOWER"'])
def test_a_shift_does_not_cross_padding(attributes: str) -> None:
    before, feeds = conv_case("bn", np.random.default_rng(3), after=False, attributes=attributes)
    assert len(check(before, "fold_affine", feeds).graph) == 2
    assert reasons(before, "fold_affine") == ["zero padding: the shift would not reach the border"]


def test_a_shift_crosses_a_transposed_convolution_only_point_by_point() -> None:
    def case(k: int, stride: int) -> tuple[Program, list[dict[str, np.ndarray]]]:
        rng = np.random.default_rng(k)
        weights = {"w": random(rng, 3, 2, k, k), "t": random(rng, 3, 1, 1)}
        body = f"a = Add(x, t) y = ConvTranspose <strides=[{stride},{stride}]> (a, w)"
        before = program(f"g (float[N,3,H,W] x) => (float[N,2,P,Q] y) {{ {body} }}", weights)
        return before, [{"x": rng.normal(size=(2, 3, 4, 5)).astype(np.float32)}]

    assert ops(check(*_named(case(1, 1)), LIMIT)) == {"ConvTranspose": 1}
    for k, stride in ((2, 1), (1, 2)):
        before, feeds = case(k, stride)
        assert len(check(before, "fold_affine", feeds).graph) == 2
        assert reasons(before, "fold_affine") == ["a transposed convolution spreads the shift unevenly"]


def _named(case: tuple[Program, list]) -> tuple[Program, str, list]:
    return case[0], "fold_affine", case[1]


# -- Gemm and MatMul --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("trans_a", "trans_b"), list(product((0, 1), (0, 1))))
def test_gemm_in_both_directions(kind: str, trans_a: int, trans_b: int) -> None:
    rng = np.random.default_rng([KINDS.index(kind), trans_a, trans_b])
    for after, c_shape, factors in product(
        (True, False), (None, (), (4,), (1, 4), (5, 1), (5, 4)), ("", ", alpha=0.5, beta=2.0")
    ):
        if kind == "bn" and trans_a and not after:
            continue
        channels = 4 if after else 3
        shape = (channels, 1) if trans_a and not after else [(channels,), (1, channels), ()][rng.integers(3)]
        weights = {"w": random(rng, *((4, 3) if trans_b else (3, 4)))}
        weights.update(affine_weights(kind, rng, tuple(shape), channels))
        tail = ""
        if c_shape is not None:
            weights["c"], tail = random(rng, *c_shape), ", c"
        gemm = f"Gemm <transA={trans_a}, transB={trans_b}{factors}>"
        body = (
            f"a = {gemm}(x, w{tail}) {affine_text(kind, 'a', 'y')}"
            if after
            else f"{affine_text(kind, 'x', 'a')} y = {gemm}(a, w{tail})"
        )
        x_dims = "3,5" if trans_a else "5,3"
        before = program(f"g (float[{x_dims}] x) => (float[5,4] y) {{ {body} }}", weights)
        feeds = [{"x": rng.normal(size=(3, 5) if trans_a else (5, 3)).astype(np.float32)}]
        after_fold = check(before, "fold_affine", feeds, LIMIT)
        if c_shape == (5, 1):  # a column of offsets may not become a matrix of them
            assert len(after_fold.graph) in (1, 2, 3)
        else:
            assert ops(after_fold) == {"Gemm": 1}


@pytest.mark.parametrize("x_dims", ["N,T,3", "N,3", "3", "A,B,N,3"])
def test_matmul_and_its_bias_take_a_scale_from_both_sides(x_dims: str) -> None:
    rng = np.random.default_rng(len(x_dims))
    weights = {k: random(rng, *s) for k, s in {"p": (3,), "w": (3, 4), "b": (4,), "s": (4,), "t": ()}.items()}
    body = "a = Mul(x, p) m = MatMul(a, w) c = Add(b, m) d = Div(c, s) y = Sub(d, t)"
    out = ",".join([*x_dims.split(",")[:-1], "4"])
    before = program(f"g (float[{x_dims}] x) => (float[{out}] y) {{ {body} }}", weights)
    feeds = [{"x": rng.normal(size=(2, 5, 2, 3)[4 - len(x_dims.split(",")) :]).astype(np.float32)}]
    after = check(before, "fold_affine", feeds, LIMIT)
    assert ops(after) == {"MatMul": 1, "Add": 1}
    assert after.outputs[0].name == "y"


def test_batch_normalization_behind_and_in_front_of_a_flat_matmul() -> None:
    rng = np.random.default_rng(5)
    weights = {"w": random(rng, 4, 4), **affine_weights("bn", rng, (), 4)}
    for body in (
        "a = MatMul(x, w) y = BatchNormalization(a, g, b, mean, var)",
        "a = BatchNormalization(x, g, b, mean, var) y = MatMul(a, w)",
    ):
        before = program(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", weights)
        feeds = [{"x": rng.normal(size=(n, 4)).astype(np.float32)} for n in (1, 6)]
        assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"MatMul": 1, "Add": 1}


def test_a_bias_by_position_is_scaled_with_the_product() -> None:
    rng = np.random.default_rng(6)
    weights = {"w": random(rng, 3, 4), "b": random(rng, 5, 4), "s": random(rng, 4)}
    body = "m = MatMul(x, w) c = Add(m, b) y = Mul(c, s)"
    before = program(f"g (float[N,5,3] x) => (float[N,5,4] y) {{ {body} }}", weights)
    feeds = [{"x": rng.normal(size=(2, 5, 3)).astype(np.float32)}]
    assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"MatMul": 1, "Add": 1}


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_floating_types(dtype: type) -> None:
    rng = np.random.default_rng(7)
    kind = {np.float64: "double", np.float16: "float16"}[dtype]
    weights = {"w": random(rng, 3, 4, dtype=dtype), "s": random(rng, 4, dtype=dtype)}
    body = "m = MatMul(x, w) y = Mul(m, s)"
    before = program(f"g ({kind}[N,3] x) => ({kind}[N,4] y) {{ {body} }}", weights)
    after = check(before, "fold_affine", [{"x": rng.normal(size=(2, 3)).astype(dtype)}], LIMIT)
    assert ops(after) == {"MatMul": 1}


def test_a_chain_folds_in_one_run() -> None:
    rng = np.random.default_rng(8)
    weights = {"w": random(rng, 3, 3, 1, 1), **affine_weights("bn", rng, (), 3), "s": random(rng, 3, 1, 1)}
    body = "a = BatchNormalization(x, g, b, mean, var) k = Conv(a, w) m = Mul(k, s) n = Neg(m) y = Add(n, s)"
    before = program(f"g (float[N,3,H,W] x) => (float[N,3,H,W] y) {{ {body} }}", weights)
    feeds = [{"x": rng.normal(size=(2, 3, 4, 5)).astype(np.float32)}]
    assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"Conv": 1}


# -- refusals ---------------------------------------------------------------------------------------

W = np.random.default_rng(9).uniform(0.5, 1, (3, 3, 1, 1)).astype(np.float32)
S = np.float32([[[2]], [[3]], [[4]]])


def refused(body: str, weights: dict, reason: str | None, outputs: str = "float[N,3,H,W] y") -> Program:
    text = f"g (float[N,3,H,W] x) => ({outputs}) {{ {body} }}"
    before = program(text, weights)
    feeds = [{"x": np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)}]
    after = check(before, "fold_affine", feeds)
    assert ops(after) == ops(before)
    found = reasons(before, "fold_affine")
    assert (found[0] if found else None) == reason
    return before


def test_refuses_a_value_that_is_read_elsewhere() -> None:
    elsewhere = "the value between the two is read elsewhere"
    refused("k = Conv(x, w) m = Mul(k, s) y = Max(m, k)", {"w": W, "s": S}, elsewhere)
    refused("m = Mul(x, s) k = Conv(m, w) y = Max(m, k)", {"w": W, "s": S}, elsewhere)
    outputs = "float[N,3,H,W] y, float[N,3,H,W] k"
    refused("k = Conv(x, w) y = Mul(k, s)", {"w": W, "s": S}, elsewhere, outputs)


def test_refuses_a_value_that_a_subgraph_reads() -> None:
    body = (
        "k = Conv(x, w) m = Mul(k, s) r = ReduceSum <keepdims=0> (x) z = Cast <to=9> (r)"
        " y = If (z) <then_branch = t () => (float[N,3,H,W] p) { p = Identity(k) },"
        " else_branch = e () => (float[N,3,H,W] q) { q = Neg(m) }>"
    )
    before = program(f"g (float[N,3,H,W] x) => (float[N,3,H,W] y) {{ {body} }}", {"w": W, "s": S})
    feeds = [{"x": v * np.ones((1, 3, 2, 2), np.float32)} for v in (1, 0)]
    assert ops(check(before, "fold_affine", feeds)) == ops(before)


def test_refuses_shared_weights() -> None:
    shared = "its weight is shared: a copy would grow the file"
    weights = {"w": random(np.random.default_rng(3), 3, 3, 3, 3), "s": S}
    conv = "Conv <pads=[1,1,1,1]>"
    refused(f"k = {conv}(x, w) m = Mul(k, s) j = {conv}(x, w) y = Max(m, j)", weights, shared)
    refused(f"m = Mul(x, s) k = {conv}(m, w) j = {conv}(x, w) y = Max(k, j)", weights, shared)


def test_a_shared_weight_smaller_than_what_goes_is_copied() -> None:
    rng = np.random.default_rng(2)
    weights = {"w": random(rng, 3, 1, 1, 1), **affine_weights("bn", rng, (), 3)}
    conv = "Conv <group=3>"
    body = f"k = {conv}(x, w) m = BatchNormalization(k, g, b, mean, var) j = {conv}(x, w) y = Max(m, j)"
    before = program(f"g (float[N,3,H,W] x) => (float[N,3,H,W] y) {{ {body} }}", weights)
    feeds = [{"x": rng.normal(size=(2, 3, 4, 5)).astype(np.float32)}]
    assert ops(check(before, "fold_affine", feeds, LIMIT)) == {"Conv": 2, "Max": 1}


def test_refuses_overridable_and_computed_weights() -> None:
    text = "g (float[N,3,H,W] x, float[3,3,1,1] w) => (float[N,3,H,W] y) {{ {} }}"
    before = program(text.format("k = Conv(x, w) y = Mul(k, s)"), {"s": S})
    w = before.model.graph.inputs[1]
    assert reasons(before, "fold_affine") == []
    import onnx_ir as ir

    w.const_value = ir.Tensor(W, name="w")
    before.model.graph.register_initializer(w)
    assert reasons(before, "fold_affine") == ["its weight is a graph input"]


def test_refuses_constants_over_more_than_channels() -> None:
    reason = "the constant varies over more than channels, or may change the shape"
    for shape in ((4, 5), (3, 4, 5), (1, 1, 1, 5), (2, 1, 1, 1), (1, 1, 3, 1, 1)):
        s = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
        for body in ("k = Conv(x, w) y = Mul(k, s)", "m = Mul(x, s) y = Conv(m, w)"):
            if len(shape) == 5 and "m =" in body:
                continue
            outputs = "float[A,N,C,H,W] y" if len(shape) == 5 else "float[N,C,H,W] y"
            feeds = [{"x": np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)}]
            before = program(f"g (float[2,3,4,5] x) => ({outputs}) {{ {body} }}", {"w": W, "s": s})
            assert ops(check(before, "fold_affine", feeds)) == ops(before)
            assert reasons(before, "fold_affine") == [reason]


@pytest.mark.parametrize("x_dims", ["N,1,H,W", "N,C,H,W", "3,H,W"])
def test_refuses_a_constant_that_may_widen_its_input(x_dims: str) -> None:
    s = S[None] if x_dims == "3,H,W" else S
    body = "m = Mul(x, s) y = Conv(m, w)"
    before = program(f"g (float[{x_dims}] x) => (float[N,3,H,W] y) {{ {body} }}", {"w": W, "s": s})
    shape = {"N,1,H,W": (2, 1, 4, 5), "N,C,H,W": (2, 1, 4, 5), "3,H,W": (3, 4, 5)}[x_dims]
    feeds = [{"x": np.random.default_rng(1).normal(size=shape).astype(np.float32)}]
    assert ops(check(before, "fold_affine", feeds)) == ops(before)


@pytest.mark.parametrize(
    ("weight", "scale"),
    [(1e30, 1e20), (1e-30, 1e-20), (1e-38, 0.01), (1, np.inf), (1, np.nan), (1e38, 100)],
)
def test_refuses_to_overflow_or_underflow(weight: float, scale: float) -> None:
    text = "g (float[N,3,H,W] x) => (float[N,3,H,W] y) { k = Conv(x, w) y = Mul(k, s) }"
    with np.errstate(all="ignore"):
        weights = {"w": (W * weight).astype(np.float32), "s": (S * scale).astype(np.float32)}
    assert reasons(program(text, weights), "fold_affine") == [
        "the folded constants would overflow or underflow"
    ]


def test_division_by_zero_stays() -> None:
    text = "g (float[N,3,H,W] x) => (float[N,3,H,W] y) { k = Conv(x, w) y = Div(k, s) }"
    weights = {"w": W, "s": S * 0}
    assert reasons(program(text, weights), "fold_affine") == [
        "the folded constants would overflow or underflow"
    ]


def test_zero_scales_and_small_weights_beside_large_ones_fold() -> None:
    weights = {"w": W.copy(), "s": np.float32([[[0]], [[3]], [[1e-3]]])}
    weights["w"][:, 0] = 1e-37
    text = "g (float[N,3,H,W] x) => (float[N,3,H,W] y) { k = Conv(x, w) y = Mul(k, s) }"
    feeds = [{"x": np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)}]
    assert ops(check(program(text, weights), "fold_affine", feeds, LIMIT)) == {"Conv": 1}


def test_refuses_additions_that_round_on_purpose() -> None:
    big = np.full((3, 1, 1), 12582912.0, np.float32)
    reason = "it nearly cancels the bias: the order of the additions matters"
    refused("k = Conv(x, w, c) y = Sub(k, t)", {"w": W, "c": big.reshape(3), "t": big}, reason)


def test_refuses_training_mode_and_integers() -> None:
    rng = np.random.default_rng(4)
    bn = affine_weights("bn", rng, (), 3)
    body = "k = Conv(x, w) y, m, v = BatchNormalization <training_mode=1> (k, g, b, mean, var)"
    refused(body, {"w": W, **bn}, None)
    text = "g (int32[N,3] x) => (int32[N,3] y) { m = MatMul(x, w) y = Mul(m, s) }"
    before = program(text, {"w": np.ones((3, 3), np.int32), "s": np.int32([1, 2, 3])})
    assert ops(check(before, "fold_affine", [{"x": np.ones((2, 3), np.int32)}])) == ops(before)


def test_a_plain_matmul_and_bias_is_left_as_it_is() -> None:
    rng = np.random.default_rng(4)
    weights = {"w": random(rng, 3, 4), "b": random(rng, 4)}
    before = program("g (float[N,3] x) => (float[N,4] y) { m = MatMul(x, w) y = Add(m, b) }", weights)
    feeds = [{"x": rng.normal(size=(2, 3)).astype(np.float32)}]
    assert ops(check(before, "fold_affine", feeds)) == {"MatMul": 1, "Add": 1}
    assert reasons(before, "fold_affine") == []


def test_a_shift_before_a_widening_matmul_without_bias_stays() -> None:
    rng = np.random.default_rng(4)
    weights = {"w": random(rng, 3, 4), "b": random(rng, 3)}
    before = program("g (float[N,3] x) => (float[N,4] y) { a = Add(x, b) y = MatMul(a, w) }", weights)
    assert reasons(before, "fold_affine") == ["adding it behind the product would cost more"]


@pytest.mark.parametrize(
    "text",
    [
        # a decomposed RMS normalization and its gain
        "s = Mul (x, x) m = ReduceMean <keepdims = 1> (s, last) e = Add (m, eps) r = Sqrt (e) n = Div (x, r)"
        " h = Mul (n, g)",
        "s = Mul (x, x) m = ReduceMean <keepdims = 1> (s, last) e = Add (m, eps) r = Sqrt (e)"
        " i = Reciprocal (r) n = Mul (x, i) h = Mul (g, n)",
        # the shift of a layer normalization
        "s = Mul (x, x) m = ReduceMean <keepdims = 1> (s, last) e = Add (m, eps) r = Sqrt (e) n = Div (x, r)"
        " o = Mul (n, g) h = Add (o, g)",
        # the half of a GELU
        "d = Div (x, root) f = Erf (d) a = Add (f, one) p = Mul (x, a) h = Mul (p, half)",
    ],
)
def test_what_a_runtime_fuses_as_a_whole_stays_whole(text: str) -> None:
    rng = np.random.default_rng(0)
    numbers = {"root": 2**0.5, "one": 1.0, "half": 0.5, "eps": 1e-5}
    weights = {name: np.array(number, np.float32) for name, number in numbers.items()}
    weights |= {"g": rng.standard_normal(6).astype(np.float32), "last": np.array([-1])}
    used = {
        k: v
        for k, v in weights.items()
        if k in text.replace(",", " ").replace(")", " ").split() or f"({k}" in text
    }
    used["w"] = rng.standard_normal((6, 4)).astype(np.float32)
    found = program(f"g (float[n, 6] x) => (float[n, 4] y) {{ {text} y = MatMul (h, w) }}", used)
    assert reasons(found, "fold_affine") == [
        "it completes a normalization or GELU, which runtimes fuse as a whole"
    ]
    check(found, "fold_affine", [{"x": rng.standard_normal((3, 6)).astype(np.float32)}])
