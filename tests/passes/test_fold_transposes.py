"""Transpositions that cancel, or that what follows absorbs: held to execution."""

from __future__ import annotations

from itertools import permutations
from math import prod

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program
from lamina.passes.fold.drop_gathered_transpose import regrouped

I64 = np.int64


def build(body: str, x: str = "N,3,4,5", more: str = "", **weights: object) -> Program:
    text = f"g (float[{x}] x) => (float[] y{more}) {{ {body} }}"
    return program(text, {k: np.asarray(v) for k, v in weights.items()})


def feeds(*shape: int, batches: tuple[int, ...] = (2, 1)) -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)} for n in batches]


# -- with elementwise operators or a Softmax between --------------------------------------------------


@pytest.mark.parametrize(
    "between",
    [
        "Sigmoid(t)",
        "Mul(t, two)",
        "Sub(two, t)",
        "Clip(t, two)",
        "Softmax <axis=-1> (t)",
        "LogSoftmax <axis=1> (t)",
    ],
)
def test_two_that_undo_each_other_go(between: str) -> None:
    body = f"t = Transpose <perm=[0,3,1,2]> (x) u = {between} v = Abs(u) y = Transpose <perm=[0,2,3,1]> (v)"
    before = build(body, two=np.float32(2))
    after = check(before, "cancel_transposes", feeds(3, 4, 5), 4)
    assert ops(after) == {between.split("(")[0].split(" ")[0]: 1, "Abs": 1}
    check(before, "cancel_transposes", feeds(3, 4, 5, batches=(0,)))


def test_two_that_do_not_undo_each_other_become_one() -> None:
    body = "t = Transpose <perm=[0,3,1,2]> (x) u = Tanh(t) y = Transpose <perm=[0,1,3,2]> (u)"
    after = check(build(body), "cancel_transposes", feeds(3, 4, 5), 4)
    assert ops(after) == {"Tanh": 1, "Transpose": 1}


def test_an_axis_that_is_the_last_before_may_move_there() -> None:
    body = "t = Transpose <perm=[3,0,2,1]> (x) u = Softmax <axis=0> (t) y = Transpose <perm=[1,0,2,3]> (u)"
    after = check(build(body), "cancel_transposes", feeds(3, 4, 5), 4)
    assert ops(after) == {"Softmax": 1, "Transpose": 1}


def test_three_with_operators_between_become_one() -> None:
    body = (
        "t = Transpose <perm=[0,3,1,2]> (x) u = Relu(t) v = Transpose <perm=[0,1,3,2]> (u) "
        "w = Neg(v) y = Transpose <perm=[3,1,2,0]> (w)"
    )
    after = check(build(body), "cancel_transposes", feeds(3, 4, 5), 4)
    assert ops(after) == {"Relu": 1, "Neg": 1, "Transpose": 1}


def test_a_softmax_does_not_leave_the_last_axis_for_nothing() -> None:
    body = "t = Transpose <perm=[0,3,2,1]> (x) u = Softmax <axis=-1> (t) y = Transpose <perm=[0,1,3,2]> (u)"
    before = build(body)
    assert ops(check(before, "cancel_transposes", feeds(3, 4, 5))) == ops(before)
    assert reasons(before, "cancel_transposes") == ["the softmax would leave the last axis"]


def test_a_transposition_read_elsewhere_stays() -> None:
    body = (
        "t = Transpose <perm=[0,3,2,1]> (x) u = Neg(t) v = Transpose <perm=[0,3,2,1]> (u) "
        "w = ReduceMax <keepdims=0> (t) y = Add(v, w)"
    )
    before = build(body)
    assert ops(check(before, "cancel_transposes", feeds(3, 4, 5))) == ops(before)
    assert reasons(before, "cancel_transposes") == ["the first transposition is read elsewhere"]


@pytest.mark.parametrize("name", ["t", "u"])
def test_an_output_in_between_stays(name: str) -> None:
    body = "t = Transpose <perm=[0,3,2,1]> (x) u = Neg(t) y = Transpose <perm=[0,3,2,1]> (u)"
    before = build(body, more=f", float[] {name}")
    assert ops(check(before, "cancel_transposes", feeds(3, 4, 5))) == ops(before)


@pytest.mark.parametrize(
    ("between", "weights"),
    [
        ("Mul(t, c)", {"c": np.arange(1, 4, dtype=np.float32)}),
        ("Add(t, t)", {}),
        ("CumSum(t, c)", {"c": I64(1)}),
    ],
)
def test_what_is_not_elementwise_stays_between(between: str, weights: dict) -> None:
    body = f"t = Transpose <perm=[0,3,2,1]> (x) u = {between} y = Transpose <perm=[0,3,2,1]> (u)"
    before = build(body, **weights)
    assert ops(check(before, "cancel_transposes", feeds(3, 4, 5))) == ops(before)


