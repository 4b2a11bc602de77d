"""Task metrics: accuracy, next-token loss and perplexity, rank correlation of embedding pairs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lamina.data import Dataset
from lamina.data.joining import IGNORED_LABEL
from lamina.errors import DataError
from lamina.quality.metric import Metric, Outputs, RatioMetric, per_sample
from lamina.quality.outputs import are_probabilities, class_axis, log_probabilities, token_mask


@dataclass(frozen=True)
class Top1(RatioMetric):
    """Share of ``labels`` that are the most probable class, in 0..1; labels of -100 do not count.

    Attributes:
        output: The output with one value a class: ``[b, classes]``, ``[b, length, classes]`` or
            ``[b, classes, h, w]``.
    """

    output: str = "logits"
    name = "top1"
    divergence = "kl"

    def check(self, dataset: Dataset) -> None:
        """Raise unless there are integer labels."""
        _labels(dataset, self.name)

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Correct predictions and counted labels of each sample."""
        labels = _labels(batch, self.name)
        logits = _answer(outputs, self.output)
        axis = class_axis(logits.ndim)
        predicted = logits.argmax(axis=axis)
        labels = _shaped(labels, predicted.shape, logits.shape[axis], self.name)
        counted = labels != IGNORED_LABEL
        correct = per_sample(counted & (predicted == labels), batch).sum(axis=1)
        return np.stack([correct, per_sample(counted, batch).sum(axis=1)], axis=1).astype(np.float64)


