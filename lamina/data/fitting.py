"""Make a dataset of named arrays, or say exactly why they do not fit the model."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import numpy as np

from lamina.data.dataset import Dataset
from lamina.data.interface import NamedShape, describe, named_shape, resolve_shape
from lamina.data.joining import interleave
from lamina.errors import DataError
from lamina.ir.program import Port, Program

# Metrics read these; an array of another name and length may be a legend (class names) and is left out.
TARGETS = ("labels", "score", "scores", "targets")
_LARGEST_RUN_BYTES = 64 << 20
_MOST_ROWS = 32


def fit(
    arrays: Mapping[str, np.ndarray], program: Program, *, batch_size: int | None = None, where: str = "data"
) -> Dataset:
    """A dataset in the model's names, shapes and dtypes.

    Raises:
        DataError: Names are missing or unknown, a rank, dim or dtype does not fit, the numbers of samples
            differ, there are none, or a value is NaN or infinite.
    """
    arrays, group = interleave(arrays, program)
    _check_names(arrays, program, where)
    inputs = {p.name: _check_array(p, _cast(p, arrays[p.name], where), where) for p in program.inputs}
    layout, fixed, samples = _layout(inputs, program, group, where)
    if samples == 0:
        raise DataError("the data is empty: no samples", where=where, advice="give at least 3 samples")
    inputs = {p.name: _constant(p, inputs[p.name], layout.get(p.name, group), where) for p in program.inputs}
    sizes = _check_dims(inputs, program, where)
    extras = _extras(arrays, inputs, samples, group, where)
    for name, array in {**inputs, **extras}.items():
        rows = layout.get(name, group) if name in inputs else 1
        _check_finite(name, array, max(rows, 1), where)
    rows = batch_size or _default_batch(program, sizes, group)
    if fixed:
        rows = fixed * group
    return Dataset(inputs, extras, max(rows, group), group, layout, fixed)


def check(dataset: Dataset, program: Program) -> Dataset:
    """The dataset itself, if its inputs fit the model.

    Raises:
        DataError: They do not.
    """
    _check_names(dataset.inputs, program, "dataset")
    for port in program.inputs:
        array = dataset.inputs[port.name]
        _check_array(port, array, "dataset")
        if array.dtype != port.numpy_dtype:
            raise _dtype_error(port, array, "dataset")
        _check_finite(port.name, array, max(1, dataset.layout.get(port.name, dataset.group)), "dataset")
    if not dataset.samples:
        raise DataError("the data is empty: no samples", where="dataset", advice="give at least 3 samples")
    return dataset


def _check_names(arrays: Mapping[str, np.ndarray], program: Program, where: str) -> None:
    wanted = [port.name for port in program.inputs]
    missing = [name for name in wanted if name not in arrays]
    if not missing:
        return
    unknown = [name for name in arrays if name not in wanted]
    hints = [_default_hint(name) for name in missing]
    for name in missing:
        near = difflib.get_close_matches(name, unknown, n=1)
        hints += [f"rename '{near[0]}' to '{name}'"] if near else []
    what = f"the data lacks the input{'s' * (len(missing) > 1)} {', '.join(missing)}"
    place = f"{where}, which has {', '.join(unknown) or 'nothing else'}"
    advice = "; ".join(filter(None, hints)) or f"name the arrays like the inputs: {', '.join(wanted)}"
    raise DataError(what, where=place, advice=advice)


def _default_hint(name: str) -> str:
    if "token_type" in name or "segment" in name:
        return f"for single sentences, add '{name}' as zeros shaped like the token ids"
    if "attention_mask" in name:
        return f"without padding, add '{name}' as ones shaped like the token ids"
    return ""


def _cast(port: Port, array: np.ndarray, where: str) -> np.ndarray:
    """Change the dtype where every value survives; integers to a narrower type when their values fit."""
    target = port.numpy_dtype
    if target.kind == "O" and array.dtype.kind in "UO":
        return array.astype(object)
    if array.dtype == target:
        return array
    if array.dtype.kind in "biuf" and np.can_cast(array.dtype, target, "safe"):
        return array.astype(target)
    if array.dtype.kind in "iu" and target.kind in "biu":
        narrowed = array.astype(target)
        if (narrowed == array).all():
            return narrowed
    raise _dtype_error(port, array, where)


def _dtype_error(port: Port, array: np.ndarray, where: str) -> DataError:
    target = port.numpy_dtype.name
    what = f"input '{port.name}' is {array.dtype.name}, the model expects {target}"
    advice = f"the conversion may lose values, so it is yours to make: .astype('{target}')"
    return DataError(what, where=where, advice=advice)


def _check_array(port: Port, array: np.ndarray, where: str) -> np.ndarray:
    shape = named_shape(port)
    expected = f"input '{port.name}' expects {describe(shape)}, got {describe(array.shape)}"
    if not shape and array.ndim <= 1:
        return array
    if array.ndim == len(shape) - 1 and _fits(array.shape, shape[1:]):
        raise DataError(expected, where=where, advice="add the batch axis: array[None]")
    if array.ndim != len(shape):
        raise DataError(expected, where=where, advice=f"give {len(shape)} dims, samples along the first")
    if not _fits(array.shape[1:], shape[1:]):
        raise DataError(expected, where=where, advice=_shape_advice(array.shape, shape))
    return array


def _fits(got: tuple[int, ...], expected: NamedShape) -> bool:
    return len(got) == len(expected) and all(
        isinstance(e, str) or e == g for g, e in zip(got, expected, strict=True)
    )


def _shape_advice(got: tuple[int, ...], expected: NamedShape) -> str:
    if len(got) == 4 and _fits((got[3], got[1], got[2]), expected[1:]):
        return "the channels come last: array.transpose(0, 3, 1, 2)"
    if len(got) == 4 and _fits((got[2], got[3], got[1]), expected[1:]):
        return "the channels come first: array.transpose(0, 2, 3, 1)"
    return "reshape, crop or pad the samples"


def _layout(
    inputs: Mapping[str, np.ndarray], program: Program, group: int, where: str
) -> tuple[dict[str, int], int, int]:
    """Rows a sample takes of the odd inputs, samples every run must get (0: any), number of samples."""
    heads = {p.name: named_shape(p)[0] if p.shape else None for p in program.inputs}
    free = {n: len(inputs[n]) for n, head in heads.items() if isinstance(head, str)}
    fixed = {n: head for n, head in heads.items() if isinstance(head, int)}
    layout = {n: 0 for n, head in heads.items() if head is None}
    if free:
        layout |= dict.fromkeys(fixed, 0)
        return layout, 0, _samples(free, group, where)
    if not fixed:
        return layout, 0, 1
    if len(set(fixed.values())) == 1:
        batch = next(iter(fixed.values()))
        samples = _samples({n: len(inputs[n]) for n in fixed}, group, where)
        if batch % group or samples * group < batch:
            what = f"the model takes exactly {batch} rows a run, the data has {samples} samples of {group}"
            raise DataError(what, where=where, advice="give more samples or a model with a dynamic batch")
        return layout, batch // group, samples
    runs = {n: len(inputs[n]) // rows for n, rows in fixed.items() if len(inputs[n]) != rows}
    count = max(runs.values(), default=1)
    layout |= {n: 0 if len(inputs[n]) == rows and count > 1 else rows for n, rows in fixed.items()}
    wrong = [n for n, r in layout.items() if r and len(inputs[n]) != count * r]
    if wrong:
        got, need = len(inputs[wrong[0]]), count * layout[wrong[0]]
        what = f"input '{wrong[0]}' has {got} rows, {count} runs need {need}"
        raise DataError(what, where=where, advice="give every input its rows for every run")
    return layout, 1, count


def _samples(rows: Mapping[str, int], group: int, where: str) -> int:
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name}: {n // group}" for name, n in rows.items())
        what = f"the inputs have different numbers of samples ({counts})"
        raise DataError(what, where=where, advice="give every input one row a sample")
    return next(iter(rows.values())) // group


def _constant(port: Port, array: np.ndarray, rows: int, where: str) -> np.ndarray:
    """One copy of an input that has no batch axis; loaders repeat it with every item."""
    if rows:
        return array
    shape = named_shape(port)
    size = int(shape[0]) if shape else 1
    copies = array.reshape(-1, *array.shape[1:]) if shape else array.reshape(-1)
    repeats, rest = divmod(len(copies), size)
    if rest or not repeats:
        what = f"input '{port.name}' expects {describe(shape)}, got {describe(array.shape)}"
        raise DataError(what, where=where, advice="the model has no batch axis there: give it once")
    parts = copies.reshape(repeats, -1)
    if (parts != parts[:1]).any():
        what = f"input '{port.name}' has no batch axis ({describe(shape)}), but differs between samples"
        raise DataError(what, where=where, advice="give one value for all samples")
    return np.asarray(copies[:size].reshape((size, *array.shape[1:]) if shape else ()))


def _check_dims(inputs: Mapping[str, np.ndarray], program: Program, where: str) -> dict[str, int]:
    """Sizes of the dynamic dims; the same name must have the same size everywhere."""
    sizes: dict[str, tuple[int, str]] = {}
    for port in program.inputs:
        for dim, size in zip(named_shape(port), inputs[port.name].shape, strict=True):
            if not isinstance(dim, str):
                continue
            known, owner = sizes.setdefault(dim, (size, port.name))
            if known != size:
                what = f"dim '{dim}' is {known} in '{owner}' but {size} in '{port.name}'"
                raise DataError(what, where=where, advice="give both inputs the same size there")
    return {dim: size for dim, (size, _) in sizes.items()}


def _extras(
    arrays: Mapping[str, np.ndarray], inputs: Mapping[str, np.ndarray], samples: int, group: int, where: str
) -> dict[str, np.ndarray]:
    extras = {}
    for name, array in arrays.items():
        if name in inputs:
            continue
        if array.ndim and len(array) == samples:
            extras[name] = array
        elif array.ndim and (name in TARGETS or array.dtype.kind in "biuf"):
            unit = "pair" if group == 2 else "sample"
            what = f"'{name}' has {len(array)} entries for {samples} {unit}s"
            raise DataError(what, where=where, advice=f"give one entry a {unit}, or leave '{name}' out")
    return extras


def _check_finite(name: str, array: np.ndarray, rows: int, where: str) -> None:
    if array.dtype.kind not in "fV":
        return
    flat = array.reshape(len(array), -1) if array.ndim else array.reshape(1, -1)
    step = max(1, (16 << 20) // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        good = np.isfinite(_plain(flat[start : start + step])).all(axis=1)
        if not good.all():
            row = start + int(np.argmin(good))
            kind = "NaN" if np.isnan(_plain(flat[row])).any() else "an infinite value"
            what = f"'{name}' holds {kind}, first in sample {row // rows}"
            raise DataError(what, where=where, advice="clean or drop such samples")


def _plain(array: np.ndarray) -> np.ndarray:
    """bfloat16 and its kin as float32, which numpy's tests understand in every version."""
    return array.astype(np.float32) if array.dtype.kind == "V" else array


def _default_batch(program: Program, sizes: Mapping[str, int], group: int) -> int:
    """Rows a run gets when the user does not say: as many as keep the largest input or output small."""
    heads = [named_shape(p)[0] for p in program.inputs if p.shape]
    one_row = {**sizes, **{head: 1 for head in heads if isinstance(head, str)}}
    ports = (*program.inputs, *program.outputs)
    row_bytes = max(4 * math.prod(resolve_shape(p, one_row)) for p in ports)
    rows = max(1, min(_MOST_ROWS, _LARGEST_RUN_BYTES // max(1, row_bytes)))
    return max(group, rows - rows % group)
