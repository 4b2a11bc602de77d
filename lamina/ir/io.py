"""Write models and other results atomically: a reader sees the old file or the new one, never a torn one."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from lamina.errors import OutputError
from lamina.ir.capture import capture
from lamina.ir.collector import collector_paused
from lamina.ir.leftovers import clean, is_referred, lock
from lamina.ir.program import Program
from lamina.ir.tensors import shape_of

EXTERNAL_ABOVE = 1_900_000_000  # protobuf's own limit is 2 GiB for the whole message
_SMALL = 1024  # bytes: tensors up to this stay in the .onnx file, runtimes read their values while loading
_ALIGNMENT = 4096


def load(path: str | os.PathLike[str]) -> Program:
    """Capture the model at ``path``.

    Raises:
        CaptureError: The file is missing, damaged or not ONNX.
        UnsupportedOperator: It uses an operator, domain or opset lamina does not know.
    """
    return capture(Path(path))


def save_model(model: ir.Model, path: str | os.PathLike[str], *, message: bytes | None = None) -> list[Path]:
    """Write ``model`` to ``path``; weights beyond 1.9 GB go to ``<path>.data`` beside it.

    Whatever happens meanwhile, ``path`` holds the old model or the new one, whole. What killed saves left and
    data that only the replaced model used are removed once the new model is in place.

    Args:
        model: Left unchanged.
        path: The ``.onnx`` file; its folder must exist.
        message: What :func:`whole` gave for ``model``, where the caller has it at hand.

    Returns:
        The files written, the model first.

    Raises:
        OutputError: The folder is missing or not writable, or the disk is full; what was there is intact.
    """
    with collector_paused():
        return _save(model, Path(path), message)


def whole(model: ir.Model) -> onnx.ModelProto:
    """``model`` with its weights inside, as :func:`save_model` writes what fits into one file.

    Raises:
        SerdeError: Something in the model cannot be written.
    """
    return ir.to_proto(_self_contained(model))


def _save(model: ir.Model, target: Path, message: bytes | None) -> list[Path]:
    clean(target)  # before as well: a full disk may be full of what killed saves left
    if message is not None or not _is_external(model):
        write_atomic(target, whole(model).SerializeToString() if message is None else message)
        clean(target)
        return [target]
    with contextlib.ExitStack() as held:
        data_path = _reserve_data_path(target, held)
        clone, tensors = _externalized(model, data_path.name)
        try:
            _write(data_path, lambda file: _write_tensors(file, tensors), held)
            write_atomic(target, ir.to_proto(clone).SerializeToString())
        except BaseException:
            # trap: an interrupt may come after the new model is in place, and then it needs its data
            if not is_referred(data_path, target):
                data_path.unlink(missing_ok=True)
            raise
    clean(target)
    return [target, data_path]


def make_directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory (and its parents) unless it is there, and check that files can be made in it.

    Raises:
        OutputError: It cannot be made, is a file, or is not writable.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        what = f"cannot write into '{folder}': {error.strerror or error}"
        raise OutputError(what, advice="choose another output directory") from error
    return folder


def write_atomic(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file in one step: temporary file in the same folder, fsync, rename.

    Raises:
        OutputError: The folder is missing or not writable, or the disk is full; what was there is intact.
    """
    data = content.encode() if isinstance(content, str) else content
    target = Path(path)
    _write(target, lambda file: file.write(data))
    return target


def serialized_size(model: ir.Model) -> int:
    """Bytes of the files :func:`save_model` would write as ``model.onnx``, without copying weights."""
    if _is_external(model):
        clone, tensors = _externalized(model, "model.onnx.data")
        end = max((t.offset or 0) + (t.length or 0) for t, _ in tensors)
        return ir.to_proto(clone).ByteSize() + end
    clone, tensors = _externalized(model, "")
    proto = ir.to_proto(clone)
    real = {stand_in.name: tensor for stand_in, tensor in tensors}
    grown = sum(_growth(t, real[t.name]) for t in proto.graph.initializer if t.name in real)
    graph = proto.graph.ByteSize()
    return proto.ByteSize() - _field(graph) + _field(graph + grown)


