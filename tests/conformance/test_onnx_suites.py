"""The models of ONNX's own backend suites, through lamina and back: none answers differently."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from conformance import CHANGED, REFUSED, SAME, Outcome, check, compare, interface_changes
from onnx_cases import SUITES, VARIANTS, Case, cases, variants
from onnx_tools import mlp

from lamina.ir.capture import capture

STRIDE = 8  # the default run takes every eighth case, each in one variant; LAMINA_SLOW=1 takes all
# The only cases lamina refuses; docs/conformance.md says why.
REFUSALS: frozenset[str] = frozenset()


def _sample(suite: str) -> Iterator[tuple[str, Case]]:
    step = 1 if suite == "simple" else STRIDE
    for position, case in enumerate(cases(suite)):
        if position % step == 0:
            found = list(variants(case))
            yield found[position // step % len(found)]


def _assert_none_changed(chosen: Iterable[tuple[str, Case]], folder: Path) -> list[Outcome]:
    outcomes = [check(case, variant, folder) for variant, case in chosen]
    wrong = [f"{o.case} ({o.variant}): {line}" for o in outcomes for line in o.changed]
    wrong += [f"{o.case} ({o.variant}): {line}" for o in outcomes for line in o.undone]
    wrong += [f"{o.case}: {o.refused}" for o in outcomes if o.refused and o.case not in REFUSALS]
    assert not wrong, "\n".join(wrong)
    return outcomes


@pytest.mark.parametrize("suite", SUITES)
def test_a_sample_answers_as_before(suite: str, tmp_path: Path) -> None:
    outcomes = _assert_none_changed(_sample(suite), tmp_path)
    answered = sum(o.status == SAME for o in outcomes)
    assert answered >= 0.9 * len(outcomes)  # what runs nowhere proves nothing
    if suite == "node":
        assert {o.variant for o in outcomes} == set(VARIANTS)
        assert sum(bool(o.fired) for o in outcomes) > 0.2 * len(outcomes)  # nor does what no fold touches


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LAMINA_SLOW"), reason="takes minutes: set LAMINA_SLOW=1")
@pytest.mark.parametrize("suite", SUITES)
def test_every_case_answers_as_before(suite: str, tmp_path: Path) -> None:
    outcomes = _assert_none_changed((pair for case in cases(suite) for pair in variants(case)), tmp_path)
    assert {o.case for o in outcomes if o.status == REFUSED} <= REFUSALS
    assert sum(o.status == SAME for o in outcomes) >= 0.95 * len(outcomes)


# -- the judge itself -----------------------------------------------------------------------------------


def _case(model: onnx.ModelProto) -> Case:
    x = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    from onnx.reference import ReferenceEvaluator

    expected = ReferenceEvaluator(model).run(None, {"x": x})
    return Case("test", "mlp", model, (({"x": x}, list(expected)),), 1e-3, 1e-7)


def test_a_model_that_is_kept_passes(tmp_path: Path) -> None:
    outcome = check(_case(mlp()), VARIANTS[0], tmp_path)
    assert outcome.status == SAME
    assert outcome.same == ["onnxruntime", "reference"]
    assert not list(tmp_path.iterdir())


def test_a_pass_that_changes_the_result_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(proto: onnx.ModelProto) -> object:
        spoiled = onnx.ModelProto()
        spoiled.CopyFrom(proto)
        spoiled.graph.node[2].op_type = "Abs"
        return capture(spoiled)

    monkeypatch.setattr("conformance.capture", broken)
    outcome = check(_case(mlp()), VARIANTS[0], tmp_path)
    assert outcome.status == CHANGED
    assert any("onnxruntime: output 'y' differs" in line for line in outcome.changed)


def test_an_original_that_answers_otherwise_proves_nothing(tmp_path: Path) -> None:
    case = _case(mlp())
    case.data_sets[0][1][0] += 1
    outcome = check(case, VARIANTS[0], tmp_path)
    assert outcome.status == "not runnable"
    assert set(outcome.not_runnable) == {"onnxruntime", "reference"}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.graph.input[0], "name", "other"),
        lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", onnx.TensorProto.DOUBLE),
        lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[0], "dim_value", 3),
        lambda m: m.graph.output[0].type.tensor_type.shape.dim.pop(),
        lambda m: m.graph.output.add(name="more"),
    ],
    ids=["name", "dtype", "dynamic dim", "rank", "number"],
)
def test_a_changed_interface_is_seen(change: object) -> None:
    after = mlp()
    change(after)  # type: ignore[operator]
    assert not interface_changes(mlp(), mlp())
    assert interface_changes(mlp(), after)


_ONE = np.array([1.0, np.nan, -2.0], np.float32)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (_ONE * np.float32(1.01), _ONE),
        (-_ONE, _ONE),
        (np.nan_to_num(_ONE), _ONE),
        (_ONE.astype(np.float64), _ONE),
        (_ONE[None], _ONE),
        (_ONE[:2], _ONE),
        ([_ONE, _ONE], [_ONE]),
        (_ONE, [_ONE]),
        (None, _ONE),
        (_ONE, None),
        (np.array(["a"], object), np.array(["b"], object)),
        ([_ONE, _ONE + 1], [_ONE, _ONE]),
    ],
)
def test_the_judge_rejects(got: object, want: object) -> None:
    assert compare(got, want, 1e-3, 1e-7)
    assert not compare(want, want, 1e-3, 1e-7)
