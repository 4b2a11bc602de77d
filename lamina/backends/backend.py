"""What a backend is: compile a model for a target, run it, measure it, say what really ran."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import parse_qsl, urlencode

import numpy as np
import onnx_ir as ir

from lamina.errors import BudgetError

if TYPE_CHECKING:
    from lamina.backends.measure import IsolatedTimer

Feeds = Mapping[str, np.ndarray]


def usable_cores() -> int:
    """Cores this process may use: a container's or taskset's share, not the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@dataclass(frozen=True)
class Target:
    """Backend, device and threads: ``ort:cpu?threads=2``, ``tvm:llvm?threads=2&tune=60``.

    Attributes:
        backend: Name in ``lamina.backends.BACKENDS``.
        device: What the backend calls the device.
        threads: Intra-operator threads, at least 1.
        options: Everything else after the question mark, as text.
    """

    backend: str = "ort"
    device: str = "cpu"
    threads: int = 1
    options: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def parse(text: str | Target) -> Target:
        """Read a target's text form; threads not given: as many as this process may use.

        Raises:
            BudgetError: The text is not ``backend:device?key=value&...`` or threads is not a positive number.
        """
        if isinstance(text, Target):
            return text
        head, _, query = text.strip().partition("?")
        backend, _, device = head.partition(":")
        options = dict(parse_qsl(query, keep_blank_values=True))
        threads = options.pop("threads", "") or str(usable_cores())
        if not backend or not threads.isdigit() or int(threads) < 1:
            raise BudgetError(f"target '{text}' is not understood", advice="write it like ort:cpu?threads=2")
        return Target(backend, device or "cpu", int(threads), options)

    def __str__(self) -> str:
        return f"{self.backend}:{self.device}?" + urlencode({"threads": self.threads, **self.options})


@dataclass(frozen=True)
class Case:
    """One shape of a workload: concrete feeds, and how much it counts.

    Attributes:
        name: ``1x128`` or what the user called it.
        feeds: One array an input.
        weight: Share of the workload; weights sum to 1.
    """

    name: str
    feeds: Feeds
    weight: float = 1.0


Workload = tuple[Case, ...]


@dataclass(frozen=True)
class Latency:
    """Time of one run in seconds: median and minimum over samples, spread = 90th minus 10th percentile."""

    median_s: float
    minimum_s: float
    spread_s: float
    samples: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Latency:
        """Summarize raw samples."""
        array = np.asarray(seconds, dtype=np.float64)
        low, mid, high = np.percentile(array, [10, 50, 90])
        return Latency(float(mid), float(array.min()), float(high - low), len(array))


@dataclass(frozen=True)
class Audit:
    """What the target made of the planned operators, read off its own optimized graph.

    Attributes:
        counts: Kernel name (``QLinearConv``, ``DynamicQuantizeMatMul``, ``MatMul``, ...) -> how many.
        fell_back: Names of operators planned as integer or fused kernels that run as something else.
    """

    counts: Mapping[str, int]
    fell_back: tuple[str, ...] = ()


class Executable(Protocol):
    """A compiled program, ready to run in this process."""

    input_names: tuple[str, ...]
    output_names: tuple[str, ...]

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run once; arrays keyed by output name."""
        ...


def run_of(executable: Executable) -> Callable[[Feeds], dict[str, np.ndarray]]:
    """How to run a program on the original's feeds: caches of attentions that were dropped are not fed."""
    names = frozenset(executable.input_names)
    return lambda feeds: executable.run({n: a for n, a in feeds.items() if n in names})


class Backend(Protocol):
    """How programs run on one kind of target."""

    name: str

    def capabilities(self, target: Target) -> Mapping[str, Any]:
        """What the target can do and what it is.

        ``forms``: option names it has kernels for; ``refused``: names it cannot even load;
        ``operator_prices``: whether single operators can be priced on it; ``device``; ``versions``.
        """
        ...

    def draft(self, target: Target) -> Target:
        """The target candidates are compared on: ``target`` without what is too dear to do for each."""
        ...

    def compile(self, model: ir.Model | Path, target: Target) -> Executable:
        """Compile for running in this process.

        Raises:
            BackendError: The backend refuses the model; names the operator where it can.
        """
        ...

    def measure(
        self, models: Sequence[Path], target: Target, workload: Workload, *, seconds: float
    ) -> list[list[Latency]]:
        """Latency of each model on each case, alternating between models, each in a process of its own.

        ``seconds`` is the wall time to spend in all, start-up excluded. Result: [model][case].
        """
        ...

    def peak_memory(self, model: Path, target: Target, case: Case) -> int:
        """Peak resident bytes a fresh process needs to load and run the model, interpreter excluded."""
        ...

    def timer(self, target: Target, workload: Workload, *, seed: int = 0) -> IsolatedTimer:
        """A timer that keeps one worker process a model, so that models can join and leave."""
        ...

    def audit(self, model: ir.Model, target: Target, planned: Mapping[str, str] | None = None) -> Audit:
        """Compile, then read which kernels really run.

        ``planned`` maps names of weighted nodes to the option they were given.
        """
        ...

    def package(self, model: ir.Model, target: Target, directory: Path) -> list[Path]:
        """Write what deployment on this backend needs besides ``model.onnx``; the files written."""
        ...
