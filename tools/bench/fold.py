"""Compare lamina's folding with other tools: nodes left, time to fold, and latency of the folded model.

    python -m tools.bench.fold [--models cnn,enc,decoder192] [--peers-python PYTHON] [--time] [--out out/fold]

Peers: onnxslim, onnxsim (where this Python, or the one given, has them), onnxscript's optimizer, and ONNX
Runtime's offline optimization at its basic level, which keeps to standard operators. Every tool runs in a
process of its own; its time is CPU time from reading the file to having written the result; for lamina also
wall time without running the result against the original, which no peer does. On the decoder of 192 layers
lamina, that proof included, and the fastest peer run seven times in alternation, wall time against wall time:
the bound is on the median of the ratios. Models: a ResNet-18 and an
encoder exported by torch (where it is installed), decoders of 12, 48 and 192 layers, one of 100,000 nodes,
and the reference models. Exit code 1 where a bound of :func:`failures` is broken.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
from rich.console import Console
from rich.table import Table

from tools.bench import fold_models
from tools.bench.cases import CASES, ROOT
from tools.bench.fold_tool import TOOLS

PEERS = ("onnxslim", "onnxsim", "onnxscript", "onnxruntime")
ELSEWHERE = ("onnxslim", "onnxsim")
LAYERS = 192
MANY_NODES = 100_000
MOST_RATIO, MOST_SECONDS = 3.0, 60.0
# A folded model counts as slower only beyond this: the noise of a measurement in alternation.
NOISE = 0.02
TIMEOUT_S = 600
RUNS = 7


def decoder(layers: int, width: int = 32) -> Callable[[Path], None]:
    return lambda path: onnx.save(fold_models.decoder(layers, width), path)


def many_nodes(path: Path) -> None:
    a_layer = len(fold_models.decoder(2).graph.node) - len(fold_models.decoder(1).graph.node)
    onnx.save(fold_models.decoder(-(-MANY_NODES // a_layer), width=8), path)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "cnn": fold_models.export_cnn,
    "enc": fold_models.export_encoder,
    "decoder12": decoder(12),
    "decoder48": decoder(48),
    f"decoder{LAYERS}": decoder(LAYERS),
    "nodes100k": many_nodes,
}
NEEDS_TORCH = ("cnn", "enc")
ALONE = ("nodes100k",)  # peers take from minutes to hours


def models(names: list[str] | None, out: Path) -> dict[str, Path]:
    """Files of the models to fold, built where they are not there yet."""
    reference = {case.name: case.path for case in CASES if case.path.exists()}
    reference |= {p.stem: p for p in sorted((ROOT / "zoo").glob("*.onnx"))}
    torch = importlib.util.find_spec("torch") is not None
    found = {}
    for name in names or [*BUILDERS, *reference]:
        if name in reference:
            found[name] = reference[name]
        elif name in BUILDERS and (torch or name not in NEEDS_TORCH):
            found[name] = out / "models" / f"{name}.onnx"
            if not found[name].exists():
                found[name].parent.mkdir(parents=True, exist_ok=True)
                BUILDERS[name](found[name])
        elif name not in BUILDERS:
            raise SystemExit(f"no model is called '{name}': choose from {', '.join([*BUILDERS, *reference])}")
    return found


def fold_with(tool: str, python: str, model: Path, output: Path) -> dict[str, Any]:
    """One tool on one model: its time and what it left, or why it failed."""
    script = Path(__file__).with_name("fold_tool.py")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [python, str(script), tool, str(model), str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {TIMEOUT_S} s"}
    if done.returncode or not output.exists():
        return {"failed": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    operators = count(onnx.load(output, load_external_data=False).graph)
    foreign = sorted(op for op in operators if "." in op)
    return {**said, "nodes": operators.total(), "operators": dict(operators), "foreign": foreign}


def race(rows: dict[str, Any], python: Callable[[str], str | None], model: Path, out: Path) -> dict[str, Any]:
    """Wall time of lamina against that of the fastest peer in ``rows``, in alternation."""
    peers = [t for t in PEERS if "nodes" in rows.get(t, {})]
    best = min(peers, key=lambda t: float(rows[t]["cpu"]))
    seconds: dict[str, list[float]] = {"lamina": [], best: []}
    for _ in range(RUNS):
        for tool, found in seconds.items():
            found.append(
                fold_with(tool, python(tool) or sys.executable, model, out / f"{tool}.onnx")["seconds"]
            )
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    medians = {tool: statistics.median(found) for tool, found in seconds.items()}
    return {
        "tool": best,
        "seconds": medians,
        "ratio": statistics.median(ratios),
        "spread": (ratios[0], ratios[-1]),
    }


def count(graph: onnx.GraphProto) -> Counter[str]:
    """Nodes per operator, subgraphs included; an operator of another domain carries its name."""
    found: Counter[str] = Counter()
    for node in graph.node:
        found[f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type] += 1
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                found += count(inner)
    return found


def latency(name: str, files: dict[str, Path], seconds: float) -> dict[str, float]:
    """Weighted latency of every file over the original's: in alternation, each in its own process."""
    from lamina.backends.backend import Target
    from lamina.backends.measure import IsolatedTimer
    from lamina.errors import LaminaError
    from lamina.ir.capture import capture
    from lamina.workload import parse_workload

    spec = next((case.workload for case in CASES if case.name == name), None)
    workload = parse_workload(spec, capture(files["original"]))
    found = {}
    with IsolatedTimer(Target("ort", "cpu", 1), workload) as timer:
        numbers = {}
        for tool, path in files.items():
            try:
                numbers[tool] = timer.add(path)
            except LaminaError as error:
                print(f"  {name}: {tool}'s model does not run: {error.what.splitlines()[0][:120]}")
        timings = timer.time(list(numbers.values()), None, seconds * len(numbers), cpu=True)
        for tool, number in numbers.items():
            ratios = [timings.ratio(number, numbers["original"], case.name).median for case in workload]
            found[tool] = sum(c.weight * r for c, r in zip(workload, ratios, strict=True))
    return found


