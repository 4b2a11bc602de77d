"""Prove by execution that folding kept the function, and find the pass that did not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    Args:
        program: The original; at least what decides is run again for every check.
        data: Samples to run besides generated inputs.
        samples: How many inputs to generate.
    """

    def __init__(self, program: Program, data: Dataset | None = None, samples: int = SAMPLES) -> None:
        self._program, self._data, self._samples = program, data, samples
        self._backend = get_backend(REFERENCE)
        self._original: Executable | None = None
        self._unusable: str | None = None

    def check(self, other: Program) -> Check:
        """Run both on the same inputs and compare every output within its dtype's rounding."""
        interface = differing_interface(self._program, other)
        if interface:
            return Check(False, reason=interface[0])
        random = random_nodes(self._program, other)
        if random:
            return Check(None, reason=f"{random[0]} draws random numbers")
        original = self._compiled()
        if original is None:
            return Check(None, reason=self._unusable)
        try:
            candidate = self._backend.compile(other.model, REFERENCE)
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

    def fault(self, other: Program, check: Check) -> str | None:
        """Why ``other`` must not ship: its function, by ``check``, or else what the checker says of it."""
        if check.equal is False:
            return check.reason or "the outputs differ"
        try:
            check_model(other)
        except VerificationError as error:
            return error.what
        return None

    def culprit(self, names: Sequence[str]) -> str:
        """The pass out of ``names``, which together have a :meth:`fault`, after which there is one.

        Bisection: the passes before it leave none.
        """
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            program = apply_named(self._program, names[:middle])
            if self.fault(program, self.check(program)) is not None:
                high = middle
            else:
                low = middle
        return names[high - 1]

    def _trials(self) -> Iterator[Trial]:
        return trials(self._program, self._data, self._samples, seed=0)

    def _compiled(self) -> Executable | None:
        if self._original is None and self._unusable is None:
            try:
                self._program.require_tensors()
                self._original = self._backend.compile(self._program.model, REFERENCE)
            except LaminaError as error:
                self._unusable = f"the original could not be run: {error.what.splitlines()[0]}"
        return self._original
