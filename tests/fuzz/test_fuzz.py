"""A few hundred random models through every check: the bounded part of ``python -m tools.fuzz``."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from fuzz_checks import Outcome, Wrong, check, differs, ulps
from graphs import Spec, build, spec_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

LEAST, MOST = 20, 120
SECONDS = 15.0  # a slow machine checks fewer
MUST_FIRE = ("eliminate_identities", "simplify_patterns", "fold_constants", "supergraph", "plan")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    folder, started = tmp_path_factory.mktemp("fuzz"), time.monotonic()
    found = []
    for seed in range(MOST):
        found.append(check(spec_of(seed), folder))
        if len(found) >= LEAST and time.monotonic() - started > SECONDS:
            break
    return found


def test_no_random_model_gives_a_wrong_result(outcomes: list[Outcome]) -> None:
    assert len(outcomes) >= LEAST
    assert not [o.undone for o in outcomes if o.undone]


def test_the_models_are_valid_and_read(outcomes: list[Outcome]) -> None:
    assert sum(bool(o.unrunnable) for o in outcomes) <= len(outcomes) / 20
    assert sum(bool(o.refused) for o in outcomes) <= len(outcomes) / 20


def test_the_passes_have_something_to_do(outcomes: list[Outcome]) -> None:
    fired: Counter[str] = sum((o.fired for o in outcomes), Counter())
    assert all(fired[name] for name in MUST_FIRE)


SPECS = st.builds(
    Spec,
    seed=st.integers(0, 2**20),
    pieces=st.lists(st.integers(0, 2**20), min_size=1, max_size=5).map(tuple),
    grid=st.booleans(),
)


@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(spec=SPECS)
def test_hypothesis_finds_no_wrong_result(spec: Spec, tmp_path: Path) -> None:
    check(spec, tmp_path)


def test_equal_specs_make_equal_models() -> None:
    for seed in range(20):
        first, second = (build(spec_of(seed)).proto.SerializeToString(deterministic=True) for _ in range(2))
        assert first == second


def test_leaving_pieces_out_leaves_a_valid_model(tmp_path: Path) -> None:
    spec = spec_of(9)
    assert len(spec.pieces) > 2
    for i in range(len(spec.pieces)):
        smaller = Spec(spec.seed, spec.pieces[:i] + spec.pieces[i + 1 :])
        assert not check(smaller, tmp_path).unrunnable


@pytest.mark.parametrize("change", ["one ulp", "times 1000", "sign", "nan", "dtype", "shape", "swap"])
def test_the_comparison_rejects_wrong_results(change: str) -> None:
    want = np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)
    have = want.copy()
    if change == "one ulp":
        have[0, 0] = np.nextafter(have[0, 0], np.float32(9))
    elif change == "times 1000":
        have *= 1000
    elif change == "sign":
        have[1] *= -1
    elif change == "nan":
        have[2, 2] = np.nan
    elif change == "dtype":
        have = have.astype(np.float64)
    elif change == "shape":
        have = have.reshape(5, 4)
    else:
        have = have[::-1]
    assert differs(want, have, 0.0 if change == "one ulp" else 64.0)
    assert differs(want, want.copy(), 0.0) is None


def test_exact_passes_get_no_allowance() -> None:
    assert ulps(("eliminate_identities", "split_residual_sum")) == 0
    assert ulps(("fuse_gelu",)) > 0


def test_a_broken_fold_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The oracle itself: a fold that drops a Relu it must keep does not get through."""
    from lamina.passes.fold import drop_redundant_relu

    monkeypatch.setattr(drop_redundant_relu, "_non_negative", lambda node, known: True)

    def search() -> None:
        for seed in range(40):
            check(spec_of(seed), tmp_path)

    with pytest.raises(Wrong):
        search()
