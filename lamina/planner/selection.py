"""Finished programs on selection data: how far their outputs are, and how much worse they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from weakref import ref

import numpy as np

from lamina.backends.backend import run_of, usable_cores
from lamina.ir.program import Program
from lamina.planner.request import Request
from lamina.quality import Outputs, evaluate_each, get_metric

# Bytes of the original's outputs that are kept: with a large vocabulary all would be many times the model.
_KEPT = 256 << 20


@dataclass(frozen=True)
class Outcome:
    """A program on selection data.

    Attributes:
        divergence: Of its outputs from the original's, as the metric's divergence has it.
        damage: How much worse than the original, in the metric's damage unit.
    """

    divergence: float
    damage: float


class Selection:
    """Runs each program once over the selection data, the original at most once a batch that is kept.

    All cores are used: quality does not depend on them.

    Args:
        request: The original, the data, the metric, and what programs run on.
    """

    def __init__(self, request: Request) -> None:
        self._request, self._data = request, request.splits.selection
        self._target = replace(request.draft, threads=max(request.draft.threads, usable_cores()))
        self._metrics = get_metric(request.metric.divergence, request.program), request.metric
        self._original = request.backend.compile(request.program.model, self._target).run
        self._kept: list[Outputs] = []
        self._bytes = 0
        self._before: float | None = None
        self._known: dict[int, tuple[ref[Program], Outcome]] = {}

    def outcome(self, program: Program) -> Outcome:
        """What came of a program, which is remembered as long as the program lives.

        Raises:
            DataError: Its outputs are not finite.
        """
        known = self._known.get(id(program))
        if known is not None and known[0]() is program:
            return known[1]
        apart, task = self._metrics
        if self._before is None:
            answers = self._answers()
            (features,) = evaluate_each(lambda _: next(answers), self._data, [task], self._answers())
            self._before = task.score(features)
        run = run_of(self._request.backend.compile(program.model, self._target))
        found = evaluate_each(run, self._data, self._metrics, self._answers())
        outcome = Outcome(apart.score(found[0]), task.damage(self._before, task.score(found[1])))
        self._known[id(program)] = ref(program), outcome
        return outcome

    def _answers(self) -> Iterator[Outputs]:
        """What the original answers to each batch."""
        for number, batch in enumerate(self._data.batches()):
            if number < len(self._kept):
                yield self._kept[number]
                continue
            answer = self._original(batch.inputs)
            size = sum(array.nbytes for array in answer.values())
            if number == len(self._kept) and self._bytes + size <= _KEPT:
                self._kept.append(answer)
                self._bytes += size
            yield answer


def few_samples(request: Request) -> Mapping[str, np.ndarray]:
    """Inputs a user gave (or that were made up where none were given), as few as the model takes."""
    selection = request.splits.selection
    return next(selection.rows(slice(0, selection.fixed_batch or 2)).batches()).inputs
