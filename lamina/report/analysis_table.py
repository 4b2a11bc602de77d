"""``lamina analyze`` on the terminal: one tree that fits 80 columns and uses more where there are more."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lamina.report.reading import reading
from lamina.report.scores import Scores, redundancy, sensitivity
from lamina.report.text import bar, count, number, percent, printable, seconds, shorten, size
from lamina.report.tree import Row, rows, total, whole_time, worst

# Cells a name keeps when optional columns join, and when even the others do not fit.
_NAME, _LEAST_NAME = 22, 8
_MARK = "*"
_GAP = 2
_STAND_INS = {"µ": "u", "…": "~"}

# (what a column shows, its letter, options it stands for); options of others are shown by their names.
OPTION_GROUPS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("drop", "d", ("drop",)),
    ("map", "m", ("bias", "diagonal", "rank-*", "full")),
    ("int8", "i", ("w8a8-*",)),
    ("w8", "8", ("w8",)),
    ("w4", "4", ("w4",)),
    ("half", "h", ("float16-compute",)),
    ("stored", "s", ("stored-*", "float16")),
)
_SAYS = {
    "drop": "take the branch out",
    "map": "a linear map in its place",
    "int8": "8-bit arithmetic",
    "w8": "8-bit weights",
    "w4": "4-bit weights",
    "half": "float16 arithmetic",
    "stored": "smaller in the file only",
}


@dataclass(frozen=True)
class _Column:
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
class _Scored:
    """The three scores of an analysis: of branches, of blocks, of operators."""

    branches: Scores | None
    blocks: Scores | None
    operators: Scores | None

    def of(self, row: Row) -> Scores | None:
        """The redundancy that stands in a row, if any."""
        scores = self.blocks if row.kind == "block" else self.branches
        return scores if scores is not None and row.redundancy in scores.values else None


def analysis_table(
    found: Mapping[str, Any],
    command: Sequence[str] = (),
    *,
    operators: bool = False,
    console: Console | None = None,
) -> None:
    """The tree, what its columns mean, and what it says in words.

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        command: The suggested ``lamina optimize`` command, word by word.
        operators: Also the weighted operators of each branch.
        console: Where to print; standard output if None.
    """
    console = console or Console()
    redundant, sensitive = redundancy(found), sensitivity(found)
    scored = _Scored(redundant, redundancy(found, "blocks", redundant), sensitive)
    lines = [*rows(found, operators=operators), total(found)]
    columns = _chosen(found, lines, scored, console)
    _print(console, _head(found), whole=True)
    for line in _tree(lines, columns, console):
        _print(console, line, whole=True)
    for remark in _legend(found, lines, scored, columns):
        _print(console, Text(remark, style="dim"))
    console.print()
    for sentence in reading(found, redundant, sensitive):
        _print(console, Text(printable(sentence)))
    if command:
        # one line however long it is: a command that wraps cannot be copied
        _print(console, Text("next: ", style="bold") + Text(" ".join(command)), whole=True)


def _print(console: Console, text: Text, *, whole: bool = False) -> None:
    """Print with what the terminal's encoding lacks replaced; ``whole`` lines are not wrapped."""
    if _plain(console):
        text = text.copy()
        text.plain = "".join(_encodable(c, console.encoding) for c in text.plain)
    console.print(text, soft_wrap=whole, highlight=False)


def _encodable(character: str, encoding: str) -> str:
    try:
        character.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return _STAND_INS.get(character, "?")
    return character


def _head(found: Mapping[str, Any]) -> Text:
    totals = found["totals"]
    shapes = ", ".join(
        f"{printable(n)} {'x'.join(map(str, s)) or 'scalar'}" for n, s in found["shapes"].items()
    )
    parts = [
        f"{count(totals['parameters'])} parameters",
        f"{size(totals['weight_bytes'])} of weights",
        f"{size(totals['peak_activation_bytes'])} of activations at the peak",
    ]
    if found.get("target"):
        parts.append(f"timed on {found['target']}")
    head = Text(printable(found["model"]), style="bold")
    return head + Text(f"\ncosts for {shapes}; {', '.join(parts)}", style="")


