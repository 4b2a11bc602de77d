"""Candidates as finished models: each built and timed against the original once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import onnx_ir as ir

from lamina.ir.io import serialized_size
from lamina.planner.blame import blame, describe, reason_of, trial, undone
from lamina.planner.prepare import Prepared, build
from lamina.planner.realize import Realized
from lamina.planner.request import Request
from lamina.planner.search import Candidate
from lamina.planner.selection import Selection
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
        plan = self.realized.plan
        return bool(plan.folds or plan.moves or plan.caches)


@dataclass(frozen=True)
class Mending:
    """What compensating one plan did.

    Attributes:
        operators: Operators that were fitted anew.
        before: Damage on selection data without it, in the metric's damage unit.
        after: With it.
        kept: Whether the plan holds it.
        seconds: What it took.
        paths: Low-rank paths that were put beside quantized operators; ``after`` is with them.
    """

    operators: int
    before: float
    after: float
    kept: bool
    seconds: float
    paths: int = 0


@dataclass(frozen=True)
class Rounded:
    """What rounding the weights of one plan against data did.

    Attributes:
        operators: Operators that were rounded anew.
        method: Of :class:`lamina.passes.quantize.rounding.Rounding`.
        before: Divergence from the original on selection data with the nearest codes.
        after: With the others.
        kept: Whether the plan holds them.
        seconds: What it took.
    """

    operators: int
    method: str
    before: float
    after: float
    kept: bool
    seconds: float


@dataclass
class Builder:
    """Builds and times candidates once each."""

    request: Request
    prepared: Prepared
    stopwatch: Stopwatch
    done: dict[Genome, Finalist] = field(default_factory=dict)
    failed: set[Genome] = field(default_factory=set)
    broken: set[tuple[int, int]] = field(default_factory=set)  # (choice, gene)
    mended: dict[Genome, Mending] = field(default_factory=dict)
    rounded: dict[Genome, Rounded] = field(default_factory=dict)
    learning_s: float = 0.0  # spent on learning codes against the outputs
    _memory: dict[Genome | None, int] = field(default_factory=dict)

    @cached_property
    def selection(self) -> Selection:
        """Finished programs on selection data."""
        return Selection(self.request)

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

    def forget_memory(self, genome: Genome) -> None:
        """The genome's finished model changed: measure its memory anew when asked."""
        self._memory.pop(genome, None)

    def _peak(self, key: Genome | None, model: ir.Model) -> int:
        if key not in self._memory:
            request = self.request
            heaviest = max(request.workload, key=lambda c: sum(a.size for a in c.feeds.values()))
            path = self.stopwatch.write(model)
            self._memory[key] = request.backend.peak_memory(path, request.draft, heaviest)
        return self._memory[key]

    def finish(self, candidates: Sequence[Candidate], *, seconds: float) -> list[Finalist]:
        """Finished, verified and timed; those seen before are not built again, broken ones are left out."""
        new = [c for c in candidates if c.genome not in self.done and self.usable(c.genome)]
        made = [(c, r) for c in new if (r := self._verified(c.genome)) is not None]
        if made:
            times = self.stopwatch.compare([r.program.model for _, r in made], seconds=seconds)
            for (candidate, realized), relative in zip(made, times, strict=True):
                self.done[candidate.genome] = Finalist(candidate, realized, relative)
                self.prepared.whole[candidate.genome] = relative.ratio
        return [self.done[c.genome] for c in candidates if c.genome in self.done]

    def usable(self, genome: Genome) -> bool:
        """Whether neither the candidate nor one of its moves proved broken."""
        return genome not in self.failed and not self.broken.intersection(enumerate(genome))

    def blameless(self, genome: Genome) -> bool:
        """Whether no single move of a broken candidate is broken on its own."""
        return not self.broken.intersection(enumerate(genome))

    def discard(self, genome: Genome, error: Exception) -> None:
        """Take a candidate out of the race, and name the moves that are to blame in the report."""
        self.failed.add(genome)
        self.done.pop(genome, None)
        space = self.prepared.costs.space
        moves = space.moves(genome)
        culprits = blame(moves, trial(space.program, self.prepared.referee))
        entries = undone(culprits) or [
            {"pass": describe(moves), "where": f"a plan of {len(moves)} moves", "reason": reason_of(error)}
        ]
        self.prepared.undone.extend(e for e in entries if e not in self.prepared.undone)
        names = {(m.site.transform, m.site.name, m.option.name) for m, _ in culprits}
        for index, choice in enumerate(space.choices):
            for gene, option in enumerate(choice.options, 1):
                if (choice.site.transform, choice.site.name, option.name) in names:
                    self.broken.add((index, gene))

    def _verified(self, genome: Genome) -> Realized | None:
        try:
            made = build(self.request, self.prepared, genome, recalibrate=True)
            plan = made.plan
            self.prepared.referee.check(made.program, describe(plan.moves), exact=plan.exact)
        except Exception as error:  # a broken move costs its candidate, never the run
            self.discard(genome, error)
            return None
        return made
