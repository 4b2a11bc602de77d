"""Run any number of rows on a library that was compiled for a fixed number of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lamina.backends.backend import Feeds
from lamina.backends.tvm_import import Prepared

Run = Callable[[Feeds], dict[str, np.ndarray]]


def fixed_rows(prepared: Prepared) -> int | None:
    """Rows a library takes at once, where the model itself takes any number; else None.

    The model counts rows when the first dim of every input and output is open and has one name.
    """
    program = prepared.program
    firsts = {port.shape[0] if port.shape else None for port in (*program.inputs, *program.outputs)}
    if len(firsts) != 1 or not isinstance(next(iter(firsts)), str):
        return None
    rows = prepared.inputs[0].shape[0]
    return rows if isinstance(rows, int) else None


def run_in_pieces(run: Run, feeds: Feeds, rows: int) -> dict[str, np.ndarray]:
    """Run ``rows`` rows at a time; the last piece is filled up with copies of its last row.

    Args:
        run: Takes exactly ``rows`` rows.
        feeds: Arrays with the same number of rows, at least one.
        rows: What the library was compiled for.
    """
    count = min((len(array) for array in feeds.values() if array.ndim), default=0)
    pieces = [_piece(run, feeds, start, rows) for start in range(0, count, rows)]
    return {name: np.concatenate([piece[name] for piece in pieces])[:count] for name in pieces[0]}


def _piece(run: Run, feeds: Mapping[str, np.ndarray], start: int, rows: int) -> dict[str, np.ndarray]:
    cut = {name: array[start : start + rows] for name, array in feeds.items()}
    missing = rows - min(len(array) for array in cut.values())
    if missing:
        cut = {name: np.concatenate([a, np.repeat(a[-1:], missing, axis=0)]) for name, a in cut.items()}
    return run(cut)
