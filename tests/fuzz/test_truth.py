"""The float64 run that decides whether a difference is rounding, and the noise that stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz_checks import _distance, differs
from fuzz_truth import narrowest, near_truth, true_outputs
from graphs import build, spec_of
from onnx import TensorProto, helper
from onnx_tools import mlp, proto, run

from lamina.ir.capture import capture

FLOAT = np.dtype(np.float32)
TRUE = np.random.default_rng(0).standard_normal((4, 5))
WANT = TRUE.astype(np.float32)


def test_what_errs_as_the_original_does_is_near_and_an_ulp_too_many_is_not() -> None:
    ulp = np.spacing(np.abs(WANT).max())
    assert near_truth(WANT, WANT + 2 * ulp, TRUE, FLOAT, 4.0)
    assert not near_truth(WANT, WANT + 9 * ulp, TRUE, FLOAT, 4.0)


@pytest.mark.parametrize("change", ["times 1.001", "sign", "one element", "swap"])
def test_wrong_results_are_not_near(change: str) -> None:
    have = WANT.copy()
    if change == "times 1.001":
        have *= np.float32(1.001)
    elif change == "sign":
        have[1] *= -1
    elif change == "one element":
        have[2, 2] += np.float32(1e-4)
    else:
        have = have[::-1]
    assert near_truth(WANT, have, TRUE, FLOAT, 64.0) is False


def test_a_truth_that_is_another_function_says_nothing() -> None:
    assert near_truth(WANT, WANT * 2, TRUE * 2, FLOAT, 4.0) is None
    assert near_truth(WANT, WANT, TRUE[:2], FLOAT, 4.0) is None
    assert near_truth(WANT, np.full_like(WANT, np.inf), TRUE, FLOAT, 4.0) is None


def test_where_the_original_overflowed_only_what_the_truth_rounds_to_is_near() -> None:
    true = TRUE.copy()
    true[1, 2] = -6e38
    want = WANT.copy()
    want[1, 2] = np.nan
    for given, near in ((-np.inf, True), (np.inf, None), (np.nan, None), (-3e38, None)):
        have = WANT.copy()
        have[1, 2] = given
        assert near_truth(want, have, true, FLOAT, 4.0) is near
    have[1, 2], have[0, 0] = -np.inf, have[0, 0] + 1
    assert near_truth(want, have, true, FLOAT, 4.0) is False


def test_the_float64_run_is_closer_than_float32_allows() -> None:
    model = mlp()
    feeds = {"x": np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)}
    found = true_outputs(model, [feeds])
    assert found is not None
    assert found[0][0].dtype == np.float64
    np.testing.assert_allclose(run(model, feeds)[0], found[0][0], rtol=0, atol=1e-5)


def test_most_random_models_have_a_float64_run() -> None:
    made = [build(spec_of(seed)) for seed in range(20)]
    found = [true_outputs(m.reference(), [m.feeds({"N": 2, "S": 3}, 0)]) for m in made]
    assert sum(f is not None for f in found) >= 15


def test_a_double_that_was_a_float_has_a_floats_ulps() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Cast", ["r"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["r"], ["d"], to=TensorProto.DOUBLE),
        helper.make_node("Cast", ["h"], ["y"], to=TensorProto.FLOAT),
    ]
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 4], "d": ["n", 4]})
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.DOUBLE
    assert narrowest(capture(model).model) == {"y": np.float16, "d": np.float32}
    one = np.ones(3)
    assert differs(one, one + 2**-23, 1.0, FLOAT) is None
    assert differs(one, one + 2**-23, 1.0)


def test_an_infinity_in_the_result_excuses_nothing_else() -> None:
    want = np.array([np.inf, 1.0, np.nan], np.float32)
    have = np.array([np.inf, 2.0, np.nan], np.float32)
    np.testing.assert_array_equal(_distance(have, want), [0, 1, 0])
    np.testing.assert_array_equal(_distance(-have, want), [np.inf, 3, 0])