def test_heads_stay_for_the_fusion_that_looks_for_them() -> None:
    body = (
        "t = Transpose <perm=[0,1,3,2]> (x) u = Mul(t, c) k = Transpose <perm=[0,1,3,2]> (u) y = MatMul(r, k)"
    )
    before = build(f"r = Transpose <perm=[0,1,3,2]> (x) {body}", c=np.float32(2))
    assert reasons(before, "cancel_transposes") == ["it lays out attention heads"]


# -- taken apart by Gathers ----------------------------------------------------------------------------


def test_slices_of_a_transposition() -> None:
    body = "t = Transpose <perm=[2,0,1,3]> (x) a = Gather <axis=0> (t, i) b = Gather <axis=-4> (t, j)"
    body = f"{body} y = Sub(a, b)"
    after = check(build(body, i=I64(1), j=I64(-1)), "drop_gathered_transpose", feeds(3, 4, 5, batches=(2, 0)))
    assert ops(after) == {"Gather": 2, "Sub": 1}


def test_a_shuffle_and_its_halves() -> None:
    body = (
        "a = Relu(x) r = Reshape(a, p) t = Transpose <perm=[1,0,2]> (r) s = Reshape(t, q) "
        "g = Gather <axis=0> (s, i) h = Gather <axis=0> (s, j) y = Sub(g, h)"
    )
    before = build(body, "1,8,3,5", p=I64([4, 2, 15]), q=I64([2, -1, 4, 3, 5]), i=I64(0), j=I64(1))
    after = check(before, "drop_gathered_transpose", feeds(8, 3, 5, batches=(1,)))
    assert ops(after) == {"Relu": 1, "Reshape": 2, "Gather": 2, "Sub": 1}


def test_other_readers_keep_the_transposition() -> None:
    body = "t = Transpose <perm=[2,0,1,3]> (x) a = Gather <axis=0> (t, i) b = ReduceMax <keepdims=0> (t)"
    before = build(f"{body} y = Sub(a, b)", i=I64(1))
    assert ops(check(before, "drop_gathered_transpose", feeds(3, 4, 5))) == ops(before)
    assert reasons(before, "drop_gathered_transpose") == ["something else reads the transposition"]


def test_a_transposition_that_is_an_output_stays() -> None:
    before = build(
        "t = Transpose <perm=[2,0,1,3]> (x) y = Gather <axis=0> (t, i)", more=", float[] t", i=I64(1)
    )
    assert ops(check(before, "drop_gathered_transpose", feeds(3, 4, 5))) == ops(before)


@pytest.mark.parametrize("index", [I64([1]), I64([[0, 1]])])
def test_more_than_one_slice_keeps_the_transposition(index: np.ndarray) -> None:
    before = build("t = Transpose <perm=[2,0,1,3]> (x) y = Gather <axis=0> (t, i)", i=index)
    assert ops(check(before, "drop_gathered_transpose", feeds(3, 4, 5))) == ops(before)


def test_an_order_that_changes_keeps_the_transposition() -> None:
    before = build("t = Transpose <perm=[2,1,0,3]> (x) y = Gather <axis=0> (t, i)", i=I64(1))
    assert ops(check(before, "drop_gathered_transpose", feeds(3, 4, 5))) == ops(before)
    assert reasons(before, "drop_gathered_transpose") == ["the dims that are left change their order"]


@pytest.mark.parametrize(
    ("x", "perm", "shape", "reason"),
    [
        ("N,2,3", [1, 0, 2], [2, -1, 3, 1], "the shapes are not known"),
        ("4,2,3", [1, 0, 2], [8, 3], "the reshape joins dims that were not neighbours"),
        ("4,2,3", [1, 2, 0], [6, 2, 2], "the dims that are left change their order"),
    ],
)
def test_a_reshape_in_between_that_cannot_move(
    x: str, perm: list[int], shape: list[int], reason: str
) -> None:
    axis = 1 if shape == [6, 2, 2] else 0
    body = f"t = Transpose <perm={perm}> (x) r = Reshape(t, s) y = Gather <axis={axis}> (r, i)"
    before = build(body, x, s=I64(shape), i=I64(1))
    assert ops(check(before, "drop_gathered_transpose", feeds(2, 3, batches=(4,)))) == ops(before)
    assert reasons(before, "drop_gathered_transpose") == [reason]


