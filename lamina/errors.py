"""The whole error tree on one screen: what was wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class LaminaError(Exception):
    """Base of every error lamina raises for a reason outside its own code.

    The message has one fact a line: what failed, where, and what to do next.

    Args:
        what: One sentence: what was wrong.
        where: The place (file, node, input, option), or None.
        advice: What the user can do about it, or None.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, advice: str | None = None) -> None:
        self.what = what
        self.where = where
        self.advice = advice
        lines = [what]
        if where:
            lines.append(f"  at {where}")
        if advice:
            lines.append(f"  {advice}")
        super().__init__("\n".join(lines))


class CaptureError(LaminaError):
    """A model could not be read: corrupt, truncated, malformed, or not a model."""


class UnsupportedOperator(LaminaError):
    """The model uses an operator, domain or opset that this path cannot handle."""


class DataError(LaminaError):
    """Data does not fit the model: names, shapes, dtypes, emptiness, NaN."""


class BudgetError(LaminaError):
    """A budget, metric, target or workload text could not be understood."""


class InfeasibleBudget(LaminaError):
    """No plan meets the budget; carries the nearest ones.

    Attributes:
        nearest: Plans closest to the budget, each a mapping with what it reaches and what it would need.
    """

    exit_code = 1

    def __init__(
        self, what: str, *, nearest: Sequence[Any] = (), where: str | None = None, advice: str | None = None
    ) -> None:
        super().__init__(what, where=where, advice=advice)
        self.nearest = tuple(nearest)


class PassError(LaminaError):
    """A pass was given a site or option it cannot apply."""


class VerificationError(LaminaError):
    """A program broke an invariant: a bug in lamina, named with pass and node."""


class BackendError(LaminaError):
    """A backend could not compile, run or measure a program."""


class OutputError(LaminaError):
    """A result could not be written."""
