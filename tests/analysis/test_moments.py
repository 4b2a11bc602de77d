"""Ridge regression from streamed moments."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.analysis.moments import Moments, ridge_correction


def _moments(x: np.ndarray, y: np.ndarray, *, diagonal: bool = False, parts: int = 3) -> Moments:
    total = Moments.empty(x.shape[1], y.shape[1], diagonal=diagonal)
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        total.add(a, b)
    return total


@given(st.integers(0, 1000), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_error_from_moments_is_the_error_of_the_tokens(seed: int, diagonal: bool, offset: bool) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(1, 2, (300, 5)), rng.normal(-1, 1, (300, 5))
    matrix = rng.normal(size=5 if diagonal else (5, 5))
    shift = rng.normal(size=5) * offset
    mapped = (x * matrix if diagonal else x @ matrix.T) + shift
    expected = np.square(mapped - y).sum(axis=1).mean()
    assert _moments(x, y, diagonal=diagonal).error(matrix, shift) == pytest.approx(expected, rel=1e-9)


def test_least_squares_recovers_a_linear_disturbance() -> None:
    rng = np.random.default_rng(0)
    x, matrix, offset = rng.normal(0.5, 1, (4000, 6)), rng.normal(size=(3, 6)), rng.normal(size=3)
    y = x @ matrix.T + offset
    found = ridge_correction(_moments(x[:3000], y[:3000]), _moments(x[3000:], y[3000:]), offset=True)
    assert found is not None
    np.testing.assert_allclose(found.matrix, matrix, atol=1e-3)  # the least ridge shrinks by 1e-4
    assert found.after < 1e-6 * found.before


def test_noise_is_not_fitted() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 40)), rng.normal(size=(60, 8))
    found = ridge_correction(_moments(x[:40], y[:40]), _moments(x[40:], y[40:]), offset=False)
    assert found is None or found.ridge >= 1e-1


def test_only_the_mean_is_taken_where_only_the_mean_is_off() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(50, 30)), 3 + 0.1 * rng.normal(size=(50, 4))
    found = ridge_correction(_moments(x[:40], y[:40]), _moments(x[40:], y[40:]), offset=True)
    assert found is not None
    assert found.ridge == np.inf
    np.testing.assert_allclose(found.offset, y[:40].mean(axis=0), rtol=1e-9)
    assert not found.matrix.any()


def test_an_input_that_never_varies_gives_the_mean() -> None:
    x, y = np.full((40, 3), 2.0), np.full((40, 2), 5.0)
    found = ridge_correction(_moments(x[:30], y[:30]), _moments(x[30:], y[30:]), offset=True)
    assert found is not None
    np.testing.assert_allclose(found.matrix @ x[0] + found.offset, [5, 5], rtol=1e-9)


def test_a_diagonal_map_scales_each_channel() -> None:
    rng = np.random.default_rng(3)
    x, scale = rng.normal(1, 1, (500, 4)), np.array([0.5, -1.0, 2.0, 0.0])
    y = x * scale + 1
    parts = [_moments(a, b, diagonal=True) for a, b in ((x[:400], y[:400]), (x[400:], y[400:]))]
    found = ridge_correction(*parts, offset=True)
    assert found is not None
    np.testing.assert_allclose(found.matrix, scale, atol=1e-3)


def test_two_streams_give_the_formula_of_qep() -> None:
    """W + W (X0 - X) X' (X X' + damp)^-1, arXiv:2504.09629, without an offset."""
    rng = np.random.default_rng(4)
    original = rng.normal(size=(2000, 6))
    changed = original @ (np.eye(6) + 0.2 * rng.normal(size=(6, 6))) + 0.1 * rng.normal(size=(2000, 6))
    weight = rng.normal(size=(4, 6))
    missing = (original - changed) @ weight.T
    parts = [_moments(changed[rows], missing[rows]) for rows in (slice(1500), slice(1500, None))]
    found = ridge_correction(*parts, offset=False, ridges=(0.01,))
    assert found is not None
    x, x0 = changed[:1500].T, original[:1500].T
    damp = 0.01 * np.trace(x @ x.T) / 6
    expected = weight @ (x0 - x) @ x.T @ np.linalg.inv(x @ x.T + damp * np.eye(6))
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-7, atol=1e-10)
