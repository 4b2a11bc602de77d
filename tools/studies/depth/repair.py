"""Quality against branches removed: dropped or replaced, with and without compensation.

    python -m tools.studies.depth.repair minilm kwt1 --most 5 --out depth_repair.json

Branches go greedily: each step drops the one without which the outputs diverge least from the original's, on
selection samples. Every prefix of that order is then scored on report samples in several ways, named
``<what becomes of the branches>`` or ``<what becomes of them>+<compensation>``: dropped (``drop``) or
replaced by a fitted map (``bias``, ``diagonal``, ``full``); compensated by the :data:`WAYS`. Calibration
samples fit, selection samples choose (``chosen``: the way with the least damage there), report samples only
report. Latency is the CPU time of the finished model over the original's, one thread of ONNX Runtime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.analysis.matching import Match, collect_matches
from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.data.dataset import Splits
from lamina.data.splitting import load_splits
from lamina.ir.capture import capture
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import Compensation, compensate
from lamina.passes.drop_branch import DropBranch
from lamina.passes.fold import fold
from lamina.passes.pass_ import Site
from lamina.passes.replace_branch import ReplaceBranch
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from lamina.planner.plan import Move
from lamina.planner.space import Genome, build_space
from lamina.planner.supergraph import build_supergraph
from lamina.planner.timing import Stopwatch
from lamina.quality import Metric, evaluate, get_metric
from lamina.quality.evaluation import reference_outputs
from lamina.workload import parse_workload
from tools.bench.cases import CASES, Case

WAYS: Mapping[str, Compensation] = {
    "mean": Compensation(weights=False),
    "norms": Compensation(roles=("norm",)),
    "writers": Compensation(roles=("norm", "writer")),
    "all": Compensation(),
}
TARGET = Target.parse("ort:cpu?threads=1")
MODELS = ("resnet56", "kwt1", "stories260k", "minilm")
# Samples the greedy order is chosen on.
ORDER_SAMPLES = 128
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Study:
    """One reference model with all that its rows are scored by."""

    case: Case
    program: Program
    splits: Splits
    metric: Metric
    divergence: Metric
    references: Mapping[str, list[dict[str, np.ndarray]]]
    matches: Mapping[str, Match]

    @staticmethod
    def of(case: Case) -> Study:
        """Capture, fold, and run the original once."""
        program, _, _ = fold(capture(str(case.path)))
        splits = load_splits(case.load(), program, batch_size=case.batch_size)
        metric = get_metric(case.metric, program)
        run = _run(program)
        references = {p: reference_outputs(run, getattr(splits, p)) for p in ("selection", "report")}
        matches = collect_matches(program, splits.calibration, ReplaceBranch().probes(program), threads=1)
        divergence = get_metric(metric.divergence, program)
        return Study(case, program, splits, metric, divergence, references, matches)

    def scores(self, program: Program) -> dict[str, Any]:
        """Metric and divergence on selection and report samples."""
        run, found = _run(program), {}
        for part, reference in self.references.items():
            data = getattr(self.splits, part)
            outputs = reference_outputs(run, data)
            for name, judge in ((part, self.metric), (f"{part}_divergence", self.divergence)):
                replay = iter(outputs)
                features = evaluate(lambda _, r=replay: next(r), data, judge, reference)  # type: ignore[misc]
                found[name] = judge.score(features)
        return found

    def moves(self, drops: Sequence[Move], what: str) -> list[Move]:
        """The drops, or replacements of the same branches; where a map is not offered, a cheaper one."""
        if what == "drop":
            return list(drops)
        transform = ReplaceBranch()
        sites = {s.name: s for s in transform.sites(self.program) if isinstance(s, Site)}
        order, chosen = ("bias", "diagonal", "rank", "full"), []
        for drop in drops:
            site = sites.get(drop.site.name)
            statistics = Statistics(0, matches=self.matches)
            offered = () if site is None else transform.options(site, self.program, statistics, TARGET)
            fit = [o for o in offered if order.index(o.name.partition("-")[0]) <= order.index(what)]
            chosen.append(Move(site, fit[-1]) if site is not None and fit else drop)
        return chosen

    def row(
        self, drops: Sequence[Move], ways: Sequence[str], original: float, tell: Progress
    ) -> dict[str, Any]:
        """Every way of doing without some branches."""
        found: dict[str, Any] = {"removed": len(drops), "branch": drops[-1].site.name}
        for way in ways:
            what, _, repair = way.partition("+")
            moves = self.moves(drops, what)
            program = plain = apply_moves(self.program, moves)
            facts: dict[str, Any] = {}
            if repair:
                start = time.perf_counter()
                made = compensate(
                    self.program,
                    plain,
                    self.splits.calibration,
                    stands_for=standing(moves, plain),
                    how=WAYS[repair],
                    divergence=self.divergence,
                    threads=1,
                )
                program = made.program
                facts = {"operators": len(made.fitted), "seconds": time.perf_counter() - start}
            found[way] = self.scores(program) | facts | {"bytes": serialized_size(program.model)}
            found[way] |= self.latency(program)
            found[way]["damage"] = self.metric.damage(original, found[way]["report"])
            tell(f"{self.case.name} -{len(drops)} {way}: {found[way]['report']:.4f}")
        best = min(ways, key=lambda w: self.metric.damage(1.0, found[w]["selection"]))
        found["chosen"] = best
        return found

    def latency(self, program: Program) -> dict[str, Any]:
        """CPU time over the original's."""
        workload = parse_workload(self.case.workload, self.program, self.splits.selection)
        with (
            tempfile.TemporaryDirectory() as folder,
            Stopwatch(get_backend(TARGET), TARGET, workload, self.program.model, Path(folder)) as stopwatch,
        ):
            (found,) = stopwatch.compare([program.model], seconds=2.0)
        return {"latency": found.ratio, "latency_spread": [found.low, found.high]}


