"""Messages between lamina and its timing workers: a JSON header, raw arrays after it; never pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np

_LENGTH = struct.Struct(">Q")
_TEXT = "text"


@dataclass
class Frame:
    """One message.

    Attributes:
        header: JSON values.
        arrays: Named arrays; strings (numpy object or unicode arrays) travel as JSON.
        blob: Raw bytes (a serialized model).
    """

    header: dict[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    blob: bytes = b""


def write_frame(stream: BinaryIO, frame: Frame) -> None:
    """Write one message and flush."""
    parts: list[bytes | memoryview] = []
    described = []
    for name, array in frame.arrays.items():
        array = np.asarray(array)
        if array.dtype.kind in "OUS":
            raw = json.dumps([str(v) for v in array.ravel()]).encode()
            described.append([name, _TEXT, list(array.shape), len(raw)])
        else:
            # trap: ascontiguousarray turns a scalar into one element; shape is taken from the array itself
            raw = np.ascontiguousarray(array).tobytes()
            described.append([name, array.dtype.str, list(array.shape), len(raw)])
        parts.append(raw)
    parts.append(frame.blob)
    head = json.dumps({"header": frame.header, "arrays": described, "blob": len(frame.blob)}).encode()
    stream.write(_LENGTH.pack(len(head)))
    stream.write(head)
    for part in parts:
        stream.write(part)
    stream.flush()


def read_frame(stream: BinaryIO) -> Frame | None:
    """Read one message; None where the stream has ended."""
    size = _exactly(stream, _LENGTH.size)
    if size is None:
        return None
    head = _exactly(stream, _LENGTH.unpack(size)[0])
    if head is None:
        return None
    message = json.loads(head)
    arrays = {}
    for name, dtype, shape, length in message["arrays"]:
        raw = _exactly(stream, length)
        if raw is None:
            return None
        if dtype == _TEXT:
            arrays[name] = np.array(json.loads(raw), dtype=object).reshape(shape)
        else:
            arrays[name] = np.frombuffer(raw, dtype=np.dtype(dtype)).reshape(shape)
    blob = _exactly(stream, message["blob"])
    return None if blob is None else Frame(message["header"], arrays, blob)


def _exactly(stream: BinaryIO, count: int) -> bytes | None:
    pieces = []
    while count:
        piece = stream.read(count)
        if not piece:
            return None
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
