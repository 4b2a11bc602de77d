"""docs/metric_trust.md from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.planner.shortlist import ENOUGH
from tools.studies.metric_trust import guessing
from tools.studies.metric_trust.claim import LEAST_TRUST
from tools.studies.metric_trust.claims import claims
from tools.studies.metric_trust.guessing import COLUMNS, DROPS, guesses
from tools.studies.metric_trust.ranking import LEAST_SITES
from tools.studies.metric_trust.ratings import FEW, GRADIENT_SAMPLES, TRACED_SAMPLES, TRACED_SITES, few_name
from tools.studies.metric_trust.summary import (
    LEAST_GAP,
    Json,
    Row,
    agreement,
    best,
    compared,
    mean,
    median,
    with_task,
)
from tools.studies.metric_trust.truth import BITS, KINDS

Rows = Mapping[tuple[str, str], Row]
# Metrics that measure changed programs, and those that need torch.
_CHANGED = ("output-kl", "skip-effect", "gradient-trace")
_GRADIENTS = ("hawq-trace", "fisher-diagonal", "gradient-trace")
_INTRO = """# Which metric to trust

Written by `python -m tools.studies.metric_trust --out DIR` from what it measured: do not edit. All figures
are of one run on the reference models, one thread; seconds are CPU time on a machine shared with others.

**Truth.** Each site is changed by itself and the divergence of the outputs measured on report samples that no
metric sees: `drop` takes a residual branch out, `w8`, `w4`, `w2` round one operator's weights (symmetric,
nearest, a scale a channel), `w8a8` makes it an integer operator. **Prediction.** Each metric rates the same
sites from calibration samples. **Trust** is the rank correlation (Spearman) of the two over the sites of a
model; *mean* is over models, *from..to* the worst and the best of them. *Quarter* is the share of the least
harmful quarter of the sites that the metric names (chance: {chance:.2f}). *Plain runs* is its cost over that
of one run of the model over the calibration data, median over models. *Halves* is the rank correlation of its
values on two halves of its own data, `-` where it has none. Models with fewer than {least} sites that differ
are left out of a cell.

