"""Which metrics an analysis is asked for, by how they are made; what cannot work is said at once."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lamina.analysis.gradients import GRADIENT_METRICS
from lamina.analysis.metrics import FORWARD_METRICS, METRICS, Metric
from lamina.analysis.needs import Need, union
from lamina.errors import DataError, PassError
from lamina.ir.fx import require_torch

GRADIENT_TRACE = "gradient-trace"
OUTPUT_KL = "output-kl"


@dataclass(frozen=True)
class Wanted:
    """The metrics asked for, by how they are made."""

    registry: tuple[Metric, ...]
    gradients: tuple[str, ...]
    damages: bool

    @property
    def changed(self) -> bool:
        """Whether some need more than damages of changed programs."""
        return bool(union(self.registry) & {Need.SKIPS, Need.PAIRS}) or any(
            {Need.EXAMPLES, Need.DAMAGES} <= m.needs for m in self.registry
        )

    @property
    def slow(self) -> bool:
        """Whether any takes more than one run over the data."""
        return bool(self.damages or self.changed or self.gradients)


def wanted_metrics(names: Sequence[str] | None, gradients: bool, damages: bool) -> Wanted:
    """The metrics called ``names`` (None: all of one run) and those the two switches add.

    Raises:
        PassError: A name is unknown.
    """
    known = {metric.name: metric for metric in METRICS}
    slow = (*GRADIENT_METRICS, GRADIENT_TRACE)
    asked = [m.name for m in FORWARD_METRICS] if names is None else list(dict.fromkeys(names))
    for name in asked:
        if name not in known and name not in slow:
            near = difflib.get_close_matches(name, [*known, *slow], n=1)
            hint = f", did you mean {near[0]}" if near else ""
            advice = f"choose from {', '.join([*known, *slow])}"
            raise PassError(f"metric '{name}' is unknown{hint}", advice=advice)
    if damages and OUTPUT_KL not in asked:
        asked.append(OUTPUT_KL)
    if gradients:
        asked += [name for name in GRADIENT_METRICS if name not in asked]
    return Wanted(
        tuple(known[n] for n in asked if n in known), tuple(n for n in slow if n in asked), OUTPUT_KL in asked
    )


def check_wanted(wanted: Wanted, data: Any, names: Any, bits: Sequence[int], samples: int) -> None:
    """Say before a large model loads what cannot work.

    Raises:
        DataError: Samples are missing, or a width or count is impossible.
        MissingTorch: Gradients are wanted and torch is not installed.
    """
    if data is None and (names is not None or wanted.slow):
        raise DataError(
            "metrics need samples", advice="give data: --data X.npz, arrays named like the inputs"
        )
    strange = [b for b in bits if not 2 <= b <= 16]
    if strange or not bits:
        what = f"{strange[0]} is no bit width" if strange else "there are no bit widths"
        raise DataError(what, advice="give widths from 2 to 16, like 8,4")
    if samples < 1:
        raise DataError(f"{samples} samples cannot be looked at", advice="give at least 1, better 64")
    if wanted.gradients:
        require_torch()
