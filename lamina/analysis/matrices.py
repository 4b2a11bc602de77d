"""Depth-by-depth and operator-by-width facts as plain data, for reports and figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np

from lamina.analysis.redundancy import cka_matrix
from lamina.analysis.statistics import Statistics
from lamina.analysis.weight_error import DEFAULT_BITS, quantization_errors
from lamina.ir.program import Program


class MatrixResult(TypedDict):
    """One table of numbers.

    Attributes:
        rows: What the rows are called.
        columns: What the columns are called.
        values: One list a row; None where there is no number (vectors of different width or places).
    """

    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def matrices(
    program: Program, statistics: Statistics, bits: Sequence[int] = DEFAULT_BITS
) -> dict[str, MatrixResult]:
    """Every table the statistics hold; those that nothing was collected for are left out.

    ``angular-distance`` (any two depths, 0..1, Gromov et al. 2024, arXiv:2403.17887), ``linear-cka`` (any two
    depths, 0..1, Kornblith et al. 2019, arXiv:1905.00414), ``skip-effect`` (skipped branch by later depth),
    and by operator and width the relative squared output errors ``quantization-error`` (weights alone, over
    the calibration distribution) and ``activation-error`` (what is read alone).

    Args:
        program: Holds the weights.
        statistics: Of a run over the data, perhaps with what was measured.
        bits: Widths of the errors.
    """
    names = list(statistics.depths.names)
    found: dict[str, MatrixResult] = {}
    if names and np.isfinite(statistics.depths.angles).any():
        found["angular-distance"] = _matrix(names, names, statistics.depths.angles)
    if statistics.depths.tokens:
        found["linear-cka"] = _matrix(names, names, cka_matrix(statistics)[1])
    if statistics.skips:
        # the first branch reaches every later depth, in order
        depths = list(dict.fromkeys(depth for row in statistics.skips.values() for depth in row))
        found["skip-effect"] = _by_name(statistics.skips, depths)
    errors = quantization_errors(program, statistics, tuple(bits)) if statistics.inputs else {}
    widths = [str(b) for b in bits]
    if errors:
        weight = {name: {str(b): e.output for b, e in row.items()} for name, row in errors.items()}
        read = {name: {str(b): e.activation for b, e in row.items()} for name, row in errors.items()}
        found["quantization-error"] = _by_name(weight, widths)
        found["activation-error"] = _by_name(read, widths)
    return found


def _matrix(rows: Sequence[str], columns: Sequence[str], values: np.ndarray) -> MatrixResult:
    plain = [[float(v) if math.isfinite(v) else None for v in row] for row in values]
    return MatrixResult(rows=list(rows), columns=list(columns), values=plain)


def _by_name(values: Mapping[str, Mapping[str, float]], columns: Sequence[str]) -> MatrixResult:
    wanted = [c for c in columns if any(c in row for row in values.values())]
    plain = [[row.get(c) for c in wanted] for row in values.values()]
    return MatrixResult(rows=list(values), columns=wanted, values=plain)
