"""Tables and progress on the terminal, from plain result data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

from lamina.errors import LaminaError
from lamina.progress import Progress


class LiveProgress(Progress):
    """Draws each stage as a bar with an estimate, on standard error."""

    def __init__(self, *, quiet: bool = False) -> None:
        super().__init__()
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            disable=quiet,
        )
        self._tasks: dict[str, Any] = {}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move a stage's bar; a total of 0 means that the amount of work is not known yet."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None, note="")
        fields = {"total": total or None, "completed": min(done, total) if total else 0, "note": escape(note)}
        self._bars.update(self._tasks[stage], **fields)

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


def result_tables(evidence: Mapping[str, Any], files: Sequence[str]) -> None:
    """Before and after, what was done, how long it took, what was written."""
    console = Console()
    before, after = evidence["original"], evidence["optimized"]
    table = Table(title=f"budget {evidence['budget']} on {evidence['target']}", title_justify="left")
    for name in ("", "original", "optimized", "ratio"):
        table.add_column(name, justify="left" if not name else "right")
    for case in evidence["workload"]:
        one, two = before["cases"][case["name"]], after["cases"][case["name"]]
        low, high = case["latency_ratio_spread"]
        table.add_row(
            f"latency {escape(case['name'])}",
            _seconds(one["median_s"]),
            _seconds(two["median_s"]),
            f"{case['latency_ratio']:.3f} ({low:.3f} to {high:.3f})",
        )
    table.add_row("size", _bytes(before["size_bytes"]), _bytes(after["size_bytes"]), f"{evidence['size_ratio']:.3f}")
    for key, show in (("peak_memory_bytes", _bytes), ("flops", _count), ("parameters", _count)):
        ratio = after[key] / before[key] if before[key] else 1.0
        table.add_row(key.replace("_bytes", "").replace("_", " "), show(before[key]), show(after[key]), f"{ratio:.3f}")
    interval = evidence["damage_ci95"]
    spread = "" if interval is None else f" ({interval[0]:+.4f} to {interval[1]:+.4f})"
    damage = f"damage {evidence['damage']:+.4f}{spread}"
    name = f"{escape(evidence['metric'])}, {evidence['n_report']} report samples"
    table.add_row(name, f"{before['metric']:.5g}", f"{after['metric']:.5g}", damage)
    console.print(table)
    _moves(console, evidence)
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in evidence["seconds"].items())
    console.print(f"[dim]time: {seconds}[/dim]")
    console.print("wrote " + escape(", ".join(files)))


def _moves(console: Console, evidence: Mapping[str, Any]) -> None:
    kept = [f["form"] for f in evidence["forms"] if f["kept"]]
    if kept:
        console.print(f"exact forms kept: {', '.join(kept)}")
    moves = Counter((m["transform"], m["option"], m["kind"]) for m in evidence["moves"])
    for (transform, option, kind), count in sorted(moves.items()):
        console.print(f"{transform}: {count} x {kind} -> {option}")
    if evidence["coverage"]["changed_nothing"]:
        console.print("[yellow]nothing was changed: no option measured faster within the budget[/yellow]")
    elif not moves:
        console.print("no lossy move was taken")
    if evidence["synthetic_data"]:
        console.print("[yellow]no data was given: inputs were made up, damage is only an indication[/yellow]")
    if evidence["report_looks"] > 1:
        console.print(f"report data was looked at {evidence['report_looks']} times")
    fell_back = evidence["audit"]["fell_back"]
    if fell_back:
        console.print(f"[yellow]{len(fell_back)} operators run as something else than planned[/yellow]")


def comparison_table(found: Mapping[str, Any]) -> None:
    """One row an output, and the verdict."""
    console = Console()
    table = Table(title=f"{found['samples']} samples", title_justify="left")
    for name in ("output", "max abs", "max rel", "max ulp"):
        table.add_column(name, justify="left" if name == "output" else "right")
    for row in found["outputs"]:
        ulp = "" if row["max_ulp"] is None else f"{row['max_ulp']:.3g}"
        table.add_row(escape(row["name"]), f"{row['max_abs']:.3g}", f"{row['max_rel']:.3g}", ulp)
    console.print(table)
    if "quality" in found:
        quality = found["quality"]
        console.print(
            f"{escape(quality['metric'])}: {quality['original']:.5g} -> {quality['optimized']:.5g}, "
            f"damage {quality['damage']:+.5f}"
        )
    word = "[green]equal[/green]" if found["equal"] else "[red]different[/red]"
    console.print(f"{word} at tolerance {found['tolerance']:g}")


def bench_table(target: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a model and case; ratios are against the first model, round by round."""
    table = Table(title=f"{target}, isolated processes, in alternation", title_justify="left")
    for name in ("model", "case", "median", "minimum", "spread", "ratio"):
        table.add_column(name, justify="left" if name in ("model", "case") else "right")
    for row in rows:
        table.add_row(
            escape(row["model"]),
            escape(row["case"]),
            _seconds(row["median_s"]),
            _seconds(row["minimum_s"]),
            _seconds(row["spread_s"]),
            f"{row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f})",
        )
    Console().print(table)


def analysis_table(found: Mapping[str, Any]) -> None:
    """Branches with what they cost and their metrics, then operators by FLOPs."""
    console = Console()
    for part in ("branches", "operators"):
        rows = found[part]
        names = sorted({m for row in rows for m in row["metrics"]})
        table = Table(title=f"{len(rows)} {part}", title_justify="left")
        for name in ("name", "kind", "parameters", "flops", "latency", *names):
            table.add_column(name, justify="left" if name in ("name", "kind") else "right")
        shown = rows if part == "branches" else sorted(rows, key=lambda r: -r["flops"])[:20]
        for row in shown:
            latency = "" if row["latency_s"] is None else _seconds(row["latency_s"])
            values = [f"{row['metrics'][n]:.4g}" if n in row["metrics"] else "" for n in names]
            table.add_row(
                escape(row["name"]), row["kind"], _count(row["parameters"]), _count(row["flops"]), latency, *values
            )
        console.print(table)


def error_text(error: LaminaError) -> None:
    """One error, plainly, on standard error."""
    console = Console(stderr=True)
    console.print(f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}", highlight=False)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3f} ms" if value < 1 else f"{value:.3f} s"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.3f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def _count(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {suffix}"
    return f"{value:.0f}"
