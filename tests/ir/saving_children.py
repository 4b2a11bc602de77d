"""What the children of the kill tests do; imports little, so that a child starts fast."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from onnx_tools import mlp

from lamina.ir import io
from lamina.ir.capture import capture

WIDTH = 128
capture(mlp())  # whatever capturing imports is imported before the children fork


def nothing() -> None:
    """Start and end: the server has done its imports then."""


def save_for_ever(path: str, external: bool, ready: object) -> None:
    programs = [capture(mlp(WIDTH, seed=seed)) for seed in (1, 2)]
    _set_external(external)
    ready.set()  # type: ignore[attr-defined]
    while True:
        for program in programs:
            io.save_model(program.model, path)


def _set_external(external: bool) -> None:
    io.EXTERNAL_ABOVE = 100 if external else 2**40


def save_and_die(path: str, external: bool, step: str, count: int, after: bool) -> None:
    """Save the second model; die at the ``count``-th call of ``os.<step>``. Ends well when there is none."""
    program = capture(mlp(WIDTH, seed=2))
    _set_external(external)
    seen = 0
    if step == "write":
        _die_while_writing(count)
    else:
        real = getattr(os, step)

        def dies(*arguments: object, **options: object) -> object:
            nonlocal seen
            seen += 1
            if seen == count and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*arguments, **options)
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(os, step, dies)
    io.save_model(program.model, path)


def _die_while_writing(count: int) -> None:
    """Die with a part of the bytes on disk: the ``count``-th write stops in the middle."""
    real, seen = io._temporary, 0

    class Torn:
        def __init__(self, file: object) -> None:
            self._file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self._file, name)

        def write(self, data: bytes) -> int:
            nonlocal seen
            seen += 1
            if seen == count:
                self._file.write(data[: len(data) // 2])  # type: ignore[attr-defined]
                self._file.flush()  # type: ignore[attr-defined]
                os.kill(os.getpid(), signal.SIGKILL)
            return self._file.write(data)  # type: ignore[attr-defined,no-any-return]

    @contextlib.contextmanager
    def torn(target: Path) -> Iterator[tuple[object, str]]:
        with real(target) as (file, name):
            yield Torn(file), name

    io._temporary = torn  # type: ignore[assignment]
