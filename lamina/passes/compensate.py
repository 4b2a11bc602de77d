"""Closed-form compensation: fit the operators behind a change so that the program does what it did before.

Runs after any plan. Operators are visited in execution order; each is fitted on what it reads in the program
as changed *and repaired so far* and on what the original had in its place (two streams).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.pass_ import Refusal
from lamina.passes.repair import Repair, apply_repairs
from lamina.passes.repair_fit import Compensation, Made, corrections
from lamina.passes.repair_sites import RepairSite
from lamina.passes.repair_trial import Place, Trial, open_places, repairs_of
from lamina.passes.repair_walk import Walk
from lamina.quality import Metric


@dataclass(frozen=True)
class Fitted:
    """One operator that was fitted anew.

    Attributes:
        site: Which.
        before: Mean squared error against the original per token, held-out calibration data.
        after: With the correction fitted on the other calibration data.
        ridge: Penalty chosen; inf: only the bias changed.
    """

    site: RepairSite
    before: float
    after: float
    ridge: float


@dataclass(frozen=True)
class Compensated:
    """A repaired program and how it came about."""

    program: Program
    repairs: tuple[Repair, ...]
    fitted: tuple[Fitted, ...]
    refusals: tuple[Refusal, ...]


def compensate(
    original: Program,
    changed: Program,
    dataset: Dataset,
    *,
    stands_for: Mapping[str, str] | None = None,
    how: Compensation | None = None,
    divergence: Metric | None = None,
    threads: int | None = None,
    seconds: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> Compensated:
    """Refit what follows a change so that its outputs match the original's on calibration data.

    Mean-to-bias: the mean of what is missing goes into the operator's bias. Least squares: its weight is
    fitted by ridge regression, pulled towards the one it has. Held-out calibration batches choose the ridge,
    and whether the outputs come nearer to the original's: what does not help them is left alone. Names,
    shapes and dtypes stay; without ``add_biases`` so do bytes and time.

    Args:
        original: What the change was made to.
        changed: The program after it, with the same inputs; left unchanged.
        dataset: Calibration samples; neither selection nor report data.
        stands_for: As for :func:`lamina.passes.repair_sites.repair_sites`.
        how: Options.
        divergence: Says how far outputs are from the original's; chosen by the outputs when None.
        threads: Threads of a run; all available cores when None.
        seconds: Time for all of it. Where that is short of what visiting every operator takes, those nearest
            behind a change are visited, and none when it is over; what was repaired by then stays.
        progress: Called with operators done and operators in all.

    Raises:
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses a program.
    """
    how = how or Compensation()
    walk = Walk(
        original,
        changed,
        dataset,
        how,
        stands_for=stands_for,
        wanted=lambda site: _usable(site, how),
        fits=lambda site: how.weights and not site.fixed,
        divergence=divergence,
        threads=threads,
        seconds=seconds,
    )
    repairs: list[Repair] = []
    fitted: list[Fitted] = []
    done = 0
    for wave, sums in walk:
        places = open_places(wave, walk.current, add_biases=how.add_biases)
        choices = [corrections(wave, sums, lead, how) for lead in how.leads]
        if any(choices):
            walk.trial.begin(walk.current, places)
            best, accepted = _best(choices, how, places, walk.trial)
            walk.current = apply_repairs(walk.current, accepted)
            repairs += accepted
            fitted += [Fitted(s, c.before, c.after, c.ridge) for s, c in best]
        done += len(wave)
        if progress is not None:
            progress(done, len(walk.sites))
    return Compensated(walk.current, tuple(repairs), tuple(fitted), walk.refusals)


def _best(
    choices: Sequence[Made], how: Compensation, places: Mapping[Place, np.ndarray], trial: Trial
) -> tuple[Made, list[Repair]]:
    """What brings the outputs nearest: one lead's corrections, or a share of them; nothing if none does."""
    whole, best, accepted = choices[0], Made(), list[Repair]()

    def attempt(made: Made, share: float) -> bool:
        nonlocal best, accepted
        part = [(s, c.times(share)) for s, c in made]
        fresh = [r for s, c in part for r in repairs_of(s, c, places)]
        if not fresh or not trial.better(fresh):
            return False
        best, accepted = part, fresh
        return True

    for made in choices:
        whole = made if attempt(made, how.shares[0]) else whole
    for share in how.shares[1:]:
        attempt(whole, share)
    return best, accepted


def _usable(site: RepairSite, how: Compensation) -> bool:
    shifts = site.bias is not None or (how.add_biases and site.addable)
    return site.role in how.roles and ((how.weights and not site.fixed) or shifts)
