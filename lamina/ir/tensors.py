"""Tensor objects of our own over data that is shared or memory-mapped, copied only where it must be."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from lamina.errors import CaptureError

# Types of whole bytes that numpy has itself: their number in a protobuf -> the type, and how to read it.
_PLAIN = {
    int(t): (t, t.numpy().newbyteorder("<"))
    for t in (
        *(ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL),
        *(ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64),
        *(ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64),
    )
}


class ExternalFiles:
    """External data files of one model, each mapped once and checked to lie inside the model's folder.

    Mapping happens at capture: replacing a file later (an atomic save over it) leaves the program whole.

    Args:
        folder: The model's folder; None for a model that came without one.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._maps: dict[str, np.ndarray] = {}

    def tensor(self, tensor: ir.ExternalTensor, where: str) -> ir.TensorProtocol:
        """The tensor over the mapped file.

        Raises:
            CaptureError: The file lies outside the model's folder, is missing or is too short.
        """
        location = os.fspath(tensor.location)
        if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
            raise CaptureError(
                f"weight '{tensor.name}' of type {tensor.dtype.name} cannot lie in a file",
                where=where,
                advice="the file is damaged: export or download the model again",
            )
        data = self._map(location, tensor, where)
        offset = tensor.offset or 0
        length = tensor.nbytes
        declared = tensor.length
        if declared is not None and declared != length:
            raise CaptureError(
                f"external data of '{tensor.name}' says {declared} bytes, its shape needs {length}",
                where=where,
                advice="export the model again",
            )
        if offset < 0 or offset + length > data.nbytes:
            raise CaptureError(
                f"external data file '{location}' is too short: '{tensor.name}' needs bytes {offset} to "
                f"{offset + length}, the file has {data.nbytes}",
                where=where,
                advice="the file is truncated or belongs to another model: copy or download it again",
            )
        return view(data[offset : offset + length], tensor.dtype, tensor.shape, tensor.name)

    def _map(self, location: str, tensor: ir.ExternalTensor, where: str) -> np.ndarray:
        if location in self._maps:
            return self._maps[location]
        folder = self._folder
        if folder is None and os.fspath(tensor.base_dir):
            folder = Path(tensor.base_dir)
        if folder is None:
            raise CaptureError(
                f"weight '{tensor.name}' lies in the file '{location}', but the model came without a folder",
                where=where,
                advice="pass the path of the .onnx file, or load the external data before passing the model",
            )
        path = _inside(folder, location, where)
        try:
            self._maps[location] = _mapped(path)
        except OSError as error:
            raise CaptureError(
                f"external data file '{location}' cannot be read: {error.strerror or error}",
                where=where,
                advice="keep the data files next to the .onnx file, under the names it was saved with",
            ) from error
        return self._maps[location]


def _mapped(path: Path) -> np.ndarray:
    """The bytes of an ordinary file."""
    # A pipe would wait for a writer for ever, and a device never ends.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, os.O_RDONLY | flags)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "it is not an ordinary file")
        if not found.st_size:
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), np.uint8)
    finally:
        os.close(descriptor)


def _inside(folder: Path, location: str, where: str) -> Path:
    """The path of ``location``, which must not leave ``folder``, not even through a link."""
    advice = "external data must lie in the model's folder: copy it there, or save the model again"
    strange = not location or "\\" in location or "\0" in location
    if strange or os.path.isabs(location) or ".." in Path(location).parts:
        raise CaptureError(
            f"external data location '{location}' leaves the model's folder", where=where, advice=advice
        )
    path = folder / location
    root = os.path.realpath(folder)
    if os.path.commonpath([root, os.path.realpath(path)]) != root:
        raise CaptureError(
            f"external data '{location}' is a link out of the model's folder", where=where, advice=advice
        )
    return path


def view(data: np.ndarray, dtype: ir.DataType, shape: ir.Shape, name: str | None) -> ir.TensorProtocol:
    """A tensor over raw little-endian bytes, without a copy."""
    dims = shape.numpy()
    if dtype.bitwidth < 8:
        return ir.PackedTensor(data, dtype, shape=ir.Shape(dims), name=name)
    kind = dtype.numpy().newbyteorder("<")
    array = np.frombuffer(data, kind) if data.size else np.empty(0, kind)
    return ir.Tensor(array.reshape(dims), dtype=dtype, name=name)


def own(tensor: ir.TensorProtocol, files: ExternalFiles, where: str) -> ir.TensorProtocol:
    """A new tensor object over the same data, so that renaming it never reaches the caller's objects.

    Raises:
        CaptureError: External data is missing, misplaced or too short; or the tensor is malformed.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return files.tensor(tensor, where)
    plain = _plain(tensor.raw) if type(tensor) is ir.serde.TensorProtoTensor else None
    if plain is not None:
        return plain
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.string_data(), shape=shape_of(tensor), name=tensor.name)  # type: ignore[attr-defined]
    if isinstance(tensor, ir.Tensor) and isinstance(tensor.raw, np.ndarray):
        return ir.Tensor(tensor.raw, dtype=tensor.dtype, shape=shape_of(tensor), name=tensor.name)
    stored = getattr(tensor, "raw", None)
    # What is not there reads as zeros, as many as the shape says. No type packs more than eight in a byte.
    if isinstance(stored, onnx.TensorProto) and tensor.size > 8 * stored.ByteSize():
        raise CaptureError(
            f"weight '{tensor.name}' of shape {list(stored.dims)[:8]} has data of {stored.ByteSize()} bytes",
            where=where,
            advice="the file is damaged: export or download the model again",
        )
    try:
        if tensor.dtype.bitwidth < 8:
            raw = np.frombuffer(tensor.tobytes(), np.uint8)
            return ir.PackedTensor(raw, tensor.dtype, shape=shape_of(tensor), name=tensor.name)
        # A protobuf tensor copies its bytes on every access: they are taken out once, here. One of torch's
        # gives a view of the parameter.
        array = tensor.numpy()
    except (ValueError, TypeError) as error:
        raise CaptureError(
            f"the data of weight '{tensor.name}' does not fit its shape: {error}",
            where=where,
            advice="the file is damaged: export or download the model again",
        ) from error
    return ir.Tensor(array, dtype=tensor.dtype, shape=shape_of(tensor), name=tensor.name)


def _plain(proto: onnx.TensorProto) -> ir.TensorProtocol | None:
    """A protobuf tensor whose bytes are what numpy reads, as most are; None for others, or malformed ones."""
    kind = _PLAIN.get(proto.data_type)
    data = b"" if kind is None else proto.raw_data
    if kind is None or not data:
        return None
    dtype, read_as = kind
    dims = tuple(proto.dims)
    if len(data) != math.prod(dims) * read_as.itemsize:
        return None
    return ir.Tensor(
        np.frombuffer(data, read_as).reshape(dims), dtype=dtype, shape=ir.Shape(dims), name=proto.name
    )


def shape_of(tensor: ir.TensorProtocol) -> ir.Shape:
    """The tensor's shape as a new object."""
    return ir.Shape([int(d) for d in tensor.shape])  # type: ignore[arg-type]
