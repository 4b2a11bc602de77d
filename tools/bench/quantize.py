"""``lamina.quantize`` beside quantizers of ONNX Runtime, NNCF and onnxsim, everybody with no options given.

    python -m tools.bench.quantize [--cases kwt1,minilm] [--seconds 60] [--threads 1] [--out out/quantize]

Everybody gets the model; static quantizers the calibration samples; lamina the samples, the metric, and
where and at what shapes the result will run, which it measures on. Quality is on report data no search saw,
by the judge that shares no code with lamina; times are in alternation, each model in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lamina
from lamina.ir.capture import capture
from tools.bench import judge, peers
from tools.bench.cases import CASES, Case
from tools.bench.run import file_bytes, timed


def run_case(
    case: Case,
    out: Path,
    seconds: float,
    threads: int,
    lamina_options: dict[str, Any],
    with_ours: bool = True,
) -> dict[str, Any]:
    """Quantize one case with everybody, score and time what came out."""
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = case.load()
    names = [p.name for p in capture(case.path).inputs]
    took: dict[str, float] = {}
    failed: dict[str, str] = {}
    models = {"float32": case.path}
    told: dict[str, Any] = {}

    def ours(source: Path) -> Path:
        result = lamina.quantize(
            case.path,
            data=data,
            metric=case.metric,
            target=f"ort:cpu?threads={threads}",
            workload=case.workload,
            batch_size=case.batch_size,
            seconds=seconds,
            **lamina_options,
        )
        result.save(folder / "lamina")
        told.update(result.evidence)
        return folder / "lamina" / "model.onnx"

    systems: dict[str, Callable[[Path], Path]] = {
        "ort dynamic": lambda source: peers.default_dynamic(source, folder),
        "ort static": lambda source: peers.default_static(
            source, folder, data["calibration"], names, case.batch_size
        ),
        "nncf": lambda source: peers.nncf_default(
            source, folder, data["calibration"], names, case.batch_size
        ),
        "onnxsim": lambda source: peers.onnxsim_default(
            source, folder, data["calibration"], names, case.batch_size
        ),
        "lamina": ours,
    }
    if not with_ours:
        del systems["lamina"]
    with tempfile.TemporaryDirectory() as scratch:
        source = peers.one_file(case.path, Path(scratch))
        for name, quantize in systems.items():
            start = time.perf_counter()
            try:
                models[name] = quantize(source)
            except Exception as error:  # a system's failure is a finding
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            took[name] = time.perf_counter() - start
    quality = {name: judge.score(case, path, data["report"]) for name, path in models.items()}
    times = timed(case, models, threads)
    rows = {
        name: {
            "metric": quality[name],
            "damage": judge.damage(case, quality["float32"], quality[name]),
            "size_ratio": file_bytes(path) / file_bytes(case.path),
            "ratios": {shape: t["ratio"] for shape, t in times[name].items()},
            "mean_ratio": float(np.mean([t["ratio"] for t in times[name].values()])),
            "seconds": took.get(name, 0.0),
        }
        for name, path in models.items()
    }
    kept = {key: told[key] for key in ("widths", "met", "rules", "budget") if key in told}
    moves: dict[str, int] = {}
    for move in told.get("moves", ()):
        key = f"{move['kind']} {move['option']}"
        moves[key] = moves.get(key, 0) + 1
    return {"case": case.name, "systems": rows, "failed": failed, "lamina": {**kept, "moves": moves}}


def show(found: dict[str, Any]) -> None:
    """One line a system, as a row of a table in Markdown."""
    for name, row in found["systems"].items():
        ratios = ", ".join(f"{value:.2f}" for value in row["ratios"].values())
        print(
            f"| {found['case']} | {name} | {row['metric']:.3f} | {row['damage']:+.2f} "
            f"| {row['size_ratio']:.3f} | {ratios} | {row['seconds']:.0f} s |"
        )
    for name, why in found["failed"].items():
        print(f"| {found['case']} | {name} | failed: {why} |")
    print(json.dumps(found["lamina"]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("out/quantize"))
    parser.add_argument("--peers-only", action="store_true", help="leave lamina out")
    for option in ("bits", "size", "drop", "strategy"):
        parser.add_argument(f"--{option}", help="given to lamina.quantize")
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # the peers' quantizer warns once a weight
    options = {k: v for k in ("bits", "size", "drop", "strategy") if (v := getattr(chosen, k)) is not None}
    for case in CASES:
        if case.name in chosen.cases.split(","):
            found = run_case(
                case, chosen.out, chosen.seconds, chosen.threads, options, with_ours=not chosen.peers_only
            )
            (chosen.out / f"{case.name}.json").write_text(json.dumps(found, indent=1))
            show(found)


if __name__ == "__main__":
    main()
