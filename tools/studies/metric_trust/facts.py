"""What claims need beside rank correlations: pairs of changes, risky examples, what lies where in depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lamina.analysis import redundancy
from lamina.analysis.gradient_operators import weighted_operators
from lamina.analysis.needs import Need
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import damages, interactions, suspicious_pairs
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.passes.single_drops import drop_variants
from lamina.quality import get_metric
from tools.studies.metric_trust.ranking import spearman
from tools.studies.metric_trust.subjects import Subject
from tools.studies.metric_trust.truth import Variants, rounded, rounded_variants

PAIRS, PAIR_SAMPLES, LOW_BITS = 8, 16, 4


def facts(subject: Subject) -> dict[str, Any]:
    """Of one model, on calibration data.

    Returns:
        ``pairs``: kind of change -> ``[sum of both damages, damage of both together]`` of the most suspicious
        pairs; and of a model with branches ``risk``: branch -> rank correlation over examples of length and
        loss in 4 bits; ``contribution``: branch -> relative-contribution; ``quality``: depth ->
        representation-quality.
    """
    program, data = subject.program, subject.calibration.rows(slice(0, PAIR_SAMPLES))
    operators = list(dict.fromkeys(o.name for o in weighted_operators(program)))
    found: dict[str, Any] = {"pairs": {}}
    for kind, variants, change in (
        ("drop", drop_variants(program), lambda names: apply_drops(program, list(names))),
        ("w4", rounded_variants(program, LOW_BITS), lambda names: rounded(program, names, LOW_BITS)),
    ):
        if len(variants) > 1:
            found["pairs"][kind] = _pairs(program, variants, change, data)
    branches = find_branches(program).branches
    if not branches:
        return found
    needs = frozenset({Need.LENGTHS, Need.EXAMPLES, Need.SPECTRA, Need.VIEWS})
    probes = [BranchProbe.of(b) for b in branches]
    statistics = collect(program, subject.calibration, branches=probes, needs=needs, threads=1)
    low = {"low": rounded(program, operators, LOW_BITS)}
    losses = damages(program, low, subject.calibration, get_metric(None, program), threads=1)["low"].samples
    rows = statistics.example_rows
    lengths = statistics.examples
    judged = {n: spearman(v, losses[rows]) for n, v in lengths.items() if len(v) == len(rows)}
    found["risk"] = {"examples": len(rows), "branches": judged}
    found["contribution"] = _plain(redundancy.relative_contribution(statistics))
    found["quality"] = _plain(redundancy.representation_quality(statistics))
    return found


def _pairs(
    program: Program, variants: Variants, change: Callable[[Sequence[str]], Program], data: Dataset
) -> list[list[float]]:
    metric = get_metric(None, program)
    singles = {n: d.mean for n, d in damages(program, variants, data, metric, threads=1).items()}
    pairs = suspicious_pairs(singles, PAIRS)
    terms = interactions(program, change, singles, pairs, data, metric, threads=1)
    sums = {pair: singles[pair[0]] + singles[pair[1]] for pair in pairs}
    return [[float(sums[pair]), float(sums[pair] + terms[pair])] for pair in pairs]


def _plain(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
