"""Workloads: the input shapes that matter, how much each counts, and the arrays to run them on."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.backends.backend import Case, Workload
from lamina.data import Dataset
from lamina.data.interface import describe, dynamic_dims, named_shape, resolve, resolve_shape
from lamina.data.synthetic import draw, example_sizes
from lamina.errors import BudgetError
from lamina.ir.program import Port, Program

EXAMPLE = "1x128@0.2; 1x1@0.8"
_UNKNOWN_DIM = 8
_SEED = 0
_NAMED_SIZE = re.compile(r"^\s*(.+?)\s*=\s*(\S+)\s*$")


@dataclass(frozen=True)
class _Spec:
    """One case as the user wrote it: name, sizes of the free dims, weight if any was given."""

    name: str
    sizes: Mapping[str, int]
    weight: float | None


def parse_workload(spec: Any, program: Program, dataset: Dataset | None = None) -> Workload:
    """The cases of a workload, with feeds to run and weights that sum to 1.

    Args:
        spec: ``"1x128@0.2; 1x1@0.8"``: sizes of the dynamic dims in the order they first appear over the
            inputs (fixed dims are not counted), with weights; or by name, ``"batch=1,seq=128@0.2"``; a case
            may be called something, ``"prefill: 1x128@0.2"``. A list holds such texts, mappings of arrays to
            feed as they are, ``(text or mapping, weight)`` pairs or :class:`Case` objects. None: batch 1,
            the other dims as in the data, or else in the example.
        program: The model.
        dataset: Where feeds come from: rows are repeated and positions cropped or repeated to fit. Without
            it, they are drawn like the program's example.

    Raises:
        BudgetError: A dim is unknown or missing, a size or weight is not a positive number, or arrays do not
            fit the model.
    """
    dims = dynamic_dims(program)
    if spec is None:
        sizes = _default_sizes(program, dataset)
        return (Case(_label(sizes, dims), _feeds(program, sizes, dataset)),)
    items = _items(spec)
    if not items:
        raise BudgetError("the workload is empty", advice=_advice(dims))
    found: list[tuple[str, Mapping[str, np.ndarray], float | None]] = []
    for number, (item, weight) in enumerate(items):
        if isinstance(item, Case):
            found.append(
                (item.name, _checked(program, item.feeds), item.weight if weight is None else weight)
            )
        elif isinstance(item, str):
            case = _parse(item, dims, program)
            feeds = _feeds(program, case.sizes, dataset)
            found.append((case.name, feeds, case.weight if weight is None else weight))
        elif isinstance(item, Mapping):
            found.append((f"case-{number}", _checked(program, item), weight))
        else:
            raise BudgetError(f"{type(item).__name__} is not a case of a workload", advice=_advice(dims))
    return _normalized(found)


def _items(spec: Any) -> list[tuple[Any, float | None]]:
    """Cases, each with the weight given beside it (not inside its text)."""
    if isinstance(spec, str):
        return [(part.strip(), None) for part in spec.split(";") if part.strip()]
    if isinstance(spec, Mapping | Case):
        return [(spec, None)]
    if not isinstance(spec, Sequence):
        raise BudgetError(
            f"a workload is text or a list, not {type(spec).__name__}", advice=f"write '{EXAMPLE}'"
        )
    items: list[tuple[Any, float | None]] = []
    for item in spec:
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], int | float):
            items.append((item[0], _weight(str(item[1]), str(item[1]))))
        else:
            items.append((item, None))
    return items


def _parse(text: str, dims: Sequence[str], program: Program) -> _Spec:
    body, at, weight = text.partition("@")
    name, colon, sizes = body.rpartition(":")
    parsed = _named_sizes(sizes, text, dims) if "=" in sizes else _ordered_sizes(sizes, text, dims)
    for dim in {named_shape(p)[0] for p in program.inputs if p.shape}:
        if isinstance(dim, str) and parsed.get(dim) == 0:
            raise _error(f"the batch '{dim}' cannot be 0", text, dims)
    label = name.strip() if colon and name.strip() else _label(parsed, dims)
    return _Spec(label, parsed, _weight(weight, text) if at else None)


def _ordered_sizes(sizes: str, text: str, dims: Sequence[str]) -> dict[str, int]:
    parts = [p for p in re.split(r"[xX×*]", sizes.strip()) if p.strip()]  # noqa: RUF001 the sign people paste
    if len(parts) != len(dims):
        given = f"{len(parts)} size{'s' * (len(parts) != 1)}"
        raise _error(f"{given} given, the model has {len(dims)} dynamic dims ({', '.join(dims)})", text, dims)
    return {dim: _size(part, dim, text, dims) for dim, part in zip(dims, parts, strict=True)}


def _named_sizes(sizes: str, text: str, dims: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in filter(str.strip, sizes.split(",")):
        match = _NAMED_SIZE.match(part)
        if match is None:
            raise _error(f"'{part.strip()}' is not dim=size", text, dims)
        dim = match.group(1)
        if dim not in dims:
            raise _error(
                f"the model has no dynamic dim '{dim}', it has {', '.join(dims) or 'none'}", text, dims
            )
        if dim in found:
            raise _error(f"dim '{dim}' is given twice", text, dims)
        found[dim] = _size(match.group(2), dim, text, dims)
    missing = [dim for dim in dims if dim not in found]
    if missing:
        raise _error(f"no size is given for dim {', '.join(missing)}", text, dims)
    return {dim: found[dim] for dim in dims}


def _size(number: str, dim: str, text: str, dims: Sequence[str]) -> int:
    # 0 is legal where no batch is meant: the past of a decoder's first step.
    if not number.strip().isascii() or not number.strip().isdigit():
        raise _error(f"the size of '{dim}' must be a whole number, not '{number.strip()}'", text, dims)
    return int(number)


def _weight(number: str, text: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight <= 0:
        what = f"the weight of a case must be a positive number, not '{number.strip()}'"
        raise BudgetError(what, where=f"workload '{text}'", advice=f"write it like '{EXAMPLE}'")
    return weight


def _error(what: str, text: str, dims: Sequence[str]) -> BudgetError:
    return BudgetError(what, where=f"workload '{text}'", advice=_advice(dims))


def _advice(dims: Sequence[str]) -> str:
    if not dims:
        return "every dim of this model is fixed: leave the workload out"
    by_order = "x".join(["1", "128", "64", "32"][: len(dims)] + ["1"] * (len(dims) - 4))
    by_name = ",".join(f"{dim}={size}" for dim, size in zip(dims, by_order.split("x"), strict=True))
    return f"write it like '{by_order}' or '{by_name}', cases separated by ';', weights after '@'"


def _normalized(found: Sequence[tuple[str, Mapping[str, np.ndarray], float | None]]) -> Workload:
    weighted = [weight is not None for _, _, weight in found]
    if any(weighted) and not all(weighted):
        name = found[weighted.index(False)][0]
        what = f"case '{name}' has no weight, others have"
        raise BudgetError(what, where="workload", advice=f"weigh all cases or none: '{EXAMPLE}'")
    weights = [1.0 if weight is None else weight for _, _, weight in found]
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise BudgetError("the weight of a case must be a positive number", where="workload", advice=EXAMPLE)
    total = sum(weights)
    return tuple(
        Case(name, feeds, weight / total) for (name, feeds, _), weight in zip(found, weights, strict=True)
    )


def _label(sizes: Mapping[str, int], dims: Sequence[str]) -> str:
    return "x".join(str(sizes[dim]) for dim in dims) or "fixed"


def _default_sizes(program: Program, dataset: Dataset | None) -> dict[str, int]:
    sizes = example_sizes(program)
    for port in program.inputs if dataset is not None else ():
        shape = dataset.inputs[port.name].shape if dataset is not None else ()
        sizes |= {dim: n for dim, n in zip(named_shape(port), shape, strict=True) if isinstance(dim, str)}
    batches = {named_shape(p)[0] for p in program.inputs if p.shape}
    return {dim: 1 if dim in batches else sizes.get(dim, _UNKNOWN_DIM) for dim in dynamic_dims(program)}


def _feeds(program: Program, sizes: Mapping[str, int], dataset: Dataset | None) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(_SEED)
    feeds = {}
    for port in program.inputs:
        unknown = [d for d in named_shape(port) if resolve(d, sizes) is None]
        if unknown:
            what = f"the size of dim '{unknown[0]}' of input '{port.name}' does not follow from the workload"
            raise BudgetError(what, advice="give the arrays themselves: a list of mappings")
        shape = resolve_shape(port, sizes)
        rows = None if dataset is None else dataset.inputs.get(port.name)
        feeds[port.name] = (
            _from_rows(rows, shape)
            if rows is not None and rows.size
            else (draw(port, shape, program.example.get(port.name), rng))
        )
    return feeds


def _from_rows(rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The first rows, repeated where there are too few; likewise along every other axis."""
    array = rows
    for axis, size in enumerate(shape):
        if array.shape[axis] < size:
            array = np.take(array, np.arange(size) % array.shape[axis], axis=axis)
        else:
            array = array[(slice(None),) * axis + (slice(0, size),)]
    return np.ascontiguousarray(array).reshape(shape)


