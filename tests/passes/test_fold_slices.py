"""A Slice of a Slice: held to execution."""

from __future__ import annotations

import numpy as np
import pytest
from folding import check, ops, program, reasons

from lamina.ir.program import Program

I64 = np.int64


def sliced(first: tuple, second: tuple, x: str = "N,6,7", extra: str = "", y: str = "A,B,C") -> Program:
    """Two Slices; each a tuple of starts, ends and, where given, axes and steps."""
    weights, calls = {}, []
    for i, bounds in enumerate((first, second)):
        names = [f"s{i}_{k}" for k in range(len(bounds))]
        weights |= {n: I64(b) for n, b in zip(names, bounds, strict=True)}
        calls.append(", ".join(names))
    body = f"a = Slice(x, {calls[0]}) b = Slice(a, {calls[1]}) {extra} y = Neg(b)"
    return program(f"g (float[{x}] x) => (float[{y}] y) {{ {body} }}", weights)


def feeds(*shape: int, batches: tuple[int, ...] = (1, 3)) -> list[dict[str, np.ndarray]]:
    return [
        {"x": np.random.default_rng(n).normal(size=(n, *shape)).astype(np.float32)} for n in (*batches, 0)
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (([0], [2**63 - 1], [1], [2]), ([0], [2**63 - 1], [2], [2])),
        (([1], [5], [1]), ([-3], [-1], [-1], [1])),
        (([-1], [-(2**63)], [2], [-1]), ([0], [3], [-2], [1])),
        (([1], [2**62], [0]), ([0, 1], [4, 5], [2, 1], [1, 3])),
        (([0, 1, 1], [9, 6, 6]), ([0], [2], [1])),
        (([1], [6], [1], [2]), ([1], [3], [1], [1])),
        (([-1], [-(2**63)], [1], [-1]), ([1], [2**62], [-2], [2])),
        (([4], [-99], [1], [-2]), ([-1], [-99], [1], [-1])),
        (([3], [3], [1]), ([0], [2], [1])),
        (([2], [6], [1]), ([9], [12], [1])),
    ],
)
def test_two_slices_become_one(first: tuple, second: tuple) -> None:
    assert ops(check(sliced(first, second), "merge_slices", feeds(6, 7))) == {"Slice": 1, "Neg": 1}


def test_a_chain_becomes_one() -> None:
    weights = {"z": I64([0]), "e": I64([5]), "one": I64([1]), "two": I64([2]), "i": I64([0])}
    body = "a = Slice(x, z, e, one) b = Slice(a, z, e, two) c = Slice(b, one, e, i) y = Slice(c, one, e, two)"
    before = program(f"g (float[N,6,7] x) => (float[A,B,C] y) {{ {body} }}", weights)
    assert ops(check(before, "merge_slices", feeds(6, 7))) == {"Slice": 1}


def test_bounds_may_be_int32() -> None:
    weights = {"z": np.int32([1]), "e": np.int32([5]), "one": np.int32([1]), "m": I64([0]), "n": I64([2])}
    body = "a = Slice(x, z, e, one) y = Slice(a, m, n, n)"
    before = program(f"g (float[N,6,7] x) => (float[A,B,C] y) {{ {body} }}", weights)
    assert ops(check(before, "merge_slices", feeds(6, 7))) == {"Slice": 1}


def test_what_lies_between_stays_where_others_read_it() -> None:
    before = sliced(([1], [5], [1]), ([0], [3], [2]), extra="c = Abs(a)")
    assert ops(check(before, "merge_slices", feeds(6, 7)))["Slice"] == 2
    assert reasons(before, "merge_slices") == ["the first slice is read elsewhere"]


def test_what_lies_between_stays_where_it_is_an_output() -> None:
    weights = {"z": I64([1]), "e": I64([5]), "one": I64([1]), "two": I64([2])}
    body = "a = Slice(x, z, e, one) y = Slice(a, z, e, two)"
    text = f"g (float[N,6,7] x) => (float[A,B,C] y, float[D,E,F] a) {{ {body} }}"
    before = program(text, weights)
    assert ops(check(before, "merge_slices", feeds(6, 7)))["Slice"] == 2


def test_an_axis_of_unknown_size_is_not_cut_twice_at_once() -> None:
    before = sliced(([1], [5], [0]), ([-2], [2**62], [0]))
    assert ops(check(before, "merge_slices", feeds(6, 7, batches=(4, 7))))["Slice"] == 2
    assert reasons(before, "merge_slices") == ["an axis of unknown size is cut twice"]


def test_a_computed_bound_is_left_alone() -> None:
    weights = {"z": I64([0]), "one": I64([1]), "two": I64([2])}
    body = "n = Shape <start=0, end=1> (x) a = Slice(x, z, n, one) y = Slice(a, z, two, two)"
    before = program(f"g (float[N,6,7] x) => (float[A,B,C] y) {{ {body} }}", weights)
    assert ops(check(before, "merge_slices", feeds(6, 7)))["Slice"] == 2
    assert reasons(before, "merge_slices") == ["a bound is computed, or an axis cut twice"]


def test_bounds_that_callers_may_override_are_left_alone() -> None:
    body = "a = Slice(x, z, e, one) y = Slice(a, z, two, two)"
    text = f"g (float[N,6,7] x, int64[1] e = {{3}}) => (float[A,B,C] y) {{ {body} }}"
    before = program(text, {"z": I64([0]), "one": I64([1]), "two": I64([2])})
    assert ops(check(before, "merge_slices", []))["Slice"] == 2


def test_axes_from_either_end_need_a_rank() -> None:
    weights = {"z": I64([1]), "e": I64([5]), "one": I64([1]), "m": I64([-1]), "s": I64([-1, 6, 7])}
    body = "r = Reshape(x, d) a = Slice(r, z, e, one) b = Slice(a, z, e, m) y = Reshape(b, w)"
    text = f"g (float[N,6,7] x, int64[R] d) => (float[A] y) {{ {body} }}"
    before = program(text, {**weights, "w": I64([-1])})
    assert before.graph.node(1).inputs[0].shape is None
    feed = {**feeds(6, 7)[1], "d": I64([-1, 6, 7])}
    assert ops(check(before, "merge_slices", [feed]))["Slice"] == 2
    assert reasons(before, "merge_slices") == ["axes are counted from either end, and the rank is unknown"]
