"""The trust study: rankings, truth against really changing a model, going on after a cut, pages."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from residual_nets import run
from scipy.stats import spearmanr
from stacked_model import WIDTH, stacked

from lamina.analysis.gradient_operators import weighted_operators
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from tools.studies.metric_trust import page, ratings, report, study, summary
from tools.studies.metric_trust.claims import claims
from tools.studies.metric_trust.guessing import COLUMNS, from_quarter, guesses
from tools.studies.metric_trust.ranking import RESAMPLES, interval, overlap, paired, resampled, spearman
from tools.studies.metric_trust.ratings import parts_of
from tools.studies.metric_trust.subjects import Subject
from tools.studies.metric_trust.truth import measure, rounded, variants_of

BRANCHES = 5


def _data(rows: int, seed: int) -> Dataset:
    random = np.random.default_rng(seed)
    return Dataset({"x": random.normal(size=(rows, 3, WIDTH)).astype(np.float32)}, {}, 4)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("tiny", stacked(BRANCHES), _data(16, 1), _data(12, 2), None, "made up", 16)


@pytest.fixture(scope="module")
def result(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ratings, "TRACED_SITES", 2)
        return study.study(subject, tmp_path_factory.mktemp("study"), lambda text: None)


# -- agreement -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_scipys_also_with_ties(seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 6, 20).astype(float), random.normal(size=20)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b)[0], abs=1e-12)


def test_spearman_by_hand() -> None:
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 * 2 / (4 * 15)
    assert spearman([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(0.8)


@pytest.mark.parametrize("a", [[1.0, 1.0, 1.0], [1.0, np.inf, 2.0], [1.0, np.nan, 2.0]])
def test_what_cannot_be_ranked_has_no_correlation(a: list[float]) -> None:
    assert np.isnan(spearman(a, [1.0, 2.0, 3.0]))


def test_overlap_counts_the_least_harmful_quarter() -> None:
    truth = np.arange(8.0)
    guess = np.array([0, 9, 1, 5, 6, 7, 8, 4.0])  # names sites 0 and 2; 0 and 1 are right
    assert overlap(guess, truth) == 0.5
    assert overlap(truth, truth) == 1.0
    assert overlap(-truth, truth) == 0.0


def test_overlap_of_a_constant_is_chance() -> None:
    assert overlap(np.ones(12), np.arange(12.0)) == pytest.approx(3 / 12)


def test_overlap_of_the_most_harmful() -> None:
    truth = np.arange(8.0)
    assert overlap(np.array([9, 1, 2, 3, 4, 5, 6, 7.5]), truth, most=True) == 0.5


def test_interval_holds_the_value_and_narrows() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=200)
    y = x + random.normal(size=200)
    low, high = interval(x, y)
    few_low, few_high = interval(x[:20], y[:20])
    assert low < spearman(x, y) < high
    assert high - low < few_high - few_low


def test_resamples_are_ranked_as_spearman_ranks() -> None:
    random = np.random.default_rng(3)
    a, b = random.integers(0, 5, 9).astype(float), random.normal(size=9)
    draws = np.random.default_rng(0).integers(0, 9, (RESAMPLES, 9))
    assert resampled(a, b)[:20] == pytest.approx([spearman(a[d], b[d]) for d in draws[:20]], nan_ok=True)


def test_few_sites_are_not_paired() -> None:
    values = {c: float(i) for i, c in enumerate("abcd")}
    assert paired(values, values) is None
    more = values | {"e": 9.0}
    pair = paired(more | {"unknown": 1.0}, more)
    assert pair is not None
    assert list(pair[0]) == list(more.values())


def test_halves_have_no_sample_in_common() -> None:
    parts = parts_of(_data(7, 0))
    first, second = (parts[p].inputs["x"] for p in ("first half", "second half"))
    assert len(first) == len(second) == 3
    assert not any(np.array_equal(a, b) for a in first for b in second)


# -- truth -----------------------------------------------------------------------------------------------


def test_rounded_weights_by_hand() -> None:
    program = stacked(BRANCHES)
    operator = weighted_operators(program)[0]
    before = program.graph.initializers[operator.weight].const_value.numpy()
    changed = rounded(program, [operator.name], 2)
    after = changed.graph.initializers[operator.weight].const_value.numpy()
    most = np.abs(before).max(axis=0, keepdims=True)  # 2 bits: -1, 0, 1 times the largest of a column
    assert np.allclose(after, np.rint(before / most) * most, atol=1e-7)
    assert np.array_equal(before, program.graph.initializers[operator.weight].const_value.numpy())
    others = [o.weight for o in weighted_operators(program)[1:]]
    for name in others:
        kept = changed.graph.initializers[name].const_value.numpy()
        assert np.array_equal(kept, program.graph.initializers[name].const_value.numpy())


@pytest.mark.parametrize("kind", ["drop", "w2"])
def test_measured_damage_is_that_of_the_whole_changed_model(subject: Subject, kind: str) -> None:
    program, data = subject.program, subject.report
    variants = variants_of(program, subject.calibration, kind)
    found = measure(program, variants, data)
    assert found.samples == data.samples
    before = run(program, data.inputs)[0].astype(np.float64)
    for name, damage in found.on(slice(None)).items():
        whole = apply_drops(program, [name]) if kind == "drop" else rounded(program, [name], 2)
        after = run(whole, data.inputs)[0].astype(np.float64)
        cosine = (before * after).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        assert found.metric == "cosine"
        assert damage == pytest.approx(1 - cosine.mean(), rel=1e-3, abs=1e-6)


def test_part_of_the_samples_is_what_they_give_alone(subject: Subject) -> None:
    variants = variants_of(subject.program, subject.calibration, "w2")
    found = measure(subject.program, variants, subject.report)
    alone = measure(subject.program, variants, subject.report.rows(slice(4, 8)))
    part = found.on(slice(4, 8))
    assert part == pytest.approx(alone.on(slice(None)), rel=1e-6)


# -- one model, end to end ---------------------------------------------------------------------------------


def test_every_kind_and_metric_is_there(result: Any) -> None:
    assert list(result["truths"]) == ["drop", "w8", "w4", "w2", "w8a8"]
    assert result["truths"]["drop"]["sites"] == BRANCHES
    names = {rating["metric"] for rating in result["ratings"]}
    wanted = {"block-influence", "hawq-trace", "skip-effect", "output-kl, 4 samples", "gradient-trace"}
    assert wanted <= names
    assert result["refused"] == {}


def test_damage_on_the_same_samples_is_the_truth(subject: Subject) -> None:
    same = replace(subject, report=subject.calibration.rows(slice(0, 16)), few=16)
    variants = variants_of(same.program, same.calibration, "w2")
    truth = measure(same.program, variants, same.report).on(slice(None))
    found = {rating.metric: rating for rating in ratings.measured(same, "w2", variants)}
    assert list(found) == ["output-kl, 1 sample", "output-kl, 4 samples", "output-kl, 16 samples"]
    assert found["output-kl, 16 samples"].values["all"] == pytest.approx(truth)
    assert found["output-kl, 4 samples"].values["all"] != pytest.approx(truth)
    assert found["output-kl, 4 samples"].seconds < found["output-kl, 16 samples"].seconds


def test_wider_weights_are_damaged_less(result: Any) -> None:
    truths = result["truths"]
    means = [np.mean(list(truths[k]["divergence"].values())) for k in ("w8", "w4", "w2")]
    assert means[0] < means[1] < means[2]


def test_a_cut_run_goes_on_where_it_stopped(
    subject: Subject, result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, said = study.variants_of, []

    def cut(program: Program, data: Dataset, kind: str) -> Any:
        if kind == "w4":
            raise KeyboardInterrupt
        return make(program, data, kind)

    monkeypatch.setattr(ratings, "TRACED_SITES", 2)
    monkeypatch.setattr(study, "variants_of", cut)
    with pytest.raises(KeyboardInterrupt):
        study.study(subject, tmp_path, lambda text: None)
    (tmp_path / "truth-w2.json").write_text('{"signature": "torn')  # what a kill in the middle may leave
    monkeypatch.setattr(study, "variants_of", make)
    again = study.study(subject, tmp_path, said.append)
    assert said[0] == "tiny: truth w4"
    assert "tiny: truth w2" in said
    assert not {"tiny: forward", "tiny: truth drop", "tiny: ratings w8"} & set(said)
    assert again["truths"]["drop"]["divergence"] == pytest.approx(result["truths"]["drop"]["divergence"])
    said.clear()
    study.study(subject, tmp_path, said.append)
    assert said == []


def test_what_is_not_kept_is_missing_and_told(subject: Subject, tmp_path: Path) -> None:
    said: list[str] = []
    nothing = study.study(subject, tmp_path, said.append, measuring=False)
    assert nothing["ratings"] == []
    assert "truth drop" in nothing["missing"]
    some = study.study(subject, tmp_path, said.append, kinds=["w8"], measuring=True)
    assert "tiny: truth w8" in said
    assert list(some["truths"]) == ["w8"]
    assert some["missing"] == ["truth drop", "truth w4", "truth w2", "truth w8a8"]
    text = page.page([some], summary.rows_of([some]))
    assert "**Not measured in this run**, and left out: tiny (drop, w4, w2, w8a8)." in text


def test_other_samples_are_measured_anew(subject: Subject) -> None:
    other = Subject("tiny", subject.program, subject.calibration, _data(12, 3), None, "made up", 16)
    assert study.signature(other) != study.signature(subject)
    same = Subject("tiny", stacked(BRANCHES), _data(16, 1), _data(12, 2), None, "made up", 16)
    assert study.signature(same) == study.signature(subject)


# -- pages -------------------------------------------------------------------------------------------------


def _made_up(model: str, good: float) -> dict[str, Any]:
    """A result in which ``good-metric`` is right, ``bad-metric`` turned round, and costs are known."""
    damage = {f"s{i}": float(i) for i in range(6)}
    turned = {n: -v for n, v in damage.items()}
    halves = {"first half": damage, "second half": turned}
    ratings = [
        {"metric": "good-metric", "truths": ["drop"], "values": {"all": damage} | halves},
        {"metric": "bad-metric", "truths": ["drop"], "values": {"all": turned}},
    ]
    for rating in ratings:
        rating |= {"seconds": good, "samples": 8}
    truth = {"sites": 6, "metric": "kl", "samples": 4, "divergence": damage, "halves": [damage, damage]}
    return {
        "model": model,
        "inputs": "made up",
        "task": None,
        "calibration": 8,
        "report": 4,
        "branches": [[n, "attention" if i % 2 else "mlp"] for i, n in enumerate(damage)],
        "plain_run_s": 2.0,
        "truths": {"drop": truth | {"task": {}, "seconds": 1.0}},
        "ratings": ratings,
        "refused": {},
        "missing": [],
        "facts": {"pairs": {"drop": [[2.0, 3.0]]}, "contribution": damage},
        "seconds": 1.0,
    }


def test_rows_know_rank_overlap_cost_and_stability() -> None:
    rows = summary.rows_of([_made_up("a", 1.0), _made_up("b", 3.0)])
    good = rows["good-metric", "drop"]
    assert good.rho == {"a": pytest.approx(1.0), "b": pytest.approx(1.0)}
    assert good.cost == {"a": 0.5, "b": 1.5}
    assert good.overlap == {"a": 1.0, "b": 1.0}
    assert good.stability["a"] == pytest.approx(-1.0)
    assert rows["bad-metric", "drop"].stability == {}
    assert [r.metric for r in summary.best(rows, "drop", ["a", "b"])] == ["good-metric", "bad-metric"]


def test_guesses_from_a_quarter() -> None:
    cheap = {f"s{i}": float(i) for i in range(9)}
    damage = {n: 10.0**v for n, v in cheap.items()}
    assert from_quarter(cheap, damage) == pytest.approx(damage)
    turned = {n: -v for n, v in cheap.items()}
    flat = from_quarter(turned, damage)
    # the ends contradict the order: all between them are the same
    assert list(flat.values())[1:-1] == pytest.approx([1e4] * 7)


def test_guesses_are_compared_on_a_model(result: Any) -> None:
    found = guesses([result])
    means, models = found["w2"]
    assert models == 1
    rows = summary.rows_of([result])
    wanted = ("quantization-error-w4", "output-kl, 1 sample", "output-kl, 16 samples")
    assert len(means) == len(COLUMNS)
    assert (means[0], *means[2:]) == pytest.approx([rows[name, "w2"].mean for name in wanted])


def test_a_duel_counts_models_and_decides() -> None:
    rows = summary.rows_of([_made_up("a", 1.0), _made_up("b", 3.0)])
    won = summary.duel(rows, "good-metric", "bad-metric", ["drop"])
    assert (won.gap, won.won, won.models, won.verdict) == (pytest.approx(2.0), 2, 2, 1)
    assert summary.duel(rows, "bad-metric", "good-metric", ["drop"]).verdict == -1
    assert summary.duel(rows, "bad-metric", "unknown", ["drop"]).verdict == 0
    assert summary.Duel(0.04, 5, 5).verdict == 0
    assert summary.Duel(0.4, 3, 5).verdict == 0


def test_claims_follow_the_numbers() -> None:
    found = {c.name: c for c in claims([_made_up("a", 1.0)], summary.rows_of([_made_up("a", 1.0)]))}
    # damage grows with depth in the made-up result, attention and MLP alternate with attention the later one
    assert found["angular-distance"].verdict == "does not reproduce"
    assert "a 4.00" in found["relative-contribution"].found  # median of 3, 4, 5 over that of 0, 1, 2
    assert found["branch-similarity"].verdict == "does not reproduce"
    assert "drops a 0.50" in found["hessian-interlayer"].found
    assert found["hawq-trace"].verdict == "undecided"
    assert len(found) == 21


def test_what_is_written(tmp_path: Path, result: Any) -> None:
    results = [result, _made_up("a", 1.0)]
    text = report.write(results, tmp_path)
    assert "good-metric" in text
    data = json.loads((tmp_path / "metric_trust.json").read_text(), parse_constant=pytest.fail)
    assert [m["model"] for m in data["models"]] == ["tiny", "a"]
    root = ElementTree.fromstring((tmp_path / "metric_trust.svg").read_text())
    labels = {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"good-metric", "hawq-trace", "drop", "w8a8"} <= labels
    report.write_docs(results, tmp_path)
    document = (tmp_path / "metric_trust.md").read_text()
    assert document == page.page(results, summary.rows_of(results))
    assert "| good-metric | 1.00 | 1.00..1.00 | 1 | 1.00 | 0.50 | 1 | -1.00 |" in document
    assert "nan" not in document.lower()
