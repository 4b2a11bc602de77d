"""Damage of every option alone, from which seeds and proposals are drawn: measured, and guessed only at need.

What docs/metric_trust.md found decides: divergence measured on 64 samples ranks sites nearly as the truth
does, and on a single one still at least as well as whatever changes no model and needs no gradients. So where
time is short the samples go first; only where one sample of every option takes too long, some options are
measured and the rest lie between them as a cheap metric ranks them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.needs import Need
from lamina.analysis.redundancy import block_influence
from lamina.analysis.residual import BranchProbe
from lamina.analysis.statistics import collect
from lamina.analysis.weight_error import output_error_at
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.planner.evaluator import Evaluator
from lamina.planner.space import Genome, Space
from lamina.quality.divergence import Divergence

# Shares of the search's time: what measuring is meant to take, and what it may.
SHARE, MOST_SHARE = 0.25, 0.5
# Samples: not more than these (or four batches), and not fewer unless the time is short.
ENOUGH, LEAST = 64, 16
_BATCHES = 4
# Width whose output error ranks all options of weights: within one option only the order counts.
_BITS = 4
# What a rank adds to a guessed logarithm: keeps the cheap metric's order where measured damages do not rise.
_TIE = 1e-9
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        samples: Selection samples of each option.
        options: Options that are measured; the rest is guessed.
    """

    samples: int
    options: int


def effort(seconds: float, per_sample: float, options: int, batch: int, *, fixed: bool = False) -> Effort:
    """Samples and options that fit the time.

    Args:
        seconds: The search's time.
        per_sample: Seconds that a run takes for each sample.
        options: Options there are.
        batch: Samples of a batch.
        fixed: Whether only whole batches can be run.
    """
    each = max(per_sample, 1e-12) * max(options, 1)
    samples = int(np.clip(SHARE * seconds / each, LEAST, max(ENOUGH, _BATCHES * batch)))
    samples = max(1, min(samples, int(MOST_SHARE * seconds / each)))
    if fixed:
        samples = max(1, samples // batch) * batch
    fit = int(MOST_SHARE * seconds / (samples * max(per_sample, 1e-12)))
    return Effort(samples, int(np.clip(fit, 1, max(options, 1))))


def single_damages(
    evaluator: Evaluator, divergence: Divergence, calibration: Dataset, seconds: float, report: Report
) -> list[list[float]]:
    """Divergence of every option alone, one list a choice; inf where its outputs are not finite.

    Args:
        evaluator: Of the compiled supergraph; its selection samples are used.
        divergence: How outputs are compared.
        calibration: What the cheap metrics read, if it comes to them.
        seconds: Time of the search.
        report: Called with (options measured, options to measure).
    """
    space, selection = evaluator.space, evaluator.selection
    where = [(i, k) for i, choice in enumerate(space.choices) for k in range(len(choice.options))]
    if not where:
        return []
    evaluator.score(space.nothing, 1)
    batch = max(1, evaluator.batches[0].samples)
    per_sample = evaluator.run_seconds / max(evaluator.runs, 1) / batch
    planned = effort(seconds, per_sample, len(where), batch, fixed=bool(selection.fixed_batch))
    probe = selection.rows(slice(0, planned.samples))
    chosen = list(range(len(where)))
    groups: list[list[int]] = []
    if planned.options < len(where):
        groups = ranked_groups(space, where, cheap_values(space, calibration))
        chosen = spread(groups, planned.options)
    genomes = [_alone(space, *where[index]) for index in chosen]
    values = evaluator.single_divergences(probe, divergence, genomes, report)
    known = dict(zip(chosen, values, strict=True))
    for group in groups:
        known |= fill(group, known)
    damage = [[0.0] * len(choice.options) for choice in space.choices]
    for index, (i, k) in enumerate(where):
        damage[i][k] = known[index]
    return damage


def cheap_values(space: Space, calibration: Dataset) -> dict[int, float]:
    """Choice -> what the cheap metric says of its site, higher = more harm; choices it cannot rate left out.

    block-influence of branches that go, the relative output error of rounding of weighted operators: one
    instrumented run over the calibration data for both.
    """
    program = space.program
    probes = [BranchProbe.of(branch) for branch in find_branches(program).branches]
    needs = frozenset({Need.INPUTS} | ({Need.LENGTHS} if probes else set()))
    statistics = collect(program, calibration, branches=probes, needs=needs)
    branches = block_influence(statistics) if probes else {}
    errors = output_error_at(_BITS)(program, statistics)
    found = {}
    for index, choice in enumerate(space.choices):
        value = (
            branches.get(choice.site.name)
            if choice.removes
            else next((errors[node] for node in choice.site.nodes if node in errors), None)
        )
        if value is not None and np.isfinite(value):
            found[index] = value
    return found


def ranked_groups(
    space: Space, where: Sequence[tuple[int, int]], cheap: Mapping[int, float]
) -> list[list[int]]:
    """Options of one name and transform, the least harmful first; those without a value in the middle.

    Args:
        space: The space.
        where: Choice and number of every option.
        cheap: Of :func:`cheap_values`.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for index, (i, k) in enumerate(where):
        choice = space.choices[i]
        groups.setdefault((choice.site.transform, choice.options[k].name), []).append(index)
    found = []
    for group in groups.values():
        known = [cheap[where[index][0]] for index in group if where[index][0] in cheap]
        middle = float(np.median(known)) if known else 0.0
        found.append(sorted(group, key=lambda index: cheap.get(where[index][0], middle)))
    return found


def spread(groups: Sequence[Sequence[int]], count: int) -> list[int]:
    """About ``count`` options, evenly spread over the ranks of each group; at least one of each.

    A group gets its share by size, and two (its ends) where there are enough for that.
    """
    total = sum(len(group) for group in groups)
    least = 2 if count >= 2 * len(groups) else 1
    chosen = []
    for group in groups:
        some = min(len(group), max(least, int(count * len(group) / max(total, 1))))
        places = [(len(group) - 1) / 2] if some == 1 else np.linspace(0, len(group) - 1, some)
        chosen += [group[int(place)] for place in places]
    return sorted(set(chosen))


def fill(group: Sequence[int], known: Mapping[int, float]) -> dict[int, float]:
    """Damages of the options of a group that were not measured: between the measured ones, by rank.

    The logarithms of the measured damages are made to rise with rank (isotonic regression) and interpolated;
    where they are level, a nothing keeps the order. With no finite one among them, inf.

    Args:
        group: Options, the least harmful first.
        known: Option -> measured damage.
    """
    from scipy.optimize import isotonic_regression

    places = [p for p, index in enumerate(group) if np.isfinite(known.get(index, np.inf))]
    missing = [p for p, index in enumerate(group) if index not in known]
    if not places:
        return {group[p]: float("inf") for p in missing}
    values = np.array([known[group[p]] for p in places])
    least = float(values[values > 0].min(initial=np.inf))
    if not np.isfinite(least):
        return {group[p]: 0.0 for p in missing}
    rising = isotonic_regression(np.log(np.maximum(values, least))).x
    found = np.exp(np.interp(missing, places, rising) + _TIE * np.array(missing))
    return {group[p]: float(value) for p, value in zip(missing, found, strict=True)}


def _alone(space: Space, choice: int, option: int) -> Genome:
    return (*space.nothing[:choice], option + 1, *space.nothing[choice + 1 :])
