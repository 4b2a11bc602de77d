"""The last net under reading a model: is a failure that no check names the fault of the file or of lamina?"""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path, PurePath

import onnx
import onnx_ir as ir

from lamina.errors import CaptureError, LaminaError
from lamina.ir.verify import verify_all

_CHECKED_BYTES = 256 << 20  # of the graph; the checker reads more of a file than is worth waiting for


@contextlib.contextmanager
def foreseen(source: str, model: Path | onnx.ModelProto | ir.Model) -> Iterator[None]:
    """Turn whatever a library raises into a :class:`CaptureError`, so that no user gets a bare traceback.

    Where onnx's checker accepts the model, the error says that the bug is lamina's, and names the place.
    With ``LAMINA_VERIFY=all`` such an exception comes out as it is, for the developer to see.

    Args:
        source: What messages call the model.
        model: What is being read, for the checker.

    Raises:
        CaptureError: Reading failed in a way no check names; the exception is its cause.
    """
    try:
        yield
    except LaminaError:
        raise
    except Exception as error:  # libraries below raise their own types, or none in particular
        text = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no message"
        said = f"{type(error).__name__}: {text}"
        if not _own(error) or not _valid(model):
            raise CaptureError(
                f"the model cannot be read: {said}",
                where=source,
                advice="it is damaged or not valid ONNX: check it with onnx.checker and export it again",
            ) from error
        if verify_all():
            raise
        raise CaptureError(
            f"lamina failed to read a model that onnx.checker accepts: {said}",
            where=f"{_innermost(error)}, reading {source}",
            advice="this is a bug in lamina, report it with the model; LAMINA_VERIFY=all shows the traceback",
        ) from error


def _own(error: BaseException | None) -> bool:
    """Whether it can be lamina's fault at all: too little memory is not, nor is text in no known coding.

    trap: the checker accepts names and strings that are not UTF-8.
    """
    while error is not None:
        if isinstance(error, (MemoryError, UnicodeDecodeError)):
            return False
        error = error.__cause__
    return True


def _valid(model: Path | onnx.ModelProto | ir.Model) -> bool:
    """Whether onnx's checker accepts the model; a file is checked with the weights that lie beside it."""
    try:
        if isinstance(model, Path):
            if model.stat().st_size > _CHECKED_BYTES:
                return False
            onnx.checker.check_model(str(model))
        else:
            onnx.checker.check_model(ir.to_proto(model) if isinstance(model, ir.Model) else model)
    except Exception:  # the checker's own, protobuf's, onnx_ir's: none of them is an acceptance
        return False
    return True


def _innermost(error: BaseException) -> str:
    """The deepest place in lamina that the exception went through, as ``module.py:line in function``."""
    root = PurePath(__file__).parents[1]
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if PurePath(f.filename).is_relative_to(root)
    ]
    inside = [f for f in frames if f.name != foreseen.__name__]
    if not inside:
        return "lamina"
    frame = inside[-1]
    return f"lamina/{PurePath(frame.filename).relative_to(root).as_posix()}:{frame.lineno} in {frame.name}"
