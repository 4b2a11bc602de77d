"""Visit operators behind a change: two streams over the same data, the sums to fit on, and trials."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from lamina.analysis.instrument import feeds_of, fixed_batch
from lamina.analysis.matching import in_batches
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.ir.shapes import Observed, observed_shapes
from lamina.passes.pass_ import Refusal
from lamina.passes.repair_fit import Compensation, Sums, moments_of
from lamina.passes.repair_order import Pace, Wave, distances, waves
from lamina.passes.repair_sites import RepairSite, repair_sites
from lamina.passes.repair_trial import Trial
from lamina.quality import Metric, get_metric

# Of a sequence model's tokens so many times those looked at are run: fewer rows do where rows are long.
_SPARE = 2
_LEAST_ROWS = 32


class Walk:
    """Operators of a changed program in execution order, each seen behind all that was repaired before it.

    Args:
        original: What the change was made to.
        changed: The program after it, with the same inputs; left unchanged.
        dataset: Calibration samples.
        how: Rows and tokens.
        stands_for: As for :func:`lamina.passes.repair_sites.repair_sites`.
        wanted: Whether a site is visited.
        fits: Whether a map of what a site reads is fitted, or its mean alone.
        divergence: Says how far outputs are from the original's; chosen by the outputs when None.
        threads: Threads of a run; all available cores when None.
        seconds: From now on; when they are short, what is nearest behind the change is visited.

    Attributes:
        current: The changed program with what was repaired; assign what it becomes.
        refusals: Operators that cannot be repaired.
        trial: Says whether outputs come nearer; knows how near :attr:`current` is.

    Raises:
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses a program.
    """

    def __init__(
        self,
        original: Program,
        changed: Program,
        dataset: Dataset,
        how: Compensation,
        *,
        stands_for: Mapping[str, str] | None,
        wanted: Callable[[RepairSite], bool],
        fits: Callable[[RepairSite], bool],
        divergence: Metric | None,
        threads: int | None,
        seconds: float,
    ) -> None:
        self._end = time.perf_counter() + seconds
        self._original, self.current, self._how, self._fits = original, changed, how, fits
        data = in_batches(changed, dataset, how.rows)
        first = next(data.batches())
        shapes, before = (observed_shapes(p, feeds_of(p, first)) for p in (changed, original))
        found = list(repair_sites(original, changed, shapes, before, stands_for))
        self.refusals = tuple(r for r in found if isinstance(r, Refusal))
        self.sites = [s for s in found if isinstance(s, RepairSite) and wanted(s)]
        rows = _rows(self.sites, shapes, len(first), how)
        data = data if rows >= len(data) else in_batches(changed, dataset, rows)
        self._batches = [b for b in data.batches() if fixed_batch(changed) in (None, len(b))]
        feeds = [feeds_of(changed, b, f"batch {i}") for i, b in enumerate(self._batches)]
        self._streams = Stream(feeds, threads=threads), Stream(feeds, threads=threads)
        self._entries = {n.name: [v.name or "" for v in n.inputs if v is not None] for n in changed.graph}
        self._waves = list(waves(changed, self.sites))
        self._ranks = distances(original, changed, self._waves, stands_for or {})
        if not self.sites:
            return  # nothing to try
        self.trial = Trial(original, self._batches, self._streams, divergence or get_metric(None, original))
        self.trial.begin(changed, {})
        self.trial.better()

    def __iter__(self) -> Iterator[tuple[Wave, Sums]]:
        """Waves and what to fit on; those there is no time for are passed by."""
        pace, start = Pace(self._ranks), time.perf_counter()
        for number, wave in enumerate(self._waves):
            now = time.perf_counter()
            if pace.takes(number, now - start, self._end - now):
                yield wave, self._sums(wave)

    def _sums(self, wave: Sequence[RepairSite]) -> Sums:
        names = [s.target for s in wave]
        targets = self._streams[0].run(self._original, names, names)
        values = dict.fromkeys(v for s in wave for v in (s.read, s.value))
        # a path beside a fixed weight reads what stands before its quantization: that must be kept
        settled = [name for s in wave for name in ([s.read] if s.fixed else self._entries[s.node])]
        pairs = zip(self._batches, targets, self._streams[1].run(self.current, values, settled), strict=True)
        share = self._how.tokens / sum(len(b) for b in self._batches)
        return moments_of(wave, pairs, share, self._fits)


def _rows(sites: Sequence[RepairSite], shapes: Mapping[str, Observed], rows: int, how: Compensation) -> int:
    """How many rows hold enough tokens for every site; ``shapes`` are those of ``rows`` rows."""
    tokens = how.tokens
    for site in sites:
        shape = shapes[site.value][0]
        width = shape[1 if site.operator is not None and site.operator.kind == "conv" else -1]
        tokens = min(tokens, math.prod(shape) // max(1, width * rows))
    return min(how.rows, max(_LEAST_ROWS, -(-_SPARE * how.tokens // max(1, tokens))))
