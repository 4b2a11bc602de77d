"""The planner's mix against every single rule and transform, at equal measured latency.

    python -m tools.studies.depth.contest kwt1 --shares 0.9 0.8 0.7 --out kwt1.json

A model is prepared once: folded, priced, its options put into one supergraph. For each share of the folded
model's latency every contender then looks for the plan of least damage on selection samples whose latency
keeps to it: each rule by its own plans, each transform alone, drops of one kind of branch alone, and the
planner with all of it. What each chose is built, timed together with all others in alternation (CPU time, one
thread), scored on report samples that nothing else saw, and scored again with its weights compensated.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lamina.backends import get_backend
from lamina.budget import Budget
from lamina.data.splitting import load_splits
from lamina.driver import proven_folds
from lamina.ir.branches import cache_ports
from lamina.ir.capture import capture
from lamina.planner.affordable import affordable
from lamina.planner.builder import Builder, Finalist
from lamina.planner.evaluator import Evaluator
from lamina.planner.finish import LOOKS, correct_latency, shortlist
from lamina.planner.goal import AIM
from lamina.planner.mend import CONTENDERS, MEND_SHARE, mend
from lamina.planner.prepare import Prepared, prepare, sensitivity
from lamina.planner.referee import Referee
from lamina.planner.request import Request
from lamina.planner.rule_seeds import RuleSeeds
from lamina.planner.search import Goal, Search
from lamina.planner.selection import few_samples
from lamina.planner.space import Genome
from lamina.planner.strategy import rule_seeds, strategy_of
from lamina.planner.timing import Relative, Stopwatch
from lamina.progress import Progress
from lamina.quality import damage_interval, get_metric
from lamina.workload import parse_workload
from tools.bench.cases import CASES, Case
from tools.studies.depth.scoring import TARGET, Judge, Judged, evenly, short

MODELS = ("kwt1", "stories260k", "resnet56", "mobilenet", "minilm")
TRANSFORMS = ("drop", "direct-matching", "merge-conv-chain", "merge-neurons-ot")
MIX = "planner"
# Plans of a rule that are built and timed at each share.
BUILDS = 2
# First and second contender -> the claim that the first does less damage.
PAIRS = (
    ("only attention", "only mlp"),
    ("greedy-output-divergence", "joint-branch-drop"),
    ("balanced-skip", "contiguous-block-drop"),
    ("merge-conv-chain alone", "drop alone"),
)
Tell = Callable[[str], None]
Fits = Callable[[int, int], bool]  # choice and gene -> whether a contender may take it


@dataclass
class Ready:
    """One reference model, prepared; contenders share its prices, scores and timings."""

    case: Case
    request: Request
    prepared: Prepared
    evaluator: Evaluator
    damage: list[list[float]]
    builder: Builder
    seeds: RuleSeeds
    judge: Judge
    _scored: dict[tuple[Genome, bool], tuple[Judged, dict[str, Any]]] = field(default_factory=dict)
    _apart: dict[tuple[Genome, Genome], list[float]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """Kinds of branches that may be dropped."""
        choices = self.prepared.costs.space.choices
        return sorted({c.site.kind for c in choices if c.transform.name == "drop"})

    def contenders(self) -> Iterator[tuple[str, Fits | None, RuleSeeds | None]]:
        """Name, what it may take (None: only plans of its seeds), and its seeds."""
        choices = self.prepared.costs.space.choices

        def uses(transform: str, kind: str | None = None) -> Fits:
            return lambda i, _: (
                choices[i].transform.name == transform and kind in (None, choices[i].site.kind)
            )

        yield MIX, lambda i, gene: True, self.seeds  # first: what it measures must not be known already
        for walk in self.seeds.walks:
            yield walk.rule.name, None, self.seeds.alone(walk.rule.name)
        for transform in self.request.transforms:
            if any(c.transform.name == transform for c in choices):
                yield f"{transform} alone", uses(transform), None
        for kind in self.kinds if len(self.kinds) > 1 else ():
            yield f"only {kind}", uses("drop", kind), None

    def search(self, level: float, fits: Fits | None, seeds: RuleSeeds | None) -> Search:
        """Run one contender's search for the least damage within a latency."""
        goal = Goal("damage", {"latency": AIM * level})
        search = Search(
            self.prepared.costs,
            self.damage,
            self.evaluator,
            goal,
            seconds=self.request.seconds,
            seed=self.request.seed,
            seeds=seeds,
            only_seeds=fits is None,
        )
        if fits is not None:
            choices = enumerate(self.prepared.costs.space.choices)
            genes = ((i, k + 1) for i, c in choices for k in range(len(c.options)))
            search.forbid([g for g in genes if not fits(*g)])
        search.run()
        return search

    def fitting(self, search: Search, level: float) -> list[Finalist]:
        """A contender's plans that keep to the latency as measured, the least damaging first."""
        request = replace(self.request, budget=Budget.parse(f"latency<={level:.4f}x"))
        fit = [
            f
            for genome, f in self.builder.done.items()
            if genome in search.archive
            and f.candidate.feasible(search.goal)
            and affordable(request, self.builder, f)
        ]
        return sorted(fit, key=lambda f: f.candidate.objective(search.goal))

    def judged(self, finalist: Finalist, *, mended: bool = False) -> tuple[Judged, dict[str, Any]]:
        """Scores on report samples, and what is said of them."""
        key = (finalist.candidate.genome, mended)
        if key not in self._scored:
            found = self.judge(finalist.realized.program)
            self._scored[key] = found, self.judge.report(found)
        return self._scored[key]

    def difference(self, before: Finalist, after: Finalist) -> list[float]:
        """Damage of the second plan with the first as the original: the difference and its 95 % interval."""
        key = (before.candidate.genome, after.candidate.genome)
        if key not in self._apart:
            metric = self.judge.metric
            first, second = (self.judged(f)[0].metric for f in (before, after))
            middle = metric.damage(metric.score(first), metric.score(second))
            spread = damage_interval(metric, first, second) or (float("nan"), float("nan"))
            self._apart[key] = [middle, *spread]
        return self._apart[key]


