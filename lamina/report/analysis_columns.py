"""The columns of an analysis's table: what each shows, and which give way where there is little room."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lamina.report.scores import Scores
from lamina.report.text import bar, count, number, percent, printable, seconds, shorten
from lamina.report.tree import Row, whole_time, worst

MARK = "*"

# (what a column shows, its letter, options it stands for); options of others are shown by their names.
OPTION_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("drop", "d", ("drop",)),
    ("map", "m", ("bias", "diagonal", "rank-*", "full")),
    ("merge", "c", ("merge *",)),
    ("narrow", "n", ("keep-*",)),
    ("int8", "i", ("w8a8-*",)),
    ("w8", "8", ("w8",)),
    ("w4", "4", ("w4",)),
    ("w2", "2", ("w2",)),
    ("half", "h", ("float16-compute",)),
    ("stored", "s", ("stored-*", "float16", "bfloat16")),
)
OTHERS = "+"
SAYS = {
    "drop": "take the branch out",
    "map": "a linear map in its place",
    "merge": "convolutions in a row as one",
    "narrow": "hidden channels merged",
    "int8": "8-bit arithmetic",
    "w8": "8-bit weights",
    "w4": "4-bit weights",
    "w2": "2-bit weights",
    "half": "float16 arithmetic",
    "stored": "smaller in the file only",
}


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        title: What stands above, in one or more lines.
        cell: Its text for a row.
        rank: 0: always there; else columns join in this order while the name keeps its room.
        left: Whether it is flush left.
        style: Its style for a row.
    """

    title: str
    cell: Callable[[Row], str]
    rank: int = 0
    left: bool = False
    style: Callable[[Row], str] = lambda row: ""


@dataclass(frozen=True)
class Scored:
    """The three scores of an analysis: of branches, of blocks, of operators."""

    branches: Scores | None
    blocks: Scores | None
    operators: Scores | None

    def of(self, row: Row) -> Scores | None:
        """The redundancy that stands in a row, if any."""
        scores = self.blocks if row.kind == "block" else self.branches
        return scores if scores is not None and row.redundancy in scores.values else None


def columns_of(found: Mapping[str, Any], scored: Scored, plain: bool) -> list[Column]:
    """Every column there is, from left to right."""
    return [*_cost_columns(found, plain), *_score_columns(scored), LETTERS, WORDS]


def _cost_columns(found: Mapping[str, Any], plain: bool) -> list[Column]:
    whole, parameters = whole_time(found) or 0.0, found["totals"]["parameters"] or 1

    def share(row: Row) -> float:
        return (row.seconds or 0.0) / whole if whole else 0.0

    def times(row: Row, text: str) -> str:
        return "" if row.seconds is None else text

    return [
        Column("kind", lambda r: "" if r.kind == "block" else shorten(r.kind, 11), 4, left=True),
        Column("params", lambda r: count(r.parameters) if r.parameters else "", style=_strong),
        Column("params %", lambda r: percent(r.parameters / parameters) if r.parameters else "", 9),
        Column("", lambda r: bar(r.parameters / parameters, 8, plain=plain), 10, left=True, style=_blue),
        Column("FLOPs", lambda r: count(r.flops), style=_strong),
        Column("time", lambda r: seconds(r.seconds), style=_strong),
        Column("time %", lambda r: times(r, percent(share(r))), 2),
        Column(" ", lambda r: times(r, bar(share(r), 5, plain=plain)), 1, left=True, style=_blue),
        Column("bound", lambda r: r.bound, 7, left=True),
        Column("of roof", lambda r: "" if r.roof_share is None else percent(r.roof_share), 8),
    ]


def _score_columns(scored: Scored) -> list[Column]:
    branches, operators = scored.branches, scored.operators

    def green(row: Row) -> str:
        scores = scored.of(row)
        return "green" if scores and row.redundancy in scores.marked else ""

    def yellow(row: Row) -> str:
        return "yellow" if operators and worst(row, operators) in operators.marked else ""

    def value(row: Row) -> str:
        scores = scored.of(row)
        return number(scores.values[row.redundancy]) if scores else ""

    def damage(row: Row) -> str:
        name = worst(row, operators)
        return number(operators.values[name]) if operators and name else ""

    columns = []
    for title, rank in (("redun-\ndancy", 0), ("redundancy", 5)):
        columns.append(Column(title, lambda r: _redundancy(r, scored), rank, style=green))
    if branches:
        columns.append(Column(branches.source.metric, value, 6))
    for title, rank in (("sensi-\ntivity", 0), ("sensitivity", 5)):
        columns.append(Column(title, lambda r: _sensitivity(r, operators), rank, style=yellow))
    if operators:
        columns.append(Column(operators.source.metric, damage, 6))
    return columns


def _strong(row: Row) -> str:
    return "bold" if row.strong else ""


def _blue(row: Row) -> str:
    return "blue"


def _redundancy(row: Row, scored: Scored) -> str:
    scores = scored.of(row)
    if scores is None:
        return ""
    mark = MARK if row.redundancy in scores.marked else " "
    return _fine(scores.shares[row.redundancy]) + mark


def _sensitivity(row: Row, scores: Scores | None) -> str:
    name = worst(row, scores)
    if scores is None or name is None:
        return ""
    return percent(scores.shares[name]) + (MARK if name in scores.marked else " ")


def _fine(share: float) -> str:
    """A percentage that does not call nearly all all."""
    return f"{100 * share:.1f} %" if 0.99 <= share < 0.9995 else percent(share)


def _options(names: Iterable[str], *, words: bool) -> str:
    found = list(dict.fromkeys(group_of(name) for name in names))
    order = [group for group, _, _ in OPTION_GROUPS]
    known = [g for g in order if g in found]
    others = [printable(g) for g in found if g not in order]
    if words:
        return " ".join([*known, *others])
    letters = {group: letter for group, letter, _ in OPTION_GROUPS}
    return "".join(letters[g] for g in known) + (OTHERS if others else "")


def group_of(option: str) -> str:
    """The group an option is shown as; its own name if it is in none."""
    for group, _, options in OPTION_GROUPS:
        if any(option == o or (o.endswith("*") and option.startswith(o[:-1])) for o in options):
            return group
    return option


# One of the two, as there is room.
LETTERS = Column("options", lambda r: _options(r.options, words=False), left=True)
WORDS = Column("options", lambda r: _options(r.options, words=True), 3, left=True)
