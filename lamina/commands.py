"""What commands share: output directories, lists of names, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer

from lamina.errors import BudgetError


@contextmanager
def made(output: Path) -> Iterator[None]:
    """Make the output directory before minutes of work; a run that fails leaves no new, empty one behind."""
    from lamina.ir.io import make_directory

    new = [folder for folder in (output, *output.parents) if not folder.exists()]
    make_directory(output)
    try:
        yield
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()
        raise


def names(text: str | None) -> list[str] | None:
    """The words between commas; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    typer.echo(json.dumps(value, indent=1, sort_keys=True, default=str))


def finite(value: Any) -> Any:
    """The value with None for numbers JSON has no word for: an infinite difference has a reason beside it."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def splits(data: Path | None, selection: Path | None, report: Path | None) -> Any:
    """One set of samples, or three; what ``data=`` takes.

    Raises:
        BudgetError: Two of three.
    """
    if selection is None and report is None:
        return data
    if data is None or selection is None or report is None:
        raise BudgetError(
            "separate samples need all three of --data, --selection-data and --report-data",
            advice="give all three, or --data alone to have it split",
        )
    return {"calibration": data, "selection": selection, "report": report}


def shapes(given: Sequence[str]) -> dict[str, int | list[int | None]]:
    """``tokens=1x128`` and ``batch=1`` as what :func:`lamina.fold` takes.

    Raises:
        BudgetError: Something else is written.
    """
    found: dict[str, int | list[int | None]] = {}
    for text in given:
        name, _, sizes = text.rpartition("=")
        parts = sizes.lower().split("x") if sizes else []
        if not name or not parts or not all(p == "?" or p.isdigit() for p in parts):
            raise BudgetError(
                f"shape '{text}' is not understood", advice="write it like tokens=1x128 or batch=1"
            )
        dims = [None if p == "?" else int(p) for p in parts]
        found[name] = dims[0] if len(dims) == 1 and dims[0] is not None else dims
    return found
