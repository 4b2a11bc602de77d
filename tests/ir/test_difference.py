"""How far two arrays are apart: the measure itself is held against wrong arrays."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lamina.ir.difference import difference, epsilon, is_discrete, unit

BASE = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)


@pytest.mark.parametrize(
    "wrong", [BASE * np.float32(1.01), BASE * 1000, -BASE, BASE * 0, BASE[::-1], np.roll(BASE, 1, 1)]
)
def test_wrong_arrays_are_far(wrong):
    found = difference(BASE, wrong.astype(np.float32))
    assert found.max_abs / found.scale > 5e-3
    assert found.max_ulp > 1e4
    assert 0 < found.mean_abs <= found.max_abs


def test_equal_arrays_are_not_apart():
    found = difference(BASE, BASE.copy())
    assert (found.max_abs, found.mean_abs, found.max_ulp, found.mean_ulp, found.count) == (0, 0, 0, 0, 20)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_one_unit_is_one_ulp(dtype):
    one = np.array([1.0, 2.0, 3.5, -1.0], dtype)
    above = (one.astype(np.float64) + unit(np.abs(one.astype(np.float64)), np.dtype(dtype))).astype(dtype)
    found = difference(one, above)
    assert found.max_ulp == found.mean_ulp == 1.0


@pytest.mark.parametrize("value", [1.0, 0.3, 1e-20, 1e30, 1e-42])
def test_unit_agrees_with_numpy(value):
    assert unit(value, np.dtype(np.float32)) == float(np.spacing(np.float32(value)))
    assert unit(value, np.dtype(np.float64)) == np.spacing(np.float64(value))


def test_zero_and_minus_zero_are_equal_and_denormals_count():
    assert difference(np.float32([0.0]), np.float32([-0.0])).max_abs == 0
    found = difference(np.float32([0.0]), np.float32([1e-45]))
    assert found.max_ulp == 1.0


def test_not_finite_values():
    nan, inf = np.float32([np.nan, 1]), np.float32([np.inf, 1])
    assert difference(nan, nan).max_abs == 0
    assert difference(inf, inf).max_abs == 0
    for one, other in ((nan, inf), (inf, nan), (nan, np.float32([0, 1])), (inf, -inf)):
        found = difference(one, other)
        assert found.max_abs == np.inf
        assert found.reason
    assert difference(nan, np.float32([0, 1]), finite_only=True).max_abs == 0
    assert difference(np.float32([0, 1]), nan, finite_only=True).max_abs == np.inf
    assert difference(inf, np.float32([3, 1.5]), finite_only=True).max_abs == 0.5


def test_shapes_must_be_equal():
    found = difference(np.zeros((2, 3)), np.zeros((3, 2)))
    assert (found.max_abs, found.reason) == (np.inf, "shape [3, 2] against [2, 3]")


def test_integers_flags_texts_and_complex_numbers():
    large = np.array([2**60, 1], np.int64)
    assert difference(large, large + 1).max_abs == 1.0
    assert difference(large, large).max_abs == 0.0
    assert difference(np.array([True, False]), np.array([True, True])).max_abs == 1.0
    assert difference(np.array(["a"], object), np.array(["b"], object)).max_abs == 1.0
    assert difference(np.array(["a"], object), np.array(["a"], object)).max_abs == 0.0
    assert difference(np.complex64([1 + 1j]), np.complex64([1 - 2j])).max_abs == pytest.approx(3.0)
    assert all(is_discrete(np.dtype(d)) for d in (np.int8, np.bool_, object))
    assert not any(is_discrete(np.dtype(d)) for d in (np.float16, ml_dtypes.bfloat16, np.complex64))
    assert epsilon(np.dtype(np.complex64)) == pytest.approx(2**-23)


def test_empty_arrays():
    found = difference(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32))
    assert (found.max_abs, found.mean_abs, found.count) == (0, 0, 0)
