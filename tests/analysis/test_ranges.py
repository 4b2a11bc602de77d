from __future__ import annotations

import itertools

import numpy as np
import pytest

from lamina.analysis.ranges import RANGE_METHODS, choose_range, expected_error
from lamina.analysis.streaming import RangeAccumulator, RangeStatistics
from lamina.errors import PassError

RNG = np.random.default_rng(7)
SAMPLES = {
    "normal": RNG.normal(0.3, 1.7, 20000),
    "relu": np.maximum(RNG.normal(0, 1, 20000), 0),
    "laplace": RNG.laplace(-0.5, 1, 20000),
    "student": RNG.standard_t(2, 20000),
    "outlier": np.concatenate([RNG.normal(0, 1, 20000), [900.0, -500.0]]),
    "negative": -np.abs(RNG.normal(0, 3, 20000)),
    "gelu": (lambda x: x / (1 + np.exp(-1.702 * x)))(RNG.normal(0, 2, 20000)),
}


def _statistics(array: np.ndarray) -> RangeStatistics:
    total = RangeAccumulator()
    total.add(array.astype(np.float32))
    return total.result()


def _limits(bits: int, signed: bool) -> tuple[int, int]:
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _true_error(array: np.ndarray, scale: float, zero: int, bits: int, signed: bool) -> float:
    integers = np.clip(np.rint(array / scale) + zero, *_limits(bits, signed))
    return float(np.mean(((integers - zero) * scale - array) ** 2))


def _brute_force(array: np.ndarray, bits: int, signed: bool, symmetric: bool) -> float:
    """The least true error over a fine grid of clipping ratios, on the data itself."""
    qmin, qmax = _limits(bits, signed)
    low, high = min(array.min(), 0.0), max(array.max(), 0.0)
    ratios = np.concatenate([np.linspace(0.02, 1, 50), np.geomspace(0.0005, 0.02, 30)])
    best = np.inf
    if symmetric:
        middle = (qmin + qmax + 1) // 2
        for r in ratios:
            scale = float(np.float32(max(-low, high) * r / (qmax - middle)))
            best = min(best, _true_error(array, scale, middle, bits, signed))
        return best
    for a, b in itertools.product(ratios if low else [1.0], ratios if high else [1.0]):
        scale = float(np.float32((high * b - low * a) / (qmax - qmin)))
        zero = int(np.clip(np.rint(qmin - low * a / scale), qmin, qmax))
        best = min(best, _true_error(array, scale, zero, bits, signed))
    return best


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize(
    ("bits", "signed", "symmetric"), [(8, False, False), (8, True, True), (4, True, False)]
)
def test_mse_is_as_good_as_brute_force_on_the_data(
    name: str, bits: int, signed: bool, symmetric: bool
) -> None:
    array = SAMPLES[name][:4000] if name != "outlier" else SAMPLES[name][-4000:]
    array = array.astype(np.float32).astype(np.float64)
    scale, zero = choose_range(_statistics(array), "mse", bits=bits, signed=signed, symmetric=symmetric)
    best = _brute_force(array, bits, signed, symmetric)
    assert _true_error(array, scale, zero, bits, signed) <= 1.03 * best


@pytest.mark.parametrize("name", SAMPLES)
def test_expected_error_is_the_true_error(name: str) -> None:
    array = SAMPLES[name].astype(np.float32).astype(np.float64)
    stat = _statistics(array)
    scale, zero = choose_range(stat)
    # Bins are assumed uniform: with a far outlier, one holds a large part of the bulk.
    tolerance = 0.1 if name == "outlier" else 0.03
    expected = pytest.approx(_true_error(array, scale, zero, 8, False), rel=tolerance)
    assert expected_error(stat, scale, zero) == expected


@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("signed", [False, True])
def test_zero_is_exact_and_scale_is_float32(method: str, name: str, signed: bool) -> None:
    qmin, qmax = _limits(8, signed)
    scale, zero = choose_range(_statistics(SAMPLES[name]), method, signed=signed)
    assert scale > 0
    assert float(np.float32(scale)) == scale
    assert isinstance(zero, int)
    assert qmin <= zero <= qmax


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_one_sided_values_waste_no_integer(method: str) -> None:
    assert choose_range(_statistics(SAMPLES["relu"]), method)[1] == 0
    assert choose_range(_statistics(SAMPLES["relu"]), method, signed=True)[1] == -128
    assert choose_range(_statistics(SAMPLES["negative"]), method)[1] == 255


@pytest.mark.parametrize("method", RANGE_METHODS)
def test_symmetric_fixes_the_zero_point(method: str) -> None:
    assert choose_range(_statistics(SAMPLES["gelu"]), method, signed=True, symmetric=True)[1] == 0
    assert choose_range(_statistics(SAMPLES["gelu"]), method, symmetric=True)[1] == 128


def test_minmax_covers_everything_and_zero() -> None:
    array = RNG.uniform(2.0, 10.0, 1000).astype(np.float32)
    scale, zero = choose_range(_statistics(array), "minmax")
    assert zero == 0
    assert scale * 255 == pytest.approx(float(array.max()), rel=1e-6)


def test_percentile_leaves_out_the_stated_share() -> None:
    array = SAMPLES["normal"].astype(np.float32)
    scale, zero = choose_range(_statistics(array), "percentile", percentile=98.0)
    low, high = -zero * scale, (255 - zero) * scale
    assert np.mean(array < low) == pytest.approx(0.01, abs=0.003)
    assert np.mean(array > high) == pytest.approx(0.01, abs=0.003)


def test_percentile_of_a_symmetric_grid_is_of_magnitudes() -> None:
    array = SAMPLES["normal"].astype(np.float32)
    scale, _ = choose_range(_statistics(array), "percentile", signed=True, symmetric=True, percentile=98.0)
    assert np.mean(np.abs(array) > 127 * scale) == pytest.approx(0.02, abs=0.003)


def test_percentile_of_mostly_zeros_keeps_the_rest() -> None:
    array = np.zeros(100_000, dtype=np.float32)
    array[:3] = 5.0
    scale, _ = choose_range(_statistics(array), "percentile", percentile=99.9)
    assert scale * 255 == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize("value", [0.0, 3.5, -3.5, 1e-30, 1e30])
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_constants_are_represented(value: float, method: str) -> None:
    scale, zero = choose_range(_statistics(np.full(10, value)), method)
    back = (np.clip(np.rint(value / scale) + zero, 0, 255) - zero) * scale
    assert back == pytest.approx(float(np.float32(value)), rel=1e-5)


def test_the_choice_is_deterministic() -> None:
    stat = _statistics(SAMPLES["student"])
    assert choose_range(stat) == choose_range(stat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "guess"},
            "range method 'guess' is unknown\n  choose one of ('mse', 'percentile', 'minmax', 'entropy')",
        ),
        ({"bits": 1}, "bits=1 is not possible\n  choose 2 to 16 bits"),
        (
            {"method": "percentile", "percentile": 20.0},
            "percentile=20.0 is not possible\n  choose over 50, at most 100",
        ),
    ],
)
def test_bad_options_say_so(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError) as error:
        choose_range(_statistics(SAMPLES["relu"]), **options)  # type: ignore[arg-type]
    assert str(error.value) == message
