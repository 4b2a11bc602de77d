"""Second moments of what enters a branch and what it adds: the statistics of direct matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.analysis.instrument import InstrumentedSession, feeds_of, fixed_batch
from lamina.analysis.moments import Moments
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.operators import evenly
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program

# Every so many batches one is held out.
HOLD_OUT = 4


@dataclass(frozen=True)
class MatchProbe:
    """A branch to match: ``output`` should be had from ``skip``.

    Attributes:
        name: The branch.
        skip: Name of the value that enters it.
        output: Name of its sum.
        axis: Axis the vectors lie on: 1 for images ``[b, c, *space]``, -1 for tokens.
    """

    name: str
    skip: str
    output: str
    axis: int


@dataclass(frozen=True)
class Match:
    """Moments of x = skip and y = output - skip, one vector a token.

    Attributes:
        fitted: Of the tokens a map is fitted on.
        held: Of those that say how good it is.
    """

    fitted: Moments
    held: Moments


def collect_matches(
    program: Program,
    dataset: Dataset,
    probes: Sequence[MatchProbe],
    *,
    rows: int = 256,
    tokens: int = 8192,
    threads: int | None = None,
) -> dict[str, Match]:
    """Run the data once; every fourth batch is held out.

    Memory: two moments of each branch's width squared, and one batch of all skips and sums.

    Args:
        program: The original.
        dataset: Calibration samples.
        probes: What to look at.
        rows: Rows of the data looked at, evenly over all of it.
        tokens: Vectors of each branch looked at, over all rows.
        threads: Threads of the run.

    Raises:
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    if not probes:
        return {}
    data = in_batches(program, dataset, rows)
    names = list(dict.fromkeys(n for p in probes for n in (p.skip, p.output)))
    fed = {port.name for port in program.inputs}
    wanted = [name for name in names if name not in fed]
    session = InstrumentedSession(program, wanted, threads=threads)
    found: dict[str, Match] = {}
    size = fixed_batch(program)
    for number, batch in enumerate(data.batches()):
        if size is not None and len(batch) != size:
            continue
        feeds = feeds_of(program, batch, f"batch {number}")
        values = {**feeds, **dict(zip(wanted, session.run(wanted, feeds), strict=True))}
        mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
        count = max(2, tokens * len(batch) // rows)
        for probe in probes:
            x, y = (_vectors(values[n], probe.axis) for n in (probe.skip, probe.output))
            places = places_of(values[probe.skip].shape, mask if probe.axis == -1 else None, len(x), count)
            width = x.shape[1]
            match = found.setdefault(
                probe.name, Match(Moments.empty(width, width), Moments.empty(width, width))
            )
            part = match.held if is_held(number) else match.fitted
            part.add(x[places], y[places].astype(np.float64) - x[places])
    return found


def in_batches(program: Program, dataset: Dataset, rows: int) -> Dataset:
    """At most ``rows`` rows, in batches small enough that some can be held out.

    Raises:
        DataError: They do not fill two batches.
    """
    samples = min(dataset.samples, max(1, rows // dataset.group))
    # Evenly over all of them: data sets come sorted by length or class.
    data = dataset.rows(evenly(samples, dataset.samples))
    size = fixed_batch(program)
    if size is None:
        size = max(1, min(dataset.batch_size, len(data) // (2 * HOLD_OUT)))
    data = replace(data, batch_size=max(size, data.group))
    if len(data) < 2 * data.batch_size:
        raise DataError(
            f"{len(data)} calibration rows do not fill two batches of {data.batch_size}",
            advice="give more calibration samples: one batch fits, another one checks the fit",
        )
    return data


def is_held(number: int) -> bool:
    """Whether a batch is held out."""
    return number % HOLD_OUT == 1


def places_of(shape: tuple[int, ...], mask: np.ndarray | None, total: int, count: int) -> np.ndarray:
    """At most ``count`` evenly spaced tokens of ``total`` that are not padding, int64."""
    places = np.arange(total)
    if mask is not None and len(shape) > 2 and shape[: mask.ndim] == mask.shape:
        kept = np.broadcast_to(mask.reshape(-1, 1) != 0, (mask.size, total // mask.size))
        places = np.flatnonzero(kept)
    return np.asarray(places[evenly(count, len(places))])


def _vectors(array: np.ndarray, axis: int) -> np.ndarray:
    moved = np.moveaxis(array, axis, -1)
    return moved.reshape(-1, moved.shape[-1])
