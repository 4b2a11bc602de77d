"""Run a model over a dataset, and say how sure the damage is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from lamina.data import Dataset
from lamina.errors import DataError
from lamina.quality.metric import Metric, Outputs
from lamina.quality.outputs import is_float

Run = Callable[[Mapping[str, np.ndarray]], Outputs]
_BLOCK = 4_000_000


def evaluate(
    run: Run, dataset: Dataset, metric: Metric, reference_run: Run | Iterable[Outputs] | None = None
) -> np.ndarray:
    """Features of every sample, batch by batch.

    Args:
        run: Inputs to outputs by name.
        dataset: What to run on.
        metric: What to keep of each batch.
        reference_run: The original's outputs for metrics that compare with them: its run, or what
            :func:`reference_outputs` kept. Where it is ``run`` itself, each batch runs once.

    Raises:
        DataError: An output holds NaN or +infinity; the data lacks what the metric reads.
    """
    return evaluate_each(run, dataset, [metric], reference_run)[0]


def evaluate_each(
    run: Run,
    dataset: Dataset,
    metrics: Sequence[Metric],
    reference_run: Run | Iterable[Outputs] | None = None,
) -> list[np.ndarray]:
    """:func:`evaluate` for several metrics at once; each batch runs once for all of them."""
    for metric in metrics:
        metric.check(dataset)
    # Equality, not identity: a bound method is a new object at each look-up.
    itself = callable(reference_run) and reference_run == run
    originals = None if itself else _originals(dataset, reference_run)
    streamed = {i: metric for i, metric in enumerate(metrics) if not metric.whole}
    parts: dict[int, list[np.ndarray]] = {i: [] for i in streamed}
    whole: list[Outputs] = []
    for batch, answer in _runs(run, dataset):
        if len(streamed) < len(metrics):
            whole.append(answer)
        original = next(originals, None) if originals is not None and streamed else None
        if originals is not None and streamed and original is None:
            what = "the kept reference outputs have fewer batches than the data"
            raise DataError(what, advice="keep them on the same dataset with the same batch size")
        for i, metric in streamed.items():
            parts[i].append(metric.features(answer, batch, answer if itself else original))
    covered = dataset
    if whole and dataset.fixed_batch:
        covered = dataset.rows(slice(0, dataset.samples - dataset.samples % dataset.fixed_batch))
    return [
        np.concatenate(parts[i]) if i in streamed else metric.features(_concatenated(whole), covered)
        for i, metric in enumerate(metrics)
    ]


def reference_outputs(run: Run, dataset: Dataset) -> list[dict[str, np.ndarray]]:
    """The outputs of every batch, to compare many candidates with; they stay in memory.

    Raises:
        DataError: An output holds NaN or +infinity.
    """
    return [dict(answer) for _, answer in _runs(run, dataset)]


def _runs(run: Run, dataset: Dataset) -> Iterator[tuple[Dataset, Outputs]]:
    first = 0
    for number, batch in enumerate(dataset.batches()):
        outputs = run(batch.inputs)
        for name, values in outputs.items():
            _check_output(name, values, f"batch {number}, samples {first} to {first + batch.samples - 1}")
        first += batch.samples
        yield batch, outputs


def _originals(dataset: Dataset, reference: Run | Iterable[Outputs] | None) -> Iterator[Outputs] | None:
    if reference is None:
        return None
    if callable(reference):
        return (answer for _, answer in _runs(reference, dataset))
    return iter(reference)


def _check_output(name: str, values: np.ndarray, where: str) -> None:
    # One fast sum decides; -inf is legal (masked logits), NaN and +inf are a broken model.
    if not is_float(values):
        return
    with np.errstate(invalid="ignore", over="ignore"):
        if np.isfinite(values.sum(dtype=np.promote_types(values.dtype, np.float32))):
            return
    values = values.astype(np.float32) if values.dtype.kind == "V" else values
    nan = bool(np.isnan(values).any())
    if nan or np.isposinf(values).any():
        what = f"output '{name}' holds {'NaN' if nan else 'an infinite value'}"
        raise DataError(
            what, where=where, advice="run the model on this batch and look for overflow or bad input"
        )


def _concatenated(parts: Iterable[Outputs]) -> dict[str, np.ndarray]:
    collected: dict[str, list[np.ndarray]] = {}
    for part in parts:
        for name, values in part.items():
            collected.setdefault(name, []).append(np.atleast_1d(values))
    joined = {}
    for name, arrays in collected.items():
        if len({a.shape[1:] for a in arrays}) > 1:
            what = f"output '{name}' has a different shape in different batches"
            raise DataError(what, advice="use a built-in metric, or pad all samples to one length")
        joined[name] = np.concatenate(arrays)
    return joined


def damage_interval(
    metric: Metric,
    original: np.ndarray | None,
    candidate: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Paired percentile bootstrap of the damage over samples; None where samples cannot be told apart.

    Args:
        metric: What scored both.
        original: Features of the original; None for a divergence, where it is at 0.
        candidate: Features of the candidate on the same samples.
        level: Share of resamples inside the interval.
        resamples: How many.
        seed: Of the resampling.
    """
    damages = _resampled(metric, original, candidate, resamples, seed)
    if damages is None:
        return None
    low, high = np.quantile(damages, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def standard_error(
    metric: Metric, original: np.ndarray | None, candidate: np.ndarray, *, resamples: int = 200, seed: int = 0
) -> float:
    """Standard error of the damage by paired bootstrap; 0 where samples cannot be told apart."""
    damages = _resampled(metric, original, candidate, resamples, seed)
    return 0.0 if damages is None else float(np.std(damages))


def _resampled(
    metric: Metric, original: np.ndarray | None, candidate: np.ndarray, resamples: int, seed: int
) -> np.ndarray | None:
    count = len(candidate)
    if count < 2 or (metric.whole and candidate.shape[1] != 1):
        return None
    if original is not None and len(original) != count:
        what = f"the original was scored on {len(original)} samples, the candidate on {count}"
        raise DataError(what, advice="score both on the same samples")
    rng = np.random.default_rng(seed)
    damages = []
    done = 0
    while done < resamples:
        block = min(resamples - done, max(1, _BLOCK // count))
        weights = _weights(rng, block, count)
        after = metric.scores(candidate, weights)
        before = np.zeros(block) if _at_zero(metric, original) else metric.scores(original, weights)  # type: ignore[arg-type]
        damages += [metric.damage(float(b), float(a)) for b, a in zip(before, after, strict=True)]
        done += block
    return np.asarray(damages)


def _at_zero(metric: Metric, original: np.ndarray | None) -> bool:
    return original is None or metric.kind == "divergence"


def _weights(rng: np.random.Generator, resamples: int, count: int) -> np.ndarray:
    drawn = rng.integers(count, size=(resamples, count)) + np.arange(resamples)[:, None] * count
    counts = np.bincount(drawn.ravel(), minlength=resamples * count)
    return counts.reshape(resamples, count).astype(np.float64)
