"""Collected statistics on disk: one ``.npz`` a run, arrays beside a JSON text, no pickle."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.analysis.attention import AttentionStatistics
from lamina.analysis.depths import DepthStatistics, Spectrum
from lamina.analysis.inputs import InputStatistics
from lamina.analysis.operators import WeightedOperator
from lamina.analysis.residual import BranchStatistics
from lamina.analysis.statistics import Statistics
from lamina.analysis.streaming import RangeStatistics
from lamina.analysis.views import Invariance
from lamina.data import Dataset
from lamina.ir.io import write_atomic

_VERSION = 3
_TYPES = {
    t.__name__: t
    for t in (
        AttentionStatistics,
        BranchStatistics,
        DepthStatistics,
        InputStatistics,
        Invariance,
        RangeStatistics,
        Spectrum,
        Statistics,
        WeightedOperator,
    )
}


def data_hash(dataset: Dataset) -> str:
    """32 hex digits over names, dtypes, shapes, contents and batching of a data set."""
    digest = hashlib.sha256()
    layout = sorted(dataset.layout.items())
    digest.update(repr((dataset.batch_size, dataset.group, dataset.fixed_batch, layout)).encode())
    for kind, arrays in (("input", dataset.inputs), ("extra", dataset.extras)):
        for name in sorted(arrays):
            array = np.ascontiguousarray(arrays[name])
            digest.update(repr((kind, name, array.dtype.str, array.shape)).encode())
            if array.dtype.kind == "O":
                digest.update(repr(array.tolist()).encode())
            elif array.size:
                digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()[:32]


def save_statistics(statistics: Statistics, path: Path) -> None:
    """Write atomically.

    Raises:
        OutputError: The folder cannot be written.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps({"version": _VERSION, "statistics": _encode(statistics, arrays)})
    buffer = io.BytesIO()
    named = {f"a{i}": array for i, array in enumerate(arrays)}
    np.savez(buffer, allow_pickle=False, text=np.frombuffer(text.encode(), np.uint8), **named)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def load_statistics(path: Path) -> Statistics | None:
    """What was saved; None where there is nothing, or nothing this version can read."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = json.loads(file["text"].tobytes().decode())
            if content["version"] != _VERSION:
                return None
            found = _decode(content["statistics"], file)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # a torn or foreign file costs a new run, not an error
    return found if isinstance(found, Statistics) else None


def _encode(value: Any, arrays: list[np.ndarray]) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [f.name for f in dataclasses.fields(value)]
        return {"type": type(value).__name__, "fields": [_encode(getattr(value, n), arrays) for n in names]}
    if isinstance(value, np.ndarray):
        arrays.append(value)
        return {"array": len(arrays) - 1}
    if isinstance(value, Mapping):
        return {"pairs": [[key, _encode(item, arrays)] for key, item in value.items()]}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {"items": [_encode(item, arrays) for item in value]}
    return value.item() if isinstance(value, np.generic) else value


def _decode(value: Any, file: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return file[f"a{value['array']}"]
    if "pairs" in value:
        return {key: _decode(item, file) for key, item in value["pairs"]}
    if "items" in value:
        return tuple(_decode(item, file) for item in value["items"])
    return _TYPES[value["type"]](*(_decode(item, file) for item in value["fields"]))
