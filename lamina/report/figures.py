"""The figures of an analysis: similarity of depths, importance by depth, bits and sensitivity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lamina.errors import OutputError
from lamina.report.charts import MOST_CELLS_A_SIDE, Panel, Scale, bar_panels, heat_map
from lamina.report.drawing import Drawing, svg
from lamina.report.raster import available, png
from lamina.report.scores import REDUNDANCY, redundancy
from lamina.report.text import number, percent, seconds
from lamina.report.tree import whole_time

NAMES = ("similarity", "cka", "skip-effect", "importance", "bits", "bits-damage")
_UNITS = {"kl": "nats of KL", "cosine": "1 - cosine", "relative-l2": "relative L2"}


def figures(found: Mapping[str, Any]) -> dict[str, Drawing]:
    """Every figure the analysis has the numbers for, by the name of its file.

    ``similarity`` (angular distances of any two depths), ``cka`` (linear CKA likewise), ``skip-effect``,
    ``importance`` (metrics and time of branches in order), ``bits`` (output error by operator and width) and
    ``bits-damage`` (the same, measured).
    """
    tables = found["matrices"]
    made: dict[str, Drawing] = {}
    if "angular-distance" in tables:
        made["similarity"] = _depths(
            tables["angular-distance"],
            "How far apart any two depths are",
            (
                "Angle over pi between the stream at two depths (last token, mean over samples).",
                "Dark blocks: depths of nearly one direction; what lies between them is a candidate.",
            ),
            "angle / pi",
        )
    if "linear-cka" in tables:
        made["cka"] = _depths(
            tables["linear-cka"],
            "How alike any two depths arrange the samples",
            ("Linear CKA of the same tokens at two depths; 1 = alike but for a rotation.",),
            "CKA",
            Scale(0.0, 1.0),
        )
    if tables.get("skip-effect", {}).get("columns"):
        made["skip-effect"] = _skips(tables["skip-effect"])
    if found["branches"]:
        made["importance"] = _importance(found)
    if "quantization-error" in tables:
        made["bits"] = _bits(
            tables["quantization-error"],
            "What fewer bits do to each operator",
            ("Squared change of the operator's output over its squared size, weights rounded.",),
            "relative",
        )
    if "output-kl" in tables:
        unit = _UNITS.get(found["damages"]["metric"], found["damages"]["metric"])
        made["bits-damage"] = _bits(
            tables["output-kl"],
            "What fewer bits in one operator do to the outputs",
            (f"Measured: one operator's weights rounded at a time, {found['damages']['samples']} samples.",),
            unit,
        )
    return {name: drawing for name, drawing in made.items() if drawing.items}


def planned(folder: Path) -> list[Path]:
    """Every file that :func:`write_figures` may write into ``folder``."""
    return [folder / f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")]


def refuse_to_overwrite(folder: Path) -> None:
    """Raise before any work where a figure would replace a file.

    Raises:
        OutputError: A file of that name is there.
    """
    there = [path.name for path in planned(folder) if path.exists()]
    if there:
        what = f"'{folder}' already holds {', '.join(there)}"
        raise OutputError(what, advice="choose another directory, or --force to replace them")


def write_figures(
    found: Mapping[str, Any], folder: Path, write: Callable[[Path, bytes], Any]
) -> tuple[list[Path], bool]:
    """Write each figure as SVG, and as PNG where Pillow is installed.

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        folder: Where to; it exists.
        write: Writes one file in one step.

    Returns:
        The files, and whether PNG was possible.

    Raises:
        OutputError: As ``write``.
    """
    also_png, written = available(), []
    for name, drawing in figures(found).items():
        for path, content in _contents(folder / name, drawing, also_png):
            write(path, content)
            written.append(path)
    return written, also_png


def _contents(base: Path, drawing: Drawing, also_png: bool) -> Iterable[tuple[Path, bytes]]:
    yield base.with_name(f"{base.name}.svg"), svg(drawing).encode()
    if also_png:
        yield base.with_name(f"{base.name}.png"), png(drawing)


def _depths(
    table: Mapping[str, Any], title: str, notes: Sequence[str], unit: str, scale: Scale | None = None
) -> Drawing:
    if any(value is None for row in table["values"] for value in row):
        notes = (*notes, "Grey: the two depths differ in width or in the number of places.")
    return heat_map(title, notes, table["rows"], table["columns"], table["values"], scale=scale, unit=unit)


def _skips(table: Mapping[str, Any]) -> Drawing:
    positive = [v for row in table["values"] for v in row if v is not None]
    notes = ("Measured change of the stream at later depths (columns) when a branch (rows) is skipped.",)
    return heat_map(
        "How far a skipped branch is felt",
        notes,
        table["rows"],
        table["columns"],
        table["values"],
        scale=Scale.of(positive, log=True, decades=4),
        unit="relative change",
    )


def _importance(found: Mapping[str, Any]) -> Drawing:
    branches = found["branches"]
    first = redundancy(found)
    chosen = [first.source] if first else []
    chosen += [s for s in REDUNDANCY[1:4] if s not in chosen]
    panels = []
    for source in chosen[:3]:
        values = [_number(b["metrics"].get(source.metric)) for b in branches]
        if any(v is not None for v in values):
            panels.append(Panel(f"{source.metric}: {source.says}", values, number))
    whole = whole_time(found)
    if whole:
        shares = [None if b["latency_s"] is None else b["latency_s"] / whole for b in branches]
        panels.append(Panel(f"time: share of a run of {seconds(whole)}", shares, percent))
    else:
        total = found["totals"]["flops"] or 1
        panels.append(Panel("FLOPs: share of the whole", [b["flops"] / total for b in branches], percent))
    notes = ["Branches in the order they run. A low bar over a high share of the time: a branch to drop."]
    if first and first.source.high:
        notes = ["Branches in the order they run."]
    return bar_panels(
        "Importance by depth", notes, [b["name"] for b in branches], [b["kind"] for b in branches], panels
    )


def _bits(table: Mapping[str, Any], title: str, notes: Sequence[str], unit: str) -> Drawing:
    """Operators by width; of very many the most sensitive."""
    rows, values = list(table["rows"]), list(table["values"])
    if len(rows) > MOST_CELLS_A_SIDE:
        order = sorted(range(len(rows)), key=lambda i: -max((v or 0.0 for v in values[i]), default=0.0))
        keep = sorted(order[:MOST_CELLS_A_SIDE])
        notes = (*notes, f"The {len(keep)} most sensitive of {len(rows)} operators.")
        rows, values = [rows[i] for i in keep], [values[i] for i in keep]
    present = [v for row in values for v in row if v is not None]
    columns = [f"{bits} bit" for bits in table["columns"]]
    return heat_map(
        title,
        notes,
        rows,
        columns,
        values,
        scale=Scale.of(present, log=True),
        cell=(58.0, 15.0),
        numbers=True,
        unit=unit,
    )


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value == value and abs(value) < 1e300 else None
