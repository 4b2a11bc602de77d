"""What folding did, on the terminal, from plain result data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Operator types printed, largest changes first: the rest is in --json.
SHOWN_TYPES = 15


def fold_table(found: Mapping[str, Any], files: Sequence[str]) -> None:
    """Nodes and bytes before and after, passes, what was undone, forms tried, the verdict, files."""
    console = Console()
    console.print(escape(found["model"]), soft_wrap=True, highlight=False)
    console.print(_counts(found))
    if found["changes"]:
        said = ", ".join(f"{name} {count}" for name, count in found["changes"].items())
        console.print(f"changed by: {escape(said)}", soft_wrap=True, highlight=False)
    if found["forms"]:
        console.print(_forms(found))
    for line in _remarks(found):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(escape("wrote " + ", ".join(files)), soft_wrap=True, highlight=False)


def _counts(found: Mapping[str, Any]) -> Table:
    table = _table("", ("", "before", "after", "change"))
    for name in ("nodes", "bytes"):
        before, after = found[name]["before"], found[name]["after"]
        table.add_row(name, f"{before:,}", f"{after:,}", f"{after - before:+,}")
    changed = [(op, *pair) for op, pair in found["operators"].items() if pair[0] != pair[1]]
    changed.sort(key=lambda row: (-abs(row[2] - row[1]), row[0]))
    for op, before, after in changed[:SHOWN_TYPES]:
        table.add_row(f"  {escape(op)}", f"{before:,}", f"{after:,}", f"{after - before:+,}")
    if len(changed) > SHOWN_TYPES:
        table.add_row(f"  and {len(changed) - SHOWN_TYPES} more types", "", "", "")
    return table


def _forms(found: Mapping[str, Any]) -> Table:
    again = ", remembered from an earlier run" if found["remembered"] else ""
    table = _table(f"forms on {found['target']}{again}", ("form", "latency ratio", "kept", "how"))
    for entry in found["forms"]:
        ratio = entry.get("latency_ratio")
        how = str(entry.get("reason") or entry.get("tried") or "")
        shown = "" if ratio is None else f"{ratio:.3f}"
        table.add_row(escape(str(entry["form"])), shown, "yes" if entry["kept"] else "no", escape(how))
    return table


def _remarks(found: Mapping[str, Any]) -> Iterator[str]:
    for entry in found["undone"]:
        yield f"[yellow]left out {escape(entry['pass'])}: {escape(entry['reason'])}[/yellow]"
    latency = found["latency"]
    if latency is not None:
        spread = f"{latency['low']:.3f} to {latency['high']:.3f}"
        yield f"latency {latency['ratio']:.3f} of the original's ({spread})"
    check = found["check"]
    if check["equal"]:
        worst = f"largest difference {check['max_rel']:.2g} relative"
        yield f"[green]equal[/green] on {check['inputs']} inputs, {worst}"
    elif check["equal"] is None:
        yield f"[yellow]not run against the original: {escape(check['reason'] or '')}[/yellow]"


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=escape(title) or None, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    for name in columns:
        words = name in ("", "form", "how", "kept")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    return table
