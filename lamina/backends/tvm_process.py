"""The parent's side of a TVM process: start it with the right environment, ask, never leave it behind."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lamina.backends._child import Child
from lamina.backends._frames import Frame
from lamina.errors import BackendError, LaminaError, UnsupportedOperator

INSTALL = "pip install 'lamina[tvm]' (docs/tvm.md says what that brings and which versions work together)"
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
        self._child = Child("lamina.backends.tvm_worker", environment(threads), unset=["TVM_USE_RUNTIME_LIB"])

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
        end = time.monotonic() + timeout
        self._child.send(Frame(dict(header), arrays or {}))
        while True:
            try:
                answer = self._child.receive(end - time.monotonic())
            except TimeoutError:
                raise TimeUp(
                    f"TVM did not finish '{header['do']}' of {self.label} in {timeout:.0f} s"
                ) from None
            if answer is None:
                raise BackendError(
                    f"the TVM process for {self.label} died during '{header['do']}': "
                    f"{self._child.post_mortem()}",
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
        self._child.close()

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
