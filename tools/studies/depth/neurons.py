"""Hidden widths made smaller: merged by transport plans, merged by equal weights, or pruned by magnitude.

    python -m tools.studies.depth.neurons kwt1 minilm --keep 0.75 0.5 --out neurons.json

Every hidden width of a model (:func:`lamina.passes.neurons.hidden_sites.hidden_sites`) shrinks by the same
share, and the outputs are compared with the original's on report samples:

* ``prune``: channels with the least ``L2(weights in front) * L2(weights behind)`` go; needs no data;
* ``prune-energy``: those with the least energy of the activation times ``L2(weights behind)^2`` on
  calibration data;
* ``features``: iterative-feature-merging;
* ``transport``: merge-neurons-ot as it is offered;
* ``transport-exact``: the same with exact marginals.

``--repair WAY ...`` also refits what follows (:func:`lamina.passes.compensate.compensate`). All ways of one
width have the same shapes, so latency is measured once a width. Prints Markdown, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.analysis.channels import collect_channels
from lamina.analysis.moments import Moments
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import compensate
from lamina.passes.neurons.channel_map import ChannelMap
from lamina.passes.neurons.hidden import Hidden, HiddenGroup
from lamina.passes.neurons.hidden_sites import hidden_sites
from lamina.passes.neurons.iterative_feature_merging import merged_features
from lamina.passes.neurons.merge_channels import merge_channels
from lamina.passes.neurons.merge_neurons_ot import MergeNeuronsOt
from tools.bench.cases import CASES
from tools.studies.depth.scoring import Study

MODELS = ("resnet56", "kwt1", "stories260k", "minilm")
Arrays = Mapping[tuple[int, int], np.ndarray]
Way = Callable[[HiddenGroup, Arrays, Moments, int], ChannelMap]


def prune(group: HiddenGroup, arrays: Arrays, moments: Moments, width: int) -> ChannelMap:
    """Keep the channels with the largest product of norms."""
    made, read = (np.linalg.norm(group.vectors(arrays, side), axis=1) for side in ("made", "read"))  # type: ignore[arg-type]
    return kept(made * read, width)


def prune_energy(group: HiddenGroup, arrays: Arrays, moments: Moments, width: int) -> ChannelMap:
    """Keep the channels that hand on most energy."""
    return kept(np.diag(moments.xx) * (group.vectors(arrays, "read") ** 2).sum(axis=1), width)


def features(group: HiddenGroup, arrays: Arrays, moments: Moments, width: int) -> ChannelMap:
    """Merge the closest weights in front."""
    return ChannelMap.grouped(merged_features(group.vectors(arrays, "made"), width=width))


def transport(group: HiddenGroup, arrays: Arrays, moments: Moments, width: int) -> ChannelMap:
    """A transport plan as the transform makes it."""
    return MergeNeuronsOt().transported(moments, group.vectors(arrays, "read"), width)


def transport_exact(group: HiddenGroup, arrays: Arrays, moments: Moments, width: int) -> ChannelMap:
    """One with exact marginals."""
    how = MergeNeuronsOt(balance=float("inf"))
    return how.transported(moments, group.vectors(arrays, "read"), width)


WAYS: Mapping[str, Way] = {
    "prune": prune,
    "prune-energy": prune_energy,
    "features": features,
    "transport": transport,
    "transport-exact": transport_exact,
}


def kept(importance: np.ndarray, width: int) -> ChannelMap:
    """The map that keeps the ``width`` most important channels and merges nothing."""
    labels = np.full(len(importance), -1)
    labels[np.sort(np.argsort(-importance, kind="stable")[:width])] = np.arange(width)
    return ChannelMap.grouped(labels)


def narrowed(
    program: Program, sites: Sequence[Hidden], way: Way, keep: float, moments: Mapping[str, Moments]
) -> Program:
    """The program with all widths a share of what they were."""
    maps = {}
    for hidden in sites:
        arrays = hidden.arrays(program)
        maps[hidden.name] = [
            way(g, arrays, moments[g.value], MergeNeuronsOt().width(g.units, keep)) for g in hidden.groups
        ]
    return merge_channels(program, maps)


def study(about: Study, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What is known so far of one model, after every row."""
    program, case = about.program, about.case
    sites, _ = hidden_sites(program)
    axes = {g.value: g.axis for h in sites for g in h.groups}
    moments = collect_channels(program, about.calibration, axes, threads=1)
    found: dict[str, Any] = {
        "model": case.name,
        "metric": case.metric,
        "divergence": about.report.divergence.name,
        "widths": len(axes),
        "n": {"calibration": about.calibration.samples, "report": about.report.samples},
        "original": about.report.report(about.report.original),
        "bytes": serialized_size(program.model),
        "rows": [],
    }
    for keep in options.keep:
        timed: dict[str, Any] = {}
        for name in options.ways:
            start = time.process_time()
            changed = narrowed(program, sites, WAYS[name], keep, moments)
            row: dict[str, Any] = {"keep": keep, "way": name, "cpu_seconds": time.process_time() - start}
            timed = timed or about.latency(changed)
            row |= about.report.report(about.report(changed)) | timed
            row["bytes"] = serialized_size(changed.model)
            found["rows"].append(row)
            yield found
            if name in options.repair:
                mended = compensate(
                    program, changed, about.calibration, divergence=about.order.divergence, threads=1
                )
                again = about.report.report(about.report(mended.program))
                found["rows"].append(row | again | {"way": f"{name}, repaired"})
                yield found


def table(found: Mapping[str, Any]) -> Iterator[str]:
    """Markdown lines of one model."""
    scale = 1 if found["metric"] == "cross-entropy" else 100
    yield (
        f"{found['model']}: {found['metric']} {scale * found['original']['report']:.4g} of the original, "
        f"{found['widths']} widths; n = {found['n']['calibration']} calibration, "
        f"{found['n']['report']} report."
    )
    yield ""
    yield f"| kept | way | {found['metric']} | damage, % (95 %) | {found['divergence']} | latency | bytes |"
    yield "| - | - | - | - | - | - | - |"
    for row in found["rows"]:
        interval = row["damage_ci95"]
        spread = "" if interval is None else " ({:+.2f} to {:+.2f})".format(*(100 * x for x in interval))
        yield (
            f"| {100 * row['keep']:g} % | {row['way']} | {scale * row['report']:.4g} | "
            f"{100 * row['damage']:+.2f}{spread} | {row['divergence']:.3g} | {row['latency']:.3f} | "
            f"{row['bytes'] / found['bytes']:.3f} |"
        )
    yield ""


def main() -> None:
    """Study the models named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.neurons",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="reference models; those of the depth study if none")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5], help="shares of the widths")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--repair", nargs="*", default=[], choices=list(WAYS), help="ways to repair as well")
    parser.add_argument(
        "--order-samples", type=int, default=16, help="selection samples, unused but run once"
    )
    parser.add_argument("--report-samples", type=int, help="report samples, evenly; all if not given")
    parser.add_argument("--out", type=Path, default=Path("neurons.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES:
        if case.name in (options.models or MODELS):
            found: dict[str, Any] = {}
            for found in study(Study.of(case, options.order_samples, options.report_samples), options):
                options.out.write_text(json.dumps([*done, found], indent=1))
            done.append(found)
            print("\n".join(table(found)), flush=True)


if __name__ == "__main__":
    main()
