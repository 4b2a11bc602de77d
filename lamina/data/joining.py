"""Put chunks and pair sides together: concatenate, pad token sequences of different lengths, interleave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.data.interface import is_mask
from lamina.data.sources import Chunk
from lamina.errors import DataError
from lamina.ir.program import Program

IGNORED_LABEL = -100
PAD_ADVICE = "pad every sample to one length (and mask the padding), or give samples of equal shape"


def join(chunks: Sequence[Chunk], program: Program) -> dict[str, np.ndarray]:
    """One array a name from all chunks.

    Token inputs of different lengths are padded at the end with 0 to the longest where the model has a mask
    input to mark the padding; integer ``labels`` that follow them, with -100 (ignored).

    Raises:
        DataError: Chunks hold different names, or shapes that do not go together.
    """
    first = chunks[0]
    for chunk in chunks[1:]:
        if set(chunk.arrays) != set(first.arrays):
            odd = ", ".join(sorted(set(chunk.arrays) ^ set(first.arrays)))
            what = f"not every part of the data has the same names: {odd} is missing from one of two"
            raise DataError(
                what, where=f"{first.where} and {chunk.where}", advice="give each part the same arrays"
            )
    if len(chunks) == 1:
        return dict(first.arrays)
    return {name: _join_one(name, chunks, program) for name in first.arrays}


def _join_one(name: str, chunks: Sequence[Chunk], program: Program) -> np.ndarray:
    arrays = [np.atleast_1d(chunk.arrays[name]) for chunk in chunks]
    if len({a.ndim for a in arrays}) > 1:
        odd = next(i for i, a in enumerate(arrays) if a.ndim != arrays[0].ndim)
        what = f"'{name}' has {arrays[odd].ndim} dims, before it had {arrays[0].ndim}"
        raise DataError(what, where=chunks[odd].where, advice="give every part the same rank")
    if len({a.shape[1:] for a in arrays}) == 1:
        return np.concatenate(arrays)
    value = pad_value(name, arrays[0], program)
    if value is None:
        odd = next(i for i, a in enumerate(arrays) if a.shape[1:] != arrays[0].shape[1:])
        what = f"'{name}' has samples of shape {arrays[odd].shape[1:]} and of {arrays[0].shape[1:]}"
        raise DataError(what, where=f"{chunks[0].where} and {chunks[odd].where}", advice=PAD_ADVICE)
    return np.concatenate(pad_alike(arrays, value))


def pad_value(name: str, array: np.ndarray, program: Program) -> int | None:
    """What fills up a shorter array, or None where padding would change what the model computes."""
    masked = any(is_mask(port.name) for port in program.inputs)
    if not masked or array.dtype.kind not in "iub":
        return None
    ports = {port.name for port in program.inputs}
    if name in ports or name.partition(".")[2] in ports:
        return 0
    return IGNORED_LABEL if name == "labels" and array.dtype.kind == "i" else None


def pad_alike(arrays: Sequence[np.ndarray], value: int) -> list[np.ndarray]:
    """Every array grown at the end of each axis but the first to the largest among them."""
    longest = np.max([a.shape[1:] for a in arrays], axis=0)
    return [
        np.pad(
            a,
            [(0, 0), *((0, int(m) - s) for m, s in zip(longest, a.shape[1:], strict=True))],
            constant_values=value,
        )
        for a in arrays
    ]


def interleave(arrays: Mapping[str, np.ndarray], program: Program) -> tuple[dict[str, np.ndarray], int]:
    """Arrays by input name and rows a sample: ``a.<input>`` and ``b.<input>`` become rows a0, b0, a1, b1, ...

    Raises:
        DataError: One side lacks an input, or the sides do not go together.
    """
    names = [port.name for port in program.inputs]
    paired = [n for n in names if f"a.{n}" in arrays or f"b.{n}" in arrays]
    if not paired:
        return dict(arrays), 1
    missing = [f"{side}.{n}" for n in names for side in "ab" if f"{side}.{n}" not in arrays]
    plain = [n for n in names if n in arrays]
    if missing or plain:
        what = (
            f"the data has pairs, but {', '.join(missing)} is missing"
            if missing
            else (f"the data has pairs, but also {', '.join(plain)} without a side")
        )
        advice = "give a.<input> and b.<input> for every input, or no pairs at all"
        raise DataError(what, where=f"inputs {', '.join(names)}", advice=advice)
    sides = {f"{side}.{n}" for n in names for side in "ab"}
    joined = {n: _interleave_one(n, arrays[f"a.{n}"], arrays[f"b.{n}"], program) for n in names}
    return joined | {k: v for k, v in arrays.items() if k not in sides}, 2


def _interleave_one(name: str, a: np.ndarray, b: np.ndarray, program: Program) -> np.ndarray:
    if a.ndim == 0 or a.ndim != b.ndim or len(a) != len(b):
        what = f"the sides of the pairs differ: a.{name} is {list(a.shape)}, b.{name} {list(b.shape)}"
        raise DataError(what, where=f"input '{name}'", advice="give both sides one row a pair")
    if a.shape[1:] != b.shape[1:]:
        value = pad_value(name, a, program)
        if value is None:
            what = f"a.{name} has rows of shape {a.shape[1:]}, b.{name} of {b.shape[1:]}"
            raise DataError(what, where=f"input '{name}'", advice=PAD_ADVICE)
        a, b = pad_alike([a, b], value)
    return np.stack([a, b], axis=1).reshape(-1, *a.shape[1:])
