"""One Markdown table from several runs of the suite, and whether each run held the budget.

    python -m tools.bench.table out/bench_0 out/bench_1 out/bench_2

Ratios are medians over the runs, with the lowest and highest run beside lamina's; "judged" counts runs in
which the independent judge, which loads nothing but the two files, saw the drop held and no shape slower.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SYSTEMS = ("ort dynamic", "ort static", "lamina")
ALLOWED = 1.0  # percent


def load(folder: Path) -> list[dict[str, Any]]:
    """The cases of one run."""
    found: list[dict[str, Any]] = json.loads((folder / "bench.json").read_text())
    return found


def best_peer(found: dict[str, Any], threads: str, shape: str) -> float:
    """Time of the best uniform quantization that holds the drop; 1.0 where none does better than float32."""
    peers = (found["systems"][name] for name in SYSTEMS[:2])
    return min([1.0, *(p["times"][threads][shape]["ratio"] for p in peers if p["damage_percent"] <= ALLOWED)])


def faster(run: Sequence[dict[str, Any]], threads: str) -> list[float]:
    """Best qualifying peer's time over lamina's, per case and shape; a run without a result counts as 1.0."""
    ratios = []
    for found in run:
        for shape in found["systems"]["float32"]["times"][threads]:
            peer = best_peer(found, threads, shape)
            own = found["systems"].get("lamina")
            ratios.append(peer / own["times"][threads][shape]["ratio"] if own else peer)
    return ratios


def held(found: dict[str, Any]) -> bool:
    """Whether the judge agrees that the drop is held and nothing is slower than the original."""
    judged = found.get("judged")
    return (
        bool(judged)
        and judged["damage_percent"] <= ALLOWED
        and all(ratio["ratio"] <= 1.0 for ratio in judged["ratios"].values())
    )


def table(runs: Sequence[Sequence[dict[str, Any]]], threads: str) -> str:
    """The Markdown table at one thread count."""
    lines = [
        "| case | shape | ORT dynamic | ORT static | lamina | damage | size | against best peer | judged |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for cases in zip(*runs, strict=True):
        for shape in _by_time(cases[0], threads):
            lines.append(_row(cases, threads, shape))
    return "\n".join(lines)


def _by_time(found: dict[str, Any], threads: str) -> list[str]:
    times = found["systems"]["float32"]["times"][threads]
    return sorted(times, key=lambda shape: float(times[shape]["median_s"]))


def _row(cases: Sequence[dict[str, Any]], threads: str, shape: str) -> str:
    first = cases[0]
    cells = [first["case"], shape]
    for name in SYSTEMS:
        systems = [c["systems"][name] for c in cases if name in c["systems"]]
        ratios = [s["times"][threads][shape]["ratio"] for s in systems]
        if not ratios:
            cells.append("no result")
        elif name == "lamina":
            cells.append(f"**{np.median(ratios):.3f}** ({min(ratios):.3f} to {max(ratios):.3f})")
        else:
            lost = systems[0]["damage_percent"]
            cells.append(f"{np.median(ratios):.3f}" + ("" if lost <= ALLOWED else f", loses {lost:.1f}"))
    own = [c["systems"]["lamina"] for c in cases if "lamina" in c["systems"]]
    cells.append(", ".join(f"{s['damage_percent']:+.2f}" for s in own))
    original = first["systems"]["float32"]["bytes"]
    cells.append(f"{np.median([s['bytes'] for s in own]) / original:.2f}" if own else "")
    against = [
        best_peer(c, threads, shape) / c["systems"]["lamina"]["times"][threads][shape]["ratio"]
        for c in cases
        if "lamina" in c["systems"]
    ]
    cells.append(f"{np.median(against):.2f}x" if against else "")
    cells.append(f"{sum(map(held, cases))} of {len(cases)}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    runs = [load(folder) for folder in parser.parse_args().runs]
    counts = sorted({t for run in runs for t in run[0]["systems"]["float32"]["times"]}, key=int)
    for threads in counts:
        timed = [run for run in runs if threads in run[0]["systems"]["float32"]["times"]]
        print(f"\n{threads} thread(s), {len(timed)} run(s)\n\n{table(timed, threads)}\n")
        for number, run in enumerate(timed):
            ratios = faster(run, threads)
            mean = float(np.exp(np.mean(np.log(ratios))))
            print(
                f"run {number}: {mean:.2f}x faster than the best qualifying peer (geometric mean of "
                f"{len(ratios)}), at worst {min(ratios):.2f}x"
            )


if __name__ == "__main__":
    main()
