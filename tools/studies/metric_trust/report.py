"""Writes what was found: JSON, a picture, tables for the terminal and for docs/."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tools.studies.metric_trust import page
from tools.studies.metric_trust.plot import heat_map
from tools.studies.metric_trust.summary import Json, Row, mean, median, plain, rows_of
from tools.studies.metric_trust.truth import BITS, KINDS


def write(results: Sequence[Json], out: Path) -> str:
    """``metric_trust.json`` (all that was measured) and ``.svg``; returns the table as text."""
    rows = rows_of(results)
    found = {"models": list(results), "summary": plain(results)}
    _put(out / "metric_trust.json", json.dumps(_finite(found), indent=1))
    _put(out / "metric_trust.svg", heat_map(rows, order(rows)))
    return table(rows)


def write_docs(results: Sequence[Json], docs: Path) -> None:
    """``metric_trust.md`` and ``.svg`` in the folder of the documentation."""
    rows = rows_of(results)
    _put(docs / "metric_trust.svg", heat_map(rows, order(rows)))
    _put(docs / "metric_trust.md", page.page(results, rows))


def order(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Metrics, the best against drops first, then those of operators by their mean over the widths."""
    names = dict.fromkeys(name for name, _ in rows)
    drops = {n: rows[n, "drop"].mean for n in names if (n, "drop") in rows}
    bits = {n: mean(rows[n, k].mean for k in BITS if (n, k) in rows) for n in names}
    rest = sorted((n for n in names if n not in drops), key=lambda n: -np.nan_to_num(bits[n]))
    return [*sorted(drops, key=lambda n: -np.nan_to_num(drops[n])), *rest]


def table(rows: Mapping[tuple[str, str], Row]) -> str:
    """Mean rank correlation (models) of each metric with each kind of change; cost in plain runs."""
    head = (
        f"{'metric':36s}" + "".join(f"{kind:>12s}" for kind in KINDS) + f"{'plain runs':>12s}{'halves':>8s}"
    )
    lines = [head]
    for metric in order(rows):
        cells, costs, halves = "", [], []
        for kind in KINDS:
            row = rows.get((metric, kind))
            cells += f"{'':12s}" if row is None else f"{f'{row.mean:.2f} ({len(row.rho)})':>12s}"
            costs += [] if row is None else list(row.cost.values())
            halves += [] if row is None else list(row.stability.values())
        lines.append(f"{metric:36s}{cells}{median(costs):12.2f}{mean(halves):8.2f}")
    return "\n".join(lines)


def _finite(value: object) -> object:
    """The value with None for what JSON cannot hold."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def _put(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
