"""``lamina.quantize`` beside quantizers of other tools, everybody with no options given.

    python -m tools.bench.quantize [--cases kwt1,minilm] [--systems lamina,olive-static] [--seconds 60]
        [--threads 1] [--peers-python PYTHON,PYTHON] [--out out/quantize]

Others are ONNX Runtime, onnxsim, NNCF, Olive, neural-compressor (2.x) and onnx-neural-compressor; all but the
first in processes of their own, in this Python or the first of those given that has them, and left out where
none does. Everybody gets the model; static quantizers the calibration samples; those that tune the selection
samples and the metric; lamina the samples, the metric, and where and at what shapes the result will run,
which it measures on. Quality is on report data no search saw, by the judge that shares no code with lamina;
times are in alternation, each model in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import lamina
from lamina.ir.capture import capture
from tools.bench import judge, peers
from tools.bench.cases import CASES, Case
from tools.bench.quantize_tool import TOOLS
from tools.bench.run import file_bytes, timed

System = Callable[[Path], Path]
SYSTEMS = ("ort dynamic", "ort static", *TOOLS, "lamina")
# Of timing, a model: what the table was made with when there were four systems.
TIMING_SECONDS = 3.0


def run_case(
    case: Case,
    out: Path,
    seconds: float,
    threads: int,
    lamina_options: dict[str, Any],
    wanted: Collection[str] = SYSTEMS,
    pythons: Sequence[str] = (),
) -> dict[str, Any]:
    """Quantize one case with everybody wanted, score and time what came out."""
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = case.load()
    took: dict[str, float] = {}
    models = {"float32": case.path}
    told: dict[str, Any] = {}
    quality = {"float32": judge.score(case, case.path, data["report"])}

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

    with tempfile.TemporaryDirectory() as scratch:
        source = peers.one_file(case.path, Path(scratch))
        samples = peers.benchmark_samples(Path(scratch) / "samples.npz", case, data)
        systems, failed = others(case, folder, data["calibration"], samples, wanted, pythons)
        if "lamina" in wanted:
            systems["lamina"] = ours
        for name, quantize in systems.items():
            start = time.perf_counter()
            try:
                path = quantize(source)
                took[name] = time.perf_counter() - start
                quality[name] = judge.score(case, path, data["report"])
                models[name] = path
            except Exception as error:  # a system's failure is a finding
                failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    times = timed(case, models, threads, seconds=TIMING_SECONDS * len(models))
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
    return {"case": case.name, "systems": rows, "failed": failed, "lamina": summary(told)}


def summary(told: dict[str, Any]) -> dict[str, Any]:
    """Of lamina's evidence: widths, bounds, rules, rounding, and how many operators got which form."""
    moves: dict[str, int] = {}
    for move in told.get("moves", ()):
        key = f"{move['kind']} {move['option']}"
        moves[key] = moves.get(key, 0) + 1
    return {
        **{k: told[k] for k in ("widths", "met", "rules", "budget", "rounding") if k in told},
        "moves": moves,
    }


def others(
    case: Case,
    folder: Path,
    calibration: dict[str, np.ndarray],
    samples: Path,
    wanted: Collection[str],
    pythons: Sequence[str],
) -> tuple[dict[str, System], dict[str, str]]:
    """The other systems wanted, writing into ``folder``; and why one is left out."""
    names, batch = [p.name for p in capture(case.path).inputs], case.batch_size
    found: dict[str, System] = {
        "ort dynamic": lambda source: peers.default_dynamic(source, folder),
        "ort static": lambda source: peers.default_static(source, folder, calibration, names, batch),
    }
    found = {name: system for name, system in found.items() if name in wanted}
    missing = {}
    for name in [tool for tool in TOOLS if tool in wanted]:
        if python := peers.python_with(name, pythons):
            output = folder / f"{name}.onnx"
            found[name] = partial(peers.by_tool, name, python, samples=samples, output=output)
        else:
            missing[name] = f"not run: no Python given has {TOOLS[name][0]}"
    return found, missing


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
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--peers-only", action="store_true", help="leave lamina out")
    parser.add_argument("--peers-python", default="", help="Pythons that have other tools, with commas")
    for option in ("bits", "size", "drop", "strategy"):
        parser.add_argument(f"--{option}", help="given to lamina.quantize")
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # the peers' quantizer warns once a weight
    options = {k: v for k in ("bits", "size", "drop", "strategy") if (v := getattr(chosen, k)) is not None}
    wanted = set(chosen.systems.split(",")) - ({"lamina"} if chosen.peers_only else set())
    if unknown := wanted.difference(SYSTEMS):
        parser.error(f"no system is called {', '.join(sorted(unknown))}: choose from {', '.join(SYSTEMS)}")
    pythons = [python for python in chosen.peers_python.split(",") if python]
    for case in CASES:
        if case.name in chosen.cases.split(","):
            found = run_case(case, chosen.out, chosen.seconds, chosen.threads, options, wanted, pythons)
            (chosen.out / f"{case.name}.json").write_text(json.dumps(found, indent=1))
            show(found)


if __name__ == "__main__":
    main()
