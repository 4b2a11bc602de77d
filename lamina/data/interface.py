"""A program's inputs seen from its data: which dims are dynamic, what they are called, which is the batch."""

from __future__ import annotations

from collections.abc import Mapping

from lamina.ir.program import Port, Program

NamedShape = tuple[int | str, ...]


def named_shape(port: Port) -> NamedShape:
    """The port's shape with a name for every dynamic dim, also for those the model left unnamed.

    An unnamed first dim is called ``batch``, another ``<input>.<axis>``.
    """
    return tuple(_named(port.name, axis, dim) for axis, dim in enumerate(port.shape))


def _named(port: str, axis: int, dim: int | str | None) -> int | str:
    if isinstance(dim, int) and dim > 0:
        return dim
    # Exporters write "?" or -1 for a dim they do not know: two of those are not the same dim.
    if isinstance(dim, str) and dim.strip() not in ("", "?"):
        return dim
    return "batch" if axis == 0 else f"{port}.{axis}"


def dynamic_dims(program: Program) -> tuple[str, ...]:
    """Names of the free dims in order of first appearance over the inputs.

    A dim that is a sum of others (``past + seq``) follows from them and is not free.
    """
    names = dict.fromkeys(d for p in program.inputs for d in named_shape(p) if isinstance(d, str))
    return tuple(n for n in names if _terms(n, set(names) - {n}) is None)


def resolve(dim: int | str, sizes: Mapping[str, int]) -> int | None:
    """The size of a dim given the sizes of the free ones; None where they do not tell."""
    if isinstance(dim, int):
        return dim
    if dim in sizes:
        return sizes[dim]
    terms = _terms(dim, set(sizes))
    return None if terms is None else sum(t if isinstance(t, int) else sizes[t] for t in terms)


def resolve_shape(port: Port, sizes: Mapping[str, int], unknown: int = 1) -> tuple[int, ...]:
    """The port's shape under ``sizes``, with ``unknown`` for dims they do not tell."""
    known = (resolve(dim, sizes) for dim in named_shape(port))
    return tuple(unknown if size is None else size for size in known)


def _terms(dim: str, names: set[str]) -> list[int | str] | None:
    parts = [part.strip() for part in dim.strip("() ").split("+")]
    if len(parts) < 2 or not all(part.isdigit() or part in names for part in parts):
        return None
    return [int(part) if part.isdigit() else part for part in parts]


def is_mask(name: str) -> bool:
    """Whether an input says by its name that it masks positions."""
    return "mask" in name.lower()


def describe(shape: tuple[int | str, ...] | tuple[int, ...]) -> str:
    """A shape as messages show it: ``[batch, 3, 32, 32]``."""
    return "[" + ", ".join(str(d) for d in shape) + "]"