def asked(case: Case, seconds: float, transforms: Sequence[str]) -> Request:
    """What the planner would be asked for: the least damage, with the depth transforms."""
    program = capture(str(case.path))
    splits = load_splits(case.load(), program, batch_size=case.batch_size)
    return Request(
        program=program,
        budget=Budget.parse("latency<=1x"),
        splits=replace(splits, calibration=short(splits.calibration)),
        synthetic_data=False,
        metric=get_metric(case.metric, program),
        target=TARGET,
        backend=get_backend(TARGET),
        workload=parse_workload(case.workload, program, splits.selection),
        transforms=tuple(transforms),
        minimize="damage",
        seconds=seconds,
        seed=0,
        progress=Progress(),
    )


def made_ready(case: Case, request: Request, stopwatch: Stopwatch, report_samples: int | None) -> Ready:
    """Fold, price, and judge every option alone."""
    program, metric = request.program, request.metric
    referee = Referee(program, [few_samples(request)])
    folded, _ = proven_folds(request, stopwatch, referee)
    referee.caches = cache_ports(folded.program)
    prepared = prepare(request, folded, stopwatch, referee, strategy_of(request.strategy).programs)
    evaluator, damage = sensitivity(request, prepared)
    report = evenly(request.splits.report, report_samples or request.splits.report.samples)
    judge = Judge(program, report, metric, get_metric(metric.divergence, program))
    seeds = rule_seeds(request, prepared, evaluator, damage)
    builder = Builder(request, prepared, stopwatch)
    return Ready(case, request, prepared, evaluator, damage, builder, seeds, judge)


