"""What it costs to let branches run each other's weights, beside dropping them and low rank without sharing.

    python -m tools.studies.depth.share minilm kwt1 --most 3 --out depth_share.json
    python -m tools.studies.depth.share_page depth_share.json

For each model, on selection samples: every branch runs the matrices of every other one of its structure,
alone (*pairs*); what the transform offers at each branch (*options*); every branch dropped (*drop*). Then
greedy sequences, each step the move after which the outputs diverge least, scored on report samples:

* ``drop``: a branch goes;
* ``reuse``: a branch runs another one's matrices as they are, donors as the transform offers them;
* ``remainder``: the same with the largest private remainder that is offered;
* ``own``: the branches of ``remainder``, their own matrices cut to the rank that stores as many bytes;
* ``one set a family``: all branches of a structure on the first one's matrices, the most there is to share.

Divergence is the case's own (kl, relative-l2), damage that of its metric. Bytes are those of the file, peak
bytes those that a process adds to load and run it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.analysis.needs import Need
from lamina.analysis.statistics import Statistics, collect
from lamina.backends import get_backend
from lamina.ir.io import save_model, serialized_size
from lamina.ir.program import Program
from lamina.passes.pass_ import Site
from lamina.passes.sharing.lender import Lender
from lamina.passes.sharing.remainder import as_matrices, low_rank
from lamina.passes.sharing.share import Share, apply_shares
from lamina.passes.sharing.twins import Twins
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.workload import parse_workload
from tools.bench.cases import CASES, Case
from tools.studies.depth.repair import drops
from tools.studies.depth.scoring import TARGET, Study

# Of the moves of a step, those that were least harmful alone are looked at.
LOOKS = 5
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """A study with what sharing needs."""

    study: Study
    statistics: Statistics
    twins: Twins
    tell: Tell

    @staticmethod
    def of(study: Study, tell: Tell) -> Subject:
        """Collect what every operator reads on calibration data."""
        statistics = collect(study.program, study.calibration, needs=(Need.INPUTS,), threads=1)
        return Subject(study, statistics, Twins.of(study.program), tell)

    @property
    def program(self) -> Program:
        """The folded original."""
        return self.study.program

    def diverges(self, moves: Sequence[Move]) -> float:
        """On selection samples."""
        return self.study.order.diverges(apply_moves(self.program, moves))

    def pairs(self, most: int | None = None) -> Iterator[dict[str, Any]]:
        """Every branch on the matrices of its ``most`` nearest relatives (None: all), and their distance."""
        weighted = Lender(self.program, self.twins, self.statistics)
        plain = Lender(self.program, self.twins, Statistics(0))
        for name, family in self.twins.family.items():
            apart = {other: abs(family.index(name) - k) for k, other in enumerate(family) if other != name}
            for donor in sorted(apart, key=apart.__getitem__)[:most]:
                yield {
                    "branch": name,
                    "donor": donor,
                    "apart": apart[donor],
                    "distance": plain.distance(name, donor),
                    "weighted": weighted.distance(name, donor),
                    "divergence": self.study.order.diverges(apply_shares(self.program, {name: donor})),
                }

    def offered(self) -> Iterator[Move]:
        """All that the transform offers."""
        transform = Share()
        for site in transform.sites(self.program):
            if isinstance(site, Site):
                options = transform.options(site, self.program, self.statistics, TARGET)
                yield from (Move(site, option) for option in options)

    def greedy(self, moves: Sequence[Move], alone: Mapping[int, float], most: int) -> Iterator[list[Move]]:
        """The sequence of moves at different branches after which the outputs diverge least, step by step."""
        taken: list[Move] = []
        for _ in range(most):
            left = sorted((k for k, m in enumerate(moves) if _fits(m, taken)), key=alone.__getitem__)
            if not left:
                return
            best = min(
                left[:LOOKS], key=lambda k: alone[k] if not taken else self.diverges([*taken, moves[k]])
            )
            taken.append(moves[best])
            yield list(taken)

    def scored(self, program: Program) -> dict[str, Any]:
        """Facts of one program on report samples."""
        found = self.study.report.report(self.study.report(program))
        return {**found, "bytes": serialized_size(program.model), "peak_bytes": self._peak(program)}

    def _peak(self, program: Program) -> int:
        """What a fresh process adds to load and run the heaviest timed shape."""
        workload = parse_workload(self.study.case.workload, self.program, self.study.calibration)
        heaviest = max(workload, key=lambda c: sum(a.size for a in c.feeds.values()))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            save_model(program.model, path)
            return get_backend(TARGET).peak_memory(path, TARGET, heaviest)

    def cut(self, moves: Sequence[Move]) -> Program:
        """The program with the branches' own matrices cut to the rank their remainders have.

        Written as full matrices: only what it computes is looked at, and it would store what they store.
        """
        clone = self.program.clone()
        nodes = {n.name: n for n in self.program.graph}
        for move in moves:
            for weight in move.site.weights:
                node = next(nodes[n] for n in move.site.nodes if _reads(nodes[n], weight))
                tensor = self.program.graph.initializers[weight].const_value
                assert tensor is not None
                array = tensor.numpy()
                seen = self.statistics.inputs.get(node.name or "")
                down, up = low_rank(
                    as_matrices(node, array), None if seen is None else seen.moments, _rank(move)
                )
                made = _stored(node, down @ up, array)
                clone.graph.initializers[weight].const_value = ir.Tensor(made, name=weight)
        return clone


def _fits(move: Move, taken: Sequence[Move]) -> bool:
    """Whether a move changes another branch than those before, and every donor keeps its own matrices.

    What a branch lends stays in the file: were it to borrow as well, that would save nothing.
    """
    changed = {m.site.name for m in taken}
    donors = {m.option.parameters.get("donor") for m in taken}
    return move.site.name not in changed | donors and move.option.parameters.get("donor") not in changed


def _reads(node: ir.Node, weight: str) -> bool:
    return any(v is not None and v.name == weight for v in node.inputs)


def _rank(move: Move) -> int:
    return int(move.option.name.removeprefix("remainder-"))


def _stored(node: ir.Node, matrices: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of :func:`lamina.passes.sharing.remainder.as_matrices`."""
    if node.op_type == "Conv":
        made = matrices.transpose(0, 2, 1).reshape(like.shape)
    else:
        same = np.array_equal(as_matrices(node, like)[0], like)
        made = matrices[0] if same else matrices[0].T
    return np.ascontiguousarray(made.astype(like.dtype))