@pytest.mark.parametrize("perm", list(permutations(range(4))))
def test_reshaping_first(perm: tuple[int, ...]) -> None:
    rng, found = np.random.default_rng(prod(p + 1 for p in perm[:2])), 0
    for shape in ((4, 6, 2, 9), (1, 6, 1, 4), (4, 1, 4, 2)):
        x = rng.normal(size=shape)
        turned = x.transpose(perm)
        for after in (
            (2, 2, 6, 2, 9),
            (9, 2, 3, 8),
            (24, 18),
            (1, 6, 4),
            (4, 6),
            (2, 2, 4, 2),
            (1, 4, 2, 4),
            (32, 1),
        ):
            if prod(after) != x.size:
                continue
            split = regrouped(list(turned.shape), list(after), perm)
            if split is not None:
                dims, order = split
                assert np.array_equal(x.reshape(dims).transpose(order), turned.reshape(after))
                found += 1
    assert found


# -- of a stack ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("perm", "axis"),
    [([0, 2, 1, 3, 4], 1), ([1, 2, 0, 3, 4], 0), ([4, 0, 1, 2, 3], -1), ([0, 1, 3, 4, 2], 2)],
)
def test_a_stack_is_made_where_it_is_wanted(perm: list[int], axis: int) -> None:
    body = f"a = Neg(x) b = Exp(x) p = Unsqueeze(a, s) q = Unsqueeze(b, s) c = Concat <axis={axis}> (p, q) "
    before = build(f"{body} y = Transpose <perm={perm}> (c)", s=I64([axis]))
    after = check(before, "drop_stacked_transpose", feeds(3, 4, 5, batches=(2, 0)))
    assert ops(after) == {"Neg": 1, "Exp": 1, "Unsqueeze": 2, "Concat": 1}


def test_a_stack_of_one_thing_twice() -> None:
    body = "a = Neg(x) p = Unsqueeze(a, s) c = Concat <axis=1> (p, p) y = Transpose <perm=[0,2,1,3,4]> (c)"
    after = check(build(body, s=I64([1])), "drop_stacked_transpose", feeds(3, 4, 5))
    assert ops(after) == {"Neg": 1, "Unsqueeze": 1, "Concat": 1}


def test_a_stack_of_reshaped_parts() -> None:
    body = "a = Neg(x) p = Reshape(a, s) q = Flatten <axis=1> (x) r = Unsqueeze(q, i)"
    before = build(
        f"{body} c = Concat <axis=1> (p, r) y = Transpose <perm=[0,2,1]> (c)",
        "N,3,4,5",
        s=I64([-1, 1, 60]),
        i=I64([-2]),
    )
    after = check(before, "drop_stacked_transpose", feeds(3, 4, 5))
    assert ops(after) == {"Neg": 1, "Flatten": 1, "Reshape": 1, "Unsqueeze": 1, "Concat": 1}


@pytest.mark.parametrize(
    "parts",
    [
        "p = Unsqueeze(a, s) c = Concat <axis=1> (p, z)",
        "p = Unsqueeze(a, s) q = Sin(p) c = Concat <axis=1> (p, q)",
        "p = Unsqueeze(a, s) b = Neg(x) q = Reshape(b, w) c = Concat <axis=1> (p, q)",
    ],
)
def test_a_part_that_would_be_copied_keeps_the_transposition(parts: str) -> None:
    body = f"a = ReduceMax <keepdims=0> (x, s) {parts} y = Transpose <perm=[0,2,1,3]> (c)"
    weights = {"z": np.ones((2, 1, 4, 5), np.float32), "w": I64([2, 3, 4, 5])}
    weights = {name: array for name, array in weights.items() if f"{name})" in parts}
    before = build(body, "2,3,4,5", s=I64([1]), **weights)
    assert ops(check(before, "drop_stacked_transpose", feeds(3, 4, 5, batches=(2,)))) == ops(before)
    reason = "a part is not reshaped for the stack alone, or would have to be transposed"
    assert reasons(before, "drop_stacked_transpose") == [reason]


def test_a_stack_read_elsewhere_keeps_the_transposition() -> None:
    body = (
        "p = Unsqueeze(x, s) q = Neg(x) r = Unsqueeze(q, s) c = Concat <axis=1> (r, p) "
        "t = Transpose <perm=[0,2,1,3,4]> (c) u = ReduceMax <keepdims=0> (c) y = Add(t, u)"
    )
    before = build(body, s=I64([1]))
    assert ops(check(before, "drop_stacked_transpose", feeds(3, 4, 5))) == ops(before)
    assert reasons(before, "drop_stacked_transpose") == ["the stack is read elsewhere"]


def test_another_order_keeps_the_transposition() -> None:
    body = "p = Unsqueeze(x, s) r = Neg(x) q = Unsqueeze(r, s) c = Concat <axis=1> (p, q)"
    before = build(f"{body} y = Transpose <perm=[0,3,1,2,4]> (c)", s=I64([1]))
    assert ops(check(before, "drop_stacked_transpose", feeds(3, 4, 5))) == ops(before)
