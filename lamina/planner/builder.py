"""Candidates as finished models: each built and timed against the original once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from lamina.ir.io import serialized_size
from lamina.planner.prepare import Prepared, build
from lamina.planner.realize import Realized
from lamina.planner.request import Request
from lamina.planner.search import Candidate
from lamina.planner.space import Genome
from lamina.planner.timing import Relative, Stopwatch


@dataclass(frozen=True)
class Finalist:
    """A candidate as a finished model, with what was measured of it.

    Attributes:
        candidate: Genome, prediction and selection score.
        realized: The finished program and its plan.
        relative: Latency against the original.
    """

    candidate: Candidate
    realized: Realized
    relative: Relative

    @property
    def changed(self) -> bool:
        """Whether the model differs from the original at all."""
        return bool(self.realized.plan.folds or self.realized.plan.moves)


@dataclass
class Builder:
    """Builds and times candidates once each."""

    request: Request
    prepared: Prepared
    stopwatch: Stopwatch
    done: dict[Genome, Finalist] = field(default_factory=dict)
    _memory: dict[Genome | None, int] = field(default_factory=dict)

    @property
    def original_size(self) -> int:
        """Bytes of the original's file."""
        return serialized_size(self.request.program.model)

    @property
    def original_latency_s(self) -> float:
        """Weighted mean latency of the original, seconds."""
        seconds = self.stopwatch.baseline_s
        return sum(c.weight * s for c, s in zip(self.request.workload, seconds, strict=True))

    def original_memory(self) -> int:
        """Peak resident bytes of the original on the heaviest case."""
        return self._peak(None, self.request.program.model)

    def memory(self, finalist: Finalist) -> int:
        """Peak resident bytes of a finished model on the heaviest case."""
        return self._peak(finalist.candidate.genome, finalist.realized.program.model)

    def _peak(self, key: Genome | None, model: ir.Model) -> int:
        if key not in self._memory:
            request = self.request
            heaviest = max(request.workload, key=lambda c: sum(a.size for a in c.feeds.values()))
            path = self.stopwatch.write(model)
            self._memory[key] = request.backend.peak_memory(path, request.draft, heaviest)
        return self._memory[key]

    def finish(self, candidates: Sequence[Candidate], *, seconds: float) -> list[Finalist]:
        """Finished and timed; those seen before are not built again."""
        new = [c for c in candidates if c.genome not in self.done]
        realized = [build(self.request, self.prepared, c.genome, recalibrate=True) for c in new]
        if new:
            times = self.stopwatch.compare([r.program.model for r in realized], seconds=seconds)
            for candidate, made, relative in zip(new, realized, times, strict=True):
                self.done[candidate.genome] = Finalist(candidate, made, relative)
                self.prepared.whole[candidate.genome] = relative.ratio
        return [self.done[c.genome] for c in candidates]