A branch metric rates an operator as the branch it is in, and leaves out operators in none. The registry's
`quantization-error-w8` and `-w4` keep their width; *width judged* follows it. Gradient metrics read
{gradients} samples; gradient-trace {traced}, and at most {sites} sites a model, its cost scaled to all. The
cost of `output-kl` is mostly that of opening a session for each changed program of these small models; where
all options stand in one program (the planner's supergraph) nothing of that is paid.

![mean rank correlation](metric_trust.svg)
"""
_BITS = """## Bits

Mean rank correlation, worst to best model and (models); *quarter*, *plain runs* and *halves* over the four
kinds of change.
"""
_CLAIMS = """## Claims

What the method catalogue quotes of each paper, or uses its id for. Verdicts go by rule: one metric beats
another with {gap} in mean rank correlation and on two thirds of the models; a metric ranks with {trust} in
the mean and on two thirds; the rest likewise by two thirds of the models. The models are tiny next to the
papers': what fails here may hold there. {counts}.
"""
_GUESSES = """## When there is no time to measure

The planner measures single options itself: on {enough} samples or more where the time allows, on fewer where
not, down to one; after that it measures some options and places the rest between them by rank of a cheap
metric (`lamina.planner.shortlist`: {drops} for drops, {bits} for weights). Mean rank
correlation with the truth, over the same models and sites (what is measured also gives the rest its scale,
which ranks do not show):
"""
_TRUTH = """## The truth itself

*halves*: rank correlation of the truth on every other report sample with the truth on the rest. The truth on
all of them is steadier than that; where it is low, its noise holds every correlation down. *task*: rank
correlation of divergence with damage on the task metric, on the same samples; with few samples and small
changes the task says little.
"""


def page(results: Sequence[Json], rows: Rows) -> str:
    """The whole page."""
    found = claims(results, rows)
    verdicts = [claim.verdict for claim in found]
    counts = ", ".join(f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts))
    introduction = _INTRO.format(
        least=LEAST_SITES,
        chance=_chance(results),
        gradients=GRADIENT_SAMPLES,
        traced=TRACED_SAMPLES,
        sites=TRACED_SITES,
    )
    parts = [
        introduction + _missing(results),
        "## What to trust for what\n\n" + "\n".join(recommendation(rows)) + "\n",
        "## Drops\n\n" + _drops(rows) + "\n",
        _BITS + "\n" + _bits(rows) + "\n",
        _CLAIMS.format(gap=LEAST_GAP, trust=LEAST_TRUST, counts=counts),
        *(f"**{c.name}** ({c.said}): *{c.verdict}*. {c.found}\n" for c in found),
        _GUESSES.format(enough=ENOUGH, drops=DROPS, bits=guessing.BITS) + "\n" + _guesses(results) + "\n",
        _TRUTH + "\n" + _truths(results) + "\n",
    ]
    return "\n".join(parts)


def _missing(results: Sequence[Json]) -> str:
    """What was not measured: models by the parts they lack."""
    lacking: dict[str, list[str]] = {}
    for result in results:
        names = [n.removeprefix("truth ") for n in result["missing"]]
        if names:
            lacking.setdefault(", ".join(names), []).append(result["model"])
    if not lacking:
        return ""
    texts = [f"{', '.join(models)} ({names})" for names, models in lacking.items()]
    return f"\n**Not measured in this run**, and left out: {'; '.join(texts)}.\n"


def recommendation(rows: Rows) -> list[str]:
    """What the table favours for each kind of change: of all, of what changes no model, of what is cheap."""
    lines = []
    for kind in KINDS:
        models = compared(rows, kind)
        every = best(rows, kind, models)
        if not every:
            continue
        without = [r for r in every if not r.metric.startswith(_CHANGED)]
        forward = [r for r in without if not r.metric.startswith(_GRADIENTS)]
        named: dict[str, str] = {}
        for words, tier in (("", every), ("changing no model ", without), ("nor gradients ", forward)):
            if tier:
                named.setdefault(tier[0].metric, words + _named(tier[0], models))
        lines.append(f"* **{kind}**, on {', '.join(models)}: " + "; ".join(named.values()) + ".")
    return [*lines, *_by_samples(rows)]


def _by_samples(rows: Rows) -> list[str]:
    """How many samples measured damage needs, on the models that have all of them."""
    lines = []
    for kind in KINDS:
        models = compared(rows, kind)
        known = {n: rows[few_name(n), kind] for n in FEW if (few_name(n), kind) in rows}
        if models and all(m in row.rho for row in known.values() for m in models):
            each = ", ".join(f"{n} {mean(row.rho[m] for m in models):.2f}" for n, row in known.items())
            lines.append(f"{kind}: {each}")
    return (
        [f"* Measured damage (`output-kl`) on the same models, by samples: {'; '.join(lines)}."]
        if lines
        else []
    )


def _named(row: Row, models: Sequence[str]) -> str:
    cost = median(row.cost[m] for m in models)
    return f"`{row.metric}` ({mean(row.rho[m] for m in models):.2f}, {cost:.2f} plain runs)"


def _chance(results: Sequence[Json]) -> float:
    shares = []
    for result in results:
        for truth in result["truths"].values():
            if truth["sites"] >= LEAST_SITES:
                shares.append(np.ceil(truth["sites"] / 4) / truth["sites"])
    return mean(shares)


def _drops(rows: Rows) -> str:
    found = sorted((r for (_, k), r in rows.items() if k == "drop"), key=lambda r: -np.nan_to_num(r.mean))
    lines = [
        _line("metric", "mean", "from..to", "models", "quarter", "plain runs", "seconds", "halves"),
        _rule(8),
    ]
    for row in found:
        lines.append(
            _line(
                row.metric,
                f"{row.mean:.2f}",
                _spread(row),
                str(len(row.rho)),
                f"{mean(row.overlap.values()):.2f}",
                _cost([row]),
                f"{median(row.seconds.values()):.2g}",
                _halves([row]),
            )
        )
    return "\n".join(lines)


def _bits(rows: Rows) -> str:
    names = dict.fromkeys(name for name, kind in rows if kind in BITS)
    found = {name: [rows[name, k] for k in BITS if (name, k) in rows] for name in names}
    ordered = sorted(names, key=lambda n: -np.nan_to_num(mean(r.mean for r in found[n])))
    lines = [_line("metric", *BITS, "quarter", "plain runs", "halves"), _rule(len(BITS) + 4)]
    for name in ordered:
        cells = []
        for kind in BITS:
            row = rows.get((name, kind))
            cells.append("" if row is None else f"{row.mean:.2f} {_spread(row)} ({len(row.rho)})")
        quarter = mean(mean(r.overlap.values()) for r in found[name])
        lines.append(_line(name, *cells, f"{quarter:.2f}", _cost(found[name]), _halves(found[name])))
    return "\n".join(lines)


def _guesses(results: Sequence[Json]) -> str:
    lines = [_line("kind", "models", *COLUMNS), _rule(len(COLUMNS) + 2)]
    for kind, (means, models) in guesses(results).items():
        lines.append(_line(kind, str(models), *(f"{value:.2f}" for value in means)))
    return "\n".join(lines)


def _truths(results: Sequence[Json]) -> str:
    head = ["model", "inputs", "calibration", "report", "plain run, s"]
    lines = [_line(*head, *(f"{k}: sites, halves, task" for k in KINDS)), _rule(len(head) + len(KINDS))]
    for result in results:
        cells = []
        for kind in KINDS:
            truth = result["truths"].get(kind)
            numbers = [] if truth is None else [agreement(result, kind), with_task(result, kind)]
            cells.append(
                ""
                if truth is None
                else f"{truth['sites']}, " + ", ".join(f"{n:.2f}" if np.isfinite(n) else "-" for n in numbers)
            )
        sizes = [str(result["calibration"]), str(result["report"]), f"{result['plain_run_s']:.2g}"]
        lines.append(_line(result["model"], result["inputs"], *sizes, *cells))
    return "\n".join(lines)


def _spread(row: Row) -> str:
    return f"{min(row.rho.values()):.2f}..{max(row.rho.values()):.2f}"


def _cost(rows: Sequence[Row]) -> str:
    value = median(c for row in rows for c in row.cost.values())
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _halves(rows: Sequence[Row]) -> str:
    value = mean(s for row in rows for s in row.stability.values())
    return f"{value:.2f}" if np.isfinite(value) else "-"


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: int) -> str:
    return "|" + " - |" * columns
