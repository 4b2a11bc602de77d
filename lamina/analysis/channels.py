"""Second moments of activations, channel by channel: how near two channels are to each other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lamina.analysis.instrument import InstrumentedSession, feeds_of, fixed_batch
from lamina.analysis.matching import in_batches, places_of
from lamina.analysis.moments import Moments
from lamina.analysis.needs import DEFAULT_MASK
from lamina.data import Dataset
from lamina.ir.program import Program


def collect_channels(
    program: Program,
    dataset: Dataset,
    axes: Mapping[str, int],
    *,
    rows: int = 256,
    vectors: int = 8192,
    threads: int | None = None,
) -> dict[str, Moments]:
    """Run the data once and sum ``x x'`` of every value's vectors.

    Memory: width squared of each value, and one batch of all of them.

    Args:
        program: The original.
        dataset: Calibration samples.
        axes: Value name -> axis its channels lie on: 1 for images ``[b, c, *space]``, -1 for tokens.
        rows: Rows of the data looked at, evenly over all of it.
        vectors: Vectors of each value looked at, over all rows; those of padded tokens are left out.
        threads: Threads of the run.

    Returns:
        Value name -> moments without a y.

    Raises:
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    if not axes:
        return {}
    data, names = in_batches(program, dataset, rows), list(axes)
    session = InstrumentedSession(program, names, threads=threads)
    found: dict[str, Moments] = {}
    size = fixed_batch(program)
    for number, batch in enumerate(data.batches()):
        if size is not None and len(batch) != size:
            continue
        mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
        feeds = feeds_of(program, batch, f"batch {number}")
        for name, array in zip(names, session.run(names, feeds), strict=True):
            moved = np.moveaxis(array, axes[name], -1)
            x = moved.reshape(-1, moved.shape[-1])
            count = max(2, vectors * len(batch) // rows)
            places = places_of(array.shape, mask if axes[name] == -1 else None, len(x), count)
            moments = found.setdefault(name, Moments.empty(x.shape[1], 0))
            moments.add(x[places], np.zeros((len(places), 0)))
    return found


def channel_distances(moments: Moments) -> np.ndarray:
    """Mean squared difference of each two channels, float64 ``[d, d]``."""
    gram = moments.xx / max(moments.count, 1e-300)
    energy = np.diag(gram)
    distances = np.maximum(energy[:, None] + energy - 2 * gram, 0.0)
    np.fill_diagonal(distances, 0.0)
    return np.asarray(distances)
