"""How many coupled channel groups models have, and what finding and cutting them costs.

    python -m tools.studies.coupled_groups MODEL.onnx ...

Prints a table. *Groups* can be cut; the *inexact* among them are not the same cut as zeroed. *Widest*
is the most units a group has, *longest* the most weights one runs through. *Find* is the CPU time of
``coupled_groups``; *cut* that of ``shrink`` by one unit, of the group for which it takes longest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lamina.analysis.coupling import coupled_groups
from lamina.ir.capture import capture
from lamina.passes.shrink import shrink

_HEAD = (
    "model",
    "operators",
    "groups",
    "inexact",
    "widest",
    "longest",
    "axes that stay",
    "find, s",
    "cut, s",
)


def row(path: Path) -> tuple[str, ...]:
    """One model in a line of the table."""
    program = capture(path)
    start = time.process_time()
    found = coupled_groups(program)
    seconds = time.process_time() - start
    slowest = 0.0
    for group in found.groups:
        start = time.process_time()
        shrink(program, found, {group.name: [0]})
        slowest = max(slowest, time.process_time() - start)
    counts = (
        len(program.graph),
        len(found.groups),
        sum(bool(g.inexact) for g in found.groups),
        max((g.units for g in found.groups), default=0),
        max((len({m.name for m in g.weights}) for g in found.groups), default=0),
        len(found.frozen),
    )
    return (path.stem, *map(str, counts), f"{seconds:.2f}", f"{slowest:.2f}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+")
    for cells in (_HEAD, ("-",) * len(_HEAD), *map(row, parser.parse_args().models)):
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
