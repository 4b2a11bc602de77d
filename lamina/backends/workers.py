"""Timing workers: one process each, spoken to in frames, never left behind."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import numpy as np

import lamina
from lamina.backends._frames import Frame, read_frame, write_frame
from lamina.backends.backend import Target
from lamina.errors import BackendError

OPEN_TIMEOUT_S = 600.0
_PACKAGE_ROOT = str(Path(lamina.__file__).resolve().parents[1])
ORT_LOADER = "lamina.backends._worker:OrtRunner"


class Worker:
    """One child process that holds models of one target and times them.

    Args:
        target: Threads and options of every session it opens.
        label: What it works for, in error messages: a model's path.
        loader: ``module:name`` of what makes a runner from an ``open`` frame, in the child.
        environment: Variables set for the child (a thread count another runtime reads at start).
    """

    def __init__(
        self,
        target: Target,
        label: str = "",
        *,
        loader: str = ORT_LOADER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.target, self.label, self.loader = target, label, loader
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the worker
        paths = [_PACKAGE_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        # trap: python -m puts the working directory first, where a numpy.py may lie (safe path: 3.11 on)
        search = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamina.backends._worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env={**os.environ, **(environment or {}), **search},
        )
        self._answers: queue.Queue[Frame | None] = queue.Queue()
        assert self._process.stdout is not None
        threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True).start()
        self._finalizer = weakref.finalize(self, _end, self._process, self._complaints)

    def open(self, model: Path | bytes) -> int:
        """Open a session on a file or a serialized model; its number.

        Raises:
            BackendError: The runtime refuses the model, or the process died.
        """
        if isinstance(model, bytes):
            frame = Frame(self._session_header("open", None), blob=model)
        else:
            frame = Frame(self._session_header("open", model))
        return int(self.ask(frame, OPEN_TIMEOUT_S)["id"])

    def close_session(self, session: int) -> None:
        """Free one session."""
        self.ask(Frame({"do": "close", "id": session}), 60.0)

    def feed(
        self, case: str, feeds: Mapping[str, np.ndarray], aliases: Mapping[str, str] | None = None
    ) -> None:
        """Give the arrays of a case; a session takes from them the inputs it has.

        ``aliases`` maps further input names to names in ``feeds`` whose memory they share.
        """
        self.ask(Frame({"do": "feeds", "case": case, "aliases": dict(aliases or {})}, feeds), 60.0)

    def kernels(self, model: bytes, case: str, *, runs: int = 10) -> dict[str, float]:
        """Seconds a run spends in each kernel type of ONNX Runtime's optimized graph, by its profiler."""
        header = {**self._session_header("kernels", None), "case": case, "runs": runs}
        seconds: dict[str, float] = self.ask(Frame(header, blob=model), OPEN_TIMEOUT_S)["kernels"]
        return seconds

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def time(
        self,
        session: int,
        case: str,
        seconds: float,
        *,
        least: int = 3,
        most: int = 1_000_000,
        warm: int = 1,
        bound: bool = False,
        cpu: bool = False,
        timeout: float = 600.0,
    ) -> list[float]:
        """Seconds of consecutive runs, for about ``seconds``, ``warm`` unmeasured ones before them.

        Args:
            session: Number from :meth:`open`.
            case: Name given to :meth:`feed`.
            seconds: Wall time to spend on measured runs.
            least: Fewest measured runs.
            most: Most measured runs.
            warm: Runs before them.
            bound: Leave out copying outputs to arrays.
            cpu: CPU time of the calling thread instead of wall time: other processes cannot stretch it, and
                it is the same on an idle machine; only where one thread does all the work.
            timeout: Seconds beyond ``seconds`` after which the worker is given up.
        """
        header = {
            "do": "time",
            "id": session,
            "case": case,
            "seconds": seconds,
            "least": least,
            "most": most,
            "warm": warm,
            "bound": bound,
            "cpu": cpu,
        }
        samples: list[float] = self.ask(Frame(header), timeout + seconds)["samples"]
        return samples

    def memory(self, model: Path, feeds: Mapping[str, np.ndarray]) -> int:
        """Bytes by which loading and running a model once raise this process's peak."""
        header = self._session_header("memory", model)
        return int(self.ask(Frame(header, feeds), OPEN_TIMEOUT_S)["bytes"])

    def ask(self, frame: Frame, timeout: float) -> dict[str, Any]:
        """Send one request and wait for its answer.

        Raises:
            BackendError: The worker reports an error, died, or took longer than ``timeout`` seconds.
        """
        assert self._process.stdin is not None
        try:
            write_frame(cast(BinaryIO, self._process.stdin), frame)
            answer = self._answers.get(timeout=timeout)
        except (BrokenPipeError, ValueError):
            answer = None
        except queue.Empty:
            self.close()
            raise BackendError(
                f"{self._subject()}: no answer to '{frame.header['do']}' within {timeout:.0f} s",
                advice="the process was ended; try a smaller case, or look whether the machine swaps",
            ) from None
        if answer is None:
            raise BackendError(f"{self._subject()} died: {self._post_mortem()}")
        if "error" in answer.header:
            raise BackendError(
                f"{self._subject()}: {answer.header['error']}", where=answer.header.get("where")
            )
        return answer.header

    def _session_header(self, command: str, path: Path | None) -> dict[str, Any]:
        return {
            "do": command,
            "loader": self.loader,
            "path": None if path is None else str(path.resolve()),
            "threads": self.target.threads,
            "level": self.target.options.get("opt", "all"),
            "spin": self.target.options.get("spin"),
            "options": dict(self.target.options),
        }

    def close(self) -> None:
        """End the process."""
        self._finalizer()

    def _subject(self) -> str:
        return f"timing worker for {self.label}" if self.label else "timing worker"

    def _post_mortem(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
        if code == -9:
            how += " (killed: most often out of memory)"
        return f"{how}{self._last_words}"

    @property
    def _last_words(self) -> str:
        if self._complaints.closed:
            return ""
        self._complaints.seek(0)
        lines = self._complaints.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


def _pump(stream: IO[bytes], answers: queue.Queue[Frame | None]) -> None:
    try:
        while (frame := read_frame(cast(BinaryIO, stream))) is not None:
            answers.put(frame)
    except (OSError, ValueError):
        pass  # the stream was closed under us: the worker is being ended
    answers.put(None)


def _end(process: subprocess.Popen[bytes], complaints: IO[bytes]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    complaints.close()
