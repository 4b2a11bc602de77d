"""The parent's side of a TVM process: start it with the right environment, ask, never leave it behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

import lamina
from lamina.backends._frames import Frame, read_frame, write_frame
from lamina.errors import BackendError, LaminaError, UnsupportedOperator

INSTALL = "pip install 'lamina[tvm]' (docs/tvm.md says what that brings and which versions work together)"
_ROOT = str(Path(lamina.__file__).resolve().parents[1])
Report = Callable[[int, int, str], None]


class TimeUp(BackendError):
    """A request took longer than it was given; the process was ended."""


def require_tvm() -> None:
    """Raise unless TVM is installed; does not import it.

    Raises:
        BackendError: It is not.
    """
    if importlib.util.find_spec("tvm") is None:
        raise BackendError("TVM is not installed", advice=f"install it with: {INSTALL}")


def versions() -> dict[str, str]:
    """Versions of TVM and of its FFI, as installed."""
    found = {}
    for name in ("apache-tvm", "apache-tvm-ffi"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def environment(threads: int) -> dict[str, str]:
    """Variables TVM reads when it is imported; which of its libraries to load, the loader says."""
    return {
        "TVM_NUM_THREADS": str(threads),
        "TVM_BIND_THREADS": "0",
        "TVM_FFI_DISABLE_TORCH_C_DLPACK": "1",  # else it compiles a torch extension where torch is installed
    }


class TvmProcess:
    """One child process that compiles, or runs a compiled library.

    Args:
        threads: Threads TVM may use in it.
        label: What it works for, in error messages.
    """

    def __init__(self, threads: int, label: str) -> None:
        require_tvm()
        self.label = label
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        # trap: python -m puts the working directory first, and a tvm.py there would be imported
        self._folder = tempfile.TemporaryDirectory(prefix="lamina-")
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        search = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        inherited = {k: v for k, v in os.environ.items() if k != "TVM_USE_RUNTIME_LIB"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamina.backends.tvm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            cwd=self._folder.name,
            env={**inherited, **environment(threads), **search},
            start_new_session=True,  # so that build workers end with it
        )
        self._answers: queue.Queue[Frame | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._complaints, self._folder)

    def ask(
        self,
        header: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray] | None = None,
        *,
        timeout: float = 1800.0,
        report: Report | None = None,
    ) -> Frame:
        """Send one request; its answer. Progress frames go to ``report`` and do not extend ``timeout``.

        Raises:
            TimeUp: No answer within ``timeout`` seconds; the process was ended.
            UnsupportedOperator: TVM's importer gave up.
            BackendError: The process failed or died.
        """
        import time

        end = time.monotonic() + timeout
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):  # a dead child: the pump says so
            write_frame(cast(BinaryIO, self._process.stdin), Frame(dict(header), arrays or {}))
        while True:
            try:
                answer = self._answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                self.close()
                raise TimeUp(
                    f"TVM did not finish '{header['do']}' of {self.label} in {timeout:.0f} s"
                ) from None
            if answer is None:
                raise BackendError(
                    f"the TVM process for {self.label} died during '{header['do']}': {self._post_mortem()}",
                    advice="one cause TVM does not catch is an index outside its table; compare with ort:cpu",
                )
            if "progress" not in answer.header:
                break
            if report is not None:
                report(*answer.header["progress"])
        if "error" in answer.header:
            raise self._failure(answer.header)
        return answer

    def close(self) -> None:
        """End the process and everything it started."""
        self._finalizer()

    def __enter__(self) -> TvmProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _failure(self, header: Mapping[str, Any]) -> LaminaError:
        where = header.get("where") or self.label
        if header["kind"] == "import":
            return UnsupportedOperator(
                f"TVM's importer gave up on {self.label}: {header['error']}",
                where=where,
                advice="fix the input shapes (&shapes=input:1x128 in the target), or use target ort:cpu",
            )
        return BackendError(f"TVM failed on {self.label}: {header['error']}", where=header.get("where"))

    def _post_mortem(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "it closed its pipe"
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        self.close()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"{how}; last words: {lines[-1][:300]}" if lines else how


def _pump(stream: IO[bytes], answers: queue.Queue[Frame | None]) -> None:
    with contextlib.suppress(OSError, ValueError):  # the stream was closed under us
        while (frame := read_frame(cast(BinaryIO, stream))) is not None:
            answers.put(frame)
    answers.put(None)


def _end(
    process: subprocess.Popen[bytes], complaints: IO[bytes], folder: tempfile.TemporaryDirectory[str]
) -> None:
    # Its own session: build workers it started are in the group even where it is dead already.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    complaints.close()
    folder.cleanup()
