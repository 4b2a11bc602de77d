"""Tables of what ``python -m tools.studies.depth.share`` measured.

    python -m tools.studies.depth.share_page depth_share.json

First one line a model: divergence of single changes, median and least over branches. Then its sequences.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Model = Mapping[str, Any]


def singles(models: Sequence[Model]) -> Iterator[str]:
    """Dropping against running a neighbour's, the most similar or the best donor's matrices."""
    from scipy.stats import spearmanr

    heads = "model, branches, drop, neighbour, most similar, best donor, worse than drop, distance, rho"
    yield f"| {heads.replace(', ', ' | ')} |"
    yield "| - | - | - | - | - | - | - | - | - |"
    for model in models:
        drop = {d["branch"]: d["divergence"] for d in model["drop"]}
        of: dict[str, list[Mapping[str, Any]]] = {}
        for pair in model["pairs"]:
            if pair["branch"] in drop:
                of.setdefault(pair["branch"], []).append(pair)
        near = [min(p["divergence"] for p in pairs if p["apart"] == 1) for pairs in of.values()]
        like = [min(pairs, key=lambda p: p["weighted"])["divergence"] for pairs in of.values()]
        best = {name: min(p["divergence"] for p in pairs) for name, pairs in of.items()}
        worse = sum(best[name] > drop[name] for name in of)
        apart = np.median([min(p["weighted"] for p in pairs) for pairs in of.values()])
        ranks = [
            spearmanr([p["weighted"] for p in pairs], [p["divergence"] for p in pairs])[0]
            for pairs in of.values()
            if len(pairs) > 2
        ]
        rho = f"{np.nanmean(ranks):.2f}" if ranks else "-"
        cells = [_two(v) for v in ([drop[n] for n in of], near, like, list(best.values()))]
        start = " | ".join([model["model"], str(len(of)), *cells])
        yield f"| {start} | {worse} | {apart:.2f} | {rho} |"


def sequences(model: Model) -> Iterator[str]:
    """Greedy sequences, scored on report samples."""
    n, first, metric = model["n"], model["original"], model["metric"]
    yield (
        f"{model['model']}: {metric} {_shown(metric, first['report'])}, {first['bytes']:,} bytes; "
        f"n = {n['calibration']} calibration, {n['order']} selection, {n['report']} report."
    )
    yield ""
    heads = f"{metric} | damage (95 %) | {model['divergence']} | changed last"
    yield f"| changed | way | size | memory | {heads} |"
    yield "| - | - | - | - | - | - | - | - |"
    for row in sorted(model["rows"], key=lambda r: r["changed"]):
        spread = row["damage_ci95"]
        told = "" if spread is None else " ({:+.2f} to {:+.2f})".format(*(100 * x for x in spread))
        cells = [
            str(row["changed"]),
            row["way"],
            f"{row['bytes'] / first['bytes']:.3f}",
            f"{row['peak_bytes'] / first['peak_bytes']:.2f}",
            _shown(metric, row["report"]),
            f"{100 * row['damage']:+.2f}{told}",
            f"{row['divergence']:.3g}",
            row["branches"][-1],
        ]
        yield f"| {' | '.join(cells)} |"
    for row in (r for r in model["rows"] if "latency" in r):
        low, high = row["latency_spread"]
        yield ""  # a line right below a table would be a row of it
        yield f"CPU time of '{row['way']}' over the original's: {row['latency']:.3f} ({low:.3f}..{high:.3f})."


def _two(values: Sequence[float]) -> str:
    return f"{np.median(values):.3g}, {min(values):.3g}"


def _shown(metric: str, value: float) -> str:
    return f"{value:.4f}" if metric == "cross-entropy" else f"{100 * value:.2f}"


def main() -> None:
    """Print the tables of the files named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.share_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON of the study")
    options = parser.parse_args()
    models = [model for file in options.files for model in json.loads(file.read_text())]
    print("\n".join(singles(models)))
    for model in models:
        print("\n".join(["", *sequences(model)]))


if __name__ == "__main__":
    main()
