"""``lamina analyze``: the analysis, its table or JSON, and its figures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import typer

from lamina.commands import finite, made, names, print_json
from lamina.errors import BudgetError, DataError
from lamina.inspection import analyze as run
from lamina.ir.io import write_atomic
from lamina.report.analysis_table import analysis_table
from lamina.report.figures import refuse_to_overwrite, write_figures
from lamina.report.reading import reading, suggestion
from lamina.report.terminal import LiveProgress


def run_analyze(
    model: Path,
    data: Path | None,
    *,
    target: str,
    workload: str | None,
    metrics: Sequence[str] | None,
    gradients: bool,
    damages: bool,
    bits: str,
    samples: int,
    options: bool,
    operators: bool,
    figures: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Analyze a model as the command line says; see ``lamina analyze --help``.

    Raises:
        OutputError: Figures would replace files, or cannot be written.
        LaminaError: As :func:`lamina.inspection.analyze`.
    """
    if figures is not None:
        _figures_need(figures, data)
        if not force:
            refuse_to_overwrite(figures)
    with made(figures) if figures else nullcontext(), LiveProgress(quiet=as_json) as progress:
        found = run(
            model,
            data,
            target=target,
            workload=workload,
            metrics=metrics,
            gradients=gradients,
            damages=damages,
            bits=_widths(bits),
            samples=samples,
            options=options,
            progress=progress,
        )
        files, png = write_figures(found, figures, write_atomic) if figures else ([], True)
    command = suggestion(found, str(model), None if data is None else str(data), target, found["metric"])
    if as_json:
        said = {"reading": reading(found), "next": " ".join(command), "files": [str(f) for f in files]}
        print_json(finite({**found, **said}))
        return
    analysis_table(found, command, operators=operators)
    if files:
        typer.echo(f"wrote {', '.join(f.name for f in files)} in {figures}")
    if not png:
        typer.echo("no PNG: it needs Pillow, pip install 'lamina[plot]'")


def _figures_need(figures: Path, data: Path | None) -> None:
    if data is None:
        raise DataError("figures need samples", where=str(figures), advice="give --data X.npz")


def _widths(text: str) -> list[int]:
    words = names(text) or []
    if not words or not all(word.isdigit() for word in words):
        raise BudgetError(f"bits '{text}' are not understood", advice="write them like 8,4")
    return [int(word) for word in dict.fromkeys(words)]
