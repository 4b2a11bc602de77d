"""Tables and a plot of what ``python -m tools.studies.depth`` measured.

    python -m tools.studies.depth.page depth_repair.json --svg docs/depth_repair.svg

Prints one table a model, and the summary: the geometric mean over models of damage with repair over damage
without, at a share of the branches removed.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WAYS = ("drop", "unrepaired", "repaired", "bias", "diagonal", "full")
COLOURS = {
    "drop": "#888888",
    "unrepaired": "#d08030",
    "repaired": "#1f5fbf",
    "bias": "#9c6fb0",
    "diagonal": "#6f9c50",
    "full": "#b04040",
}
WIDTH, HEIGHT, MARGIN = 420, 260, 52
Model = Mapping[str, Any]


def tables(models: Sequence[Model]) -> Iterator[str]:
    """Markdown lines."""
    for model in models:
        ways = [w for w in WAYS if w in model["rows"][0]]
        n = model["n"]
        original = model["original"]["report"]
        yield f"### {model['model']}"
        yield ""
        yield (
            f"{model['metric']} {_shown(model, original)} of the original, {model['branches']} branches; "
            f"n = {n['calibration']} calibration, {n['order']} for the order, {n['report']} report."
        )
        yield ""
        heads = [f"{way}: {model['metric']}, damage (95 %), {model['divergence']}" for way in ways]
        yield "| gone | latency | " + " | ".join(heads) + " | gone last (drop; repaired) |"
        yield "| " + " | ".join("-" for _ in range(len(ways) + 3)) + " |"
        for row in model["rows"]:
            cells = [_cell(model, row[way]) for way in ways]
            last = "; ".join(row[way]["branches"][-1] for way in ("drop", "repaired"))
            times = f"{row['drop']['latency']:.3f}; {row['repaired']['latency']:.3f}"
            yield f"| {row['removed']} | {times} | " + " | ".join(cells) + f" | {last} |"
        yield ""


def summary(models: Sequence[Model], share: float) -> Iterator[str]:
    """Damage with repair over damage without, at ``share`` of the branches.

    Without repair is the better of both orders, in each measure by itself.
    """
    pairs: dict[str, list[float]] = {"divergence": [], "damage": []}
    yield "| model | gone | divergence | with repair | ratio | damage | with repair | ratio |"
    yield "| - | - | - | - | - | - | - | - |"
    for model in models:
        row = _row_at(model, share)
        cells = [model["model"], f"{row['removed']} of {model['branches']}"]
        for key, found in pairs.items():
            before, after = min(row[w][key] for w in ("drop", "unrepaired")), row["repaired"][key]
            ratio = _ratio(before, after)
            cells += [f"{before:.4g}", f"{after:.4g}", "-" if ratio is None else f"{ratio:.2f}"]
            found += [] if ratio is None else [ratio]
        yield "| " + " | ".join(cells) + " |"
    for key, found in pairs.items():
        if found:
            yield ""  # a line right below a table would be a row of it
            mean = math.exp(sum(math.log(r) for r in found) / len(found))
            yield f"Geometric mean of the ratios of {key}, {len(found)} models: {mean:.2f}"


def _row_at(model: Model, share: float) -> Mapping[str, Any]:
    found: Mapping[str, Any] = min(model["rows"], key=lambda r: abs(r["removed"] - share * model["branches"]))
    return found


def _ratio(before: float, after: float) -> float | None:
    """None where a ratio says nothing: a side is no damage at all."""
    return after / before if before > 0 and after > 0 else None


def _shown(model: Model, value: float) -> str:
    return f"{value:.4f}" if model["metric"] == "cross-entropy" else f"{100 * value:.2f}"


def _cell(model: Model, found: Mapping[str, Any]) -> str:
    points = 100 * found["damage"]
    spread = (
        ""
        if found["damage_ci95"] is None
        else " ({:+.2f} to {:+.2f})".format(*(100 * x for x in found["damage_ci95"]))
    )
    return f"{_shown(model, found['report'])}, {points:+.2f}{spread}, {found['divergence']:.3g}"


def svg(models: Sequence[Model]) -> str:
    """One panel a model: damage on report data against measured latency, a line a way."""
    columns = 2
    rows = -(-len(models) // columns)
    width, height = columns * WIDTH, rows * HEIGHT + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, model in enumerate(models):
        x, y = number % columns * WIDTH, number // columns * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">')
        parts += _panel(model)
        parts.append("</g>")
    ways = [w for w in WAYS if any(w in m["rows"][0] for m in models)]
    for place, way in enumerate(ways):
        x, y = MARGIN + 130 * place, height - 12
        parts.append(f'<line x1="{x}" y1="{y - 4}" x2="{x + 20}" y2="{y - 4}" stroke="{COLOURS[way]}" '
                     f'stroke-width="2"/><text x="{x + 26}" y="{y}">{way}</text>')  # fmt: skip
    return "\n".join([*parts, "</svg>", ""])


def _panel(model: Model) -> Iterator[str]:
    ways = [w for w in WAYS if w in model["rows"][0]]
    lines = {
        way: [(1.0, 0.0), *((row[way]["latency"], 100 * row[way]["damage"]) for row in model["rows"])]
        for way in ways
    }
    points = [p for line in lines.values() for p in line]
    left, right = min(p[0] for p in points) - 0.01, max(1.0, *(p[0] for p in points)) + 0.01
    low, high = min(p[1] for p in points), max(p[1] for p in points)
    low, high = low - 0.05 * (high - low), high + 0.05 * (high - low) + 1e-9

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = MARGIN + (point[0] - left) / (right - left) * (WIDTH - MARGIN - 16)
        y = HEIGHT - MARGIN - (point[1] - low) / (high - low) * (HEIGHT - MARGIN - 30)
        return x, y

    yield f'<text x="{MARGIN}" y="18" font-size="13">{escape(model["model"])} ({model["metric"]})</text>'
    yield (
        f'<rect x="{MARGIN}" y="30" width="{WIDTH - MARGIN - 16}" height="{HEIGHT - MARGIN - 30}" '
        'fill="none" stroke="#bbbbbb"/>'
    )
    for value in _ticks(left, right):
        x, _ = place((value, low))
        yield f'<text x="{x:.1f}" y="{HEIGHT - MARGIN + 14}" text-anchor="middle">{value:g}</text>'
    for value in _ticks(low, high):
        _, y = place((left, value))
        yield f'<text x="{MARGIN - 5}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'
        yield (
            f'<line x1="{MARGIN}" y1="{y:.1f}" x2="{WIDTH - 16}" y2="{y:.1f}" '
            f'stroke="{"#999999" if value == 0 else "#eeeeee"}"/>'
        )
    yield (
        f'<text x="{(WIDTH + MARGIN) / 2:.0f}" y="{HEIGHT - MARGIN + 30}" text-anchor="middle">'
        "latency over the original's</text>"
    )
    yield (
        f'<text transform="translate(12 {HEIGHT / 2:.0f}) rotate(-90)" text-anchor="middle">damage, %</text>'
    )
    for way, line in lines.items():
        where = [place(p) for p in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in where)
        yield f'<polyline points="{path}" fill="none" stroke="{COLOURS[way]}" stroke-width="1.5"/>'
        for x, y in where:
            yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{COLOURS[way]}"/>'


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers between two bounds, three to eight of them."""
    step = 10 ** math.floor(math.log10(high - low))
    for by in (1, 0.5, 0.2, 0.1):
        if (high - low) / (step * by) >= 3:
            step *= by
            break
    return [round(i * step, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def main() -> None:
    """Print tables, write the plot."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON of the study")
    parser.add_argument("--svg", type=Path, help="where the plot goes")
    parser.add_argument("--share", type=float, default=0.2, help="share of branches of the summary")
    options = parser.parse_args()
    models = [model for file in options.files for model in json.loads(file.read_text())]
    print("\n".join([*tables(models), *summary(models, options.share)]))
    if options.svg is not None:
        options.svg.write_text(svg(models))


if __name__ == "__main__":
    main()
