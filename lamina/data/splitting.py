"""Samples for calibration, selection and report: split by seed, or as the user split them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data.dataset import Dataset, Splits
from lamina.data.fitting import check, fit
from lamina.data.joining import join
from lamina.data.sources import read
from lamina.data.synthetic import synthetic
from lamina.errors import DataError
from lamina.ir.program import Program

PARTS = ("calibration", "selection", "report")
FRACTIONS = (0.25, 0.35, 0.4)
SYNTHETIC_SAMPLES = 96
_MOST_OVERLAP = 0.5


def load_data(source: Any, program: Program, *, batch_size: int | None = None) -> Dataset:
    """Read samples and fit them to the model.

    Args:
        source: ``.npz`` path (arrays named like the inputs; the rest, ``labels``, ``score``, go to metrics),
            a folder of them, a mapping of arrays, an array or tensor (one input), a tuple
            ``(inputs, labels)``, an iterable of any of these (batches, or samples without batch axis), or a
            :class:`Dataset`. Pairs are named ``a.<input>`` and ``b.<input>`` and become a dataset with
            ``group=2``.
        program: The model the samples are for.
        batch_size: Rows a run gets; by default at most 32, fewer where outputs are large.

    Raises:
        DataError: The data cannot be read or does not fit the model.
    """
    if batch_size is not None and batch_size < 1:
        raise DataError(
            f"batch_size {batch_size} is not positive", advice="give a number of rows, at least 1"
        )
    if isinstance(source, Dataset):
        return check(source, program)
    if isinstance(source, Splits):
        raise DataError(
            "splits were given where one set of samples is expected", advice="pass one of its parts"
        )
    chunks = read(source, program)
    where = str(source) if isinstance(source, str | Path) else chunks[0].where.partition(",")[0]
    return fit(join(chunks, program), program, batch_size=batch_size, where=where)


def split(data: Dataset, *, seed: int = 0, fractions: Sequence[float] = FRACTIONS) -> Splits:
    """Shuffle the samples by ``seed`` and cut them into three disjoint parts.

    Every part gets at least one sample, or one full batch where the model's batch is fixed (what does not
    fill a batch is left out).

    Raises:
        DataError: There are too few samples, or the fractions are not three positive numbers.
    """
    if len(fractions) != len(PARTS) or not all(f > 0 for f in fractions):
        advice = f"give one positive share each for {', '.join(PARTS)}"
        raise DataError(f"fractions {tuple(fractions)} do not make three parts", advice=advice)
    unit = data.fixed_batch or 1
    units = data.samples // unit
    if units < len(PARTS):
        what = f"{data.samples} samples cannot be split into {', '.join(PARTS)}"
        advice = f"give at least {len(PARTS) * unit} samples, better 300, or pass the three sets yourself"
        raise DataError(what, advice=advice)
    order = np.random.default_rng(seed).permutation(data.samples)
    counts = _counts(units, fractions)
    stops = np.cumsum([0, *counts]) * unit
    return Splits(*(data.rows(order[start:stop]) for start, stop in itertools.pairwise(stops)))


def _counts(units: int, fractions: Sequence[float]) -> list[int]:
    total = sum(fractions)
    counts = [max(1, round(units * f / total)) for f in fractions]
    # Rounding and the minimum of one can overshoot: the largest part gives or takes the difference.
    counts[int(np.argmax(counts))] += units - sum(counts)
    return counts


def load_splits(
    source: Any,
    program: Program,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    fractions: Sequence[float] = FRACTIONS,
) -> Splits:
    """Read samples and split them, or read the three sets the user made.

    Three sets are a mapping with the keys ``calibration``, ``selection`` and ``report``, or a folder with
    ``calibration.npz``, ``selection.npz`` and ``report.npz``. None means made-up samples, which whoever
    reports on them must say. Anything else is what :func:`load_data` takes.

    Raises:
        DataError: As :func:`load_data`; a set is missing; over half of the report samples are used elsewhere.
    """
    if isinstance(source, Splits):
        return Splits(*(check(getattr(source, part), program) for part in PARTS))
    if source is None:
        made_up = synthetic(program, SYNTHETIC_SAMPLES, seed, batch_size=batch_size)
        return split(made_up, seed=seed, fractions=fractions)
    given = _explicit(source)
    if given is None:
        return split(load_data(source, program, batch_size=batch_size), seed=seed, fractions=fractions)
    splits = Splits(*(load_data(given[part], program, batch_size=batch_size) for part in PARTS))
    for part in ("selection", "calibration"):
        share = overlap(splits.report, getattr(splits, part))
        if share > _MOST_OVERLAP:
            what = f"{share:.0%} of the report samples are also in {part}"
            advice = "the report must be on data the search never saw: give other samples"
            raise DataError(what, where="report", advice=advice)
    return splits


def _explicit(source: Any) -> Mapping[str, Any] | None:
    if isinstance(source, str | Path) and Path(source).is_dir():
        files = {part: Path(source) / f"{part}.npz" for part in PARTS}
        found = {part: file for part, file in files.items() if file.is_file()}
    elif isinstance(source, Mapping):
        found = {part: source[part] for part in PARTS if part in source}
    else:
        return None
    if not found:
        return None
    missing = [part for part in PARTS if part not in found]
    if missing:
        what = f"{', '.join(found)} given without {', '.join(missing)}"
        raise DataError(what, advice="give all three sets, or one set to be split")
    return found


def overlap(data: Dataset, other: Dataset) -> float:
    """Share of ``data``'s rows whose inputs also occur in ``other``, value for value."""
    seen = set(_digests(other))
    digests = _digests(data)
    return sum(d in seen for d in digests) / max(1, len(digests))


def _digests(data: Dataset) -> list[bytes]:
    """One hash a row; a sample where the inputs do not have the same number of rows."""
    per_sample = any(rows not in (0, data.group) for rows in data.layout.values())
    count = data.samples if per_sample else len(data)
    arrays = [a for name, a in sorted(data.inputs.items()) if data.layout.get(name, data.group)]
    rows = [a.astype(str) if a.dtype == object else a for a in arrays]
    rows = [np.ascontiguousarray(a).reshape(count, -1) for a in rows]
    digests = []
    for index in range(count):
        digest = hashlib.blake2b(digest_size=16)
        for array in rows:
            digest.update(array[index].tobytes())
        digests.append(digest.digest())
    return digests
