"""Tables and progress on the terminal, from plain result data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
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
        console = Console(stderr=True)
        self._bars = RichProgress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=quiet or not console.is_terminal,  # bars in a log file help nobody
        )
        self._tasks: dict[str, Any] = {}

    def update(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Move a stage's bar; a total of 0 means that the amount of work is not known yet."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(stage, total=None, note="")
        self._bars.update(
            self._tasks[stage],
            total=total or None,
            completed=min(done, total) if total else 0,
            note=escape(note),
        )

    def __enter__(self) -> LiveProgress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()


def result_tables(evidence: Mapping[str, Any], files: Sequence[str]) -> None:
    """Before and after, what was done, how long it took, what was written."""
    console = Console()
    console.print(_before_and_after(evidence))
    _met(console, evidence)
    _moves(console, evidence)
    _warnings(console, evidence)
    seconds = ", ".join(f"{k} {v:.1f} s" for k, v in evidence["seconds"].items())
    console.print(f"[dim]time: {seconds}[/dim]")
    folder = os.path.commonpath([os.path.dirname(f) or "." for f in files])
    names = ", ".join(os.path.relpath(f, folder) for f in files)
    console.print(escape(f"wrote {names} in {folder}"), soft_wrap=True)


def _before_and_after(evidence: Mapping[str, Any]) -> Table:
    before, after = evidence["original"], evidence["optimized"]
    table = _table(f"budget {evidence['budget']} on {evidence['target']}")
    for name in ("", "original", "optimized", "ratio", "spread"):
        # A number that wraps cannot be read; a long case name may.
        table.add_column(name, justify="right" if name else "left", no_wrap=bool(name), overflow="fold")
    for case in evidence["workload"]:
        one, two = before["cases"][case["name"]], after["cases"][case["name"]]
        low, high = case["latency_ratio_spread"]
        table.add_row(
            f"latency {escape(case['name'])}",
            _seconds(one["median_s"]),
            _seconds(two["median_s"]),
            f"{case['latency_ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
        )
    for key, show in (
        ("size_bytes", _bytes),
        ("peak_memory_bytes", _bytes),
        ("flops", _count),
        ("parameters", _count),
    ):
        ratio = f"{after[key] / before[key]:.3f}" if before[key] else ""
        table.add_row(key.replace("_bytes", "").replace("_", " "), show(before[key]), show(after[key]), ratio)
    table.add_row(escape(evidence["metric"]), f"{before['metric']:.5g}", f"{after['metric']:.5g}")
    interval = evidence["damage_ci95"]
    spread = "" if interval is None else f"{interval[0]:+.4f} to {interval[1]:+.4f}"
    table.add_row("damage", "", f"{evidence['damage']:+.4f}", "", spread)
    return table


def _met(console: Console, evidence: Mapping[str, Any]) -> None:
    predicted, measured = evidence["predicted"], evidence["measured"]
    for axis, check in evidence["met"].items():
        word = "[green]met[/green]" if check["met"] else "[red]not met[/red]"
        reached, allowed = (_AMOUNTS[axis](check[key]) for key in ("reached", "allowed"))
        console.print(f"{axis} {word}: {reached}, allowed {allowed}", highlight=False)
    pairs = (f"{k} {predicted[k]:.3f} -> {measured[k]:.3f}" for k in ("latency", "damage"))
    console.print(f"predicted -> measured: {', '.join(pairs)}", highlight=False)
    if "original_on_onnxruntime_s" in evidence:
        elsewhere = _seconds(evidence["original_on_onnxruntime_s"])
        console.print(f"the original in ONNX Runtime, as many threads: {elsewhere}", highlight=False)
    counts = ", ".join(f"{evidence[f'n_{part}']} {part}" for part in ("calibration", "selection", "report"))
    console.print(f"[dim]samples: {counts}[/dim]")
    clock = "CPU time of the one thread" if evidence.get("clock") == "cpu" else "wall time"
    console.print(f"[dim]latency: {clock}, spread 10th to 90th percentile; damage: 95 % interval[/dim]")


def _moves(console: Console, evidence: Mapping[str, Any]) -> None:
    kept = [f["form"] for f in evidence["forms"] if f["kept"]]
    if kept:
        console.print(f"exact forms kept: {', '.join(kept)}")
    moves = Counter((m["transform"], m["option"], m["kind"]) for m in evidence["moves"])
    for (transform, option, kind), count in sorted(moves.items()):
        console.print(f"{transform}: {count} x {kind} -> {option}")
    if "quantization" in evidence:
        _widths(console, evidence["widths"])
    touched = evidence["coverage"]
    if touched["changed_nothing"]:
        console.print("[yellow]nothing was changed: no option measured better within the budget[/yellow]")
    elif not moves:
        console.print("no lossy move was taken")
    else:
        console.print(
            f"touched: {touched['time']:.0%} of the time, {touched['bytes']:.0%} of the weight bytes, "
            f"{touched['operators']:.0%} of the weighted operators",
            highlight=False,
        )
    _caches(console, evidence.get("kv_cache"))
    _rounding(console, evidence.get("rounding"))
    _compensation(console, evidence.get("compensation"))


def _widths(console: Console, found: Mapping[str, Any]) -> None:
    """How many operators have how many bits."""
    pairs = [f"{count} in {width}" for width, count in found["operators"].items()]
    if pairs:
        console.print(
            f"weighted operators by bits: {', '.join(pairs)}; {found['mean_bits']:.2f} bits a weight",
            highlight=False,
        )


def _caches(console: Console, found: Sequence[Mapping[str, Any]] | None) -> None:
    """What changed at the interface: a caller must know it."""
    if found:
        names = ", ".join(f"{cache['past']} -> {cache['present']}" for cache in found)
        text = f"interface changed: {len(found)} caches are int8, with the scales in result.json: {names}"
        console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)


def _rounding(console: Console, found: Mapping[str, Any] | None) -> None:
    """What rounding weights against data did to the divergence on selection data."""
    if found is not None:
        word = "kept" if found["kept"] else "not kept"
        console.print(
            f"rounding ({found['method']}) {word}: {found['operators']} operators, "
            f"divergence on selection data {found['before']:.3g} -> {found['after']:.3g}",
            highlight=False,
        )


def _compensation(console: Console, found: Mapping[str, Any] | None) -> None:
    """What refitting weights behind the moves did to the damage on selection data."""
    if found is None:
        return
    if not found["operators"] and not found["paths"]:
        console.print("compensation: no refitted operator brought the outputs nearer to the original's")
        return
    word = "kept" if found["kept"] else "not kept"
    console.print(
        f"compensation {word}: {found['operators']} operators refitted, {found['paths']} low-rank paths, "
        "damage on selection data "
        f"{found['before']:+.4f} -> {found['after']:+.4f}",
        highlight=False,
    )


def _warnings(console: Console, evidence: Mapping[str, Any]) -> None:
    if evidence["synthetic_data"]:
        trust = evidence.get("quantization", {}).get("trust")
        said = trust or "no data was given: inputs were made up, damage is only an indication"
        console.print(f"[yellow]{escape(said)}[/yellow]", highlight=False)
    if evidence["report_looks"] > 1:
        console.print(f"report data was looked at {evidence['report_looks']} times")
    for entry in evidence["undone"]:
        text = f"left out: {entry['pass']} ({entry['where']}): {entry['reason']}"
        console.print(f"[yellow]{escape(text)}[/yellow]", highlight=False, soft_wrap=True)
    fell_back = evidence["audit"]["fell_back"]
    if fell_back:
        console.print(f"[yellow]{len(fell_back)} operators run as something else than planned[/yellow]")


def comparison_table(found: Mapping[str, Any]) -> None:
    """One row an output, what differs as graphs, where the models part, and the verdict."""
    console = Console()
    table = _table(f"{found['samples']} inputs")
    for name in ("output", "max abs", "mean abs", "max rel", "max ulp", "allowed"):
        table.add_column(name, justify="left" if name == "output" else "right", overflow="fold")
    for row in found["outputs"]:
        numbers = (row[key] for key in ("max_abs", "mean_abs", "max_rel", "max_ulp", "tolerance"))
        table.add_row(escape(row["name"]), *("" if n is None else f"{n:.3g}" for n in numbers))
    console.print(table)
    for line in (*_structure(found["structure"]), *_left_out(found), *_parting(found["first_divergence"])):
        console.print(escape(line), highlight=False, soft_wrap=True)
    if "quality" in found:
        quality = found["quality"]
        console.print(
            f"{escape(quality['metric'])}: {quality['original']:.5g} -> {quality['optimized']:.5g}, "
            f"damage {quality['damage']:+.5f}"
        )
    word = "[green]equal[/green]" if found["equal"] else "[red]different[/red]"
    console.print(f"{word} at tolerance {found['tolerance']:g}")


def _structure(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"interface: {line}" for line in found["interface"])
    yield from (f"shapes: {line}" for line in found["shapes"])
    if found["random"]:
        yield f"draws random numbers, so outputs differ from run to run: {', '.join(found['random'])}"
    for domain, (one, other) in found["opsets"].items():
        yield f"opset of {domain}: {one} -> {other}"
    one, other = found["nodes"]
    kinds = ", ".join(f"{name} {a} -> {b}" for name, (a, b) in found["operators"].items())
    if kinds:
        yield f"nodes: {one} -> {other} ({kinds})"
    counts, sizes = found["initializers"], found["initializer_bytes"]
    if counts[0] != counts[1] or sizes[0] != sizes[1]:
        yield f"weights: {counts[0]} -> {counts[1]}, {_bytes(sizes[0])} -> {_bytes(sizes[1])}"


def _left_out(found: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"only the second model fails on {line}" for line in found["failures"])
    yield from (f"{o['name']}: {o['reason']} on {o['worst_input']}" for o in found["outputs"] if o["reason"])
    if found["skipped"]:
        yield f"{found['skipped']} inputs were skipped: the first model does not run on them"
    if found["ill_conditioned"]:
        yield f"{found['ill_conditioned']} edge inputs say nothing: rounding them moves the first as far"


def _parting(found: Mapping[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    yield f"the models part at '{found['name']}', made by {found['operator']} '{found['node']}'"
    if found["matched_by"] == "value":
        yield "  no tensor of the second model equals it (they share no inner names)"
    if found["other_node"] is not None:
        other = f"'{found['other_name']}', {found['other_operator']} '{found['other_node']}'"
        yield f"  in the second model: {other}"
    ulp = "" if found["max_ulp"] is None else f", {found['max_ulp']:.3g} ulp"
    yield f"  max abs {found['max_abs']:.3g}, max rel {found['max_rel']:.3g}{ulp} on {found['input']}"
    if found["agrees"]:
        yield f"  what it is computed from agrees: {', '.join(found['agrees'])}"


def bench_table(target: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """One row a model and case; ratios are against the first model, round by round."""
    table = _table(f"{target}, isolated processes, in alternation")
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


def error_text(error: LaminaError) -> None:
    """One error, plainly, on standard error."""
    console = Console(stderr=True)
    console.print(
        f"[bold red]{type(error).__name__}[/bold red]: {escape(str(error))}", highlight=False, soft_wrap=True
    )


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3f} ms" if value < 1 else f"{value:.3f} s"


def _bytes(value: float) -> str:
    return f"{value / 1e6:.3f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"


def _count(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.2f} {suffix}"
    return f"{value:.0f}"


_AMOUNTS: Mapping[str, Callable[[float], str]] = {
    "latency": _seconds,
    "size": _bytes,
    "memory": _bytes,
    "flops": _count,
    "drop": lambda value: f"{value:+.4f}",
}
