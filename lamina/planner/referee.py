"""Hold finished programs against the original: structure, types, interface, and execution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Executable
from lamina.backends.reference import compile_reference
from lamina.errors import LaminaError, VerificationError
from lamina.ir.difference import difference, is_discrete, tolerance_of
from lamina.ir.probe_inputs import probe_inputs
from lamina.ir.program import Port, Program
from lamina.ir.semantics import why_fenced
from lamina.ir.verify import check, verify_structure
from lamina.passes.fold import apply_named
from lamina.passes.quantize.caches import CODES, CacheCodes, coded_feeds, decoded_outputs

# Of these every other one is ordinary: the example's sizes, an odd batch, all sizes 1.
_GENERATED = 6


@dataclass(frozen=True)
class _Run:
    """Inputs and what the original makes of them; ``real`` where a user gave them."""

    label: str
    feeds: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    real: bool


class Referee:
    """Says whether a program may stand in for the original; the original runs once.

    Args:
        original: The captured program.
        real: Feeds a user gave; on them a result must stay finite. Generated ones only show that it runs.

    Attributes:
        coded: Caches that may be in codes at the interface: their feeds are rounded to codes, and what comes
            out is compared as the numbers that the codes stand for.
        caches: For each branch that may be dropped, its cache inputs and outputs: they leave with it, all of
            one branch or none; nothing else of the interface ever changes.
    """

    def __init__(self, original: Program, real: Sequence[Mapping[str, np.ndarray]] = ()) -> None:
        self.original = original
        self.caches: tuple[frozenset[str], ...] = ()
        self.coded: tuple[CacheCodes, ...] = ()
        self._real = tuple(real)

    def check(self, program: Program, name: str, *, exact: bool) -> None:
        """Check structure, names, types, shapes, opsets, interface, and run beside the original.

        Args:
            program: What was made of the original.
            name: Of what made it, for the message.
            exact: Whether outputs must be equal but for rounding; else they must only have the right shapes
                and be finite on real data where the original's are.

        Raises:
            VerificationError: Something does not hold; names it.
        """
        verify_structure(program, name)
        check(program)
        left = self._interface(program, name, exact=exact)
        if not self._runs:
            return  # the original does not run on made-up inputs either: real data judges
        try:
            executable = compile_reference(program.model)
            found = [(run, self._run(program, executable, run.feeds)) for run in self._runs]
        except LaminaError as error:
            raise _broken(name, f"the program does not run: {error.what.splitlines()[0]}") from error
        for run, outputs in found:
            for port in self.original.outputs:
                if port.name in left:
                    continue
                self._output(name, run, port.name, outputs[port.name], exact and not self._random)

    def _run(
        self, program: Program, executable: Executable, feeds: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        outputs = executable.run(coded_feeds(program, feeds, self.coded))
        return decoded_outputs(outputs, self.coded)

    def culprit(self, names: Sequence[str]) -> str:
        """Of passes that together change the function, the one after which it is changed; bisection."""
        low, high = 0, len(names)
        while high - low > 1:
            middle = (low + high) // 2
            try:
                self.check(apply_named(self.original, names[:middle]), "folding", exact=True)
                low = middle
            except LaminaError:
                high = middle
        return names[high - 1]

    @cached_property
    def _runs(self) -> tuple[_Run, ...]:
        feeds = [(f"given samples {i}", f, True) for i, f in enumerate(self._real)]
        feeds += [
            (p.label, p.feeds, False) for p in probe_inputs(self.original, _GENERATED) if p.kind == "ordinary"
        ]
        found = []
        try:
            executable = compile_reference(self.original.model)
        except LaminaError:
            return ()
        for label, arrays, real in feeds:
            try:
                found.append(_Run(label, arrays, executable.run(arrays), real))
            except LaminaError:
                continue  # an input the original itself refuses says nothing
        return tuple(found)

    @cached_property
    def _random(self) -> bool:
        return any("random" in (why_fenced(n) or "") for n in self.original.graph.all_nodes())

    def _interface(self, program: Program, name: str, *, exact: bool) -> frozenset[str]:
        """Compare names, order and dtypes; the ports of dropped caches, which are the one exception."""
        now = {p.name for p in (*program.inputs, *program.outputs)}
        left: frozenset[str] = frozenset()
        if not exact:
            left = left.union(*(ports for ports in self.caches if not ports & now))
        for what, after, then in (
            ("inputs", program.inputs, self.original.inputs),
            ("outputs", program.outputs, self.original.outputs),
        ):
            before = [f"{p.name}: {p.dtype.name}" for p in then if p.name not in left]
            kept = [f"{p.name}: {self._dtype(p)}" for p in after]
            if before != kept:
                raise _broken(name, f"the {what} changed from {before} to {kept}")
        return left

    def _dtype(self, port: Port) -> str:
        """Name of the port's dtype; of codes that were asked for, of what they stand for."""
        asked = {name for cache in self.coded for name in (cache.past, cache.present)}
        return ir.DataType.FLOAT.name if port.name in asked and port.dtype == CODES else port.dtype.name

    def _output(self, name: str, run: _Run, output: str, after: np.ndarray, exact: bool) -> None:
        before = run.outputs[output]
        if after.dtype != before.dtype or after.shape != before.shape:
            shapes = f"{before.dtype}{list(before.shape)} to {after.dtype}{list(after.shape)}"
            raise _broken(name, f"output '{output}' changed from {shapes} on {run.label}")
        if is_discrete(before.dtype) and not exact:
            return
        if exact:
            found = difference(before, after)
            allowed = tolerance_of(before.dtype) * found.scale
            if found.max_abs > max(allowed, 0.0):
                raise _broken(name, f"output '{output}' differs by {found.max_abs:.3g} on {run.label}")
        elif run.real and np.isfinite(before).all() and not np.isfinite(after).all():
            raise _broken(name, f"output '{output}' is not finite on {run.label}")


def _broken(name: str, what: str) -> VerificationError:
    return VerificationError(f"after {name}: {what}", advice=f"this is a bug in {name}: report it")