def _chosen(
    found: Mapping[str, Any], lines: Sequence[Row], scored: _Scored, console: Console
) -> list[_Column]:
    """The columns that fit the console beside a name that can still be told from others."""
    return _fitting(
        _columns(found, scored, _plain(console)), lines, console.width - min(_longest(lines), _NAME)
    )


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _longest(lines: Sequence[Row]) -> int:
    return max(2 * row.level + cell_len(printable(row.label)) for row in lines)


def _tree(lines: Sequence[Row], columns: Sequence[_Column], console: Console) -> Iterator[Text]:
    """Lines of the table, by hand: rich's tables squeeze every column where only the name may give way."""
    cells = [[column.cell(row) for row in lines] for column in columns]
    widths = [_width(column, lines) for column in columns]
    room = console.width - sum(widths) - _GAP * len(columns)
    name = min(_longest(lines), max(room, _LEAST_NAME))
    height = max(len(column.title.split("\n")) for column in columns)
    for level in range(height):
        titles = ["part" if level == height - 1 else ""]
        titles += [_title(column, level, height) for column in columns]
        yield _line(titles, [name, *widths], [True, *(c.left for c in columns)], ["bold"] * len(titles))
    rule = Text(
        ("-" if _plain(console) else "─") * min(console.width, name + sum(widths) + _GAP * len(columns))
    )
    yield rule
    for index, row in enumerate(lines):
        if row is lines[-1]:
            yield rule
        label = "  " * row.level + shorten(row.label, max(3, name - 2 * row.level))
        texts = [label, *(column[index] for column in cells)]
        styles = ["bold" if row.strong else "", *(c.style(row) for c in columns)]
        yield _line(texts, [name, *widths], [True, *(c.left for c in columns)], styles)


def _fitting(columns: Sequence[_Column], lines: Sequence[Row], room: int) -> list[_Column]:
    """The columns that say anything and fit, by rank; one title stands once, in its wordiest form."""
    chosen: dict[str, _Column] = {}
    for column in sorted(columns, key=lambda c: c.rank):
        if not any(column.cell(row).strip() for row in lines):
            continue
        tried = {**chosen, column.title.replace("-\n", ""): column}
        taken = sum(_width(c, lines) + _GAP for c in tried.values())
        if not column.rank or taken <= room:
            chosen = tried
    return [column for column in columns if any(column is c for c in chosen.values())]


def _width(column: _Column, lines: Sequence[Row]) -> int:
    return max(map(cell_len, (*(column.cell(row) for row in lines), *column.title.split("\n"))))


def _title(column: _Column, level: int, height: int) -> str:
    """A title's line at a level, titles standing on the last one."""
    parts = column.title.split("\n")
    index = level - (height - len(parts))
    return parts[index] if index >= 0 else ""


def _line(texts: Sequence[str], widths: Sequence[int], left: Sequence[bool], styles: Sequence[str]) -> Text:
    line = Text(no_wrap=True)
    for index, (text, width, to_left, style) in enumerate(zip(texts, widths, left, styles, strict=True)):
        space = " " * max(0, width - cell_len(text))
        line.append(" " * (_GAP if index else 0))
        line.append(text + space if to_left else space + text, style=style)
    line.rstrip()
    return line


def _columns(found: Mapping[str, Any], scored: _Scored, plain: bool) -> list[_Column]:
    """Every column there is, from left to right."""
    return [*_cost_columns(found, plain), *_score_columns(scored), _LETTERS, _WORDS]


def _cost_columns(found: Mapping[str, Any], plain: bool) -> list[_Column]:
    whole, parameters = whole_time(found) or 0.0, found["totals"]["parameters"] or 1

    def share(row: Row) -> float:
        return (row.seconds or 0.0) / whole if whole else 0.0

    def times(row: Row, text: str) -> str:
        return "" if row.seconds is None else text

    return [
        _Column("kind", lambda r: "" if r.kind == "block" else shorten(r.kind, 11), 4, left=True),
        _Column("params", lambda r: count(r.parameters) if r.parameters else "", style=_strong),
        _Column("params %", lambda r: percent(r.parameters / parameters) if r.parameters else "", 9),
        _Column("", lambda r: bar(r.parameters / parameters, 8, plain=plain), 10, left=True, style=_blue),
        _Column("FLOPs", lambda r: count(r.flops), style=_strong),
        _Column("time", lambda r: seconds(r.seconds), style=_strong),
        _Column("time %", lambda r: times(r, percent(share(r))), 2),
        _Column(" ", lambda r: times(r, bar(share(r), 5, plain=plain)), 1, left=True, style=_blue),
        _Column("bound", lambda r: r.bound, 7, left=True),
        _Column("of roof", lambda r: "" if r.roof_share is None else percent(r.roof_share), 8),
    ]