@dataclass(frozen=True)
class CrossEntropy(RatioMetric):
    """Mean negative log-likelihood in nats: of the next token, or of ``labels`` for classifiers.

    With logits ``[b, length, classes]`` position ``i`` is held against token ``i + 1`` of ``labels`` where
    the data has them, else of the token input; padding (mask 0) and labels of -100 do not count.

    Attributes:
        output: The output with the logits or probabilities.
        tokens: The integer input that holds the tokens; empty where only ``labels`` will do.
    """

    output: str = "logits"
    tokens: str = ""
    name = "cross-entropy"
    higher_is_better = False
    percent = "relative"
    divergence = "kl"

    def check(self, dataset: Dataset) -> None:
        """Raise unless there are labels or tokens."""
        self._targets(dataset)

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Sum of the negative log-likelihood and counted tokens of each sample."""
        logits, targets, counted, axis = self._held(outputs, batch)
        log_p = log_probabilities(logits, axis, probabilities=are_probabilities(logits, axis))
        nll = -np.take_along_axis(log_p, targets, axis=axis).squeeze(axis) * counted
        sums = per_sample(nll.astype(np.float64), batch).sum(axis=1)
        return np.stack([sums, per_sample(counted, batch).sum(axis=1)], axis=1).astype(np.float64)

    def loss(self, outputs: Outputs, batch: Dataset) -> tuple[float, dict[str, np.ndarray]]:
        """Sum of the negative log-likelihood, nats, and its derivative by the logits or probabilities."""
        logits, targets, counted, axis = self._held(outputs, batch)
        probabilities = are_probabilities(logits, axis)
        log_p = log_probabilities(logits, axis, probabilities=probabilities)
        right = np.take_along_axis(log_p, targets, axis=axis)
        weight = np.expand_dims(counted, axis).astype(np.float32)
        if probabilities:
            slope = np.zeros(logits.shape, np.float32)
            np.put_along_axis(slope, targets, -weight * np.exp(-right), axis=axis)
        else:
            slope = weight * np.exp(log_p)
            pull = np.take_along_axis(slope, targets, axis=axis) - weight
            np.put_along_axis(slope, targets, pull, axis=axis)
        if logits.ndim == 3:  # nothing follows the last token
            slope = np.pad(slope, ((0, 0), (0, 1), (0, 0)))
        return -float((right * weight).sum(dtype=np.float64)), {self.output: slope}

    def _held(self, outputs: Outputs, batch: Dataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """Logits that count, their targets (with the class axis), which of them count, and the class axis."""
        logits, targets = _answer(outputs, self.output), self._targets(batch)
        axis = class_axis(logits.ndim)
        if logits.ndim == 3:
            mask = token_mask(batch, logits.shape)
            targets = targets if mask is None else np.where(mask != 0, targets, IGNORED_LABEL)
            logits, targets = logits[:, :-1], targets[:, 1:]
            if not targets.size:
                advice = "give sequences of at least 2 tokens"
                raise DataError(f"metric '{self.name}' has no next token to predict", advice=advice)
        classes = logits.shape[axis]
        targets = _shaped(targets, np.delete(logits.shape, axis).tolist(), classes, self.name)
        counted = targets != IGNORED_LABEL
        return logits, np.expand_dims(np.where(counted, targets, 0), axis), counted, axis

    def _targets(self, batch: Dataset) -> np.ndarray:
        if "labels" in batch.extras or not self.tokens:
            return _labels(batch, self.name)
        return batch.inputs[self.tokens]


@dataclass(frozen=True)
class Perplexity(CrossEntropy):
    """Exponential of the next-token :class:`CrossEntropy`; damage is its relative increase."""

    name = "perplexity"

    def finish(self, ratios: np.ndarray) -> np.ndarray:
        """Nats to perplexity."""
        return np.exp(ratios)


@dataclass(frozen=True)
class Spearman(Metric):
    """Rank correlation of the cosine of embedding pairs with ``score``, in -1..1.

    An output ``[b, length, width]`` is averaged over the positions its mask leaves; ``[b, width]`` is taken
    as it is. The data holds pairs: ``a.<input>`` and ``b.<input>`` for each input.

    Attributes:
        output: The output with the embedding or the hidden states.
    """

    output: str = "last_hidden_state"
    name = "spearman"

    def check(self, dataset: Dataset) -> None:
        """Raise unless the samples are pairs with a score."""
        if dataset.group != 2:
            what = "metric 'spearman' compares pairs, the data has single samples"
            raise DataError(what, advice="name the arrays a.<input> and b.<input> for each input")
        _scores(dataset)

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """Cosine and given score of each pair."""
        self.check(batch)
        pairs = _embeddings(_answer(outputs, self.output), batch).reshape(batch.samples, 2, -1)
        return np.stack([(pairs[:, 0] * pairs[:, 1]).sum(axis=1), _scores(batch)], axis=1)

    def score(self, features: np.ndarray) -> float:
        """Spearman's coefficient; ties share their mean rank."""
        return float(self.scores(features, np.ones((1, len(features))))[0])

    def scores(self, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """All resamples at once: a sample drawn twice is a tie with itself."""
        x = weighted_ranks(features[:, 0], weights)
        y = weighted_ranks(features[:, 1], weights)
        total = weights.sum(axis=1, keepdims=True)
        x -= (weights * x).sum(axis=1, keepdims=True) / total
        y -= (weights * y).sum(axis=1, keepdims=True) / total
        spread = np.sqrt((weights * x * x).sum(axis=1) * (weights * y * y).sum(axis=1))
        covariance = (weights * x * y).sum(axis=1)
        # A constant side has no ranks to correlate; a collapsed embedding must not look undamaged.
        return np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average ranks ``[resamples, n]`` where value ``i`` occurs ``weights[r, i]`` times."""
    _, inverse = np.unique(values, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    starts = np.flatnonzero(np.diff(inverse[order], prepend=-1))
    ties = np.add.reduceat(weights[:, order], starts, axis=1)
    return np.asarray((np.cumsum(ties, axis=1) - (ties - 1) / 2)[:, inverse])


def _answer(outputs: Outputs, name: str) -> np.ndarray:
    if name not in outputs:
        what = f"the model did not return the output '{name}' the metric reads"
        raise DataError(what, advice=f"it returned {', '.join(outputs)}")
    values = outputs[name]
    # Classifiers from convnets often keep [b, classes, 1, 1].
    while values.ndim > 2 and values.shape[-1] == 1:
        values = values[..., 0]
    return values


def _labels(batch: Dataset, metric: str) -> np.ndarray:
    labels = batch.extras.get("labels")
    if labels is None:
        has = ", ".join(batch.extras) or "no extra arrays"
        what = f"metric '{metric}' needs labels, the data has {has}"
        raise DataError(what, advice="add an array 'labels' with the class numbers, one a sample")
    if labels.dtype.kind not in "iub":
        what = f"metric '{metric}' needs integer labels, these are {labels.dtype.name}"
        raise DataError(what, where="'labels'", advice="give class numbers, counted from 0")
    return labels.astype(np.int64)


def _shaped(labels: np.ndarray, shape: tuple[int, ...] | list[int], classes: int, metric: str) -> np.ndarray:
    if labels.size != np.prod(shape) or labels.shape[:1] != tuple(shape[:1]):
        what = f"labels of shape {list(labels.shape)} do not go with predictions of shape {list(shape)}"
        raise DataError(
            what, where=f"metric '{metric}'", advice="give one class number a prediction, not one-hot"
        )
    wrong = (labels != IGNORED_LABEL) & ((labels < 0) | (labels >= classes))
    if wrong.any():
        what = (
            f"label {labels[wrong].flat[0]} is not one of the model's {classes} classes (0 to {classes - 1})"
        )
        raise DataError(
            what, where=f"metric '{metric}'", advice="count classes from 0; mark ignored ones -100"
        )
    return labels.reshape(shape)


def _scores(batch: Dataset) -> np.ndarray:
    for name in ("score", "scores", "labels"):
        if name in batch.extras:
            return batch.extras[name].astype(np.float64).reshape(batch.samples, -1)[:, 0]
    what = "metric 'spearman' needs the array 'score', one number a pair"
    raise DataError(what, advice="add it to the data")


def _embeddings(values: np.ndarray, batch: Dataset) -> np.ndarray:
    values = values.astype(np.float64)
    if values.ndim == 3:
        mask = token_mask(batch, values.shape)
        if mask is None:
            values = values.mean(axis=1)
        else:
            counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
            values = np.einsum("bsd,bs->bd", values, mask) / counts
    values = values.reshape(len(values), -1)
    return np.asarray(values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12))
