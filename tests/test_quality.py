"""Quality: each metric against a plain computation, what they refuse, evaluation, intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from interfaces import interface
from reference import models_dir, needs_reference, sets_dir

from lamina.data import Dataset, load_data
from lamina.errors import BudgetError, DataError
from lamina.quality import (
    METRICS,
    damage_interval,
    evaluate,
    evaluate_each,
    get_metric,
    reference_outputs,
    standard_error,
)
from lamina.quality.divergence import CosineDivergence, KlDivergence, RelativeL2
from lamina.quality.task import CrossEntropy, Perplexity, Spearman, Top1, weighted_ranks
from lamina.quality.user import UserMetric

RNG = np.random.default_rng(0)
CLASSIFIER = interface({"x": ("float32", ["b", 4])}, {"logits": ("float32", ["b", 5])})
DECODER = interface({"tokens": ("int64", ["b", "s"])}, {"logits": ("float32", ["b", "s", 7])})
ENCODER = interface(
    {"input_ids": ("int64", ["b", "s"]), "attention_mask": ("int64", ["b", "s"])},
    {"last_hidden_state": ("float32", ["b", "s", 16])},
)
Arrays = Mapping[str, np.ndarray]


def table(outputs: np.ndarray, name: str = "logits", key: str = "x") -> Any:
    """A run that looks its answer up: row ``i`` of ``outputs`` for the input whose first value is ``i``."""

    def run(feeds: Arrays) -> dict[str, np.ndarray]:
        return {name: outputs[feeds[key].reshape(len(feeds[key]), -1)[:, 0].astype(int)]}

    return run


def indexed(n: int, batch_size: int = 4, **extras: np.ndarray) -> Dataset:
    return Dataset({"x": np.arange(n, dtype=np.float32)[:, None]}, extras, batch_size)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# ---- top1 ------------------------------------------------------------------------------------------


def test_top1_is_the_accuracy() -> None:
    logits, labels = RNG.standard_normal((50, 5)).astype(np.float32), RNG.integers(0, 5, 50)
    features = evaluate(table(logits), indexed(50, labels=labels), Top1("logits"))
    assert features.shape == (50, 2)
    assert Top1().score(features) == np.mean(logits.argmax(1) == labels)


def test_top1_of_positions_images_and_ignored_labels() -> None:
    logits = RNG.standard_normal((6, 3, 5)).astype(np.float32)
    labels = RNG.integers(0, 5, (6, 3))
    labels[:, 1] = -100
    expected = np.mean(logits.argmax(2)[:, [0, 2]] == labels[:, [0, 2]])
    data = indexed(6, labels=labels)
    assert Top1().score(evaluate(table(logits), data, Top1())) == expected
    maps = logits.transpose(0, 2, 1)[:, :, :, None].repeat(2, axis=3)
    data = indexed(6, labels=np.repeat(labels[:, :, None], 2, axis=2))
    assert Top1().score(evaluate(table(maps), data, Top1())) == expected
    pooled = indexed(6, labels=labels[:, 0])
    assert Top1().score(evaluate(table(logits[:, 0, :, None, None]), pooled, Top1())) == np.mean(
        logits[:, 0].argmax(1) == labels[:, 0]
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "metric 'top1' needs labels, the data has no extra arrays"),
        (np.ones(8), "needs integer labels, these are float64"),
        (np.full(8, 5), "label 5 is not one of the model's 5 classes (0 to 4)"),
        (np.full(8, -1), "label -1 is not one of"),
        (np.zeros((8, 5), int), "labels of shape [4, 5] do not go with predictions of shape [4]"),
    ],
)
def test_top1_refusals(labels: np.ndarray | None, message: str) -> None:
    extras = {} if labels is None else {"labels": labels}
    with pytest.raises(DataError) as caught:
        evaluate(table(np.zeros((8, 5), np.float32)), indexed(8, **extras), Top1())
    assert message in str(caught.value)


# ---- next token ------------------------------------------------------------------------------------


def decoder_case() -> tuple[np.ndarray, np.ndarray, Dataset]:
    tokens = RNG.integers(0, 7, (9, 6))
    tokens[:, 0] = RNG.permutation(9) % 7
    logits = RNG.standard_normal((7, 6, 7)).astype(np.float32)
    return tokens, logits, Dataset({"tokens": tokens}, {}, 4)


def test_next_token_loss_and_perplexity() -> None:
    tokens, logits, data = decoder_case()
    run = table(logits, key="tokens")
    log_p = log_softmax(logits[tokens[:, 0]])[:, :-1]
    nll = -np.take_along_axis(log_p, tokens[:, 1:, None], axis=2).mean()
    for name, expected in (("cross-entropy", nll), ("perplexity", math.exp(nll))):
        metric = get_metric(name, DECODER)
        features = evaluate(run, data, metric)
        assert metric.score(features) == pytest.approx(expected, rel=1e-6)
        assert (features[:, 1] == 5).all()


def test_probabilities_are_not_softmaxed_again() -> None:
    tokens, logits, data = decoder_case()
    metric = CrossEntropy("logits", "tokens")
    from_logits = metric.score(evaluate(table(logits, key="tokens"), data, metric))
    probabilities = np.exp(log_softmax(logits)).astype(np.float32)
    from_probabilities = metric.score(evaluate(table(probabilities, key="tokens"), data, metric))
    assert from_probabilities == pytest.approx(from_logits, rel=1e-5)
    assert tokens.shape == (9, 6)


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("case", ["tokens", "labels", "images"])
def test_a_loss_is_the_sum_of_its_features_and_has_the_derivative_it_says(
    case: str, probabilities: bool
) -> None:
    shape = {"tokens": (3, 6, 7), "labels": (5, 7), "images": (2, 7, 3, 4)}[case]
    axis = 1 if case == "images" else -1
    values = RNG.standard_normal(shape)
    if probabilities:
        values = np.exp(values) / np.exp(values).sum(axis=axis, keepdims=True)
    mask = np.ones((3, 6), np.int64)
    mask[1, 4:] = 0
    tokens, labels = RNG.integers(7, size=(3, 6)), RNG.integers(7, size=np.delete(shape, axis))
    labels.flat[0] = -100
    data = {
        "tokens": Dataset({"tokens": tokens, "attention_mask": mask}, {}),
        "labels": Dataset({"x": np.zeros((5, 1))}, {"labels": labels}),
        "images": Dataset({"x": np.zeros((2, 1))}, {"labels": labels}),
    }[case]
    metric = CrossEntropy("logits", "tokens" if case == "tokens" else "")

    def at(given: np.ndarray) -> float:
        return float(metric.features({"logits": given.astype(np.float64)}, data)[:, 0].sum())

    loss, slopes = metric.loss({"logits": values}, data)
    assert loss == pytest.approx(at(values), rel=1e-5)
    assert slopes["logits"].shape == shape
    way = RNG.standard_normal(shape)
    if probabilities:  # the way keeps sums; elsewhere these are no probabilities
        way = values * (way - (way * values).sum(axis=axis, keepdims=True))
    shown = (at(values + 1e-2 * way) - at(values - 1e-2 * way)) / 2e-2
    assert float((slopes["logits"] * way).sum()) == pytest.approx(shown, rel=1e-2, abs=1e-3)


def test_a_metric_that_counts_has_no_loss() -> None:
    assert Top1().loss({"logits": np.ones((4, 5))}, indexed(4, labels=np.zeros(4, int))) == (0.0, {})


def test_padding_and_ignored_labels_do_not_count() -> None:
    _, logits, _ = decoder_case()
    tokens = np.array([[1, 2, 3, 4, 5, 6], [2, 3, 4, 0, 0, 0]])
    mask = np.array([[1] * 6, [1] * 3 + [0] * 3])
    data = Dataset({"tokens": tokens, "attention_mask": mask}, {})
    metric = CrossEntropy("logits", "tokens")
    features = evaluate(table(logits, key="tokens"), data, metric)
    assert features[:, 1].tolist() == [5, 2]
    log_p = log_softmax(logits[2])
    assert features[1, 0] == pytest.approx(-(log_p[0, 3] + log_p[1, 4]), rel=1e-5)
    labels = np.where(mask, tokens, -100)
    by_label = evaluate(table(logits, key="tokens"), Dataset({"tokens": tokens}, {"labels": labels}), metric)
    assert np.array_equal(by_label, features)


def test_cross_entropy_of_a_classifier() -> None:
    logits, labels = RNG.standard_normal((20, 5)).astype(np.float32), RNG.integers(0, 5, 20)
    metric = get_metric("cross-entropy", CLASSIFIER)
    score = metric.score(evaluate(table(logits), indexed(20, labels=labels), metric))
    assert score == pytest.approx(-log_softmax(logits)[np.arange(20), labels].mean(), rel=1e-6)


def test_next_token_refusals() -> None:
    one = Dataset({"tokens": np.ones((3, 1), int)}, {})
    with pytest.raises(DataError, match="has no next token to predict"):
        evaluate(table(np.zeros((7, 1, 7), np.float32), key="tokens"), one, CrossEntropy("logits", "tokens"))
    with pytest.raises(DataError, match="needs labels"):
        evaluate(table(np.zeros((8, 5), np.float32)), indexed(8), get_metric("perplexity", CLASSIFIER))


def test_relative_damage_of_losses() -> None:
    assert CrossEntropy().damage(1.5, 1.53) == pytest.approx(0.02)
    assert Perplexity().damage(4.0, 3.0) == pytest.approx(-0.25)
    assert Top1().damage(0.9, 0.88) == pytest.approx(0.02)


# ---- spearman --------------------------------------------------------------------------------------


def pair_case(n: int = 40) -> tuple[np.ndarray, np.ndarray, Dataset]:
    hidden = RNG.standard_normal((2 * n, 6, 16)).astype(np.float32)
    lengths = RNG.integers(2, 7, 2 * n)
    mask = (np.arange(6) < lengths[:, None]).astype(np.int64)
    ids = np.arange(2 * n)[:, None] * np.ones((1, 6), np.int64)
    score = RNG.integers(0, 4, n).astype(np.float32)
    return hidden, mask, Dataset({"input_ids": ids, "attention_mask": mask}, {"score": score}, 7, group=2)


def test_spearman_matches_scipy() -> None:
    hidden, mask, data = pair_case()
    metric = get_metric("spearman", ENCODER)
    features = evaluate(table(hidden, "last_hidden_state", "input_ids"), data, metric)
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    cosine = (mean[0::2] * mean[1::2]).sum(1)
    assert features.shape == (40, 2)
    assert np.allclose(features[:, 0], cosine, atol=1e-6)
    expected = scipy.stats.spearmanr(cosine, data.extras["score"]).statistic
    assert metric.score(features) == pytest.approx(expected, abs=1e-12)


def test_spearman_of_pooled_embeddings() -> None:
    embeddings = RNG.standard_normal((20, 8)).astype(np.float32)
    data = Dataset({"x": np.arange(20.0)[:, None]}, {"score": np.arange(10.0)}, 6, group=2)
    metric = Spearman("embedding")
    features = evaluate(table(embeddings, "embedding"), data, metric)
    e = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    assert np.allclose(features[:, 0], (e[0::2] * e[1::2]).sum(1), atol=1e-6)


def test_weighted_ranks_are_the_ranks_of_repeated_values() -> None:
    values = np.array([3.0, 1.0, 3.0, 2.0, 0.0])
    counts = np.array([[1, 2, 1, 0, 3], [0, 1, 1, 1, 1]])
    for row, ranks in zip(counts, weighted_ranks(values, counts.astype(float)), strict=True):
        repeated = scipy.stats.rankdata(np.repeat(values, row))
        assert np.array_equal(np.repeat(ranks, row), repeated)


def test_spearman_resamples_like_repeated_samples() -> None:
    features = np.stack([RNG.standard_normal(30), RNG.integers(0, 5, 30)], axis=1)
    weights = np.array([np.bincount(RNG.integers(0, 30, 30), minlength=30) for _ in range(5)], dtype=float)
    for row, score in zip(weights, Spearman().scores(features, weights), strict=True):
        again = np.repeat(features, row.astype(int), axis=0)
        assert score == pytest.approx(scipy.stats.spearmanr(again[:, 0], again[:, 1]).statistic, abs=1e-12)


def test_a_collapsed_embedding_scores_zero() -> None:
    assert Spearman().score(np.stack([np.ones(9), np.arange(9.0)], axis=1)) == 0


def test_spearman_refusals() -> None:
    with pytest.raises(DataError, match="compares pairs, the data has single samples"):
        evaluate(table(np.zeros((4, 5))), indexed(4, score=np.zeros(4)), Spearman("logits"))
    with pytest.raises(DataError, match="needs the array 'score'"):
        evaluate(table(np.zeros((4, 5))), Dataset({"x": np.zeros((4, 1))}, {}, group=2), Spearman("logits"))


# ---- divergences -----------------------------------------------------------------------------------


def test_kl_matches_its_definition() -> None:
    p, q = (RNG.standard_normal((30, 5)).astype(np.float32) for _ in range(2))
    metric = get_metric("kl", CLASSIFIER)
    features = evaluate(table(q), indexed(30), metric, reference_run=table(p))
    log_p, log_q = log_softmax(p), log_softmax(q)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    assert metric.score(features) == pytest.approx(expected, rel=1e-5)
    assert metric.damage(0.0, metric.score(features)) == metric.score(features)
    probabilities = [table(np.exp(v).astype(np.float32)) for v in (log_q, log_p)]
    again = evaluate(probabilities[0], indexed(30), metric, reference_run=probabilities[1])
    assert metric.score(again) == pytest.approx(expected, rel=1e-4)


def test_kl_of_masked_logits_is_finite() -> None:
    p = RNG.standard_normal((4, 5)).astype(np.float32)
    p[:, 2] = -np.inf
    q = p + RNG.standard_normal((4, 5)).astype(np.float32)
    score = KlDivergence().score(evaluate(table(q), indexed(4), KlDivergence(), reference_run=table(p)))
    assert 0 < score < 10


def test_padding_does_not_diverge() -> None:
    a = RNG.standard_normal((7, 6, 16)).astype(np.float32)
    b = a.copy()
    b[:, 4:] += 1
    ids = np.arange(7)[:, None] * np.ones((1, 6), np.int64)
    mask = np.ones((7, 6), np.int64)
    mask[:, 4:] = 0
    data = Dataset({"input_ids": ids, "attention_mask": mask}, {})
    runs = [table(v, "h", "input_ids") for v in (b, a)]
    for metric in (CosineDivergence(), RelativeL2(), KlDivergence("h")):
        assert metric.score(evaluate(runs[0], data, metric, reference_run=runs[1])) == 0
        unmasked = Dataset({"input_ids": ids}, {})
        assert metric.score(evaluate(runs[0], unmasked, metric, reference_run=runs[1])) >= 0
    assert RelativeL2().score(evaluate(runs[0], unmasked, RelativeL2(), reference_run=runs[1])) > 0.1


def test_cosine_and_relative_l2_match_their_definitions() -> None:
    a, b = (RNG.standard_normal((12, 16)).astype(np.float32) for _ in range(2))
    features = evaluate(table(b), indexed(12), CosineDivergence(), reference_run=table(a))
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert CosineDivergence().score(features) == pytest.approx(1 - cosine.mean(), rel=1e-6)
    features = evaluate(table(b), indexed(12), RelativeL2(), reference_run=table(a))
    assert RelativeL2().score(features) == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-6)


def test_every_output_counts_but_caches_and_missing_ones() -> None:
    a = {
        "y": np.ones((4, 3)),
        "z": np.full((4, 2), 2.0),
        "present.0.key": np.ones((4, 9)),
        "n": np.ones(4, int),
    }
    b = {"y": np.ones((4, 3)), "z": np.full((4, 2), 3.0), "n": np.zeros(4, int)}
    data = indexed(4)
    score = RelativeL2().score(evaluate(lambda _: b, data, RelativeL2(), reference_run=lambda _: a))
    assert score == pytest.approx((0 + 0.5) / 2)


def test_zero_outputs_that_stay_zero_have_not_diverged() -> None:
    zero = np.zeros((4, 3), np.float32)
    for metric in (CosineDivergence(), RelativeL2()):
        assert metric.score(evaluate(table(zero), indexed(4), metric, reference_run=table(zero))) == 0
        moved = metric.score(evaluate(table(zero + 1), indexed(4), metric, reference_run=table(zero)))
        assert moved >= 1


def test_divergence_refusals() -> None:
    ones = np.ones((4, 3), np.float32)
    with pytest.raises(DataError, match="compares with the original's outputs, none were given"):
        evaluate(table(ones), indexed(4), RelativeL2())
    with pytest.raises(DataError, match="has shape"):
        evaluate(table(ones), indexed(4), RelativeL2(), reference_run=table(ones[:, :2]))
    with pytest.raises(DataError, match="finds no real-valued output"):
        evaluate(table(ones), indexed(4), RelativeL2(), reference_run=table(ones, "other"))


# ---- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
def test_every_builtin_is_found_by_name(kind: type) -> None:
    assert type(get_metric(kind.name.upper().replace("-", "_"), DECODER)) is kind  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("outputs", "last", "expected"),
    [
        ({"logits": ("float32", ["b", 5])}, "Identity", "kl"),
        ({"y": ("float32", ["b", 5])}, "Softmax", "kl"),
        ({"y": ("float32", ["b", 5])}, "Gemm", "kl"),
        ({"sentence_embedding": ("float32", ["b", 384])}, "Gemm", "cosine"),
        ({"last_hidden_state": ("float32", ["b", "s", 384])}, "Add", "cosine"),
        ({"price": ("float32", ["b", 1])}, "Gemm", "relative-l2"),
        ({"scores": ("float32", ["b", 9, 2]), "boxes": ("float32", ["b", 9, 4])}, "Add", "relative-l2"),
        ({"logits": ("float32", ["b", 5]), "present.0": ("float32", ["b", 5])}, "Add", "kl"),
    ],
)
def test_the_default_suits_the_outputs(outputs: Any, last: str, expected: str) -> None:
    program = interface({"x": ("float32", ["b", 4])}, outputs, last=last)
    assert get_metric(None, program).name == expected


def test_the_right_outputs_are_read() -> None:
    program = interface(
        {"input_ids": ("int64", ["b", "s"]), "position_ids": ("int64", ["b", "s"])},
        {
            "aux": ("float32", ["b", 2]),
            "logits": ("float32", ["b", "s", 9]),
            "last_hidden_state": ("float32", ["b", "s", 8]),
        },
    )
    assert get_metric("perplexity", program) == Perplexity("logits", "input_ids")
    assert get_metric("top1", program) == Top1("logits")
    assert get_metric("spearman", program) == Spearman("last_hidden_state")
    assert get_metric("cosine", program) == CosineDivergence(("aux", "logits", "last_hidden_state"))


def test_metric_refusals() -> None:
    with pytest.raises(BudgetError, match="metric 'topl' is unknown, did you mean top1") as caught:
        get_metric("topl", CLASSIFIER)
    assert "module:function" in str(caught.value)
    integer = interface({"x": ("float32", ["b"])}, {"label": ("int64", ["b"])})
    for name in ("top1", "cosine", None):
        with pytest.raises(BudgetError, match="needs an output of real numbers"):
            get_metric(name, integer)
    with pytest.raises(BudgetError, match="int is not a metric"):
        get_metric(3, CLASSIFIER)
    with pytest.raises(BudgetError, match="direction 'up'"):
        get_metric((len, "up"), CLASSIFIER)


# ---- the user's own --------------------------------------------------------------------------------


def accuracy(outputs: Arrays, data: Arrays) -> float:
    return float((outputs["logits"].argmax(1) == data["labels"]).mean())


def test_a_function_sees_all_samples_at_once() -> None:
    logits, labels = RNG.standard_normal((10, 5)).astype(np.float32), RNG.integers(0, 5, 10)
    metric = get_metric(accuracy, CLASSIFIER)
    assert (metric.name, metric.higher_is_better) == ("accuracy", True)
    features = evaluate(table(logits), indexed(10, labels=labels), metric)
    assert features.shape == (1, 1)
    assert metric.score(features) == np.mean(logits.argmax(1) == labels)
    assert damage_interval(metric, features, features) is None
    assert standard_error(metric, features, features) == 0


def test_a_function_sees_the_samples_that_were_run() -> None:
    data = Dataset({"x": np.arange(10.0)[:, None]}, {"labels": np.arange(10)}, 4, fixed_batch=4)
    metric = get_metric(lambda o, d: len(o["logits"]) == len(d["labels"]) == 8, CLASSIFIER)
    assert metric.score(evaluate(table(np.ones((10, 5))), data, metric)) == 1


def test_one_number_a_sample_gives_an_interval() -> None:
    logits, labels = RNG.standard_normal((40, 5)).astype(np.float32), RNG.integers(0, 5, 40)
    metric = get_metric(lambda o, d: o["logits"].argmax(1) == d["labels"], CLASSIFIER)
    features = evaluate(table(logits), indexed(40, labels=labels), metric)
    assert features.shape == (40, 1)
    top1 = evaluate(table(logits), indexed(40, labels=labels), Top1())
    worse = np.zeros_like(features)
    assert damage_interval(metric, features, worse) == damage_interval(Top1(), top1, top1 * [0, 1])


def test_directions_and_percents() -> None:
    def error(outputs: Arrays, data: Arrays) -> float:
        return 2.0

    def ready(outputs: Arrays, data: Arrays) -> float:
        return 2.0

    ready.higher_is_better = False  # type: ignore[attr-defined]
    ready.percent = "points"  # type: ignore[attr-defined]
    less = get_metric((error, "min"), CLASSIFIER)
    assert (less.higher_is_better, less.damage(2.0, 2.1)) == (False, pytest.approx(0.05))
    assert get_metric(ready, CLASSIFIER).damage(2.0, 2.1) == pytest.approx(0.1)
    more = get_metric(error, CLASSIFIER)
    assert more.damage(0.9, 0.88) == pytest.approx(0.02), "bounded: points"
    assert more.damage(40.0, 39.0) == pytest.approx(0.025), "unbounded: relative"


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda o, d: d["labels"], "metric '<lambda>' raised KeyError: 'labels'"),
        (lambda o, d: np.zeros((2, 2)), "returned an array of shape [2, 2]"),
        (lambda o, d: np.zeros(3), "returned an array of shape [3]"),
        (lambda o, d: float("nan"), "returned NaN or an infinite value"),
        (lambda o: 0.0, "metric '<lambda>' raised TypeError"),
        (lambda o, d: "good", "metric '<lambda>' raised ValueError"),
    ],
)
def test_functions_that_do_not_work(function: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        evaluate(table(np.ones((4, 5))), indexed(4), get_metric(function, CLASSIFIER))
    assert message in str(caught.value)
    assert "write f(outputs, data)" in str(caught.value) or "original model" in str(caught.value)


def test_functions_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "class Scores:\n    @staticmethod\n    def half(o, d): return 0.5\ndef one(o, d): return 1.0\n"
    (tmp_path / "own_metric_module.py").write_text(code)
    (tmp_path / "own_metric_broken.py").write_text("raise RuntimeError('no')\n")
    monkeypatch.chdir(tmp_path)
    for text, score in (
        ("own_metric_module:one", 1.0),
        ("own_metric_module:Scores.half", 0.5),
        ("own_metric_module.py:one", 1.0),
        (f"{tmp_path / 'own_metric_module.py'}:one", 1.0),
    ):
        metric = get_metric(text, CLASSIFIER)
        assert isinstance(metric, UserMetric)
        assert metric.name == text
        assert metric.score(evaluate(table(np.ones((4, 5))), indexed(4), metric)) == score
    for text, message in (
        ("own_metric_module:two", "has no 'two'"),
        ("own_metric_absent:one", "cannot be imported: ModuleNotFoundError"),
        ("own_metric_absent.py:one", "cannot be imported: FileNotFoundError"),
        ("own_metric_broken:one", "cannot be imported: RuntimeError: no"),
    ):
        with pytest.raises(BudgetError) as caught:
            get_metric(text, CLASSIFIER)
        assert message in str(caught.value)


# ---- evaluation ------------------------------------------------------------------------------------


def test_bad_outputs_are_named() -> None:
    logits = np.zeros((10, 5), np.float32)
    logits[6, 2] = np.nan
    with pytest.raises(DataError) as caught:
        evaluate(table(logits), indexed(10, labels=np.zeros(10, int)), Top1())
    assert str(caught.value) == (
        "output 'logits' holds NaN\n"
        "  at batch 1, samples 4 to 7\n"
        "  run the model on this batch and look for overflow or bad input"
    )
    logits[6, 2] = np.inf
    with pytest.raises(DataError, match="holds an infinite value"):
        reference_outputs(table(logits), indexed(10))
    logits[6, 2] = -np.inf
    assert len(reference_outputs(table(logits), indexed(10))) == 3


def test_large_finite_outputs_are_fine() -> None:
    import ml_dtypes

    for value, dtype in (
        (3e38, np.float32),
        (1e300, np.float64),
        (6e4, np.float16),
        (3e38, ml_dtypes.bfloat16),
    ):
        reference_outputs(table(np.full((4, 5), value, dtype)), indexed(4))
    with pytest.raises(DataError, match="holds NaN"):
        reference_outputs(table(np.full((4, 5), np.nan, ml_dtypes.bfloat16)), indexed(4))


def test_references_run_kept_or_itself() -> None:
    a, b = (RNG.standard_normal((10, 5)).astype(np.float32) for _ in range(2))
    data, metric = indexed(10), RelativeL2()
    kept = reference_outputs(table(a), data)
    live = evaluate(table(b), data, metric, reference_run=table(a))
    assert np.array_equal(evaluate(table(b), data, metric, reference_run=kept), live)
    with pytest.raises(DataError, match="fewer batches"):
        evaluate(table(b), data, metric, reference_run=kept[:1])

    class Executable:
        runs = 0

        def run(self, feeds: Arrays) -> dict[str, np.ndarray]:
            self.runs += 1
            return {"logits": a[: len(feeds["x"])]}

    model = Executable()
    assert metric.score(evaluate(model.run, data, metric, reference_run=model.run)) == 0
    assert model.runs == 3


def test_several_metrics_share_one_run_of_each_batch() -> None:
    a, b = (RNG.standard_normal((10, 5)).astype(np.float32) for _ in range(2))
    data, calls = indexed(10, labels=RNG.integers(5, size=10)), []
    whole = UserMetric(lambda o, d: float(o["logits"].mean()), "mean")
    metrics = [RelativeL2(), whole, Top1()]
    assert [m.whole for m in metrics] == [False, True, False]
    alone = [evaluate(table(b), data, m, reference_run=table(a)) for m in metrics]

    def counted(feeds: Arrays) -> dict[str, np.ndarray]:
        calls.append(len(feeds["x"]))
        return table(b)(feeds)

    together = evaluate_each(counted, data, metrics, reference_run=table(a))
    assert all(np.array_equal(x, y) for x, y in zip(alone, together, strict=True))
    assert calls == [len(batch) for batch in data.batches()]


def test_missing_output_is_named() -> None:
    with pytest.raises(DataError, match="did not return the output 'logits'"):
        evaluate(table(np.zeros((4, 5)), "y"), indexed(4, labels=np.zeros(4, int)), Top1())


# ---- how sure --------------------------------------------------------------------------------------


def counts(correct: np.ndarray) -> np.ndarray:
    return np.stack([correct, np.ones(len(correct))], axis=1).astype(float)


def test_interval_is_paired() -> None:
    original = RNG.random(2000) < 0.8
    same = original.copy()
    same[:20] ^= True
    shuffled = RNG.permutation(original)
    narrow = damage_interval(Top1(), counts(original), counts(same))
    wide = damage_interval(Top1(), counts(original), counts(shuffled))
    assert narrow is not None
    assert wide is not None
    assert narrow[1] - narrow[0] < 0.3 * (wide[1] - wide[0])


def test_interval_agrees_with_theory() -> None:
    original, candidate = np.ones(1000), (RNG.random(1000) < 0.9).astype(float)
    rate = 1 - candidate.mean()
    expected = math.sqrt(rate * (1 - rate) / 1000)
    assert standard_error(Top1(), counts(original), counts(candidate)) == pytest.approx(expected, rel=0.2)
    low, high = damage_interval(Top1(), counts(original), counts(candidate)) or (0, 0)
    assert low == pytest.approx(rate - 1.96 * expected, abs=0.3 * expected)
    assert high == pytest.approx(rate + 1.96 * expected, abs=0.3 * expected)


def test_interval_levels_seeds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    original, candidate = counts(RNG.random(50)), counts(RNG.random(50))
    wide = damage_interval(Top1(), original, candidate, level=0.99) or (0, 0)
    narrow = damage_interval(Top1(), original, candidate, level=0.5) or (0, 0)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    once = damage_interval(Top1(), original, candidate)
    assert once == damage_interval(Top1(), original, candidate)
    assert once != damage_interval(Top1(), original, candidate, seed=1)
    monkeypatch.setattr("lamina.quality.evaluation._BLOCK", 500)
    assert damage_interval(Top1(), original, candidate) == once


def test_divergences_are_held_against_zero() -> None:
    features = np.stack([RNG.random(100), np.ones(100)], axis=1)
    interval = damage_interval(KlDivergence(), None, features)
    assert interval is not None
    assert interval[0] < features[:, 0].mean() < interval[1]
    assert damage_interval(KlDivergence(), features * 0, features) == interval


def test_a_metric_of_another_package_resamples_by_default() -> None:
    from lamina.quality import Metric

    class Median(Metric):
        def score(self, features: np.ndarray) -> float:
            return float(np.median(features))

    original, candidate = RNG.random((60, 1)) + 1, RNG.random((60, 1))
    low, high = damage_interval(Median(), original, candidate, resamples=50) or (0, 0)
    assert 0.5 < low < high < 1.5


def test_interval_needs_the_same_samples() -> None:
    with pytest.raises(DataError, match="scored on 5 samples, the candidate on 4"):
        damage_interval(Top1(), np.ones((5, 2)), np.ones((4, 2)))


# ---- reference models ------------------------------------------------------------------------------


@needs_reference
def test_reference_figures() -> None:
    import onnx_ir as ir
    import onnxruntime as ort

    from lamina.ir.program import Program

    def load(name: str) -> tuple[Program, Any]:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        session = ort.InferenceSession(str(models_dir / name), options)
        names = [o.name for o in session.get_outputs()]
        program = Program(ir.load(str(models_dir / name)))
        return program, lambda feeds: dict(zip(names, session.run(names, dict(feeds)), strict=True))

    program, run = load("stories260k.onnx")
    data = load_data(sets_dir / "tinystories_tok512_758x512.npz", program).rows(slice(384, 448))
    metric = get_metric("cross-entropy", program)
    assert metric.score(evaluate(run, data, metric)) == pytest.approx(1.51, abs=0.05)
    program, run = load("kwt1_speech_commands.onnx")
    data = load_data(sets_dir / "speech_commands_kwt_2400.npz", program).rows(slice(400, 800))
    metric = get_metric("top1", program)
    assert metric.score(evaluate(run, data, metric)) == pytest.approx(0.978, abs=0.02)


def test_kl_against_one_original_is_the_same_however_often_it_is_asked() -> None:
    random = np.random.default_rng(5)
    original, first, second = random.normal(size=(3, 4, 6)).astype(np.float32)
    batch, metric = Dataset({"x": original}, {}), KlDivergence()
    fresh = [metric.features({"logits": o}, batch, {"logits": original.copy()}) for o in (first, second)]
    original.flags.writeable = False
    again = [metric.features({"logits": o}, batch, {"logits": original}) for o in (first, second, first)]
    assert [a.tolist() for a in again] == [f.tolist() for f in (*fresh, fresh[0])]
    changed = original * 2
    changed.flags.writeable = False
    assert metric.features({"logits": first}, batch, {"logits": changed}).tolist() != fresh[0].tolist()