def contest(ready: Ready, options: argparse.Namespace, tell: Tell) -> Iterator[dict[str, Any]]:
    """All shares of one model; then again after every plan that was compensated."""
    base = ready.prepared.costs.base["latency"]
    levels = []
    tops: list[list[Finalist]] = []  # the planner compensates its best plans before it chooses
    for share in options.shares:
        level = share * base
        searches = {}
        for name, fits, seeds in ready.contenders():
            searches[name] = search = ready.search(level, fits, seeds)
            best = search.best()
            tell(f"{ready.case.name} {share}: {name}: {'nothing' if best is None else best.score.damage}")
        first = {c.genome: c for s in searches.values() for c in _feasible(s)[:BUILDS]}
        ready.builder.finish(list(first.values()), seconds=1.0 * (len(first) + 1))
        shortlist(ready.builder, searches[MIX])
        asked_for = replace(ready.request, budget=Budget.parse(f"latency<={level:.4f}x"))
        for _ in range(LOOKS):  # as in a run: where all that was predicted to be fast enough is not
            if not correct_latency(asked_for, ready.builder, searches[MIX]):
                break
            shortlist(ready.builder, searches[MIX])
        fit = {name: ready.fitting(s, level) for name, s in searches.items()}
        levels.append((share, level, {name: next(iter(plans), None) for name, plans in fit.items()}))
        tops.append(fit[MIX][:CONTENDERS])
    chosen = [f for _, _, found in levels for f in found.values() if f is not None]
    unique = {f.candidate.genome: f for f in (*chosen, *[f for top in tops for f in top])}
    models = [f.realized.program.model for f in unique.values()]
    seconds = options.timing * (len(models) + 1)
    times = ready.builder.stopwatch.compare(models, seconds=seconds) if models else []
    latency = dict(zip(unique, times, strict=True))
    yield _scored(ready, levels, latency, {})
    mended: dict[Genome, Finalist] = {}
    mixes = [f for top in tops for f in top]
    still = Goal("latency")  # no paths, which would take time: plans are compared at equal latency
    ordered = sorted(unique.values(), key=lambda f: (f not in mixes, f.candidate.score.damage))
    if not options.mend:
        return
    for finalist in ordered[: options.mended]:  # the planner's first, then the least damaging
        # trap: plans of one run share its time; here each is given its own
        spent = sum(m.seconds for m in ready.builder.mended.values())
        patient = replace(ready.request, seconds=(options.mend + spent) / MEND_SHARE)
        mended[finalist.candidate.genome] = mend(patient, ready.builder, finalist, still)
        tell(f"{ready.case.name}: compensated {len(mended)} of {len(unique)}")
        yield _scored(ready, levels, latency, mended, tops)


def _feasible(search: Search) -> list[Any]:
    return [c for c in search.ranked() if c.feasible(search.goal)]


def _scored(
    ready: Ready,
    levels: Sequence[tuple[float, float, dict[str, Finalist | None]]],
    latency: Mapping[Genome, Relative],
    mended: Mapping[Genome, Finalist],
    tops: Sequence[Sequence[Finalist]] = (),
) -> dict[str, Any]:
    """What is known of every chosen plan, bare and compensated, on report samples."""
    rows = []
    for place, (share, level, found) in enumerate(levels):
        plans: list[dict[str, Any]] = []
        mix = found[MIX]
        for name, finalist in found.items():
            if finalist is None:
                plans.append({"name": name, "plan": None})
                continue
            genome = finalist.candidate.genome
            facts = _facts(ready, finalist, latency[genome])
            if genome in mended and mended[genome] is not finalist:
                facts["compensated"] = ready.judged(mended[genome], mended=True)[1]
            if name == MIX and mended:
                facts |= _best_compensated(ready, tops[place], mended, latency)
            apart = None if mix is None else ready.difference(finalist, mix)
            plans.append({"name": name, "plan": facts, "planner_minus": apart})
        claims = [
            {"first": a, "second": b, "first_minus_second": ready.difference(second, first)}
            for a, b in PAIRS
            if (first := found.get(a)) is not None and (second := found.get(b)) is not None
        ]
        rows.append({"share": share, "level": level, "plans": plans, "claims": claims})
    return {
        "model": ready.case.name,
        "metric": ready.case.metric,
        "divergence": ready.judge.divergence.name,
        "base_latency": ready.prepared.costs.base["latency"],
        "original": ready.judge.report(ready.judge.original),
        "n": {
            "calibration": ready.request.splits.calibration.samples,
            "selection": ready.evaluator.selection.samples,
            "report": ready.judge.samples,
        },
        "seconds": ready.request.seconds,
        "alone": _alone(ready),
        "levels": rows,
    }


