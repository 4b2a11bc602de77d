"""Time whole models on TVM against each other: each is compiled and checked before its process starts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lamina.backends.backend import Target, Workload
from lamina.backends.measure import IsolatedTimer
from lamina.backends.tvm_library import LOADER
from lamina.backends.tvm_process import environment


class CompilingTimer(IsolatedTimer):
    """An :class:`IsolatedTimer` for ONNX files that run as compiled libraries.

    Args:
        library: ONNX file -> its compiled and checked library.
        target: Where; its threads are the workers'.
        workload: The cases; every worker gets their feeds.
        seed: Of the order within rounds.
    """

    def __init__(
        self, library: Callable[[Path], Path], target: Target, workload: Workload, *, seed: int = 0
    ) -> None:
        super().__init__(target, workload, seed=seed, loader=LOADER, environment=environment(target.threads))
        self._library = library

    def add(self, path: Path) -> int:
        """Compile the model at ``path``, compare it with ONNX Runtime, start a process for it; its number.

        Raises:
            LaminaError: It cannot be compiled, computes something else, or does not run.
        """
        return super().add(self._library(path))
