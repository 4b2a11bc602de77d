"""Heat maps and bar panels as drawings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina.report.drawing import FAINT, INK, MISSING, Color, Drawing, Label, Line, Rect, text_width
from lamina.report.text import number, shorten

# Dark to light, readable in grey and for the colour-blind: anchors of viridis (CC0, matplotlib authors).
_VIRIDIS = ("#440154", "#472c7a", "#3b518b", "#2c718e", "#21908d", "#27ad81", "#5cc863", "#aadc32", "#fde725")
_BARS = ("#33658a", "#f26419", "#2a9d8f", "#8f5db7", "#86a33b", "#b5485d")
# Rows and columns shown at most: beyond, evenly thinned.
MOST_CELLS_A_SIDE = 160
_TIPS = 2600
_MARGIN, _NAME_CELLS = 16.0, 34


@dataclass(frozen=True)
class Scale:
    """Maps values to 0..1.

    Attributes:
        low: What is 0.
        high: What is 1.
        log: Whether between them values count by their logarithm.
    """

    low: float
    high: float
    log: bool = False

    @staticmethod
    def of(values: Sequence[float], *, log: bool = False, decades: float = 6.0) -> Scale:
        """The scale that holds the values; logarithmic ones at most so many decades below the largest."""
        high = max(values, default=1.0)
        if not log:
            low = min(values, default=0.0)
            return Scale(low, high if high > low else low + 1.0)
        high = high if high > 0 else 1.0
        positive = [v for v in values if v > 0]
        low = max(min(positive, default=high / 10), high * 10**-decades)
        return Scale(low if low < high else high / 10, high, log=True)

    def share(self, value: float) -> float:
        """Where the value lies, cut to 0..1."""
        if self.log:
            if value <= self.low:
                return 0.0
            return min(1.0, math.log(value / self.low) / math.log(self.high / self.low))
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def ticks(self) -> list[float]:
        """A few values to label."""
        if not self.log:
            return [self.low + (self.high - self.low) * i / 4 for i in range(5)]
        return [self.low * (self.high / self.low) ** (i / 4) for i in range(5)]


def color_of(share: float) -> Color:
    """Viridis at 0..1."""
    place = min(max(share, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    low, high = (_channels(_VIRIDIS[index + i]) for i in (0, 1))
    mixed = (round(a + (b - a) * (place - index)) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{c:02x}" for c in mixed)


def heat_map(
    title: str,
    notes: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    scale: Scale | None = None,
    cell: tuple[float, float] | None = None,
    numbers: bool = False,
    unit: str = "",
) -> Drawing:
    """A table as colours, with a colour bar; grey where there is no number.

    Args:
        title: What it shows.
        notes: Lines below the title.
        rows: Names at the left.
        columns: Names above.
        values: One list a row.
        scale: Of the colours; None: from the least to the greatest value.
        cell: Width and height of a cell in points; None: as fits.
        numbers: Write each value into its cell.
        unit: Written above the colour bar.
    """
    keep, across = _thinned(len(rows)), _thinned(len(columns))
    scale = scale or Scale.of([v for row in values for v in row if v is not None])
    wide, high = cell or (_side(len(across)), _side(len(keep)))
    left = _MARGIN + _names_width([rows[i] for i in keep])
    drawing, top = _sheet(title, notes)
    above = _names_width([columns[j] for j in across]) if not numbers else 18.0
    top += above
    tips = len(keep) * len(across) <= _TIPS
    for y, i in enumerate(keep):
        for x, j in enumerate(across):
            value = values[i][j]
            fill = MISSING if value is None else color_of(scale.share(value))
            tip = (
                ""
                if not tips
                else f"{rows[i]} / {columns[j]}: {'no number' if value is None else number(value)}"
            )
            drawing.add(Rect(left + x * wide, top + y * high, wide, high, fill, tip))
            if numbers and value is not None:
                ink = INK if scale.share(value) > 0.6 else "#ffffff"
                place = left + (x + 0.5) * wide, top + (y + 0.5) * high + 3
                drawing.add(Label(*place, f"{value:.1e}" if value else "0", 9, "middle", color=ink))
    _row_names(drawing, [rows[i] for i in keep], left - 5, top, high)
    _column_names(drawing, [columns[j] for j in across], left, top - 5, wide, turned=not numbers)
    right, bottom = left + len(across) * wide, top + len(keep) * high
    edge = _color_bar(drawing, scale, right + 24, top, max(120.0, min(bottom - top, 260.0)), unit)
    if len(keep) < len(rows) or len(across) < len(columns):
        drawing.add(Label(_MARGIN, bottom + 16, f"{len(keep)} of {len(rows)} rows shown", 10, color=FAINT))
    drawing.width = max(edge, _widest(drawing)) + _MARGIN
    drawing.height = max(bottom + 22, top + 180) + _MARGIN
    return drawing


@dataclass(frozen=True)
class Panel:
    """One row of bars.

    Attributes:
        title: What the bars are.
        values: One a bar; None where there is none.
        show: Writes a value.
    """

    title: str
    values: Sequence[float | None]
    show: Callable[[float], str] = number


def bar_panels(
    title: str, notes: Sequence[str], names: Sequence[str], kinds: Sequence[str], panels: Sequence[Panel]
) -> Drawing:
    """Panels of bars over the same names, one colour a kind, with a legend.

    Args:
        title: What it shows.
        notes: Lines below the title.
        names: Below the bars, in order.
        kinds: Of each bar.
        panels: From top to bottom.
    """
    drawing, top = _sheet(title, notes)
    colors = {kind: _BARS[i % len(_BARS)] for i, kind in enumerate(dict.fromkeys(kinds))}
    keep = _thinned(len(names))
    wide = min(34.0, max(5.0, 760.0 / max(1, len(keep))))
    left, x = _MARGIN + 58, _MARGIN
    for kind, color in colors.items():
        drawing.add(Rect(x, top, 10, 10, color), Label(x + 15, top + 9, kind, 10))
        x += 30 + text_width(kind, 10)
    top += 42
    for panel in panels:
        shown = [(names[i], panel.values[i], colors[kinds[i]]) for i in keep]
        _bars(drawing, panel, shown, left, top, wide, 120.0)
        top += 120.0 + 44
    _names_below(drawing, [names[i] for i in keep], left, top - 36, wide)
    drawing.width = max(left + wide * len(keep), _widest(drawing)) + _MARGIN
    drawing.height = top - 36 + _names_width([names[i] for i in keep]) + _MARGIN
    return drawing


def _bars(
    drawing: Drawing,
    panel: Panel,
    shown: Sequence[tuple[str, float | None, Color]],
    left: float,
    top: float,
    wide: float,
    height: float,
) -> None:
    present = [v for _, v, _ in shown if v is not None]
    high, low = max([*present, 0.0]), min([*present, 0.0])
    spread = (high - low) or 1.0
    zero = top + height * high / spread
    drawing.add(Label(left, top - 8, panel.title, 11, bold=True))
    for tick in (high, (high + low) / 2, low):
        y = top + height * (high - tick) / spread
        drawing.add(
            Line(left, y, left + wide * len(shown), y, "#dddddd", 0.6),
            Label(left - 6, y + 3, panel.show(tick), 9, "end", color=FAINT),
        )
    for index, (name, value, color) in enumerate(shown):
        if value is None:
            continue
        tall = height * abs(value) / spread
        y = zero - tall if value > 0 else zero
        tip = f"{name}: {panel.show(value)}"
        drawing.add(Rect(left + index * wide + wide * 0.12, y, wide * 0.76, max(tall, 0.6), color, tip))
    drawing.add(Line(left, zero, left + wide * len(shown), zero, INK, 0.8))


def _sheet(title: str, notes: Sequence[str]) -> tuple[Drawing, float]:
    """A drawing with its heading, and where the rest begins."""
    drawing = Drawing(title)
    drawing.add(Label(_MARGIN, _MARGIN + 14, title, 15, bold=True))
    for index, note in enumerate(notes):
        drawing.add(Label(_MARGIN, _MARGIN + 32 + 14 * index, note, 10.5, color=FAINT))
    return drawing, _MARGIN + 34 + 14 * len(notes)


def _color_bar(drawing: Drawing, scale: Scale, x: float, y: float, height: float, unit: str) -> float:
    """A colour bar, greatest on top; its right edge."""
    steps = 48
    for index in range(steps):
        share = 1 - (index + 0.5) / steps
        drawing.add(Rect(x, y + height * index / steps, 14, height / steps + 0.3, color_of(share)))
    edge = x + 14
    for value in scale.ticks():
        text = number(value)
        drawing.add(Label(x + 20, y + height * (1 - scale.share(value)) + 3, text, 9))
        edge = max(edge, x + 20 + text_width(text, 9))
    if unit:
        drawing.add(Label(x, y + height + 16, unit, 10, color=FAINT))
        edge = max(edge, x + text_width(unit, 10))
    return edge


def _row_names(drawing: Drawing, names: Sequence[str], x: float, top: float, high: float) -> None:
    every = max(1, math.ceil(9 / high))
    for index in range(0, len(names), every):
        y = top + (index + 0.5) * high + 3
        drawing.add(Label(x, y, shorten(names[index], _NAME_CELLS), min(10.0, max(8.0, high)), "end"))


def _column_names(
    drawing: Drawing, names: Sequence[str], left: float, y: float, wide: float, *, turned: bool
) -> None:
    every = 1 if not turned else max(1, math.ceil(9 / wide))
    for index in range(0, len(names), every):
        x = left + (index + 0.5) * wide
        text = shorten(names[index], _NAME_CELLS)
        if turned:
            drawing.add(Label(x + 3, y, text, min(10.0, max(8.0, wide)), "start", turned=True))
        else:
            drawing.add(Label(x, y, text, 10, "middle"))


def _names_below(drawing: Drawing, names: Sequence[str], left: float, y: float, wide: float) -> None:
    every = max(1, math.ceil(9 / wide))
    for index in range(0, len(names), every):
        x = left + (index + 0.5) * wide + 3
        drawing.add(Label(x, y, shorten(names[index], _NAME_CELLS), 9, "end", turned=True))


def _names_width(names: Sequence[str]) -> float:
    return 12 + max((text_width(shorten(name, _NAME_CELLS), 10) for name in names), default=0.0)


def _widest(drawing: Drawing) -> float:
    """Where the text that starts furthest right ends."""
    flat = (i for i in drawing.items if isinstance(i, Label) and not i.turned and i.anchor == "start")
    return max((i.x + text_width(i.text, i.size) for i in flat), default=0.0)


def _side(count: int) -> float:
    return min(26.0, max(4.0, 560.0 / max(1, count)))


def _thinned(count: int) -> list[int]:
    if count <= MOST_CELLS_A_SIDE:
        return list(range(count))
    return [(2 * i + 1) * count // (2 * MOST_CELLS_A_SIDE) for i in range(MOST_CELLS_A_SIDE)]


def _channels(color: Color) -> tuple[int, int, int]:
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)