def _growth(stand_in: onnx.TensorProto, tensor: ir.TensorProtocol) -> int:
    header = onnx.TensorProto(
        name=stand_in.name,
        data_type=stand_in.data_type,
        dims=stand_in.dims,
        doc_string=tensor.doc_string or None,
    )
    for key, value in tensor.metadata_props.items():
        header.metadata_props.add(key=key, value=value)
    return _field(header.ByteSize() + _field(tensor.nbytes)) - _field(stand_in.ByteSize())


def _field(length: int) -> int:
    """Bytes a length-delimited protobuf field of ``length`` bytes takes (tags here are one byte)."""
    return 1 + max(1, (length.bit_length() + 6) // 7) + length


def _is_external(model: ir.Model) -> bool:
    values = [v.const_value for v in model.graph.initializers.values()]
    tensors = [t for t in values if t is not None]
    return sum(t.nbytes for t in tensors) > EXTERNAL_ABOVE and any(map(_is_big, tensors))


def _is_big(tensor: ir.TensorProtocol) -> bool:
    """Whether it can and should lie in a data file."""
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes > _SMALL


def _self_contained(model: ir.Model) -> ir.Model:
    """The model itself, or a clone whose weights no longer lie in other files."""
    if not any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()):
        return model
    clone = model.clone()
    for value in clone.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    return clone


def _externalized(
    model: ir.Model, location: str
) -> tuple[ir.Model, list[tuple[ir.ExternalTensor, ir.TensorProtocol]]]:
    """A clone whose big weights say they lie in ``location``, and which tensor each of them stands for."""
    clone, pairs, end = model.clone(), [], 0
    for value in clone.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or not _is_big(tensor):
            continue
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.nbytes
        stand_in = ir.ExternalTensor(
            location, start, tensor.nbytes, tensor.dtype, shape=shape_of(tensor), name=value.name or ""
        )
        value.const_value = stand_in
        pairs.append((stand_in, tensor))
    return clone, pairs


def _write_tensors(file: BinaryIO, tensors: list[tuple[ir.ExternalTensor, ir.TensorProtocol]]) -> None:
    for stand_in, tensor in tensors:
        file.seek(stand_in.offset or 0)
        file.write(tensor.tobytes())


def _reserve_data_path(target: Path, held: contextlib.ExitStack) -> Path:
    """A name no file had, taken now: an existing model keeps its data until the new one has replaced it."""
    candidate, i = target.with_name(f"{target.name}.data"), 0
    while True:
        try:
            descriptor = os.open(candidate, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        except FileExistsError:
            i += 1
            candidate = target.with_name(f"{target.name}.{i}.data")
            continue
        except OSError as error:
            raise _unwritable(candidate, error) from error
        held.callback(os.close, descriptor)
        lock(descriptor)
        if candidate.exists():  # else another save took it for a leftover before the lock was there
            return candidate


def _write(
    target: Path, fill: Callable[[BinaryIO], object], held: contextlib.ExitStack | None = None
) -> None:
    """Write a file in one step; its lock is kept until ``held`` ends, if given."""
    target = Path(os.path.realpath(target))
    try:
        with _temporary(target) as (file, name):
            fill(file)
            file.flush()
            os.fsync(file.fileno())
            if held is not None:
                held.callback(os.close, os.dup(file.fileno()))
            file.close()
            os.replace(name, target)
        _sync_folder(target.parent)
    except OSError as error:
        raise _unwritable(target, error) from error


def _unwritable(target: Path, error: OSError) -> OutputError:
    return OutputError(f"'{target}' cannot be written: {error.strerror or error}", advice=_advice(target))


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[tuple[BinaryIO, str]]:
    descriptor, name = _locked_temporary(target)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if hasattr(os, "fchmod"):  # mkstemp makes private files; results are ordinary ones
                os.fchmod(file.fileno(), 0o666 & ~_umask())
            yield file, name
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)


def _locked_temporary(target: Path) -> tuple[int, str]:
    while True:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
        lock(descriptor)
        if os.path.exists(name):  # else another save cleaned it up before the lock was there
            return descriptor, name
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _advice(target: Path) -> str:
    if not target.parent.is_dir():
        return f"the folder '{target.parent}' does not exist: create it first"
    if target.is_dir():
        return "it is a folder: give the name of a file"
    if not os.access(target.parent, os.W_OK):
        return f"the folder '{target.parent}' is not writable: choose another or change its permissions"
    return "free some disk space or choose another folder"
