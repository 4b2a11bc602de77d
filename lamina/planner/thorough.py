"""What ``LAMINA_VERIFY=all`` adds after every move: types, checker, and running the program."""

from __future__ import annotations

from lamina.backends.reference import compile_reference
from lamina.errors import LaminaError, VerificationError
from lamina.ir.program import Program
from lamina.ir.verify import check, verify_structure


def verify_thoroughly(program: Program, name: str) -> None:
    """Check a program as it is in the middle of a change, and run it on its example.

    Raises:
        VerificationError: It is not whole, or does not run; names ``name``.
    """
    verify_structure(program, name)
    try:
        check(program)
        compile_reference(program.model).run({p.name: program.example[p.name] for p in program.inputs})
    except LaminaError as error:
        raise VerificationError(
            f"after {name}: {error.what.splitlines()[0]}",
            where=error.where,
            advice=f"this is a bug in {name.split()[0]}: report it with the model",
        ) from error
