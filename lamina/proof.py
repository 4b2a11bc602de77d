"""Prove by execution that folding kept the function, and find the pass that did not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from lamina.backends.onnxruntime import OrtExecutable, weight_bytes
from lamina.backends.reference import compile_reference
from lamina.comparison.running import run_both, summarize, trials
from lamina.comparison.structure import differing_interface, random_nodes
from lamina.data import Dataset
from lamina.errors import BackendError, LaminaError, VerificationError
from lamina.ir.io import whole
from lamina.ir.message import message
from lamina.ir.probe_inputs import probe_inputs
from lamina.ir.program import Program
from lamina.ir.verify import check as check_model
from lamina.passes.fold import apply_named

# Generated inputs: ordinary and edge values, at three sizes of every dynamic dim.
SAMPLES = 6
# Weights up to this are in the message that is checked, run and saved: making three costs more than copying.
SMALL_BYTES = 1 << 26


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


@dataclass(frozen=True)
class Judgement:
    """What is known of one candidate.

    Attributes:
        check: What running it beside the original showed.
        fault: Why it must not ship: its function, or what onnx's checker says; None: it may.
        message: The very bytes that ran, for :func:`lamina.ir.io.save_model`; None where they are many.
    """

    check: Check
    fault: str | None
    message: bytes | None


class Oracle:
    """Runs the original in ONNX Runtime, every optimization off, beside programs made from it.

    The runtime takes a second to load a deep model and holds no lock of Python's meanwhile: it loads the
    original while the caller folds, and a candidate while onnx's checker looks at it, and both run side by
    side. As a context manager it waits for what is still loading.

    Args:
        program: The original.
        data: Samples to run besides generated inputs.
        again: Gives the original once more; whoever gives it may change ``program`` from here on.
    """

    def __init__(
        self, program: Program, data: Dataset | None = None, again: Callable[[], Program] | None = None
    ) -> None:
        self._interface, self._data, self._random = program.interface, data, random_nodes(program)
        self._again = again or (lambda: program)
        self._probes = tuple(probe_inputs(program, SAMPLES))
        model = program.model if again is None else message(program.model).SerializeToString()
        self._pool = ThreadPoolExecutor(1, "lamina-oracle")
        self._original: Future[OrtExecutable] = self._pool.submit(self._load_original, model)

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def wait(self) -> None:
        """Return once the original is loaded or cannot be: from here on nothing of this runs by itself."""
        wait([self._original])

    def judge(self, other: Program) -> Judgement:
        """Check ``other`` and run it and the original on the same inputs.

        Every output is compared within its dtype's rounding.
        """
        proto, message = _written(other.model)
        loading = self._pool.submit(compile_reference, other.model if message is None else message)
        fault = None
        try:
            check_model(other, proto)
        except VerificationError as error:
            fault = error.what
        check = self._check(other, loading)
        if check.equal is False:
            fault = check.reason or "the outputs differ"
        return Judgement(check, fault, message)

    def _check(self, other: Program, loading: Future[OrtExecutable]) -> Check:
        interface = differing_interface(self._interface, other.interface)
        if interface:
            return Check(False, reason=interface[0])
        random = self._random or random_nodes(other)
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
        names = [port.name for port in self._interface.outputs]
        tally = run_both(original, candidate, names, trials(self._data, self._probes), None, self._pool)
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
            program = apply_named(self._again(), names[:middle])
            if self.judge(program).fault is not None:
                high = middle
            else:
                low = middle
        return names[high - 1]

    def _load_original(self, model: ir.Model | bytes) -> OrtExecutable:
        self._interface.require_tensors()
        return compile_reference(model)


def _written(model: ir.Model) -> tuple[onnx.ModelProto | None, bytes | None]:
    """A small model as one message, and its bytes."""
    if weight_bytes(model) > SMALL_BYTES:
        return None, None
    proto = whole(model)
    return proto, proto.SerializeToString()