def study(case: Case, most: int, ways: Sequence[str], tell: Progress) -> dict[str, Any]:
    """Rows of one reference model, one for every number of branches removed."""
    about = Study.of(case)
    drops = greedy(about.program, about.splits.selection, about.divergence, most, tell)
    original = about.scores(about.program)
    rows = [about.row(drops[: i + 1], ways, original["report"], tell) for i in range(len(drops))]
    return {
        "model": case.name,
        "metric": case.metric,
        "branches": len(build_space(about.program, [DropBranch()], Statistics(0), TARGET).choices),
        "n": {p: getattr(about.splits, p).samples for p in ("calibration", "selection", "report")},
        "calibration_rows_fitted": min(len(about.splits.calibration), Compensation().rows),
        "original": original,
        "rows": rows,
    }


def greedy(program: Program, selection: Dataset, divergence: Metric, most: int, tell: Progress) -> list[Move]:
    """Drops in the order they go."""
    space = build_space(program, [DropBranch()], Statistics(0), TARGET)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    count = min(ORDER_SAMPLES, selection.samples)
    data = selection.rows(np.linspace(0, selection.samples - 1, count).astype(np.int64))
    reference = reference_outputs(lambda feeds: supergraph.run(space.nothing, feeds), data)

    def score(genome: Genome) -> float:
        features = evaluate(lambda feeds: supergraph.run(genome, feeds), data, divergence, reference)
        return divergence.score(features)

    genome, order = space.nothing, []
    for _ in range(min(most, len(genome))):
        left = [i for i, gene in enumerate(genome) if not gene and not space.dropped(genome, i)]
        harm = {i: score((*genome[:i], 1, *genome[i + 1 :])) for i in left}
        best = min(harm, key=lambda i: harm[i])
        genome = (*genome[:best], 1, *genome[best + 1 :])
        order.append(best)
        tell(f"drop {space.choices[best].site.name}: divergence {harm[best]:.3g}")
    return [Move(space.choices[i].site, space.choices[i].options[0]) for i in order]


def _run(program: Program) -> Any:
    return get_backend(TARGET).compile(program.model, TARGET).run


def main() -> None:
    """Study the models named on the command line and write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", help="reference models; all with branches if none")
    parser.add_argument("--most", type=int, default=5, help="branches to remove")
    parser.add_argument("--ways", nargs="*", default=["drop", "drop+all", "full", "full+all"])
    parser.add_argument("--out", type=Path, default=Path("depth_repair.json"))
    options = parser.parse_args()
    found = []
    for case in CASES:
        if case.name in (options.models or MODELS):
            found.append(study(case, options.most, options.ways, lambda note: print(note, flush=True)))
            options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
