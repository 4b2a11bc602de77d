"""Budgets: what the user will pay and lose, as bounds that a measurement either meets or does not."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from lamina.errors import BudgetError

if TYPE_CHECKING:
    from lamina.quality import Metric

Axis = Literal["latency", "size", "memory", "flops", "drop"]
Unit = Literal["x", "s", "bytes", "flops", "%", "metric"]

COSTS: tuple[Axis, ...] = ("latency", "size", "memory", "flops")
AXES: tuple[Axis, ...] = (*COSTS, "drop")
# What can be minimized beside one cost or the damage: the sum of the latency ratio and the size ratio.
FOOTPRINT = "footprint"
EXAMPLE = "latency<=0.5x, size<=10MB, memory<=200MB, flops<=0.5x, drop<=1%"

# Where a result's mapping keeps the measured value of an axis.
RESULT_KEYS: Mapping[str, str] = {
    "latency": "latency_s",
    "size": "size_bytes",
    "memory": "peak_memory_bytes",
    "flops": "flops",
}

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}  # micro has two code points
_BYTES = {"b": 1.0} | {
    f"{prefix}{infix}b": float(base**power)
    for power, prefix in enumerate("kmgt", start=1)
    for infix, base in (("", 1000), ("i", 1024))
}
_FLOPS = {
    f"{prefix}{suffix}": 1000.0**power
    for power, prefix in enumerate(["", "k", "m", "g", "t"])
    for suffix in ("", "flop", "flops")
}
_TABLES: Mapping[str, tuple[Unit, Mapping[str, float], str]] = {
    "latency": ("s", _SECONDS, "0.5x or 4ms"),
    "size": ("bytes", _BYTES, "0.3x or 10MB"),
    "memory": ("bytes", _BYTES, "0.5x or 200MB"),
    "flops": ("flops", _FLOPS, "0.5x or 2G"),
    "drop": ("metric", {"": 1.0}, "1% or 0.05"),
}
_CLAUSE = re.compile(r"^([^<>=≤≥:]*?)\s*(<=|=<|≤|<|==|=|:|>=|≥|>)\s*(.*)$")
_AMOUNT = re.compile(r"^([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*([a-zA-Zµμ×%]*)$")  # noqa: RUF001


class Check(NamedTuple):
    """One bound against a measurement, in seconds, bytes, operations or damage."""

    met: bool
    reached: float
    allowed: float


@dataclass(frozen=True)
class Bound:
    """An upper limit on one axis.

    Attributes:
        axis: ``latency``, ``size``, ``memory``, ``flops`` or ``drop``.
        value: The limit in ``unit``; ``1%`` is 0.01.
        unit: ``x`` (times the original), ``s``, ``bytes``, ``flops``, ``%`` (of ``drop``: points of a bounded
            metric, relative increase of a loss) or ``metric`` (``drop`` in the metric's own unit).
        text: The limit as the user wrote it.
    """

    axis: Axis
    value: float
    unit: Unit
    text: str = field(default="", compare=False)

    @property
    def relative(self) -> bool:
        """Whether the limit is a multiple of what the original costs."""
        return self.unit == "x"

    def limit(self, original: float) -> float:
        """The limit as an absolute amount, given what the original costs."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.axis}<={self.text or f'{self.value:g}{self.unit}'}"


BoundLike = Bound | str | float | None


@dataclass(frozen=True)
class Budget:
    """Upper limits on what a model may cost and on how much worse it may get.

    Each field takes a :class:`Bound` or the text of one: ``Budget(latency="0.5x", drop="1%")``.

    Raises:
        BudgetError: No bound at all, or one that is not understood.
    """

    latency: BoundLike = None
    size: BoundLike = None
    memory: BoundLike = None
    flops: BoundLike = None
    drop: BoundLike = None

    def __post_init__(self) -> None:
        for axis in AXES:
            given = getattr(self, axis)
            if isinstance(given, Bound):
                _fits(given, axis)
            elif given is not None:
                object.__setattr__(self, axis, _bound(axis, str(given), f"{axis}={given}", ()))
        if not self.bounds:
            raise BudgetError(
                "the budget is empty", advice=f"name at least one limit, for example '{EXAMPLE}'"
            )

    @staticmethod
    def parse(text: str | Budget | None = None, **keywords: BoundLike) -> Budget:
        """Read a budget's text form, keywords, or both.

        Args:
            text: ``"latency<=0.5x, size<=10MB, drop<=1%"``, a ready budget, or None.
            **keywords: Limits by axis, each in the text form after the ``<=``.

        Raises:
            BudgetError: Empty; an axis named twice or unknown; a unit that does not fit its axis; a
                limit that is not a positive number. The message says what was understood.
        """
        if isinstance(text, Budget):
            found: dict[str, BoundLike] = {b.axis: b for b in text.bounds}
        elif text is None or isinstance(text, str):
            found = dict(_clauses(text or ""))
        else:
            what = f"a budget is text, not {type(text).__name__}"
            raise BudgetError(what, advice=f"write it like '{EXAMPLE}'")
        for name, value in keywords.items():
            if value is None:
                continue
            understood = tuple(str(b) for b in found.values())
            axis = _axis(name, f"{name}={value}", understood)
            if axis in found:
                raise _error(f"{axis} is limited twice", f"{name}={value}", understood)
            bound = (
                value if isinstance(value, Bound) else _bound(axis, str(value), f"{name}={value}", understood)
            )
            found[axis] = bound
        return Budget(**found)

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Every limit, in the order of ``AXES``."""
        return tuple(b for axis in AXES if (b := self.bound(axis)) is not None)

    @property
    def costs(self) -> tuple[Bound, ...]:
        """The limits on cost: everything but ``drop``."""
        return tuple(b for b in self.bounds if b.axis != "drop")

    def bound(self, axis: Axis) -> Bound | None:
        """The limit on one axis, or None."""
        return cast("Bound | None", getattr(self, axis))

    def objective(self, minimize: str | None = None) -> str:
        """What to make least among the plans that meet every bound.

        Cost bounds alone: ``damage``. A drop bound, with or without cost bounds: ``latency``.
        ``minimize`` overrides where the budget leaves room for it.

        Raises:
            BudgetError: ``minimize`` is unknown, or nothing bounds the other side: least cost needs a drop
                bound, least damage needs a cost bound.
        """
        if minimize is None:
            return "damage" if self.bound("drop") is None else "latency"
        choices = ("damage", *COSTS, FOOTPRINT)
        if minimize not in choices:
            what = f"minimize='{minimize}' is unknown"
            raise BudgetError(what, where=f"budget '{self}'", advice=f"choose one of {', '.join(choices)}")
        if minimize == "damage" and not self.costs:
            what = "minimize='damage' needs a limit on a cost, or the original is already the answer"
            raise BudgetError(what, where=f"budget '{self}'", advice="add one, for example latency<=0.5x")
        if minimize != "damage" and self.bound("drop") is None:
            what = f"minimize='{minimize}' needs a limit on the drop, or nothing holds the quality"
            raise BudgetError(what, where=f"budget '{self}'", advice="add one, for example drop<=1%")
        return minimize

    def allowed_damage(self, metric: Metric | None, original_score: float) -> float:
        """The drop bound in the unit of :meth:`lamina.quality.Metric.damage`; infinite without one.

        Args:
            metric: What damage is measured with; None and divergences are bounded as they are.
            original_score: What the original reaches; turns a bare number into a share of a loss.
        """
        bound = self.bound("drop")
        if bound is None:
            return math.inf
        if bound.unit == "%" or metric is None or metric.kind == "divergence":
            return bound.value
        if metric.unit(original_score) == "points":
            return bound.value
        return bound.value / max(abs(original_score), 1e-12)

    def met(
        self,
        original: Mapping[str, Any],
        optimized: Mapping[str, Any],
        damage: float,
        *,
        allowed_damage: float | None = None,
    ) -> dict[str, Check]:
        """Hold every bound against what was measured.

        Args:
            original: Costs of the original by axis (``latency``) or result key (``latency_s``).
            optimized: Costs of the result, likewise.
            damage: Damage of the result, as :meth:`lamina.quality.Metric.damage` gives it.
            allowed_damage: What :meth:`allowed_damage` said; needed when ``drop`` is a bare number.

        Returns:
            For each bounded axis: met, reached, allowed. A cost nobody measured is not met.
        """
        checks: dict[str, Check] = {}
        for bound in self.costs:
            reached, allowed = _cost(optimized, bound.axis), bound.limit(_cost(original, bound.axis))
            checks[bound.axis] = Check(reached <= allowed, reached, allowed)
        drop = self.bound("drop")
        if drop is not None:
            allowed = drop.value if allowed_damage is None else allowed_damage
            checks["drop"] = Check(damage <= allowed, damage, allowed)
        return checks

    def __str__(self) -> str:
        return ", ".join(str(b) for b in self.bounds)


def _cost(costs: Mapping[str, Any], axis: str) -> float:
    value = costs.get(axis)
    if value is None:
        value = costs.get(RESULT_KEYS[axis])
    return math.nan if value is None else float(value)


def _clauses(text: str) -> dict[str, Bound]:
    found: dict[str, Bound] = {}
    for clause in filter(None, (part.strip() for part in re.split(r"[,;]", text))):
        understood = tuple(str(b) for b in found.values())
        match = _CLAUSE.match(clause)
        if match is None:
            raise _error(f"'{clause}' is not a limit", clause, understood)
        name, sign, amount = match.groups()
        axis = _axis(name, clause, understood)
        if sign in (">=", "≥", ">"):
            raise _error(f"a budget limits from above, '{clause}' from below", clause, understood)
        if axis in found:
            raise _error(f"{axis} is limited twice", clause, understood)
        found[axis] = _bound(axis, amount, clause, understood)
    return found


def _axis(name: str, clause: str, understood: tuple[str, ...]) -> Axis:
    key = name.strip().lower()
    if key in AXES:
        return key
    near = difflib.get_close_matches(key, AXES, n=1)
    hint = f", did you mean {near[0]}" if near else f"; there are {', '.join(AXES)}"
    raise _error(f"'{name.strip()}' is not something a budget can limit{hint}", clause, understood)


def _bound(axis: Axis, amount: str, clause: str, understood: tuple[str, ...]) -> Bound:
    amount = amount.strip()
    base, units, example = _TABLES[axis]
    match = _AMOUNT.match(amount)
    number = float(match.group(1)) if match else math.nan
    if match is None or not math.isfinite(number) or number <= 0:
        raise _error(
            f"the limit on {axis} must be a positive number like {example}, not '{amount}'",
            clause,
            understood,
        )
    unit = match.group(2).lower().replace("×", "x")  # noqa: RUF001 the sign people paste
    if unit == "x" and axis != "drop":
        return Bound(axis, number, "x", amount)
    if unit == "%" and axis == "drop":
        return Bound(axis, number / 100, "%", amount)
    if unit not in units:
        said = f"'{match.group(2)}' is not a unit of {axis}" if unit else f"the limit on {axis} has no unit"
        raise _error(f"{said}: write {example}", clause, understood)
    return Bound(axis, number * units[unit], base, amount)


def _fits(bound: Bound, axis: Axis) -> None:
    if bound.axis != axis or not (math.isfinite(bound.value) and bound.value > 0):
        raise _error(f"the limit on {axis} cannot be {bound!r}", f"{axis}={bound}", ())


def _error(what: str, clause: str, understood: tuple[str, ...]) -> BudgetError:
    so_far = f"understood so far: {', '.join(understood)}; " if understood else ""
    return BudgetError(what, where=f"budget '{clause}'", advice=f"{so_far}write it like '{EXAMPLE}'")
