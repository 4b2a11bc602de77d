"""Fair latency: each model in its own process, short bursts in turn, the order drawn anew each round."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np

from lamina.backends.backend import Case, Latency, Target, Workload
from lamina.backends.workers import ORT_LOADER, Worker
from lamina.errors import BackendError

LEAST_ROUNDS = 5
MOST_ROUNDS = 40
LEAST_RUNS = 3
SLOW_S = 0.02  # a run this long is a burst of its own
BURST_S = 0.01  # long enough for a clock's and a wake-up's share to vanish

Rounds = list[list[float]]  # samples in seconds, one list a round


@dataclass(frozen=True)
class Ratio:
    """How long a takes relative to b: median over rounds, and the 10th and 90th percentile."""

    median: float
    low: float
    high: float


@dataclass
class Timings:
    """Samples by (model number, case name), one list a round; rounds of all models are in step."""

    samples: dict[tuple[int, str], Rounds] = field(default_factory=dict)

    def latency(self, model: int, case: str) -> Latency:
        """All samples of one model on one case."""
        return Latency.of([s for burst in self.samples[model, case] for s in burst])

    def ratio(self, model: int, other: int, case: str) -> Ratio:
        """Time of ``model`` over time of ``other``, round by round."""
        return paired_ratio(self.samples[model, case], self.samples[other, case])


def paired_ratio(samples_a: Sequence[Sequence[float]], samples_b: Sequence[Sequence[float]]) -> Ratio:
    """Compare two models round by round, so that what slows a whole round cancels.

    Args:
        samples_a: Seconds, one sequence a round.
        samples_b: The same rounds of the other model.

    Raises:
        BackendError: The rounds are not in step, or there are none.
    """
    if not samples_a or len(samples_a) != len(samples_b):
        raise BackendError(
            f"cannot pair {len(samples_a)} rounds with {len(samples_b)}",
            advice="time both models in one call",
        )
    ratios = [float(np.median(a) / np.median(b)) for a, b in zip(samples_a, samples_b, strict=True)]
    low, mid, high = np.percentile(ratios, [10, 50, 90])
    return Ratio(float(mid), float(low), float(high))


class IsolatedTimer:
    """Keeps one worker process a model, so that models can be added and timed against each other.

    Args:
        target: Threads and session options.
        workload: The cases; every worker gets their feeds.
        seed: Of the order within rounds.
        loader: What opens a model in the worker; see :class:`.workers.Worker`.
        environment: Variables for the workers.
    """

    def __init__(
        self,
        target: Target,
        workload: Workload,
        *,
        seed: int = 0,
        loader: str = ORT_LOADER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        if not workload:
            raise BackendError("a workload needs at least one case to time")
        self.target, self.workload = target, workload
        self._loader, self._environment = loader, environment
        self._random = random.Random(seed)
        self._workers: dict[int, tuple[Worker, int]] = {}
        self._estimates: dict[tuple[int, str], float] = {}
        self._next = 0

    def add(self, path: Path) -> int:
        """Start a process for the model at ``path``, load it, run every case once; its number.

        Raises:
            BackendError: The model cannot be loaded or run there; names the model.
        """
        worker = Worker(self.target, str(path), loader=self._loader, environment=self._environment)
        try:
            session = worker.open(path)
            estimates = {}
            for case in self.workload:
                worker.feed(case.name, case.feeds)
                samples = worker.time(session, case.name, 0.0, least=2, warm=1)
                estimates[case.name] = min(samples)
        except BaseException:
            worker.close()
            raise
        number, self._next = self._next, self._next + 1
        self._workers[number] = (worker, session)
        self._estimates.update({(number, case): s for case, s in estimates.items()})
        return number

    def add_all(self, paths: Sequence[Path]) -> list[int]:
        """Add models one after the other; none of them stays running when one fails."""
        numbers: list[int] = []
        try:
            for path in paths:
                numbers.append(self.add(path))
        except BaseException:
            for number in numbers:
                self.remove(number)
            raise
        return numbers

    def remove(self, number: int) -> None:
        """End one model's process."""
        worker, _ = self._workers.pop(number)
        worker.close()

    @property
    def counts_cpu(self) -> bool:
        """Whether a run happens in the calling thread alone, so that its CPU time is its latency."""
        return self._loader == ORT_LOADER and self.target.threads == 1

    def time(
        self,
        ids: Sequence[int],
        cases: Iterable[str] | None = None,
        seconds: float = 1.0,
        *,
        cpu: bool = False,
    ) -> Timings:
        """Time models in turn for about ``seconds`` in all.

        Every round gives each model one burst on each case, models of one case back to back in random order.
        At least 5 rounds of 3 runs (of 1 where it is long) are made, however long they take.

        Args:
            ids: Numbers from :meth:`add`.
            cases: Names of the cases; all when omitted.
            seconds: Wall time to spend.
            cpu: Count CPU time where :attr:`counts_cpu`: wall time on an idle machine, and steadier
                on a busy one.

        Raises:
            BackendError: A worker failed or died; names its model.
        """
        cpu = cpu and self.counts_cpu
        names = [c.name for c in self.workload] if cases is None else list(cases)
        pairs = [(i, case) for i in ids for case in names]
        if not pairs:
            return Timings()
        rounds, bursts = self._schedule(pairs, seconds)
        result = Timings({pair: [] for pair in pairs})
        for _ in range(rounds):
            for case in self._random.sample(names, len(names)):
                for i in self._random.sample(list(ids), len(ids)):
                    worker, session = self._workers[i]
                    least = self._least(i, case)
                    samples = worker.time(session, case, bursts[i, case], least=least, warm=1, cpu=cpu)
                    result.samples[i, case].append(samples)
        return result

    def _schedule(
        self, pairs: Sequence[tuple[int, str]], seconds: float
    ) -> tuple[int, dict[tuple[int, str], float]]:
        """How many rounds, and how many seconds each burst gets after its one warm-up run."""
        estimate = self._estimates
        wanted = {pair: estimate[pair] + max(self._least(*pair) * estimate[pair], BURST_S) for pair in pairs}
        rounds = int(np.clip(seconds / sum(wanted.values()), LEAST_ROUNDS, MOST_ROUNDS))
        share = seconds / rounds / sum(wanted.values())
        return rounds, {pair: max(0.0, share * cost - estimate[pair]) for pair, cost in wanted.items()}

    def _least(self, number: int, case: str) -> int:
        return LEAST_RUNS if self._estimates[number, case] < SLOW_S else 1

    def close(self) -> None:
        """End every process."""
        for worker, _ in self._workers.values():
            worker.close()
        self._workers.clear()

    def __enter__(self) -> IsolatedTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def measure_rounds(
    models: Sequence[Path], target: Target, workload: Workload, seconds: float, *, seed: int = 0
) -> Timings:
    """Time models against each other, in alternation, each in a process of its own.

    Raises:
        BackendError: A model cannot be loaded or run, or its process died; names the model.
    """
    with IsolatedTimer(target, workload, seed=seed) as timer:
        return timer.time(timer.add_all(models), None, seconds)


def measure(
    models: Sequence[Path], target: Target, workload: Workload, seconds: float
) -> list[list[Latency]]:
    """Latency of each model on each case, ``[model][case]``; see :func:`measure_rounds`.

    Raises:
        BackendError: A model cannot be loaded or run, or its process died; names the model.
    """
    timings = measure_rounds(models, target, workload, seconds)
    return [[timings.latency(i, case.name) for case in workload] for i in range(len(models))]


def peak_memory(model: Path, target: Target, case: Case) -> int:
    """Peak resident bytes a fresh process adds, on top of importing the runtime, to load and run ``model``.

    Raises:
        BackendError: The model cannot be loaded or run.
    """
    worker = Worker(target, str(model))
    try:
        return worker.memory(model, case.feeds)
    finally:
        worker.close()
