"""Timing workers: one process each, spoken to in frames, never left behind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamina.backends._child import Child
from lamina.backends._frames import Frame
from lamina.backends.backend import Target
from lamina.errors import BackendError

OPEN_TIMEOUT_S = 600.0
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
        self._child = Child("lamina.backends._worker", environment or {})

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
        return self._child.alive

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
        self._child.send(frame)
        try:
            answer = self._child.receive(timeout)
        except TimeoutError:
            raise BackendError(
                f"{self._subject()}: no answer to '{frame.header['do']}' within {timeout:.0f} s",
                advice="the process was ended; try a smaller case, or look whether the machine swaps",
            ) from None
        if answer is None:
            raise BackendError(f"{self._subject()} died: {self._child.post_mortem()}")
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
        self._child.close()

    def _subject(self) -> str:
        return f"timing worker for {self.label}" if self.label else "timing worker"
