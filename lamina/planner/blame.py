"""Which moves are to blame when a candidate breaks: halving, so that few culprits cost few trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lamina.errors import LaminaError
from lamina.ir.program import Program
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.planner.referee import Referee
from lamina.planner.space import Space

Culprits = list[tuple[Move, str]]
Undone = dict[str, str]  # "pass", "where", "reason"


def blame(moves: Sequence[Move], fault: Callable[[Sequence[Move]], str | None]) -> Culprits:
    """The moves that fail on their own, each with the reason.

    Args:
        moves: A set that may fail.
        fault: Tries some of them: why they fail, or None. O(culprits log moves) calls.
    """
    reason = fault(moves) if moves else None
    if reason is None:
        return []
    if len(moves) == 1:
        return [(moves[0], reason)]
    middle = len(moves) // 2
    return blame(moves[:middle], fault) + blame(moves[middle:], fault)


def blame_space(space: Space, referee: Referee) -> Culprits:
    """Every option of a space that cannot be applied alone; options of one name are tried together."""
    names = dict.fromkeys(option.name for choice in space.choices for option in choice.options)
    found: Culprits = []
    for name in names:
        found += blame(space.moves(space.uniform(name)), trial(space.program, referee))
    return found


def trial(program: Program, referee: Referee) -> Callable[[Sequence[Move]], str | None]:
    """What applies moves to ``program`` and says why the result may not be shipped, or None."""

    def fault(moves: Sequence[Move]) -> str | None:
        try:
            referee.check(apply_moves(program, moves), describe(moves), exact=False)
        except Exception as error:  # any failure of a move counts, a bug in its code above all
            return reason_of(error)
        return None

    return fault


def describe(moves: Sequence[Move]) -> str:
    """Moves in a message: ``quantize w8 at 'fc1'``, or how many of which transforms."""
    if len(moves) == 1:
        return f"{moves[0].site.transform} {moves[0].option.name} at '{moves[0].site.name}'"
    return ", ".join(sorted({m.site.transform for m in moves})) or "folding"


def reason_of(error: Exception) -> str:
    """One line of an error."""
    text = error.what if isinstance(error, LaminaError) else f"{type(error).__name__}: {error}"
    return (text.strip().splitlines() or [type(error).__name__])[0][:300]


def undone(culprits: Culprits) -> list[Undone]:
    """Entries for ``result.json``."""
    return [
        {"pass": f"{m.site.transform} {m.option.name}", "where": m.site.name, "reason": reason}
        for m, reason in culprits
    ]
