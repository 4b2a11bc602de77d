"""Rounding against second moments: the algorithm as written down, and what it may never do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.passes.quantize.coded import Coded, nearest
from lamina.passes.quantize.gptq import descend, gptq, output_error

PARAMETERS = {
    "channel": {"weight_bits": 4, "clipping": "minmax"},
    "blocks": {"weight_bits": 4, "clipping": "mse", "block": 8},
    "offset": {"weight_bits": 3, "clipping": "mse", "block": 8, "grid": "offset"},
    "two": {"weight_bits": 2, "clipping": "mse", "block": 16},
}


def correlated(rng, groups, width, count=200):
    """Moments of inputs that share a few directions, and one channel that stands out."""
    mix = rng.standard_normal((groups, width, width)) * 0.3 + 1.0
    x = rng.standard_normal((groups, count, width)) @ mix
    x[:, :, 0] *= 5
    return np.matmul(x.transpose(0, 2, 1), x)


def problem(seed, form, groups=1, rows=6, width=24):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((groups, rows, width)).astype(np.float32)
    start = nearest(weight.reshape(-1, width), PARAMETERS[form], 0)
    return weight.astype(np.float64), correlated(rng, groups, width), start


def written_down(weight, moments, start, damp):
    """Algorithm 1 of the paper, one row and one column at a time, the inverse updated by elimination."""
    width = len(moments)
    order = np.argsort(-(np.diag(moments)), kind="stable")
    inverse = np.linalg.inv(moments + damp * np.diag(moments).mean() * np.eye(width))
    codes = np.zeros(weight.shape)
    rest = weight.copy()
    scale, zero = (np.broadcast_to(start.spread(a), weight.shape) for a in (start.scale, start.zero))
    for i, j in enumerate(order):
        codes[:, j] = np.clip(np.rint(rest[:, j] / scale[:, j] + zero[:, j]), start.low, start.high)
        error = (rest[:, j] - (codes[:, j] - zero[:, j]) * scale[:, j]) / inverse[j, j]
        behind = order[i + 1 :]
        rest[:, behind] -= np.outer(error, inverse[j, behind])
        column = inverse[:, j].copy()
        inverse = inverse - np.outer(column, column) / column[j]
    return codes


@pytest.mark.parametrize("form", PARAMETERS)
def test_gptq_is_the_algorithm_of_the_paper(form):
    weight, moments, start = problem(1, form)
    made = gptq(weight, moments, start, damp=0.01)
    np.testing.assert_array_equal(made.codes, written_down(weight[0], moments[0], start, 0.01))
    np.testing.assert_array_equal(made.scale, start.scale)


def test_spans_change_nothing(monkeypatch):
    weight, moments, start = problem(2, "offset", groups=3, width=40)
    whole = [gptq(weight, moments, start), descend(weight, moments, start)]
    monkeypatch.setattr("lamina.passes.quantize.gptq.BLOCK", 7)
    parts = [gptq(weight, moments, start), descend(weight, moments, start)]
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a.codes, b.codes)
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-6)


def test_groups_of_a_convolution_are_problems_of_their_own():
    weight, moments, start = problem(3, "blocks", groups=3)
    together = gptq(weight, moments, start).codes.reshape(weight.shape)
    for g in range(3):
        part = slice(6 * g, 6 * g + 6)
        alone = replace(start, codes=start.codes[part], scale=start.scale[part], zero=start.zero[part])
        made = gptq(weight[g : g + 1], moments[g : g + 1], alone)
        np.testing.assert_array_equal(together[g], made.codes)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), form=st.sampled_from(sorted(PARAMETERS)), groups=st.integers(1, 3))
def test_output_error_only_falls(seed, form, groups):
    weight, moments, start = problem(seed, form, groups)
    plain = output_error(weight, moments, start)
    descended = output_error(weight, moments, descend(weight, moments, start))
    after = gptq(weight, moments, start)
    both = output_error(weight, moments, descend(weight, moments, after))
    assert descended <= plain * (1 + 1e-9)
    assert both <= output_error(weight, moments, after) * (1 + 1e-9)
    # gptq alone has no such guarantee for every draw; on correlated inputs it has never come near
    assert output_error(weight, moments, after) < plain


def test_codes_stay_within_their_bits():
    for form in PARAMETERS:
        weight, moments, start = problem(4, form)
        for made in (gptq(weight, moments, start), descend(3 * weight, moments, start)):
            assert made.codes.dtype == start.codes.dtype
            assert made.codes.min() >= start.low
            assert made.codes.max() <= start.high


def test_with_bits_enough_nothing_is_lost():
    rng = np.random.default_rng(5)
    codes = rng.integers(-127, 128, (6, 24)).astype(np.int8)
    fine = Coded(codes, np.full((6, 1), 2.0**-6, np.float32), np.zeros((1, 1), np.float32), 24, -127, 127)
    weight, moments = fine.rows().astype(np.float64)[None], correlated(rng, 1, 24)
    for made in (gptq(weight, moments, fine), descend(weight, moments, fine)):
        np.testing.assert_array_equal(made.codes, codes)
        np.testing.assert_array_equal(made.scale, fine.scale)


def test_inputs_that_do_not_correlate_leave_the_nearest_codes():
    weight, _, start = problem(6, "blocks")
    moments = np.diag(np.random.default_rng(0).random(24) + 0.1)[None]
    np.testing.assert_array_equal(gptq(weight, moments, start).codes, nearest_codes(weight, start))


def nearest_codes(weight, start):
    scale, zero = start.spread(start.scale), start.spread(start.zero)
    return np.clip(np.rint(weight[0] / scale + zero), start.low, start.high)


def test_what_reads_nothing_is_left_alone():
    weight, _, start = problem(7, "offset")
    nothing = np.zeros((1, 24, 24))
    assert gptq(weight, nothing, start) is start
    assert descend(weight, nothing, start) is start


def test_each_step_of_descent_is_the_best_code_given_the_others():
    weight, moments, start = problem(8, "two", rows=2, width=16)
    made = descend(weight, moments, start, sweeps=50, scales=False)
    least = output_error(weight, moments, made)
    for row in range(2):
        for column in range(16):
            for code in range(4):
                other = made.codes.copy()
                other[row, column] = code
                assert output_error(weight, moments, replace(made, codes=other)) >= least * (1 - 1e-12)


def test_refitted_scales_are_kept_in_the_type_they_had():
    weight, moments, start = problem(9, "offset")
    made = descend(weight, moments, start)
    assert (made.scale != start.scale).any()
    np.testing.assert_array_equal(made.scale.astype(np.float16).astype(np.float32), made.scale)
