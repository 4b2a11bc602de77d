"""Weight quantizers: the grid is used, the search never loses, scales stay sane."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from lamina.errors import PassError
from lamina.passes.quantize.weights import quantize_blocks, quantize_channels

rng = np.random.default_rng(0)


def restored(made, axis):
    shape = [1] * made.codes.ndim
    shape[axis] = -1
    return made.codes.astype(np.float32) * made.scale.reshape(shape)


def blocks_restored(made, block):
    rows = made.codes.shape[0]
    scale = np.repeat(made.scale, block, axis=0)[:rows]
    zero = (
        0 if made.zero_point is None else np.repeat(made.zero_point.astype(np.float32), block, axis=0)[:rows]
    )
    return (made.codes.astype(np.float32) - zero) * scale


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_channels_err_at_most_half_a_step_without_clipping(axis):
    weight = rng.standard_normal((6, 5, 3, 4)).astype(np.float32)
    made = quantize_channels(weight, axis, clipping="minmax")
    shape = [1] * 4
    shape[axis] = -1
    assert made.codes.dtype == np.int8
    assert made.codes.shape == weight.shape
    assert (np.abs(restored(made, axis) - weight) <= made.scale.reshape(shape) * 0.5001).all()


@pytest.mark.parametrize("bits", [8, 7, 4])
@pytest.mark.parametrize("tail", [0, 3])
def test_search_is_never_worse_than_covering_everything(bits, tail):
    weight = rng.standard_normal((16, 300)).astype(np.float32)
    weight[:, :tail] *= 30
    errors = {}
    for clipping in ("mse", "minmax"):
        made = quantize_channels(weight, 0, bits=bits, clipping=clipping)
        errors[clipping] = np.square(restored(made, 0) - weight).sum(axis=1)
    assert (errors["mse"] <= errors["minmax"] * (1 + 1e-5)).all()
    assert errors["mse"].sum() < errors["minmax"].sum()


def test_weights_on_the_grid_are_exact():
    codes = rng.integers(-127, 128, (9, 64)).astype(np.float32)
    codes[:, 0] = 127
    made = quantize_channels(codes * np.float32(0.5), 0)
    np.testing.assert_array_equal(made.codes, codes)
    np.testing.assert_allclose(made.scale, 0.5, rtol=1e-6)


def test_seven_bits_stay_within_63():
    made = quantize_channels(rng.standard_normal((4, 500)).astype(np.float32) * 9, 0, bits=7)
    assert np.abs(made.codes).max() == 63


def test_channels_of_zeros_take_a_scale_like_the_others():
    weight = rng.standard_normal((3, 50)).astype(np.float32)
    weight[1] = 0
    made = quantize_channels(weight, 0)
    assert made.scale[1] == made.scale[[0, 2]].max()
    assert not made.codes[1].any()
    assert (quantize_channels(np.zeros((2, 3), np.float32), 0).scale == 1).all()


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.008), (4, 0.095)])
@pytest.mark.parametrize("depth", [128, 100, 7])
def test_blocks_follow_each_blocks_own_range(bits, bound, depth):
    weight = rng.standard_normal((depth, 24)).astype(np.float32)
    weight[: depth // 2] *= 50
    made = quantize_blocks(weight, block=32, bits=bits)
    assert made.codes.shape == weight.shape
    assert made.scale.shape == (-(-depth // 32), 24)
    error = blocks_restored(made, 32) - weight
    assert np.linalg.norm(error) / np.linalg.norm(weight) < bound


def test_four_bits_are_unsigned_with_zero_points_that_pay_on_one_sided_blocks():
    weight = rng.random((64, 8)).astype(np.float32)
    made = quantize_blocks(weight, block=32, bits=4)
    assert made.codes.dtype == ml_dtypes.uint4
    assert (made.zero_point.astype(int) <= 1).all()
    symmetric = quantize_channels(weight.T.reshape(-1, 32), 0, bits=4)
    error = np.square(blocks_restored(made, 32) - weight).sum()
    assert error < 0.4 * np.square(restored(symmetric, 0) - weight.T.reshape(-1, 32)).sum()


def test_search_of_four_bits_beats_covering_everything():
    weight = rng.standard_normal((256, 32)).astype(np.float32)
    mse, minmax = (
        np.square(blocks_restored(quantize_blocks(weight, block=32, bits=4, clipping=c), 32) - weight).sum()
        for c in ("mse", "minmax")
    )
    assert mse < 0.95 * minmax


def test_quantizing_twice_gives_the_same():
    weight = rng.standard_normal((40, 33)).astype(np.float32)
    first, second = quantize_channels(weight, 1), quantize_channels(weight.copy(), 1)
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scale, second.scale)


def test_impossible_options_are_refused():
    with pytest.raises(PassError, match="cannot be quantized to 9 bits"):
        quantize_channels(np.zeros((2, 2), np.float32), 0, bits=9)
    with pytest.raises(PassError, match="clipping 'best' is unknown"):
        quantize_channels(np.zeros((2, 2), np.float32), 0, clipping="best")