def _best_compensated(
    ready: Ready,
    top: Sequence[Finalist],
    mended: Mapping[Genome, Finalist],
    latency: Mapping[Genome, Relative],
) -> dict[str, Any]:
    """The planner's plan of least damage on selection samples after compensation."""

    def left(finalist: Finalist) -> float:
        told = ready.builder.mended.get(finalist.candidate.genome)
        return told.after if told is not None and told.kept else finalist.candidate.score.damage

    genome = min(top, key=left).candidate.genome
    if genome not in mended:
        return {}
    times = {"latency": latency[genome].ratio}
    return {"compensated": ready.judged(mended[genome], mended=True)[1] | times}


def _facts(ready: Ready, finalist: Finalist, relative: Relative) -> dict[str, Any]:
    score = ready.judged(finalist)[1]
    moves = finalist.realized.plan.moves
    return score | {
        "latency": relative.ratio,
        "latency_spread": [relative.low, relative.high],
        "latency_chosen_by": finalist.relative.ratio,
        "selection_damage": finalist.candidate.score.damage,
        "moves": dict(Counter(m.site.transform for m in moves)),
        "sites": [f"{m.site.name}: {m.option.name}" for m in moves],
    }


def _alone(ready: Ready) -> dict[str, Any]:
    """Divergence of dropping one branch, by kind of branch: on selection samples."""
    found: dict[str, list[float]] = {}
    for index, choice in enumerate(ready.prepared.costs.space.choices):
        if choice.transform.name == "drop":
            found.setdefault(choice.site.kind, []).append(ready.damage[index][0])
    return {
        k: {"n": len(v), "median": float(np.median(v)), "least": min(v), "most": max(v)}
        for k, v in found.items()
    }


def main() -> None:
    """Hold the contest on the models named on the command line and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.contest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="reference models; all if none")
    parser.add_argument("--transforms", nargs="+", default=TRANSFORMS, help="what the planner may use")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.8, 0.7], help="of folded latency")
    parser.add_argument("--seconds", type=float, default=40.0, help="of one contender's search")
    parser.add_argument("--timing", type=float, default=1.0, help="seconds a model of the last timing")
    parser.add_argument("--report-samples", type=int, help="report samples, evenly; all if not given")
    parser.add_argument("--mend", type=float, default=0.0, help="seconds to compensate each plan; 0: not")
    parser.add_argument("--mended", type=int, default=8, help="how many plans: the planner's, then the best")
    parser.add_argument("--out", type=Path, default=Path("depth_contest.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES:
        if case.name not in (options.models or MODELS):
            continue
        request = asked(case, options.seconds, options.transforms)
        timed = request.backend, TARGET, request.workload, request.program.model
        with tempfile.TemporaryDirectory() as folder, Stopwatch(*timed, Path(folder)) as stopwatch:
            ready = made_ready(case, request, stopwatch, options.report_samples)
            found: dict[str, Any] = {}
            for found in contest(ready, options, lambda note: print(note, flush=True)):
                options.out.write_text(json.dumps([*done, found], indent=1))
            done.append(found)


if __name__ == "__main__":
    main()
