"""What the user asked for, understood and checked before any work starts."""

from __future__ import annotations

from dataclasses import dataclass

from lamina.backends.backend import Backend, Target, Workload
from lamina.budget import Budget
from lamina.data import Splits
from lamina.ir.program import Program
from lamina.progress import Progress
from lamina.quality import Metric


@dataclass(frozen=True)
class Request:
    """One optimization.

    Attributes:
        program: The captured model.
        budget: Bounds.
        splits: Disjoint calibration, selection and report samples.
        synthetic_data: Whether the samples were made up from shapes.
        metric: The user's metric, or the default divergence.
        target: Where the result runs.
        backend: The target's backend.
        workload: Shapes that latency is measured on.
        transforms: Names of the transforms to use.
        minimize: What to make least: ``latency``, ``size``, ``flops``, ``memory``, ``footprint`` (the sum of
            latency ratio and size ratio), ``damage``.
        seconds: Time for measuring candidates.
        seed: Of search and timing order.
        progress: Receives progress.
        strategy: ``search``, or names of rules and allocators with commas between
            (:mod:`lamina.planner.strategy`).
        bits: Every weight in so many bits where there is such a form (:mod:`lamina.planner.bits.uniform`);
            None: any width.
        data_free: Leave out what rests on statistics of the samples, as they say nothing of real ones.
        kv_cache: Bits of the caches at the interface; None leaves them as they are.
        not_slower: Whether a plan slower than the original is out whatever is bounded or minimized.
    """

    program: Program
    budget: Budget
    splits: Splits
    synthetic_data: bool
    metric: Metric
    target: Target
    backend: Backend
    workload: Workload
    transforms: tuple[str, ...]
    minimize: str
    seconds: float
    seed: int
    progress: Progress
    strategy: str = "search"
    bits: int | None = None
    data_free: bool = False
    not_slower: bool = False
    kv_cache: int | None = None

    @property
    def draft(self) -> Target:
        """What candidates are compared on: the target without what is too dear to do for each of them."""
        return self.backend.draft(self.target)
