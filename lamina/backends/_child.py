"""One child process spoken to in frames: started in a clean place, never left behind."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, BinaryIO, cast

import lamina
from lamina.backends._frames import Frame, read_frame, write_frame

_PACKAGE_ROOT = str(Path(lamina.__file__).resolve().parents[1])


class Child:
    """``python -m module`` with a pipe each way; whatever it started ends with it.

    Args:
        module: What to run.
        environment: Variables set for the child.
        unset: Variables it must not inherit.
    """

    def __init__(self, module: str, environment: Mapping[str, str], *, unset: Sequence[str] = ()) -> None:
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        # trap: python -m puts the working directory first, where a numpy.py may lie (safe path: 3.11 on)
        self._folder = tempfile.TemporaryDirectory(prefix="lamina-")
        given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        paths = [_PACKAGE_ROOT, *map(os.path.abspath, given)]  # the child works in another folder
        search = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            cwd=self._folder.name,
            env={**inherited, **environment, **search},
            start_new_session=True,
        )
        self._answers: queue.Queue[Frame | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._complaints, self._folder)

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def send(self, frame: Frame) -> None:
        """Write one request; to a dead child that is no error here: :meth:`receive` gives None."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            write_frame(cast(BinaryIO, self._process.stdin), frame)

    def receive(self, timeout: float) -> Frame | None:
        """The next answer; None when the child has ended.

        Raises:
            TimeoutError: None came within ``timeout`` seconds; the child was ended.
        """
        try:
            return self._answers.get(timeout=max(0.0, timeout))
        except queue.Empty:
            self.close()
            raise TimeoutError from None

    def post_mortem(self) -> str:
        """How the child ended and its last words; it is cleaned up."""
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        if code == -signal.SIGKILL:
            how += " (killed: most often out of memory)"
        return f"{how}; last words: {lines[-1][:300]}" if lines else how

    def close(self) -> None:
        """End the process and everything it started."""
        self._finalizer()


def _pump(stream: IO[bytes], answers: queue.Queue[Frame | None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the stream was closed under us
        while (frame := read_frame(cast(BinaryIO, stream))) is not None:
            answers.put(frame)
    answers.put(None)


def _end(
    process: subprocess.Popen[bytes], complaints: IO[bytes], folder: tempfile.TemporaryDirectory[str]
) -> None:
    # Its own session: what it started is in the group even where it is dead already.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    complaints.close()
    folder.cleanup()