def study(case: Case, options: argparse.Namespace, tell: Tell) -> Iterator[dict[str, Any]]:
    """What is known so far of one reference model, after every row."""
    about = Subject.of(Study.of(case, options.order_samples, options.report_samples), tell)
    tell(f"{case.name}: {len(about.twins.sites)} branches with relatives")
    pairs = list(about.pairs(options.relatives))
    gone = list(drops(about.program))
    offered = list(about.offered())
    alone = [about.diverges([m]) for m in offered]
    without = [about.diverges([m]) for m in gone]
    tell(f"{case.name}: {len(pairs)} pairs, {len(offered)} options, {len(gone)} drops measured")
    found: dict[str, Any] = {
        "model": case.name,
        "metric": case.metric,
        "divergence": about.study.report.divergence.name,
        "n": {
            "calibration": about.study.calibration.samples,
            "order": about.study.order.samples,
            "report": about.study.report.samples,
        },
        "families": sorted({len(f) for f in about.twins.family.values()}),
        "original": about.scored(about.program),
        "pairs": pairs,
        "options": [
            {
                "branch": m.site.name,
                "option": m.option.name,
                "donor": m.option.parameters["donor"],
                "divergence": d,
            }
            for m, d in zip(offered, alone, strict=True)
        ],
        "drop": [{"branch": m.site.name, "divergence": d} for m, d in zip(gone, without, strict=True)],
        "rows": [],
    }
    yield found
    ways = {
        "drop": (gone, without),
        "reuse": _some(offered, alone, lambda m: m.option.name.startswith("reuse")),
        "remainder": _largest(offered, alone),
    }
    for way, (moves, harm) in ways.items():
        for taken in about.greedy(moves, dict(enumerate(harm)), options.most):
            row = {"way": way, "changed": len(taken), "branches": [m.site.name for m in taken]}
            found["rows"].append({**row, **about.scored(apply_moves(about.program, taken))})
            if way == "remainder":
                size = found["rows"][-1]["bytes"]
                found["rows"].append({**row, "way": "own", **about.scored(about.cut(taken)), "bytes": size})
            tell(f"{case.name} {way} {len(taken)}")
            yield found
    donors = {name: family[0] for name, family in about.twins.family.items() if name != family[0]}
    one = apply_shares(about.program, donors)
    row = {"way": "one set a family", "changed": len(donors), "branches": list(donors)}
    found["rows"].append({**row, **about.scored(one), **about.study.latency(one, seconds=6.0)})
    yield found


Harm = tuple[list[Move], list[float]]


def _some(moves: Sequence[Move], harm: Sequence[float], test: Callable[[Move], bool]) -> Harm:
    kept = [(m, h) for m, h in zip(moves, harm, strict=True) if test(m)]
    return [m for m, _ in kept], [h for _, h in kept]


def _largest(moves: Sequence[Move], harm: Sequence[float]) -> Harm:
    """Of each branch the largest remainder that is offered."""
    ranks: dict[str, int] = {}
    for move in moves:
        if move.option.name.startswith("remainder"):
            ranks[move.site.name] = max(ranks.get(move.site.name, 0), _rank(move))
    return _some(moves, harm, lambda m: m.option.name == f"remainder-{ranks.get(m.site.name)}")


def main() -> None:
    """Study the models named on the command line and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", default=["resnet56", "kwt1", "stories260k", "minilm"])
    parser.add_argument("--most", type=int, default=3, help="branches to change")
    parser.add_argument("--relatives", type=int, help="donors of each branch in pairs, nearest first; all")
    parser.add_argument("--order-samples", type=int, default=64, help="selection samples moves are judged on")
    parser.add_argument("--report-samples", type=int, help="report samples, evenly; all if not given")
    parser.add_argument("--out", type=Path, default=Path("depth_share.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES:
        if case.name in options.models:
            found: dict[str, Any] = {}
            for found in study(case, options, lambda note: print(note, flush=True)):
                options.out.write_text(json.dumps([*done, found], indent=1))
            done.append(found)


if __name__ == "__main__":
    main()
