"""One model's contest as a drawing: damage against measured latency, a line a contender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from lamina.report.charts import Scale
from lamina.report.drawing import FAINT, INK, Drawing, Label, Line, Rect
from tools.studies.depth.contest import MIX

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _NAMES = 800.0, 440.0, 56.0, 44.0, 40.0, 210.0
_COLOURS = (
    *("#33658a", "#f26419", "#2a9d8f", "#8f5db7", "#86a33b", "#b5485d", "#c9a227", "#5c6f7b"),
    *("#e08e79", "#4f9bd9", "#7a4b2a", "#d16ba5", "#3d5a3d", "#a0a0a0", "#6b6bd6", "#b07d62"),
)
_PLAIN, _MENDED = 6.0, 3.0
Point = tuple[float, float]


def plot(model: Mapping[str, Any]) -> Drawing:
    """Large squares: as planned; small ones: compensated, where that was kept. Both at the same latency."""
    found = points(model)
    every = [p for plain, mended in found.values() for p in (*plain, *mended)]
    drawing = Drawing(f"{model['model']}: damage against latency", _WIDTH, _HEIGHT)
    drawing.add(Label(_LEFT, 18, f"{model['model']}: damage on report samples against measured latency", 13))
    drawing.add(Label(_LEFT, 34, "large: as planned; small: the same plan, compensated", 10, color=FAINT))
    if not every:
        return drawing
    across = Scale.of([p[0] for p in every])
    up = Scale.of([p[1] for p in every])
    right, bottom = _WIDTH - _NAMES, _HEIGHT - _BOTTOM

    def place(point: Point) -> Point:
        return (
            _LEFT + across.share(point[0]) * (right - _LEFT),
            bottom - up.share(point[1]) * (bottom - _TOP),
        )

    for value in across.ticks():
        drawing.add(Label(place((value, up.low))[0], bottom + 14, f"{value:.2f}", 10, "middle"))
    for value in up.ticks():
        y = place((across.low, value))[1]
        drawing.add(
            Line(_LEFT, y, right, y, "#e4e4e4"), Label(_LEFT - 5, y + 3, f"{100 * value:.1f}", 10, "end")
        )
    drawing.add(Label((_LEFT + right) / 2, _HEIGHT - 8, "latency over the original's", 11, "middle"))
    drawing.add(Label(14, (_TOP + bottom) / 2, "damage, points or %", 11, "middle", turned=True))
    for number, (name, (plain, mended)) in enumerate(found.items()):
        color = INK if name == MIX else _COLOURS[number % len(_COLOURS)]
        drawing.add(*_line([place(p) for p in plain], color, 2.5 if name == MIX else 1.0, _PLAIN))
        drawing.add(*_line([place(p) for p in mended], color, 0.5, _MENDED))
        y = _TOP + 8 + 20 * number
        drawing.add(
            Rect(right + 14, y - 6, _PLAIN, _PLAIN, color), Label(right + 26, y, name, 10, bold=name == MIX)
        )
    return drawing


def points(model: Mapping[str, Any]) -> dict[str, tuple[list[Point], list[Point]]]:
    """Contender -> (latency, damage) of its plans by latency, as planned and compensated."""
    found: dict[str, tuple[list[Point], list[Point]]] = {}
    for level in model["levels"]:
        for contender in level["plans"]:
            plan = contender["plan"]
            if plan is None:
                continue
            plain, mended = found.setdefault(contender["name"], ([], []))
            plain.append((plan["latency"], plan["damage"]))
            if "compensated" in plan:
                mended.append((plan["latency"], plan["compensated"]["damage"]))
    return {name: (sorted(plain), sorted(mended)) for name, (plain, mended) in found.items()}


def _line(where: Sequence[Point], color: str, width: float, side: float) -> Iterator[Line | Rect]:
    for (x1, y1), (x2, y2) in pairwise(where):
        yield Line(x1, y1, x2, y2, color, width)
    for x, y in where:
        yield Rect(x - side / 2, y - side / 2, side, side, color)