def _score_columns(scored: _Scored) -> list[_Column]:
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
        columns.append(_Column(title, lambda r: _redundancy(r, scored), rank, style=green))
    if branches:
        columns.append(_Column(branches.source.metric, value, 6))
    for title, rank in (("sensi-\ntivity", 0), ("sensitivity", 5)):
        columns.append(_Column(title, lambda r: _sensitivity(r, operators), rank, style=yellow))
    if operators:
        columns.append(_Column(operators.source.metric, damage, 6))
    return columns


def _strong(row: Row) -> str:
    return "bold" if row.strong else ""


def _blue(row: Row) -> str:
    return "blue"


def _redundancy(row: Row, scored: _Scored) -> str:
    scores = scored.of(row)
    if scores is None:
        return ""
    mark = _MARK if row.redundancy in scores.marked else " "
    return _fine(scores.shares[row.redundancy]) + mark


def _sensitivity(row: Row, scores: Scores | None) -> str:
    name = worst(row, scores)
    if scores is None or name is None:
        return ""
    return percent(scores.shares[name]) + (_MARK if name in scores.marked else " ")


def _fine(share: float) -> str:
    """A percentage that does not call nearly all all."""
    return f"{100 * share:.1f} %" if 0.99 <= share < 0.9995 else percent(share)


def _options(names: Iterable[str], *, words: bool) -> str:
    found = list(dict.fromkeys(_group(name) for name in names))
    order = [group for group, _, _ in OPTION_GROUPS]
    known = [g for g in order if g in found]
    others = [printable(g) for g in found if g not in order]
    if words:
        return " ".join([*known, *others])
    letters = {group: letter for group, letter, _ in OPTION_GROUPS}
    return "".join(letters[g] for g in known) + ("+" if others else "")


def _group(option: str) -> str:
    for group, _, options in OPTION_GROUPS:
        if any(option == o or (o.endswith("*") and option.startswith(o[:-1])) for o in options):
            return group
    return option


def _legend(
    found: Mapping[str, Any], lines: Sequence[Row], scored: _Scored, columns: Sequence[_Column]
) -> Iterator[str]:
    redundant, sensitive = scored.branches, scored.operators
    titles, letters = {c.title for c in columns}, _LETTERS in columns
    if redundant:
        yield (
            f"redundancy: from {redundant.source.metric}, {redundant.source.says}; 100 %: nothing lost, 0 %: "
            f"matters most; {_MARK} the most redundant quarter"
        )
    if sensitive:
        yield (
            f"sensitivity: from {sensitive.source.metric}, {sensitive.source.says}; 100 %: the most "
            f"sensitive operator; of several the worst; {_MARK} half of the sum, at most eight"
        )
    groups = {_group(o) for row in lines for o in row.options}
    shown = [
        f"{letter if letters else group}: {_SAYS[group]}"
        for group, letter, _ in OPTION_GROUPS
        if group in groups
    ]
    if shown:
        yield f"options, before anything is priced: {', '.join(shown)}"
    if "bound" in titles:
        yield "bound: what limits it by the measured roofline; of roof: attainable over measured time"
    if found["skipped"]:
        name, reason = next(iter(found["skipped"].items()))
        yield f"{len(found['skipped'])} parts were not rated, first {printable(name)}: {printable(reason)}"


# One of the two, as there is room.
_LETTERS = _Column("options", lambda r: _options(r.options, words=False), left=True)
_WORDS = _Column("options", lambda r: _options(r.options, words=True), 3, left=True)
