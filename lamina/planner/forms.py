"""Choose among exact forms of the same function by measuring them on the target."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.errors import BackendError, UnsupportedOperator
from lamina.ir.program import Program
from lamina.passes.fold import FOLDS, fold, form_names
from lamina.planner.timing import Relative, Stopwatch
from lamina.progress import Progress

_REFUSED = (BackendError, UnsupportedOperator)
# A form must pay by more than timing noise, or the simpler graph stays.
LEAST_GAIN = 0.01


@dataclass(frozen=True)
class Folded:
    """The program after exact passes.

    Attributes:
        program: Folded, with the forms that paid.
        names: Passes in the order :func:`lamina.passes.fold.apply_named` takes.
        relative: Its latency against the original's.
        log: Per form tried: name, latency ratio it reached, whether it was kept.
    """

    program: Program
    names: tuple[str, ...]
    relative: Relative
    log: tuple[dict[str, object], ...]


def pick_forms(program: Program, stopwatch: Stopwatch, progress: Progress, *, seconds: float = 2.0) -> Folded:
    """Fold, then add each form in turn where it makes the measured latency better.

    A fold that makes the model slower than the original is not kept either: where plain folding loses,
    forms are tried on the program as captured.
    """
    bare, no_names, _ = fold(program, only=())
    folded, names, _ = fold(program)
    candidates = [(bare, no_names, ()), (folded, names, FOLDS)]
    measured = stopwatch.compare([bare.model, folded.model], seconds=seconds)
    keep = 1 if measured[1].ratio <= measured[0].ratio * (1 + LEAST_GAIN) else 0
    best, best_names, only = candidates[keep]
    relative, log = measured[keep], [_entry("folds", measured[1], keep == 1)]
    chosen: tuple[str, ...] = ()
    forms = form_names()
    for i, form in enumerate(forms):
        progress.update("fold", i, len(forms), form)
        try:
            trial, trial_names, _ = fold(program, forms=(*chosen, form), only=only)
            if trial_names == best_names:
                continue
            now, before = stopwatch.compare([trial.model, best.model], seconds=seconds)
        except _REFUSED as error:  # a form this runtime has no kernel for is no candidate
            log.append({"form": form, "kept": False, "reason": error.what})
            continue
        kept = now.ratio < before.ratio * (1 - LEAST_GAIN)
        log.append(_entry(form, now, kept))
        if kept:
            best, best_names, relative, chosen = trial, trial_names, now, (*chosen, form)
    return Folded(best, best_names, relative, tuple(log))


def _entry(form: str, relative: Relative, kept: bool) -> dict[str, object]:
    return {"form": form, "latency_ratio": relative.ratio, "kept": kept}
