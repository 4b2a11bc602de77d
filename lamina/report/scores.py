"""Redundancy of branches, sensitivity of operators: shares of the largest, from plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A metric that can fill a column.

    Attributes:
        metric: Its name.
        says: What it is, in a few words.
        high: Whether a high value means redundant (of branches) or sensitive (of operators).
    """

    metric: str
    says: str
    high: bool


# The first that was computed fills the column: what was measured, then what follows it best over the models
# of docs/metric_trust.md. block-influence stands before relative-contribution, whose range has no end: the
# two rank alike there.
REDUNDANCY: tuple[Source, ...] = (
    Source("output-kl", "measured damage of dropping the branch alone", high=False),
    Source("skip-effect", "how far later depths move without the branch", high=False),
    Source("block-influence", "1 - cos of what enters and leaves the branch", high=False),
    Source("relative-contribution", "length of what the branch adds over what it adds it to", high=False),
    Source("branch-similarity", "cos of what enters and leaves the branch", high=True),
    Source("angular-distance", "angle between what enters and leaves the branch", high=False),
    Source("direct-matching", "what no affine map makes of the branch", high=False),
)
SENSITIVITY: tuple[Source, ...] = (
    Source("output-kl-w4", "measured damage of 4-bit weights in the operator alone", high=True),
    Source("output-kl-w8", "measured damage of 8-bit weights in the operator alone", high=True),
    Source("hawq-trace-w4", "curvature of the loss times the 4-bit rounding error", high=True),
    Source("hawq-trace-w8", "curvature of the loss times the 8-bit rounding error", high=True),
    Source("fisher-diagonal", "squared slope of the likelihood along the weight", high=True),
    Source("quantization-error-w4", "change of the operator's output with 4-bit weights", high=True),
    Source("quantization-error-w8", "change of the operator's output with 8-bit weights", high=True),
)


@dataclass(frozen=True)
class Scores:
    """One column.

    Attributes:
        source: The metric it is made of.
        values: Part -> the metric as it is.
        shares: Part -> 0..1; 1 the most redundant (nothing lost) or the most sensitive one.
        marked: Parts that stand out, the first the most.
    """

    source: Source
    values: Mapping[str, float]
    shares: Mapping[str, float]
    marked: Sequence[str]


def redundancy(
    found: Mapping[str, Any], parts: str = "branches", like: Scores | None = None
) -> Scores | None:
    """Of branches or blocks: 1 less the metric over its largest value (turned where high means redundant).

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        parts: ``branches``, of which the most redundant quarter is marked, or ``blocks``.
        like: Scores whose metric is used; None: the first of :data:`REDUNDANCY` that is there.
    """
    scores = _first(found[parts], REDUNDANCY if like is None else (like.source,))
    if scores is None:
        return None
    source, values = scores
    most = max((abs(v) for v in values.values()), default=0.0) or 1.0
    shares = {n: max(0.0, v / most if source.high else 1 - max(v, 0.0) / most) for n, v in values.items()}
    order = sorted(values, key=lambda n: values[n], reverse=source.high)
    return Scores(source, values, shares, order[: max(1, len(order) // 4)] if parts == "branches" else ())


def sensitivity(found: Mapping[str, Any]) -> Scores | None:
    """Of weighted operators: the metric over its largest value.

    Marked are the fewest operators that hold half of the sum, but no more than eight.
    """
    scores = _first(found["operators"], SENSITIVITY)
    if scores is None:
        return None
    source, values = scores
    most = max(values.values(), default=0.0)
    shares = {n: max(0.0, v) / most if most > 0 else 0.0 for n, v in values.items()}
    order = sorted(values, key=lambda n: -values[n])
    half, held, marked = sum(max(v, 0.0) for v in values.values()) / 2, 0.0, []
    for name in order[:8]:
        if held >= half:
            break
        held += max(values[name], 0.0)
        marked.append(name)
    return Scores(source, values, shares, marked)


def _first(parts: Sequence[Part], sources: Sequence[Source]) -> tuple[Source, dict[str, float]] | None:
    for source in sources:
        values = {
            p["name"]: p["metrics"][source.metric] for p in parts if _finite(p["metrics"].get(source.metric))
        }
        if values:
            return source, values
    return None


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and value == value and abs(value) != float("inf")
