"""Prove by execution that folding kept the function, and find the pass that did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from lamina.backends import get_backend
from lamina.backends.backend import Executable, Target
from lamina.comparison.running import Trial, run_both, summarize, trials
from lamina.comparison.structure import differing_interface, random_nodes
from lamina.data import Dataset
from lamina.errors import BackendError, LaminaError, VerificationError
from lamina.ir.program import Program
from lamina.ir.verify import check as check_model
from lamina.passes.fold import apply_named

# Every optimization off: what runs is what the file says.
REFERENCE = Target("ort", "cpu", 1, {"opt": "disabled"})
# Generated inputs: ordinary and edge values, at three sizes of every dynamic dim.
SAMPLES = 6


@dataclass(frozen=True)
class Check:
    """Whether a program computes what the original does.

    Attributes:
        equal: None where it cannot be said; ``reason`` says why.
        inputs: On how many inputs both ran.
        max_rel: Largest difference against the output's magnitude.
        reason: What is wrong, or why nothing was run.
    """

    equal: bool | None
    inputs: int = 0
    max_rel: float = 0.0
    reason: str | None = None


class Oracle:
    """Runs the original in ONNX Runtime, every optimization off, beside programs made from it.

    The runtime takes a second to load a deep model and holds no lock of Python's meanwhile: it loads the
    original while the caller folds, and a candidate while onnx's checker looks at it. As a context manager it
    waits for what is still loading.

    Args:
        program: The original; at least what decides is run again for every check.
        data: Samples to run besides generated inputs.
        samples: How many inputs to generate.
    """

    def __init__(self, program: Program, data: Dataset | None = None, samples: int = SAMPLES) -> None:
        self._program, self._data, self._samples = program, data, samples
        self._backend = get_backend(REFERENCE)
        self._pool = ThreadPoolExecutor(1, "lamina-oracle")
        self._original: Future[Executable] = self._pool.submit(self._load_original)

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Return once the original is loaded or cannot be: from here on nothing of this runs by itself."""
        wait([self._original])

    def judge(self, other: Program) -> tuple[Check, str | None]:
        """What running ``other`` shows, and why it must not ship: its function, or what the checker says.

        Both models run on the same inputs; every output is compared within its dtype's rounding.
        """
        loading = self._pool.submit(self._backend.compile, other.model, REFERENCE)
        fault = None
        try:
            check_model(other)
        except VerificationError as error:
            fault = error.what
        check = self._check(other, loading)
        return check, (check.reason or "the outputs differ") if check.equal is False else fault

    def _check(self, other: Program, loading: Future[Executable]) -> Check:
        interface = differing_interface(self._program, other)
        if interface:
            return Check(False, reason=interface[0])
        random = random_nodes(self._program, other)
        if random:
            return Check(None, reason=f"{random[0]} draws random numbers")
        try:
            original = self._original.result()
        except LaminaError as error:
            said = error.what.splitlines()[0]
            return Check(None, reason=f"the original could not be run: {said}")
        try:
            candidate = loading.result()
        except BackendError as error:
            return Check(False, reason=error.what)
        names = [port.name for port in self._program.outputs]
        tally = run_both(original, candidate, names, self._trials(), None)
        if tally.failures:
            return Check(False, tally.samples, reason=tally.failures[0])
        if not tally.seen:
            said = (
                tally.errors[0].what.splitlines()[0] if tally.errors else "no generated input says anything"
            )
            return Check(None, reason=f"the original could not be run: {said}")
        found = [summarize(tally, name, None) for name in names]
        wrong = [
            f"output '{f.name}' differs by {f.max_rel:.2g} of its magnitude" for f in found if not f.equal
        ]
        worst = max(f.max_rel for f in found)
        return Check(not wrong, tally.samples, worst, wrong[0] if wrong else None)

    def culprit(self, names: Sequence[str]) -> str:
        """The pass out of ``names``, which together have a fault by :meth:`judge`, after which there is one.

        Bisection: the passes before it leave none.
        """
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            program = apply_named(self._program, names[:middle])
            if self.judge(program)[1] is not None:
                high = middle
            else:
                low = middle
        return names[high - 1]

    def _trials(self) -> Iterator[Trial]:
        return trials(self._program, self._data, self._samples, seed=0)

    def _load_original(self) -> Executable:
        self._program.require_tensors()
        return self._backend.compile(self._program.model, REFERENCE)
