"""``lamina analyze`` on the terminal: one tree that fits 80 columns and uses more where there are more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from lamina.report.analysis_columns import (
    LETTERS,
    MARK,
    OPTION_GROUPS,
    OTHERS,
    SAYS,
    Column,
    Scored,
    columns_of,
    group_of,
)
from lamina.report.reading import reading
from lamina.report.scores import redundancy, sensitivity
from lamina.report.text import count, printable, shorten, size
from lamina.report.tree import Row, rows, total

# Cells a name keeps when optional columns join, and when even the others do not fit.
_NAME, _LEAST_NAME = 22, 8
_GAP = 2
_STAND_INS = {"µ": "u", "…": "~"}


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
    scored = Scored(redundant, redundancy(found, "blocks", redundant), sensitive)
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


def _chosen(found: Mapping[str, Any], lines: Sequence[Row], scored: Scored, console: Console) -> list[Column]:
    """The columns that fit the console beside a name that can still be told from others."""
    return _fitting(
        columns_of(found, scored, _plain(console)), lines, console.width - min(_longest(lines), _NAME)
    )


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _longest(lines: Sequence[Row]) -> int:
    return max(2 * row.level + cell_len(printable(row.label)) for row in lines)


def _tree(lines: Sequence[Row], columns: Sequence[Column], console: Console) -> Iterator[Text]:
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


def _fitting(columns: Sequence[Column], lines: Sequence[Row], room: int) -> list[Column]:
    """The columns that say anything and fit, by rank; one title stands once, in its wordiest form."""
    chosen: dict[str, Column] = {}
    for column in sorted(columns, key=lambda c: c.rank):
        if not any(column.cell(row).strip() for row in lines):
            continue
        tried = {**chosen, column.title.replace("-\n", ""): column}
        taken = sum(_width(c, lines) + _GAP for c in tried.values())
        if not column.rank or taken <= room:
            chosen = tried
    return [column for column in columns if any(column is c for c in chosen.values())]


def _width(column: Column, lines: Sequence[Row]) -> int:
    return max(map(cell_len, (*(column.cell(row) for row in lines), *column.title.split("\n"))))


def _title(column: Column, level: int, height: int) -> str:
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


def _legend(
    found: Mapping[str, Any], lines: Sequence[Row], scored: Scored, columns: Sequence[Column]
) -> Iterator[str]:
    redundant, sensitive = scored.branches, scored.operators
    titles, letters = {c.title for c in columns}, LETTERS in columns
    if redundant:
        yield (
            f"redundancy: from {redundant.source.metric}, {redundant.source.says}; 100 %: nothing lost, 0 %: "
            f"matters most; {MARK} the most redundant quarter"
        )
    if sensitive:
        yield (
            f"sensitivity: from {sensitive.source.metric}, {sensitive.source.says}; 100 %: the most "
            f"sensitive operator; of several the worst; {MARK} half of the sum, at most eight"
        )
    groups = {group_of(o) for row in lines for o in row.options}
    shown = [
        f"{letter if letters else group}: {SAYS[group]}"
        for group, letter, _ in OPTION_GROUPS
        if group in groups
    ]
    if letters and groups - {group for group, _, _ in OPTION_GROUPS}:
        shown.append(f"{OTHERS}: others, which a wider terminal names")
    if shown:
        yield f"options, before anything is priced: {', '.join(shown)}"
    if "bound" in titles:
        share = "; of roof: attainable over measured time" if "of roof" in titles else ""
        yield f"bound: what limits it by the measured roofline{share}"
    if found["skipped"]:
        name, reason = next(iter(found["skipped"].items()))
        yield f"{len(found['skipped'])} parts were not rated, first {printable(name)}: {printable(reason)}"
