"""Read samples from whatever holds them: files, folders, arrays, tensors and loaders."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.errors import DataError
from lamina.ir.program import Program

Arrays = Mapping[str, np.ndarray]
ACCEPTED = (
    "give an .npz file, a folder of them, a mapping of arrays named like the inputs, "
    "or an iterable of arrays, mappings, tensors or (inputs, labels) pairs"
)


@dataclass(frozen=True)
class Chunk:
    """Some samples by name, and where they came from, for messages."""

    arrays: Arrays
    where: str


def read(source: Any, program: Program) -> list[Chunk]:
    """Every chunk of ``source`` in order; each with a batch axis.

    A tuple is one item, ``(inputs, labels)`` or one array an input; any other iterable yields batches, or
    single samples where arrays have one axis less than the model's input.

    Raises:
        DataError: The source is missing, corrupt, empty or of a kind nobody understands.
    """
    if isinstance(source, str | Path):
        return _read_path(Path(source), program)
    if isinstance(source, Mapping):
        return [Chunk(_by_name(source, "data"), "data")]
    if is_array(source) or isinstance(source, tuple):
        return [Chunk(_item(source, program, "data"), "data")]
    if isinstance(source, bytes) or not isinstance(source, Iterable):
        raise DataError(f"data of type {type(source).__name__} cannot be read", advice=ACCEPTED)
    chunks = []
    for number, item in enumerate(source):
        where = f"data, item {number}"
        chunks.append(Chunk(_batched(_item(item, program, where), program), where))
    if not chunks:
        raise DataError("the data is empty: it yields no samples", advice=ACCEPTED)
    return chunks


def _read_path(path: Path, program: Program) -> list[Chunk]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix == ".npz" and p.is_file())
        if not files:
            raise DataError("the folder holds no .npz file", where=str(path), advice=ACCEPTED)
        return [Chunk(read_npz(p), str(p)) for p in files]
    if path.suffix == ".npy":
        return [Chunk(_item(_load(path), program, str(path)), str(path))]
    return [Chunk(read_npz(path), str(path))]


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Every array of one ``.npz`` file.

    Raises:
        DataError: The file is missing, not an ``.npz``, damaged, empty, or holds pickled objects.
    """
    archive = _load(path)
    if isinstance(archive, np.ndarray):
        raise DataError(
            "this is a single array, not an .npz", where=str(path), advice="save it with numpy.savez"
        )
    arrays = {}
    with archive:
        for name in archive.files:
            try:
                arrays[name] = archive[name]
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise _unreadable(path, error, f", array '{name}'") from error
    if not arrays:
        raise DataError("the file holds no arrays", where=str(path), advice="save it with numpy.savez")
    return arrays


def _load(path: Path) -> Any:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError("there is no such data file", where=str(path), advice=ACCEPTED) from error
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception, part: str = "") -> DataError:
    if part and "pickle" in str(error).lower():
        what = "the file holds pickled Python objects, which are never loaded"
        return DataError(what, where=f"{path}{part}", advice="save plain numeric arrays of equal shapes")
    what = "the data file cannot be read: not an .npz, or damaged"
    return DataError(what, where=f"{path}{part}", advice="write it again with numpy.savez")


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a tensor of any library."""
    return (
        isinstance(value, np.ndarray | np.generic) or hasattr(value, "detach") or hasattr(value, "__array__")
    )


def to_array(value: Any, where: str) -> np.ndarray:
    """A numpy array of an array, a tensor, a number or nested lists of numbers.

    Raises:
        DataError: The value is ragged or holds objects.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # numpy has no bfloat16 of its own, and float32 holds every bfloat16 exactly.
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        what = "the values do not form an array (ragged lists?)"
        raise DataError(what, where=where, advice="give arrays of equal shapes") from error
    if array.dtype == object and not all(isinstance(v, str) for v in array.flat):
        what = (
            f"an array holds Python objects ({type(array.flat[0]).__name__})"
            if array.size
            else "empty objects"
        )
        raise DataError(what, where=where, advice="give numeric arrays")
    return array


def _by_name(item: Mapping[Any, Any], where: str) -> dict[str, np.ndarray]:
    return {str(k): to_array(v, f"{where}, '{k}'") for k, v in item.items() if v is not None}


def _item(item: Any, program: Program, where: str) -> dict[str, np.ndarray]:
    if isinstance(item, Mapping):
        return _by_name(item, where)
    names = [port.name for port in program.inputs]
    if isinstance(item, tuple | list) and _has_fields(item):
        return _fields(item, names, where)
    if len(names) != 1:
        what = f"one array was given, the model has {len(names)} inputs"
        raise DataError(what, where=where, advice=f"give a mapping with {', '.join(names)}")
    if not is_array(item) and not isinstance(item, Sequence | int | float | str):
        raise DataError(f"{type(item).__name__} is not a sample", where=where, advice=ACCEPTED)
    return {names[0]: to_array(item, where)}


def _has_fields(item: Sequence[Any]) -> bool:
    """Whether a sequence holds arrays; nested lists of numbers are one array themselves."""
    if any(is_array(v) or isinstance(v, Mapping) for v in item):
        return True
    return isinstance(item, tuple) and any(isinstance(v, list | tuple) for v in item)


def _fields(item: Sequence[Any], names: Sequence[str], where: str) -> dict[str, np.ndarray]:
    values = list(item)
    labels: list[Any] = []
    nested = len(values) == 2 and (
        isinstance(values[0], Mapping)
        or (isinstance(values[0], tuple | list) and len(names) > 1 and len(values[0]) == len(names))
    )
    if nested:
        values, labels = ([values[0]], values[1:])
        values = values if isinstance(values[0], Mapping) else list(values[0])
    elif len(values) == len(names) + 1:
        values, labels = values[:-1], values[-1:]
    if nested and isinstance(values[0], Mapping):
        arrays = _by_name(values[0], where)
    elif len(values) == len(names):
        arrays = {n: to_array(v, f"{where}, '{n}'") for n, v in zip(names, values, strict=True)}
    else:
        what = f"a tuple of {len(item)} was given for a model with {len(names)} inputs ({', '.join(names)})"
        raise DataError(what, where=where, advice="give one array an input, labels last if any, or a mapping")
    for extra in labels:
        named = extra if isinstance(extra, Mapping) else {"labels": extra}
        arrays |= _by_name(named, where)
    return arrays


def _batched(arrays: Arrays, program: Program) -> Arrays:
    """Give a single sample its batch axis; batches stay as they are."""
    rank = {port.name: len(port.shape) for port in program.inputs if port.shape}
    rank |= {f"{side}.{name}": r for name, r in list(rank.items()) for side in "ab"}
    known = [name for name in arrays if name in rank]
    if not known or any(arrays[name].ndim != rank[name] - 1 for name in known):
        return arrays
    scalars = {port.name for port in program.inputs if not port.shape}
    return {name: a if name in scalars else a[None] for name, a in arrays.items()}
