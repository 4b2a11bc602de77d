"""The model as a user gave it: captured, and captured again where folding changed the first capture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lamina.backends.onnxruntime import weight_bytes
from lamina.errors import CaptureError
from lamina.ir.capture import capture
from lamina.ir.fix_shapes import fix_shapes
from lamina.ir.io import serialized_size
from lamina.ir.program import Program

Shapes = Mapping[str, int | Sequence[int | None]]


class Given:
    """A model and the shapes its dynamic dims are fixed to.

    Copying the nodes of a captured model costs as much as folding half of them: whoever needs the model only
    once takes :attr:`program` for itself, and :meth:`again` where it turns out to be needed once more.

    Args:
        model: Whatever :func:`lamina.ir.capture.capture` takes.
        shapes: As :func:`lamina.ir.fix_shapes.fix_shapes` takes them.
    """

    def __init__(self, model: Any, shapes: Shapes | None = None) -> None:
        self._model, self._shapes = model, shapes
        self._stamp = _stamp(model)

    @cached_property
    def program(self) -> Program:
        """The program, captured once.

        Raises:
            LaminaError: Model or shapes are not usable.
        """
        found = capture(self._model)
        return fix_shapes(found, self._shapes) if self._shapes else found

    @cached_property
    def is_spare(self) -> bool:
        """Whether :attr:`program` shares no node with what the user holds, and :meth:`again` costs little."""
        if self._stamp is not None:  # with its weights inside: other files are not watched
            return weight_bytes(self.program.model) <= self._stamp[0]
        return isinstance(self._model, (onnx.ModelProto, ir.Model))

    def again(self) -> Program:
        """The same program once more, its nodes new.

        Raises:
            CaptureError: The file is not what it was.
        """
        if _stamp(self._model) != self._stamp:
            raise CaptureError(
                "the file was changed while it was being read", where=str(self._model), advice="run it again"
            )
        return Given(self._model, self._shapes).program

    def size(self) -> int:
        """Bytes of the model as it was given; of one whose weights lie elsewhere, as lamina would save it."""
        if isinstance(self._model, onnx.ModelProto):
            return int(self._model.ByteSize())
        if self._stamp is not None and self.is_spare:
            return self._stamp[0]
        return serialized_size(self._model if isinstance(self._model, ir.Model) else self.program.model)


def _stamp(model: Any) -> tuple[int, ...] | None:
    """What tells a file from another of its name; None for what is no file."""
    if not isinstance(model, (str, os.PathLike)):
        return None
    try:
        found = Path(os.fspath(model)).stat()
    except OSError:  # capturing it says what is wrong
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
