"""Quality against branches removed: dropped in two orders, repaired or not, or replaced by fitted maps.

    python -m tools.studies.depth minilm kwt1 --most 5 --out depth_repair.json

Branches go greedily, each the one without which the outputs diverge least from the original's on samples of
the selection set. The *plain* order looks at models that were only cut. The *repaired* order looks at models
that were repaired after every step, so that what the repair makes up for counts. Every row holds

* ``drop``: the plain order's branches gone, nothing else;
* ``repaired``: the repaired order's branches gone, and every operator behind them refitted
  (:func:`lamina.passes.compensate.compensate`) on the calibration set, going on from the last step's repair;
* ``unrepaired``: the same branches as ``repaired``, without repair;
* ``bias``, ``diagonal``, ``full`` (``--maps``): the plain order's branches replaced by fitted maps.

All are scored on the report set, which nothing else sees. Latency is the CPU time of the finished model over
the original's, one thread of ONNX Runtime; a repair adds no operator and no byte.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.analysis.matching import Match, collect_matches
from lamina.analysis.statistics import Statistics
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import compensate
from lamina.passes.drop_branch import DropBranch
from lamina.passes.pass_ import Site
from lamina.passes.repair import Repair, apply_repairs
from lamina.passes.replace_branch import ReplaceBranch
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from lamina.planner.plan import Move
from tools.bench.cases import CASES, Case
from tools.studies.depth.scoring import TARGET, Study

MODELS = ("resnet56", "kwt1", "stories260k", "minilm")
MAPS = ("bias", "diagonal", "rank", "full")
# Branches measured anew in a step at least, in the order of what they last were.
LOOKS = 3
Tell = Callable[[str], None]


@dataclass
class Order:
    """Branches in the order they go: each step the one whose absence the outputs show least.

    Divergences of the step before, which nearly always only grow, say in which order candidates are looked
    at; what was worse then than the best is now is not looked at again (lazy greedy).

    Attributes:
        study: What is cut.
        moves: Drops so far.
        program: What they leave, with the repairs so far.
        repairs: Fitted weights of :attr:`program`, by node and operand.
    """

    study: Study
    tell: Tell
    moves: list[Move] = field(default_factory=list)
    repairs: dict[tuple[str, int], Repair] = field(default_factory=dict)
    known: dict[str, float] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Branches gone."""
        return sorted(m.site.name for m in self.moves)

    @property
    def program(self) -> Program:
        """What the moves and repairs so far leave."""
        return self._program(self.moves)

    def step(self) -> None:
        """Drop one more."""
        gone = {m.site.name for m in self.moves}
        left = [m for m in drops(self.study.program) if m.site.name not in gone]
        left.sort(key=lambda m: self.known.get(m.site.name, 0.0))
        best: Move | None = None
        looks = 0
        for move in left:
            name = move.site.name
            enough = looks >= LOOKS and name in self.known
            if enough and best is not None and self.known[name] >= self.known[best.site.name]:
                break
            self.known[name] = self.study.order.diverges(self._program([*self.moves, move]))
            looks += 1
            if best is None or self.known[name] < self.known[best.site.name]:
                best = move
        if best is None:
            raise SystemExit("no branch is left to drop")
        self.moves.append(best)
        self.tell(
            f"{len(self.moves)}: {best.site.name} ({self.known[best.site.name]:.4g}, {looks} looked at)"
        )

    def repair(self) -> dict[str, Any]:
        """Refit what is behind all drops so far, from the weights of the last repair."""
        plain = apply_moves(self.study.program, self.moves)
        start = time.process_time()
        made = compensate(
            self.study.program,
            self.program,
            self.study.calibration,
            stands_for=standing(self.moves, plain),
            divergence=self.study.order.divergence,
            threads=1,
        )
        self.repairs |= {(r.node, r.operand): r for r in made.repairs}
        return {"operators": len(made.fitted), "cpu_seconds": time.process_time() - start}

    def _program(self, moves: Sequence[Move]) -> Program:
        plain = apply_moves(self.study.program, moves)
        there = {n.name for n in plain.graph}
        return apply_repairs(plain, [r for r in self.repairs.values() if r.node in there])


def drops(program: Program) -> Iterator[Move]:
    """Every drop there is, in execution order."""
    transform = DropBranch()
    for site in transform.sites(program):
        if isinstance(site, Site):
            (option,) = transform.options(site, program, Statistics(0), TARGET)
            yield Move(site, option)


