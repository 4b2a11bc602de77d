"""What commands share: output directories, lists of names, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import typer


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
