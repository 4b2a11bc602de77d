"""Drawings made of rectangles, lines and text, and the SVG that holds them: no plotting library needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal
from xml.sax.saxutils import escape, quoteattr

from rich.cells import cell_len

from lamina.report.text import printable

Anchor = Literal["start", "middle", "end"]
Color = str  # "#rrggbb"

INK, FAINT, PAPER, MISSING = "#222222", "#777777", "#ffffff", "#e4e4e4"
# Mean advance of a sans-serif letter over its size: widths are estimated, no font is read.
_ADVANCE = 0.56
_FONT = "system-ui, 'DejaVu Sans', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Rect:
    """A filled rectangle; ``tip`` is what a viewer shows when pointed at."""

    x: float
    y: float
    width: float
    height: float
    fill: Color
    tip: str = ""


@dataclass(frozen=True)
class Line:
    """A straight line."""

    x1: float
    y1: float
    x2: float
    y2: float
    color: Color = INK
    width: float = 1.0


@dataclass(frozen=True)
class Label:
    """Text whose baseline starts, is centred or ends at (x, y), turned by 0 or -90 degrees."""

    x: float
    y: float
    text: str
    size: float = 11.0
    anchor: Anchor = "start"
    turned: bool = False
    color: Color = INK
    bold: bool = False


Item = Rect | Line | Label


@dataclass
class Drawing:
    """A white sheet of ``width`` by ``height`` points and what is on it, back to front."""

    title: str
    width: float = 0.0
    height: float = 0.0
    items: list[Item] = field(default_factory=list)

    def add(self, *items: Item) -> None:
        """Put items on top."""
        self.items.extend(items)


def text_width(text: str, size: float) -> float:
    """About how wide the text is at a font size."""
    return cell_len(text) * size * _ADVANCE


def svg(drawing: Drawing) -> str:
    """The drawing as one self-contained SVG 1.1 document: no scripts, styles or references.

    Names come from the model's file: what XML reserves is escaped, what it forbids is spelled out.
    """
    size = f'width="{_n(drawing.width)}" height="{_n(drawing.height)}"'
    box = f'viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}"'
    lines = [
        '<?xml version="1.0" encoding="UTF-8"?>',
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {box} font-family={quoteattr(_FONT)} role="img">',
        f"<title>{_text(drawing.title)}</title>",
        f'<rect width="100%" height="100%" fill="{PAPER}"/>',
        *_elements(drawing),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _elements(drawing: Drawing) -> Iterator[str]:
    for item in drawing.items:
        if isinstance(item, Rect):
            place = f'x="{_n(item.x)}" y="{_n(item.y)}" width="{_n(item.width)}" height="{_n(item.height)}"'
            end = f"><title>{_text(item.tip)}</title></rect>" if item.tip else "/>"
            yield f'<rect {place} fill="{item.fill}"{end}'
        elif isinstance(item, Line):
            ends = f'x1="{_n(item.x1)}" y1="{_n(item.y1)}" x2="{_n(item.x2)}" y2="{_n(item.y2)}"'
            yield f'<line {ends} stroke="{item.color}" stroke-width="{_n(item.width)}"/>'
        else:
            place = f'x="{_n(item.x)}" y="{_n(item.y)}"'
            turn = f' transform="rotate(-90 {_n(item.x)} {_n(item.y)})"' if item.turned else ""
            weight = ' font-weight="bold"' if item.bold else ""
            style = f'font-size="{_n(item.size)}" text-anchor="{item.anchor}" fill="{item.color}"{weight}'
            yield f"<text {place} {style}{turn}>{_text(item.text)}</text>"


def _text(text: str) -> str:
    return escape(printable(text))


def _n(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")
