"""Choose among exact forms of the same function by measuring them on the target."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import count

from lamina.backends.load import machine_load
from lamina.errors import BackendError, PassError, UnsupportedOperator
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewrite
from lamina.passes.fold import FOLDS, fold, form_names
from lamina.passes.fold.pipeline import replay
from lamina.passes.quantize.caches import CacheCodes
from lamina.planner.form_memory import FormMemory, Record, read_relative, relative_record
from lamina.planner.timing import Relative, Stopwatch
from lamina.progress import Progress

_REFUSED = (BackendError, UnsupportedOperator)
# A form must pay by more than timing noise, or the simpler graph stays.
LEAST_GAIN = 0.01
# Wall seconds for trying combinations after every form has been tried once.
COMBINATIONS_S = 30.0


@dataclass(frozen=True)
class Folded:
    """The program after exact passes.

    Attributes:
        program: Folded, with the forms that paid.
        names: Passes in the order :func:`lamina.passes.fold.apply_named` takes.
        relative: Its latency against the original's.
        log: Per form tried: name, latency ratio it reached, whether it was kept; where it was tried again
            beside others, ``tried`` says how.
        records: Every change of the passes in ``names``.
        caches: Codes that its caches hold, written after the passes.
        remembered: Whether an earlier run's measurements decided, and none was made now.
    """

    program: Program
    names: tuple[str, ...]
    relative: Relative
    log: tuple[dict[str, object], ...]
    records: tuple[Rewrite, ...] = ()
    remembered: bool = False
    caches: tuple[CacheCodes, ...] = ()


def pick_forms(
    program: Program,
    stopwatch: Stopwatch,
    progress: Progress,
    *,
    seconds: float = 2.0,
    candidates: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    without: Collection[str] = (),
    combinations_s: float = COMBINATIONS_S,
    memory: FormMemory | None = None,
) -> Folded:
    """Fold, then choose the set of forms whose whole model is measured fastest.

    Forms act on each other and on the runtime's own fusions, so whole models are compared: each form once on
    top of those already kept; then all together, each kept one left out and each rejected one added again, as
    long as that gains. A fold that makes the model slower than the original is not kept either: where plain
    folding loses, forms are tried on the program as captured. What was measured is remembered on disk by
    device, versions, threads and shapes, so that a second run measures nothing.

    Args:
        program: What to fold.
        stopwatch: Times whole models against the original.
        progress: Receives progress.
        seconds: Wall time of one comparison.
        candidates: Forms to try; all when omitted.
        only: Always-applied folds to use; all when omitted.
        without: Passes that may not be used.
        combinations_s: Wall time for combinations, after each form was tried once.
        memory: Where measurements are kept; the target's file in the cache folder when omitted.
    """
    memory = memory or FormMemory(stopwatch.timer.target, stopwatch.workload)
    sets = _Sets.of(candidates, only, without)
    found = _recall(program, memory, sets)
    if found is None:
        search = _Search(program, stopwatch, progress, memory, seconds, sets)
        found = search.run(combinations_s)
        search.remember(found)
    return found


def remembered_forms(
    program: Program,
    memory: FormMemory,
    *,
    candidates: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    without: Collection[str] = (),
) -> Folded | None:
    """What :func:`pick_forms` would return without measuring; None where it would have to."""
    return _recall(program, memory, _Sets.of(candidates, only, without))


@dataclass(frozen=True)
class _Sets:
    """Which passes a choice is among: forms, always-applied folds, and those that may not be used."""

    forms: tuple[str, ...]
    always: tuple[str, ...]
    without: tuple[str, ...]

    @staticmethod
    def of(candidates: Sequence[str] | None, only: Sequence[str] | None, without: Collection[str]) -> _Sets:
        forms = tuple(f for f in form_names() if f not in without and (candidates is None or f in candidates))
        always = tuple(f for f in (FOLDS if only is None else only) if f not in without)
        return _Sets(forms, always, tuple(sorted(without)))

    def key(self, program: Program) -> tuple[str, ...]:
        """What a decision is remembered under."""
        import lamina

        texts = (",".join(self.forms), ",".join(self.always), ",".join(self.without))
        return ("decision", lamina.__version__, program.fingerprint, *texts)


def _recall(program: Program, memory: FormMemory, sets: _Sets) -> Folded | None:
    """The decision of an earlier run, if its passes still lead to the program that was measured."""
    known = memory.get(*sets.key(program))
    if known is None or not (known.get("quiet") or not machine_load().quiet):
        return None
    try:
        names, relative = tuple(known["names"]), read_relative(known["relative"])
        folded, records = replay(program, names)
    except (KeyError, TypeError, PassError):
        return None
    if folded.fingerprint != known["result"]:
        return None
    return Folded(folded, names, relative, tuple(known["log"]), tuple(records), True)


@dataclass(frozen=True)
class _Trial:
    """A set of forms on top of a set of always-applied folds, folded."""

    forms: tuple[str, ...]
    only: tuple[str, ...]
    program: Program
    names: tuple[str, ...]
    records: tuple[Rewrite, ...]


@dataclass
class _Search:
    program: Program
    stopwatch: Stopwatch
    progress: Progress
    memory: FormMemory
    seconds: float
    sets: _Sets
    log: list[dict[str, object]] = field(default_factory=list)
    best: _Trial = field(init=False)
    relative: Relative = field(init=False)
    matching: list[str] = field(default_factory=list)
    _seen: set[tuple[str, ...]] = field(default_factory=set)
    _quiet: bool = True

    def run(self, combinations_s: float) -> Folded:
        self._quiet = machine_load().quiet
        bare, folded = self._trial((), ()), self._trial((), self.sets.always)
        now, before = self._compare(folded, bare)
        keep = now.ratio <= before.ratio * (1 + LEAST_GAIN)
        self.best, self.relative = (folded, now) if keep else (bare, before)
        self._seen |= {bare.names, folded.names}
        self.log.append(_entry("folds", now, keep))
        for i, form in enumerate(self.sets.forms):
            self.progress.update("fold", i, len(self.sets.forms), form)
            self._add(form)
        self._combine(time.monotonic() + combinations_s)
        best = self.best
        return Folded(best.program, best.names, self.relative, tuple(self.log), best.records)

    def _add(self, form: str, **said: str) -> bool:
        return self._try((*self.best.forms, form), form, 1 - LEAST_GAIN, **said)

    def _combine(self, deadline: float) -> None:
        """Try what one greedy pass misses, until a round gains nothing or time is up."""
        kept = set(self.best.forms)
        if len(set(self.matching) - kept) > 1:  # several that do nothing alone may do something together
            self._try(tuple(self.matching), "all", 1 - LEAST_GAIN, tried="all together")
        for _ in count():
            changed = False
            for form in self.matching:
                if time.monotonic() > deadline:
                    self.log.append({"form": form, "kept": False, "reason": "time for combinations was up"})
                    return
                if form in self.best.forms:
                    rest = tuple(f for f in self.best.forms if f != form)
                    changed |= self._try(rest, form, 1.0, tried="left out of those kept")
                else:
                    changed |= self._add(form, tried="added once more")
            if not changed:
                return

    def _try(self, forms: tuple[str, ...], label: str, least: float, **said: str) -> bool:
        """Measure a set of forms against the best one; whether it took its place."""
        trial = self._trial(forms, self.best.only)
        if trial.names in self._seen:
            return False
        self._seen.add(trial.names)
        if not said and label not in self.matching:
            self.matching.append(label)
        try:
            now, before = self._compare(trial, self.best)
        except _REFUSED as error:  # a form this runtime has no kernel for is no candidate
            self.log.append({"form": label, "kept": False, "reason": error.what, **said})
            self.matching = [f for f in self.matching if f != label]
            return False
        kept = now.ratio < before.ratio * least
        self.log.append({**_entry(label, now, kept), **said})
        if kept:
            self.best, self.relative = trial, now
        return kept

    def _trial(self, forms: tuple[str, ...], only: tuple[str, ...]) -> _Trial:
        ordered = tuple(f for f in form_names() if f in forms)
        program, names, records = fold(self.program, forms=ordered, only=only, without=self.sets.without)
        return _Trial(ordered, only, program, names, tuple(records))

    def _compare(self, trial: _Trial, other: _Trial) -> tuple[Relative, Relative]:
        """Both against the original, from one measurement in alternation: this run's or a remembered one."""
        key = ("comparison", self.program.fingerprint, trial.program.fingerprint, other.program.fingerprint)
        known = self.memory.get(*key)
        if known is not None and (known.get("quiet") or not self._quiet):
            return read_relative(known["first"]), read_relative(known["second"])
        models = [trial.program.model, other.program.model]
        first, second = self.stopwatch.compare(models, seconds=self.seconds)
        record: Record = {"first": relative_record(first), "second": relative_record(second)}
        self.memory.put(key, {**record, "quiet": self._quiet})
        return first, second

    def remember(self, found: Folded) -> None:
        """Write the decision, and what it leads to: another lamina may make something else of the names."""
        self.memory.put(
            self.sets.key(self.program),
            {
                "names": list(found.names),
                "relative": relative_record(found.relative),
                "log": list(found.log),
                "result": found.program.fingerprint,
                "quiet": self._quiet,
            },
        )


def _entry(form: str, relative: Relative, kept: bool) -> dict[str, object]:
    return {"form": form, "latency_ratio": relative.ratio, "kept": kept}
