"""One width for the whole model: the forms that are left of a space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lamina.errors import BudgetError
from lamina.planner.bits.evidence import QUANTIZE, weight_bytes, width_of
from lamina.planner.option_bytes import stored_bytes
from lamina.planner.space import Choice, Space


def uniform_space(space: Space, bits: int) -> Space:
    """The space with the forms of one width; or the next wider where there is none.

    Of each operator those forms stay whose level is the widest up to ``bits``; where all are wider, the
    narrowest of them. Carriers of int8, and choices of other transforms, stay as they are.

    Args:
        space: What the transforms offer.
        bits: 2 to 8.

    Raises:
        BudgetError: No operator has a form as narrow as that.
    """
    kept: list[Choice] = []
    reached = False
    for choice, stored in zip(space.choices, stored_bytes(space), strict=True):
        if choice.transform.name != QUANTIZE or not choice.site.weights:
            kept.append(choice)
            continue
        held = max(weight_bytes(space, choice.site), 1.0)
        levels = [width_of(o, s / held) for o, s in zip(choice.options, stored, strict=True)]
        chosen = level_for(levels, bits)
        reached |= chosen <= bits
        options = tuple(o for o, level in zip(choice.options, levels, strict=True) if level == chosen)
        kept.append(replace(choice, options=options))
    if not reached:
        raise BudgetError(
            f"no operator of the model has a form in {bits} bits on this target",
            advice="give more bits, or leave them out",
        )
    return replace(space, choices=tuple(kept))


def level_for(levels: Sequence[int], bits: int) -> int:
    """The widest level up to ``bits``, or the narrowest of all."""
    return max((level for level in levels if level <= bits), default=min(levels))
