"""Quality against branches removed, with and without compensation.

    python -m tools.studies.depth.repair minilm kwt1 --most 5 --out depth_repair.json

Branches go greedily: each step drops the one without which the outputs diverge least from the original's, on
selection samples. Every prefix of that order is then scored on report samples, as it is and repaired by each
of the ways in :data:`WAYS`, fitted on calibration samples. ``chosen`` is the way with the least damage on
selection samples, or none: what a user gets. Report samples choose nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.data.splitting import load_splits
from lamina.ir.capture import capture
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import Compensation, compensate
from lamina.passes.drop_branch import DropBranch
from lamina.passes.fold import fold
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.planner.space import Genome, build_space
from lamina.planner.supergraph import build_supergraph
from lamina.quality import Metric, evaluate, get_metric
from lamina.quality.evaluation import reference_outputs
from tools.bench.cases import CASES, Case

WAYS: Mapping[str, Compensation] = {
    "mean": Compensation(weights=False),
    "norms": Compensation(roles=("norm",)),
    "writers": Compensation(roles=("norm", "writer")),
    "all": Compensation(),
}
TARGET = Target.parse("ort:cpu?threads=1")
# Samples the greedy order is chosen on.
ORDER_SAMPLES = 128


def study(case: Case, most: int, ways: Sequence[str], progress: Callable[[str], None]) -> dict[str, Any]:
    """Rows of one reference model: quality and divergence for every number of branches removed."""
    program, _, _ = fold(capture(str(case.path)))
    splits = load_splits(case.load(), program, batch_size=case.batch_size)
    metric = get_metric(case.metric, program)
    divergence = get_metric(metric.divergence, program)
    order, moves = greedy(program, splits.selection, divergence, most, progress)
    run = _run(program)
    references = {part: reference_outputs(run, getattr(splits, part)) for part in ("selection", "report")}

    def scores(changed: Program) -> dict[str, Any]:
        changed_run, found = _run(changed), {}
        for part, reference in references.items():
            data = getattr(splits, part)
            outputs = reference_outputs(changed_run, data)
            for name, judge in ((part, metric), (f"{part}_divergence", divergence)):
                replay = iter(outputs)
                features = evaluate(lambda _, r=replay: next(r), data, judge, reference)  # type: ignore[misc]
                found[name] = judge.score(features)
        return found

    original = scores(program)
    rows = []
    for count in range(1, len(order) + 1):
        some = moves[:count]
        changed = apply_moves(program, some)
        row: dict[str, Any] = {"removed": count, "branch": order[count - 1], "plain": scores(changed)}
        for way in ways:
            start = time.perf_counter()
            made = compensate(
                program,
                changed,
                splits.calibration,
                stands_for=replaced(some),
                how=WAYS[way],
                divergence=divergence,
                threads=1,
            )
            seconds = time.perf_counter() - start
            row[way] = scores(made.program) | {
                "seconds": seconds,
                "operators": len(made.fitted),
                "bytes_added": serialized_size(made.program.model) - serialized_size(changed.model),
            }
            progress(f"{case.name} -{count} {way}: {row[way]['report']:.4f} ({seconds:.1f} s)")
        best = min(("plain", *ways), key=lambda w: metric.damage(original["selection"], row[w]["selection"]))
        row["chosen"] = {"way": best, **row[best]}
        for found in (row[w] for w in ("plain", *ways, "chosen")):
            found["damage"] = metric.damage(original["report"], found["report"])
        rows.append(row)
    return {
        "model": case.name,
        "metric": case.metric,
        "branches": len(moves_of(program)),
        "order": order,
        "n": {part: getattr(splits, part).samples for part in ("calibration", "selection", "report")},
        "calibration_rows_used": min(splits.calibration.samples, WAYS["all"].rows),
        "original": original,
        "rows": rows,
    }


def moves_of(program: Program) -> tuple[Move, ...]:
    """Every drop the program offers."""
    space = build_space(program, [DropBranch()], Statistics(0), TARGET)
    return space.moves(tuple(1 for _ in space.choices))


def replaced(moves: Sequence[Move]) -> dict[str, str]:
    """What the skips of dropped branches stand for, through runs of dropped branches."""
    steps = {m.site.inputs[0]: m.site.outputs[0] for m in moves if len(m.site.outputs) == 1}
    found = {}
    for name in steps:
        last = steps[name]
        while last in steps:
            last = steps[last]
        found[name] = last
    return found


def greedy(
    program: Program, selection: Dataset, divergence: Metric, most: int, progress: Callable[[str], None]
) -> tuple[list[str], list[Move]]:
    """Branches in the order they go, and their moves."""
    space = build_space(program, [DropBranch()], Statistics(0), TARGET)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    count = min(ORDER_SAMPLES, selection.samples)
    data = selection.rows(np.linspace(0, selection.samples - 1, count).astype(np.int64))
    reference = reference_outputs(lambda feeds: supergraph.run(space.nothing, feeds), data)

    def score(genome: Genome) -> float:
        features = evaluate(lambda feeds: supergraph.run(genome, feeds), data, divergence, reference)
        return divergence.score(features)

    genome, order = list(space.nothing), []
    for _ in range(min(most, len(genome))):
        left = [i for i, gene in enumerate(genome) if not gene and not space.dropped(genome, i)]
        harm = {i: score((*genome[:i], 1, *genome[i + 1 :])) for i in left}
        best = min(harm, key=lambda i: harm[i])
        genome[best] = 1
        order.append(best)
        progress(f"drop {space.choices[best].site.name}: divergence {harm[best]:.3g}")
    moves = [Move(space.choices[i].site, space.choices[i].options[0]) for i in order]
    return [m.site.name for m in moves], moves


def _run(program: Program) -> Any:
    return get_backend(TARGET).compile(program.model, TARGET).run


def main() -> None:
    """Study the models named on the command line and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=[], help="reference models; all with branches if none")
    parser.add_argument("--most", type=int, default=5, help="branches to remove")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--out", type=Path, default=Path("depth_repair.json"))
    options = parser.parse_args()
    chosen = [c for c in CASES if c.name in (options.models or ("resnet56", "kwt1", "stories260k", "minilm"))]
    found = []
    for case in chosen:
        found.append(study(case, options.most, options.ways, lambda note: print(note, flush=True)))
        options.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