def replaced(program: Program, moves: Sequence[Move], what: str, matches: Mapping[str, Match]) -> list[Move]:
    """Replacements of the same branches; where a map is not offered, the next cheaper one or the drop."""
    transform, chosen = ReplaceBranch(), []
    sites = {s.name: s for s in transform.sites(program) if isinstance(s, Site)}
    for drop in moves:
        site = sites.get(drop.site.name)
        statistics = Statistics(0, matches=matches)
        offered = () if site is None else transform.options(site, program, statistics, TARGET)
        fit = [o for o in offered if MAPS.index(o.name.partition("-")[0]) <= MAPS.index(what)]
        chosen.append(Move(site, fit[-1]) if site is not None and fit else drop)
    return chosen


class Rows:
    """Scores and times programs once each: two orders often meet in the same branches."""

    def __init__(self, study: Study, tell: Tell) -> None:
        self._study, self._tell = study, tell
        self._cut: dict[tuple[str, ...], dict[str, Any]] = {}

    def cut(self, moves: Sequence[Move]) -> dict[str, Any]:
        """Branches gone and nothing else."""
        key = tuple(sorted(m.site.name for m in moves))
        if key not in self._cut:
            self._cut[key] = self.scored("drop", moves, apply_moves(self._study.program, moves))
        return self._cut[key]

    def scored(
        self, way: str, moves: Sequence[Move], program: Program, timed: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Facts of one program; ``timed``: those of one with the same operators."""
        found = self._study.report.report(self._study.report(program))
        found["branches"] = [m.site.name for m in moves]
        found["bytes"] = serialized_size(program.model)
        times = self._study.latency(program) if timed is None else timed
        found |= {k: times[k] for k in ("latency", "latency_spread")}
        self._tell(
            f"{self._study.case.name} -{len(moves)} {way}: {found['report']:.4f}, "
            f"damage {found['damage']:.4f}, divergence {found['divergence']:.4g}, "
            f"latency {found['latency']:.3f}"
        )
        return found


def study(case: Case, options: argparse.Namespace, tell: Tell) -> Iterator[dict[str, Any]]:
    """What is known so far of one reference model, after every row."""
    about = Study.of(case, options.order_samples, options.report_samples)
    matches = {}
    if options.maps:
        probes = ReplaceBranch().probes(about.program)
        matches = collect_matches(about.program, about.calibration, probes, threads=1)
    plain, mended, rows = Order(about, tell), Order(about, tell), Rows(about, tell)
    found: dict[str, Any] = {
        "model": case.name,
        "metric": case.metric,
        "divergence": about.report.divergence.name,
        "branches": len(list(drops(about.program))),
        "n": {
            "calibration": about.calibration.samples,
            "order": about.order.samples,
            "report": about.report.samples,
        },
        "original": about.report.report(about.report.original),
        "rows": [],
    }
    for count in range(1, options.most + 1):
        plain.step()
        if count == 1:
            mended.known = dict(plain.known)
        mended.step()
        facts = mended.repair()
        if options.at and count not in options.at:
            continue
        row: dict[str, Any] = {"removed": count, "drop": rows.cut(plain.moves)}
        row["unrepaired"] = rows.cut(mended.moves)
        row["repaired"] = rows.scored("repaired", mended.moves, mended.program, row["unrepaired"]) | facts
        for what in options.maps:
            moves = replaced(about.program, plain.moves, what, matches)
            row[what] = rows.scored(what, moves, apply_moves(about.program, moves))
        found["rows"].append(row)
        yield found


def main() -> None:
    """Study the models named on the command line and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="reference models; all with branches if none")
    parser.add_argument("--most", type=int, default=5, help="branches to remove")
    parser.add_argument("--at", type=int, nargs="*", default=[], help="score only these numbers of branches")
    parser.add_argument("--maps", nargs="*", default=[], choices=MAPS, help="maps to replace branches by")
    parser.add_argument("--order-samples", type=int, default=128, help="selection samples orders are made on")
    parser.add_argument("--report-samples", type=int, help="report samples, evenly; all if not given")
    parser.add_argument("--out", type=Path, default=Path("depth_repair.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES:
        if case.name in (options.models or MODELS):
            found: dict[str, Any] = {}
            for found in study(case, options, lambda note: print(note, flush=True)):
                options.out.write_text(json.dumps([*done, found], indent=1))
            done.append(found)


if __name__ == "__main__":
    main()