def gaps(row: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Per peer that leaves fewer nodes: the operators it has fewer of, and how many."""
    mine, found = row["lamina"], {}
    for tool in PEERS:
        other = row.get(tool, {})
        if "nodes" in other and "nodes" in mine and other["nodes"] < mine["nodes"] and not other["foreign"]:
            more = Counter(mine["operators"])
            more.subtract(other["operators"])
            found[tool] = {op: n for op, n in more.most_common() if n}
    return found


def failures(name: str, row: dict[str, Any]) -> list[str]:
    """What must hold and does not."""
    mine, said = row["lamina"], []
    if "failed" in mine:
        return [f"{name}: lamina failed: {mine['failed']}"]
    if mine.get("equal") is False:
        said.append(f"{name}: the folded model is another function")
    others = {t: row[t] for t in PEERS if "nodes" in row.get(t, {})}
    for tool in gaps(row):
        said.append(f"{name}: {mine['nodes']} nodes, {tool} leaves {others[tool]['nodes']}")
    if "race" in row and row["race"]["ratio"] > MOST_RATIO:
        said.append(f"{name}: {row['race']['ratio']:.1f} times as long as {row['race']['tool']}")
    if name == "nodes100k" and mine["seconds"] > MOST_SECONDS:
        said.append(f"{name}: {mine['seconds']:.0f} s")
    times = row.get("latency", {})
    rivals = {t: s for t, s in times.items() if t not in ("lamina", "original") and not others[t]["foreign"]}
    if rivals and times["lamina"] > min(rivals.values()) * (1 + NOISE):
        best = min(rivals, key=lambda t: rivals[t])
        said.append(f"{name}: latency {times['lamina']:.3f}, {best} {rivals[best]:.3f}")
    return said


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Nodes, CPU seconds and latency per model and tool; what peers remove and lamina does not."""
    console = Console()
    table = Table(
        title="nodes left / CPU seconds to fold / latency over the original's", title_justify="left"
    )
    for column in ("model", "before", "lamina", "wall, unchecked", *PEERS):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, row in rows.items():
        mine = row["lamina"]
        unchecked = f"{mine['seconds'] - mine['checked_seconds']:.2f}" if "checked_seconds" in mine else ""
        cells = [_cell(row.get(tool), row.get("latency", {}).get(tool)) for tool in ("lamina", *PEERS)]
        table.add_row(name, str(row["nodes"]), cells[0], unchecked, *cells[1:])
    console.print(table)
    for name, row in rows.items():
        if "race" in row:
            raced = row["race"]
            low, high = raced["spread"]
            times = ", ".join(f"{tool} {seconds:.2f} s" for tool, seconds in raced["seconds"].items())
            console.print(
                f"{name}, wall, {RUNS} runs: {times}; ratio {raced['ratio']:.2f} ({low:.2f} to {high:.2f})"
            )
    for name, row in rows.items():
        for tool, operators in gaps(row).items():
            console.print(f"{name}: {tool} leaves fewer: {operators}", soft_wrap=True)


def _cell(found: dict[str, Any] | None, ratio: float | None) -> str:
    if not found:
        return ""
    if "failed" in found:
        return "failed"
    shown = f"{found['nodes']}{'*' if found['foreign'] else ''} / {found['cpu']:.2f}"
    return shown if ratio is None else f"{shown} / {ratio:.3f}"


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--models", help="comma-separated; all by default")
    parser.add_argument("--tools", default=",".join(PEERS), help="peers to run, comma-separated")
    parser.add_argument("--peers-python", help="a Python that has onnxslim and onnxsim")
    parser.add_argument("--time", action="store_true", help="measure the latency of the folded models")
    parser.add_argument("--seconds", type=float, default=3.0, help="wall seconds of timing a folded model")
    parser.add_argument("--out", type=Path, default=Path("out/fold"))
    given = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    for name, path in models(given.models.split(",") if given.models else None, given.out).items():
        row: dict[str, Any] = {"nodes": count(onnx.load(path, load_external_data=False).graph).total()}
        files = {"original": path}
        for tool in ("lamina", *given.tools.split(",")):
            python = _python(tool, given.peers_python)
            if python is None or (name in ALONE and tool != "lamina"):
                continue
            output = given.out.resolve() / name / f"{tool}.onnx"
            row[tool] = fold_with(tool, python, path, output)
            if "nodes" in row[tool]:
                files[tool] = output
        if name == f"decoder{LAYERS}" and any("nodes" in row.get(t, {}) for t in PEERS):
            row["race"] = race(
                row, lambda t: _python(t, given.peers_python), path, given.out.resolve() / name
            )
        if given.time and name not in ALONE:
            row["latency"] = latency(name, files, given.seconds)
        rows[name] = row
        broken += failures(name, row)
        print(f"{name}: " + ", ".join(f"{t} {_cell(row[t], None)}" for t in TOOLS if t in row), flush=True)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "fold.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    print("\n".join(broken) if broken else "everything that must hold does")
    return 1 if broken else 0


def _python(tool: str, elsewhere: str | None) -> str | None:
    if tool not in ELSEWHERE or importlib.util.find_spec(tool):
        return sys.executable
    return elsewhere


if __name__ == "__main__":
    sys.exit(main())
