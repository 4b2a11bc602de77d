"""No-ops and chains in linear time, and Pad into the operator behind it: held to execution."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program

I64 = np.int64


def build(
    body: str, x: str = "N,3,4", y: str = "A,B,C", opset: int = 18, kind: str = "float", **weights: object
) -> Program:
    return program(
        f"g (float[{x}] x) => ({kind}[{y}] y) {{ {body} }}",
        {k: np.asarray(v) for k, v in weights.items()},
        opset,
    )


def feeds(*shape: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)} for n in (1, 2)]


# -- nothing left -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("b = Transpose <perm=[0,1,2]> (a)", {}),
        ("t = Transpose <perm=[2,0,1]> (a) b = Transpose <perm=[1,2,0]> (t)", {}),
        ("t = Transpose(a) b = Transpose(t)", {}),
        ("b = Reshape(a, s)", {"s": I64([-1, 3, 4])}),
        ("b = Reshape(a, s)", {"s": I64([0, 0, -1])}),
        ("t = Unsqueeze(a, s) b = Squeeze(t, s)", {"s": I64([1])}),
        ("u = Unsqueeze(a, s) t = Squeeze(u, s) b = Identity(t)", {"s": I64([1])}),
        ("b = Cast <to=1> (a)", {}),
        ("d = Cast <to=11> (a) b = Cast <to=1> (d)", {}),
        ("b = Expand(a, s)", {"s": I64([1, 3, 1])}),
        ("b = Expand(a, s)", {"s": I64([])}),
        ("b = Slice(a, z, e, s)", {"z": I64([0, 0]), "e": I64([3, 2**62]), "s": I64([1, -1])}),
        ("b = Pad(a, z)", {"z": I64([0] * 6)}),
        ("b, m = Dropout(a, r)", {"r": np.float32(0.5)}),
        ("b = Concat <axis=1> (a)", {}),
        ("b = Sum(a)", {}),
        ("b = Mul(one, a)", {"one": np.float32(1)}),
        ("b = Div(a, one)", {"one": np.float32([1])}),
        ("b = Add(a, zero)", {"zero": np.float32([[0]])}),
        ("b = Sub(a, zero)", {"zero": np.float32(0)}),
    ],
)
def test_what_does_nothing_goes(body: str, weights: dict) -> None:
    before = build(f"a = Exp(x) {body} y = Neg(b)", **weights)
    after = check(before, "simplify_local", feeds(3, 4))
    assert {k: n for k, n in ops(after).items() if k != "Identity"} == {"Exp": 1, "Neg": 1}


@pytest.mark.parametrize(
    ("body", "weights"),
    [
        ("b = Transpose <perm=[0,2,1]> (a)", {}),
        ("b = Reshape(a, s)", {"s": I64([-1, 4, 3])}),
        ("b = Expand(a, s)", {"s": I64([2, 1, 1, 1])}),
        ("b = Slice(a, z, e, s)", {"z": I64([0]), "e": I64([100]), "s": I64([0])}),
        ("b = Slice(a, z, e, s, t)", {"z": I64([0]), "e": I64([4]), "s": I64([2]), "t": I64([2])}),
        ("b = Slice(a, z, e, s)", {"z": I64([0]), "e": I64([-1]), "s": I64([2])}),
        ("b = Mul(a, one)", {"one": np.float32([[[[1]]]])}),
        ("b = Add(a, small)", {"small": np.float32(1e-30)}),
        ("b = Sub(zero, a)", {"zero": np.float32(0)}),
        ("b = Div(one, a)", {"one": np.float32(1)}),
        ("b = Mul(a, ones)", {"ones": np.ones((2, 1, 3, 4), np.float32)}),
        ("d = Cast <to=10> (a) b = Cast <to=1> (d)", {}),
        ("d = Cast <to=6> (a) b = Cast <to=1> (d)", {}),
        ("t = Unsqueeze(a, s) b = Squeeze(t, q)", {"s": I64([1]), "q": I64([-1])}),
    ],
)
def test_what_does_something_stays(body: str, weights: dict) -> None:
    if "q" in weights:  # only a batch of one can be squeezed there
        body = body.replace("Squeeze(t, q)", "Reshape(t, q)")
        weights = {"s": I64([1]), "q": I64([-1, 12])}
    rank4 = any(np.ndim(v) == 4 for v in weights.values()) or body == "b = Expand(a, s)"
    before = build(
        f"a = Exp(x) {body} y = Neg(b)",
        y="A,B,C,D" if rank4 else "A,B" if "q" in weights else "A,B,C",
        **weights,
    )
    after = check(before, "simplify_local", feeds(3, 4))
    assert len(after.graph) >= 3


def test_an_operator_between_two_interface_tensors_stays() -> None:
    before = build("y = Reshape(x, s)", y="N,3,4", s=I64([-1, 3, 4]))
    assert ops(check(before, "simplify_local", feeds(3, 4))) == {"Reshape": 1}


def test_dropout_that_may_train_or_gives_its_mask_stays() -> None:
    body = "a = Exp(x) b, m = Dropout(a, r, t) y = Neg(b)"
    before = build(body, r=np.float32(0.5), t=np.array(True))
    assert reasons(before, "simplify_local") == []
    text = "a = Exp(x) b, m = Dropout(a, r) c = Where(m, b, x) y = Neg(c)"
    assert ops(check(build(text, r=np.float32(0.5)), "simplify_local", feeds(3, 4)))["Dropout"] == 1


# -- chains -----------------------------------------------------------------------------------------


def test_transposes_compose_although_the_first_is_read_elsewhere() -> None:
    body = "t = Transpose <perm=[1,2,0]> (x) u = Transpose <perm=[0,2,1]> (t) e = Exp(u) f = Neg(t)"
    body += " g = Transpose <perm=[0,2,1]> (f) y = Concat <axis=1> (e, g)"
    after = check(build(body), "simplify_local", feeds(3, 4))
    perms = [n.attributes["perm"].value for n in after.graph if n.op_type == "Transpose"]
    assert sorted(map(tuple, perms)) == [(0, 2, 1), (1, 0, 2), (1, 2, 0)]


@pytest.mark.parametrize(
    ("first", "target", "merges"),
    [
        ("Reshape(x, s)", [-1, 6], True),
        ("Flatten <axis=2> (x)", [-1, 2], True),
        ("Unsqueeze(x, o)", [-1, 3, 2, 2], True),
        ("Reshape(x, s)", [0, 6], False),  # the 0 copies a dim that only the shape in between has
        ("Unsqueeze(x, o)", [0, -1], True),  # the batch, which x has there too
    ],
)
def test_reshapes_merge_unless_one_copies_a_dim_in_between(first: str, target: list, merges: bool) -> None:
    weights = {"s": I64([-1, 2, 3]), "o": I64([1]), "k": I64(target)}
    used = {k: v for k, v in weights.items() if f" {k})" in first or k == "k"}
    y = ",".join("ABCD"[: len(target)])
    body = f"a = {first} b = Reshape(a, k) y = Exp(b)"
    before = build(body, y=y, **used)
    after = check(before, "simplify_local", feeds(3, 4))
    assert ops(after)["Reshape"] + ops(after)["Flatten"] + ops(after)["Unsqueeze"] == (1 if merges else 2)
    if not merges:
        assert reasons(before, "simplify_local") == ["it copies a dim of the shape in between"]


def test_casts_merge_when_the_first_keeps_every_bit() -> None:
    after = check(
        build("a = Cast <to=11> (x) b = Cast <to=10> (a) y = Exp(b)", kind="float16"),
        "simplify_local",
        feeds(3, 4),
    )
    assert ops(after) == {"Cast": 1, "Exp": 1}
    text = "g (int8[N] x) => (uint8[N] y) { a = Cast <to=1> (x) y = Cast <to=2> (a) }"
    assert ops(check(program(text), "simplify_local", [{"x": np.int8([1, 2, 3])}])) == {"Cast": 2}


# -- Pad --------------------------------------------------------------------------------------------

W = np.random.default_rng(0).normal(size=(2, 3, 3, 3)).astype(np.float32)
ZERO, INF = np.float32(0), np.float32(-np.inf)


def padded(node: str, pads: list[int], first: str = "Identity", **weights: object) -> Program:
    body = f"a = {first}(x) p = Pad(a, s{', v' if 'v' in weights else ''}) y = {node}"
    return build(body, x="N,3,7,8", y="A,B,C,D", s=I64(pads), **weights)


@pytest.mark.parametrize("attributes", ["", "<pads=[1,0,2,1], strides=[2,1]>", '<auto_pad="VALID">'])
def test_zeros_move_into_a_convolution(attributes: str) -> None:
    before = padded(f"Conv {attributes}(p, w)", [0, 0, 1, 2, 0, 0, 3, 0], w=W, v=ZERO)
    assert ops(check(before, "pad_into_conv", feeds(3, 7, 8)))["Pad"] == 0


def test_pads_of_named_axes_move_too() -> None:
    body = "p = Pad(x, s, , t) y = Conv(p, w)"
    before = build(body, x="N,3,7,8", y="A,B,C,D", s=I64([1, 2]), t=I64([-1]), w=W)
    assert ops(check(before, "pad_into_conv", feeds(3, 7, 8))) == {"Conv": 1}


@pytest.mark.parametrize(
    "node",
    [
        "AveragePool <kernel_shape=[3,3]> (p)",
        "AveragePool <kernel_shape=[3,3], strides=[2,2]> (p)",
        "AveragePool <kernel_shape=[4,4], count_include_pad=1, pads=[1,0,1,0]> (p)",
    ],
)
def test_zeros_move_into_an_average_that_counts_them(node: str) -> None:
    before = padded(node, [0, 0, 1, 2, 0, 0, 2, 1])
    assert ops(check(before, "pad_into_conv", feeds(3, 7, 8), 4))["Pad"] == 0


def test_padding_moves_into_a_maximum_it_cannot_be() -> None:
    pool, pads = "MaxPool <kernel_shape=[3,3], strides=[2,1]> (p)", [0, 0, 1, 2, 0, 0, 2, 1]
    for before in (padded(pool, pads, "Relu"), padded(pool, pads, v=INF)):
        assert ops(check(before, "pad_into_conv", feeds(3, 7, 8)))["Pad"] == 0


@pytest.mark.parametrize(
    ("node", "pads", "weights", "reason"),
    [
        (
            "Conv(p, w)",
            [0, 0, 1, 1, 0, 0, 1, 1],
            {"v": np.float32(1)},
            "the Pad fills in something else than zeros",
        ),
        ("Conv(p, w)", [0, 0, -1, 1, 0, 0, 1, 1], {}, "the Pad crops, or pads batch or channels"),
        ("Conv(p, w)", [1, 0, 1, 1, 0, 0, 1, 1], {}, "the Pad crops, or pads batch or channels"),
        (
            'Conv <auto_pad="SAME_UPPER"> (p, w)',
            [0, 0, 1, 1, 0, 0, 1, 1],
            {},
            "the operator chooses its padding by itself",
        ),
        (
            "MaxPool <kernel_shape=[3,3]> (p)",
            [0, 0, 1, 1, 0, 0, 1, 1],
            {},
            "the padding could be the largest of a window",
        ),
        (
            "AveragePool <kernel_shape=[3,3]> (p)",
            [0, 0, 3, 0, 0, 0, 0, 0],
            {},
            "a window of the pooling could see padding only",
        ),
        (
            "AveragePool <kernel_shape=[4,4], pads=[1,1,1,1]> (p)",
            [0, 0, 1, 0, 0, 0, 0, 0],
            {},
            "the pooling counts the Pad but not its own padding",
        ),
        (
            "AveragePool <kernel_shape=[3,3], strides=[2,2], ceil_mode=1> (p)",
            [0, 0, 1, 0, 0, 0, 0, 0],
            {},
            "the pooling is dilated, rounds its size up or returns indices",
        ),
    ],
)
def test_refuses_a_pad(node: str, pads: list[int], weights: dict, reason: str) -> None:
    used = {**weights, **({"w": W} if "w)" in node else {})}
    before = padded(node, pads, **used)
    assert ops(check(before, "pad_into_conv", feeds(3, 7, 8)))["Pad"] == 1
    assert reasons(before, "pad_into_conv") == [reason]


def test_refuses_a_pad_that_is_read_elsewhere_or_mirrors() -> None:
    before = padded("Conv(p, w) q = Neg(p) y2 = Exp(q)", [0, 0, 1, 1, 0, 0, 1, 1], w=W)
    assert reasons(before, "pad_into_conv") == ["the Pad is read elsewhere"]
    body = 'p = Pad <mode="reflect"> (x, s) y = Conv(p, w)'
    before = build(body, x="N,3,7,8", y="A,B,C,D", s=I64([0, 0, 1, 1, 0, 0, 1, 1]), w=W)
    assert ops(check(before, "pad_into_conv", feeds(3, 7, 8))) == {"Pad": 1, "Conv": 1}
