"""Analyses computed once: cached by function, options and the program's fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Concatenate, ParamSpec, TypeVar

from lamina.ir.program import Program

P = ParamSpec("P")
R = TypeVar("R")
_Key = tuple[str, Callable[..., Any], Any]


class Analyses:
    """Results of analyses of one program, each computed when first asked for.

    An analysis is any function whose first argument is the program. Results are shared and must not be
    changed. Options that can be hashed are compared by value, others (data sets, feeds) by identity, and are
    kept alive with the result.

    Args:
        program: The program to analyze.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._results: dict[_Key, tuple[Any, Any]] = {}

    def get(self, function: Callable[Concatenate[Program, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The result of ``function(program, *args, **kwargs)``, from the cache where it is there."""
        options = (tuple(map(_token, args)), tuple(sorted((k, _token(v)) for k, v in kwargs.items())))
        key = (self.program.fingerprint, function, options)
        if key not in self._results:
            self._results[key] = (function(self.program, *args, **kwargs), (args, kwargs))
        result: R = self._results[key][0]
        return result

    def preserve(self, program: Program, functions: Collection[Callable[..., Any]] = ()) -> Analyses:
        """Analyses of a changed program, with the results of ``functions`` carried over.

        A program that computes the same (equal fingerprint) keeps everything.

        Args:
            program: What a pass made of this program.
            functions: Analyses the pass says are still true.
        """
        following = Analyses(program)
        for (fingerprint, function, options), result in self._results.items():
            if fingerprint == program.fingerprint or function in functions:
                following._results[(program.fingerprint, function, options)] = result
        return following

    def __len__(self) -> int:
        return len(self._results)


def _token(option: Any) -> Any:
    """What an option is compared by: type and value, so that 1, 1.0 and True differ; else identity."""
    if isinstance(option, tuple):
        return type(option).__name__, tuple(_token(o) for o in option)
    if isinstance(option, frozenset):
        return type(option).__name__, frozenset(_token(o) for o in option)
    try:
        hash(option)
    except TypeError:
        return "identity", id(option)
    return type(option).__name__, option
