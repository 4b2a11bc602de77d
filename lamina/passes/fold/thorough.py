"""What ``LAMINA_VERIFY=all`` adds after every fold: types, checker, and the outputs of the original."""

from __future__ import annotations

from lamina.backends.reference import compile_reference
from lamina.errors import LaminaError, VerificationError
from lamina.ir.difference import difference, tolerance_of
from lamina.ir.program import Program
from lamina.ir.verify import check


def verify_outputs(original: Program, changed: Program, name: str) -> None:
    """Check a program in the middle of folding and run it beside the original on its example.

    Differences accumulate over passes, so what is allowed is a dtype's own tolerance, not one pass's ulps.

    Raises:
        VerificationError: It is not whole, does not run, or gives other outputs; names ``name``.
    """
    feeds = {p.name: original.example[p.name] for p in original.inputs if p.name in original.example}
    try:
        wanted = compile_reference(original.model).run(feeds)
    except LaminaError:
        wanted = {}  # what does not run cannot be held against anything
    try:
        check(changed)
        found = compile_reference(changed.model).run(feeds) if wanted else {}
    except LaminaError as error:
        raise VerificationError(f"after {name}: {error.what.splitlines()[0]}", where=error.where) from error
    for output, before in wanted.items():
        apart = difference(before, found[output])
        if apart.max_abs > tolerance_of(before.dtype) * apart.scale:
            raise VerificationError(
                f"after {name}: output '{output}' differs by {apart.max_abs:.2g}",
                where=apart.reason,
                advice=f"this is a bug in {name}: report it with the model",
            )
