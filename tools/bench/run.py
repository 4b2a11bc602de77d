"""Run the reference suite: float32, ONNX Runtime's dynamic and static int8, lamina at drop <= 1 %.

    python -m tools.bench.run [--cases kwt1] [--threads 1,2] [--seconds 120] [--out out/bench] [--again]

Every model of a case is timed in alternation, each in a process of its own, in one run a thread count; the
float32 original at full graph optimization is the 1.0. Quality is on report data that no search saw.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from rich.console import Console
from rich.table import Table

import lamina
from lamina.backends.backend import Target
from lamina.backends.measure import IsolatedTimer
from lamina.data import load_data
from lamina.ir.capture import capture
from lamina.workload import parse_workload
from tools.bench import judge, peers
from tools.bench.cases import CASES, Case
from tools.bench.table import faster, held, load


def run_case(case: Case, out: Path, threads: list[int], seconds: float, seed: int) -> dict[str, Any]:
    """All systems on one case."""
    folder = out / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    data = case.load()
    models = {"float32": case.path}
    with tempfile.TemporaryDirectory() as scratch:
        plain = peers.preprocessed(peers.one_file(case.path, Path(scratch)), Path(scratch))
        names = [p.name for p in capture(case.path).inputs]
        models["ort dynamic"] = peers.dynamic(plain, folder)
        models["ort static"] = peers.static(plain, folder, data["calibration"], names, case.batch_size)
    started = time.perf_counter()
    note = ""
    try:
        result = lamina.optimize(
            case.path,
            drop="1%",
            data=data,
            metric=case.metric,
            target="ort:cpu?threads=1",
            workload=case.workload,
            seconds=seconds,
            seed=seed,
            batch_size=case.batch_size,
        )
        result.save(folder / "lamina")
        models["lamina"] = folder / "lamina" / "model.onnx"
    except lamina.InfeasibleBudget as error:
        note = str(error)
    took = time.perf_counter() - started
    quality = {name: judge.score(case, path, data["report"]) for name, path in models.items()}
    rows: dict[str, Any] = {
        name: {
            "metric": quality[name],
            "damage_percent": judge.damage(case, quality["float32"], quality[name]),
            "bytes": file_bytes(path),
            "times": {},
        }
        for name, path in models.items()
    }
    for count in threads:
        for name, times in timed(case, models, count).items():
            rows[name]["times"][str(count)] = times
    found = {"case": case.name, "metric": case.metric, "optimize_s": took, "note": note, "systems": rows}
    if "lamina" in models:  # once more by what shares no code with lamina
        found["judged"] = judge.judge(case, models["lamina"])
    return found


def time_again(found: dict[str, Any], out: Path, threads: list[int]) -> dict[str, Any]:
    """Time and judge what an earlier run left; nothing is optimized."""
    case = next(c for c in CASES if c.name == found["case"])
    files = {
        "float32": case.path,
        "ort dynamic": out / case.name / "ort_dynamic.onnx",
        "ort static": out / case.name / "ort_static.onnx",
        "lamina": out / case.name / "lamina" / "model.onnx",
    }
    models = {name: path for name, path in files.items() if name in found["systems"]}
    for count in threads:
        for name, times in timed(case, models, count).items():
            found["systems"][name]["times"][str(count)] = times
    if "lamina" in models:
        found["judged"] = judge.judge(case, models["lamina"])
    return found


def timed(
    case: Case, models: dict[str, Path], threads: int, *, seconds: float = 12.0
) -> dict[str, dict[str, Any]]:
    """Ratios to float32 on both shapes, round by round; ``seconds`` of timing in all."""
    program = capture(case.path)
    samples = load_data(case.load()["calibration"], program)
    workload = parse_workload(case.workload, program, samples)
    with IsolatedTimer(Target("ort", "cpu", threads), workload) as timer:
        ids = dict(zip(models, timer.add_all(list(models.values())), strict=True))
        timings = timer.time(list(ids.values()), None, seconds)
        found: dict[str, dict[str, Any]] = {}
        for name, number in ids.items():
            found[name] = {}
            for item in workload:
                ratio = timings.ratio(number, ids["float32"], item.name)
                latency = timings.latency(number, item.name)
                found[name][item.name] = {
                    "ratio": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                    "median_s": latency.median_s,
                    "samples": latency.samples,
                }
    return found


def show(results: list[dict[str, Any]], threads: str) -> None:
    """One table."""
    table = Table(
        title=f"time / float32 at {threads} thread(s); quality on report data", title_justify="left"
    )
    for name in ("case", "system", "metric", "damage", "MB", "small shape", "large shape"):
        table.add_column(name)
    for found in results:
        for name, row in found["systems"].items():
            times = sorted(row["times"][threads].values(), key=lambda t: t["median_s"])
            cells = [f"{t['ratio']:.3f} ({t['low']:.3f}-{t['high']:.3f})" for t in times]
            table.add_row(
                found["case"],
                name,
                f"{row['metric']:.3f}",
                f"{row['damage_percent']:+.2f}",
                f"{row['bytes'] / 1e6:.2f}",
                *cells,
            )
        table.add_section()
    Console(width=140).print(table)


def plot(results: list[dict[str, Any]], threads: str, path: Path) -> None:
    """Time against damage, one marker a system and shape, as a page."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name in ("float32", "ort dynamic", "ort static", "lamina"):
        points = [
            (t["ratio"], f["systems"][name]["damage_percent"], f"{f['case']} {shape}")
            for f in results
            if name in f["systems"]
            for shape, t in f["systems"][name]["times"][threads].items()
        ]
        if points:
            x, y, text = zip(*points, strict=True)
            figure.add_trace(go.Scatter(x=x, y=y, text=text, mode="markers", name=name))
    figure.update_layout(
        title=f"Reference suite, {threads} thread(s)",
        xaxis_title="time / float32 (log)",
        yaxis_title="damage: points, or percent of the loss",
        xaxis_type="log",
    )
    figure.update_yaxes(range=[-2, 10])
    figure.write_html(path, include_plotlyjs=True)


def file_bytes(path: Path) -> int:
    """Of a model and the files of external data that it names."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    files = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    return sum(p.stat().st_size for p in (path, *(path.parent / f for f in files)))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--again", action="store_true", help="only time and judge what lies in --out")
    chosen = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # the peers' quantizer warns once a weight
    threads = [int(t) for t in chosen.threads.split(",")]
    wanted = chosen.cases.split(",")
    results = []
    if chosen.again:
        for found in load(chosen.out):
            results.append(time_again(found, chosen.out, threads) if found["case"] in wanted else found)
        (chosen.out / "bench.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    for case in CASES:
        if case.name in wanted and not chosen.again:
            print(f"{case.name} ...", flush=True)
            results.append(run_case(case, chosen.out, threads, chosen.seconds, chosen.seed))
            (chosen.out / "bench.json").write_text(json.dumps(results, indent=1, default=str) + "\n")
    for count in map(str, threads):
        show(results, count)
        ratios = faster(results, count)
        mean = float(np.exp(np.mean(np.log(ratios))))
        print(
            f"{count} thread(s): {mean:.2f}x faster than the best qualifying peer in geometric mean of "
            f"{len(ratios)}, at worst {min(ratios):.2f}x; the judge saw the budget held in "
            f"{sum(map(held, results))} of {len(results)} cases"
        )
        plot(results, count, chosen.out / f"bench_{count}.html")


if __name__ == "__main__":
    main()