def _checked(program: Program, feeds: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The user's own arrays, if they are what the model takes."""
    names = [port.name for port in program.inputs]
    if set(feeds) != set(names):
        what = f"the feeds are {', '.join(feeds)}, the model takes {', '.join(names)}"
        raise BudgetError(what, where="workload", advice="give one array an input")
    arrays = {port.name: _checked_one(port, np.asarray(feeds[port.name])) for port in program.inputs}
    sizes: dict[str, int] = {}
    for port in program.inputs:
        for dim, size in zip(named_shape(port), arrays[port.name].shape, strict=True):
            if isinstance(dim, str) and sizes.setdefault(dim, size) != size:
                what = f"dim '{dim}' is {sizes[dim]} in one input and {size} in '{port.name}'"
                raise BudgetError(what, where="workload", advice="give both inputs the same size there")
    return arrays


def _checked_one(port: Port, array: np.ndarray) -> np.ndarray:
    shape = named_shape(port)
    fits = array.ndim == len(shape) and all(
        isinstance(d, str) or d == n for d, n in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype != port.numpy_dtype:
        expected = f"{port.numpy_dtype.name} {describe(shape)}"
        what = f"input '{port.name}' expects {expected}, got {array.dtype.name} {describe(array.shape)}"
        raise BudgetError(what, where="workload", advice="give the arrays as the model takes them")
    return array
