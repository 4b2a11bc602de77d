"""The table as a picture: a cell a metric and kind of change, coloured by mean rank correlation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

from tools.studies.metric_trust.summary import Row
from tools.studies.metric_trust.truth import KINDS

_LEFT, _TOP, _CELL, _LINE = 250, 46, 92, 20
_BLUE, _RED = (33, 102, 172), (178, 24, 43)
_DARK = 0.55


def heat_map(rows: Mapping[tuple[str, str], Row], metrics: Sequence[str]) -> str:
    """An SVG: metrics down, kinds across; the number is the mean, the small one the models."""
    width, height = _LEFT + _CELL * len(KINDS) + 10, _TOP + _LINE * len(metrics) + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        '<text x="8" y="18">mean rank correlation with measured damage (models)</text>',
    ]
    for column, kind in enumerate(KINDS):
        x = _LEFT + _CELL * column + _CELL / 2
        lines.append(f'<text x="{x:g}" y="{_TOP - 8}" text-anchor="middle">{kind}</text>')
    for line, metric in enumerate(metrics):
        y = _TOP + _LINE * line
        lines.append(f'<text x="{_LEFT - 8}" y="{y + 14}" text-anchor="end">{escape(metric)}</text>')
        for column, kind in enumerate(KINDS):
            row = rows.get((metric, kind))
            if row is not None and np.isfinite(row.mean):
                lines += _cell(_LEFT + _CELL * column, y, row.mean, len(row.rho))
    return "\n".join([*lines, "</svg>", ""])


def _cell(x: int, y: int, value: float, models: int) -> list[str]:
    end = _BLUE if value >= 0 else _RED
    share = min(1.0, abs(value))
    colour = ",".join(str(round(255 + (c - 255) * share)) for c in end)
    ink = "white" if share > _DARK else "black"
    return [
        f'<rect x="{x}" y="{y}" width="{_CELL - 2}" height="{_LINE - 2}" fill="rgb({colour})"/>',
        f'<text x="{x + _CELL / 2:g}" y="{y + 14}" text-anchor="middle" fill="{ink}">{value:.2f} '
        f'<tspan font-size="9">({models})</tspan></text>',
    ]
