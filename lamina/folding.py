"""Folding as a product of its own: an equal model with fewer nodes, and faster where a target is measured."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from lamina.backends import get_backend
from lamina.backends.backend import Backend, Target, Workload
from lamina.backends.onnxruntime import weight_bytes
from lamina.data import Dataset, load_data
from lamina.errors import OutputError, VerificationError
from lamina.given import Given
from lamina.ir.collector import collector_paused
from lamina.ir.io import save_model, serialized_size
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewrite
from lamina.passes.fold import FOLDS
from lamina.passes.fold import fold as fold_program
from lamina.passes.fold.catalog import canonical, load
from lamina.passes.fold.graph import every_node
from lamina.planner.form_memory import FormMemory
from lamina.planner.forms import pick_forms, remembered_forms
from lamina.planner.timing import Relative, Stopwatch
from lamina.progress import Progress
from lamina.proof import SMALL_BYTES, Check, Oracle
from lamina.workload import parse_workload

_UNDONE = ("undone", "stopped")
_Again = Callable[[], Program] | None
_Make = Callable[[Program, tuple[str, ...], _Again], "FoldResult"]


@dataclass(frozen=True)
class Census:
    """What a program is made of.

    Attributes:
        operators: How often it uses each, subgraphs included.
        opset: Version of the default operator set.
    """

    operators: Counter[str]
    opset: int

    @classmethod
    def of(cls, program: Program) -> Census:
        """Count."""
        names = [f"{n.domain}.{n.op_type}" if n.domain else n.op_type for n in every_node(program.graph)]
        return cls(Counter(names), program.opset)


@dataclass(frozen=True)
class FoldResult:
    """A folded program and how it came about.

    Attributes:
        given: What was folded.
        before: What it was made of.
        program: The folded one.
        names: Passes in the order :func:`lamina.passes.fold.apply_named` takes.
        changes: Pass -> how many changes it made.
        undone: Passes left out because they failed or changed the function: name and reason.
        check: What running both said.
        target: Where forms were measured, or None.
        relative: Latency against the original's, or None.
        forms: Per form tried: name, latency ratio, whether it was kept.
        remembered: Whether an earlier run's measurements chose the forms.
        seconds: Time each stage took.
        message: The bytes that were checked and ran, where they are few; :meth:`save` writes them.
    """

    given: Given
    before: Census
    program: Program
    names: tuple[str, ...]
    changes: Mapping[str, int]
    undone: tuple[Mapping[str, str], ...]
    check: Check
    target: str | None = None
    relative: Relative | None = None
    forms: tuple[Mapping[str, object], ...] = ()
    remembered: bool = False
    seconds: Mapping[str, float] = field(default_factory=dict)
    message: bytes | None = field(default=None, repr=False)

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write the model; the file at ``path`` is the old one or the new one at any time.

        Raises:
            OutputError: It cannot be written; what was there is intact.
        """
        return save_model(self.program.model, path, message=self.message)

    def report(self) -> dict[str, Any]:
        """Plain data: what ``lamina fold --json`` prints."""
        before, after = self.before, Census.of(self.program)
        written = serialized_size(self.program.model) if self.message is None else len(self.message)
        return {
            "model": self.program.source,
            "nodes": {"before": before.operators.total(), "after": after.operators.total()},
            "operators": {
                op: [before.operators[op], after.operators[op]]
                for op in sorted(before.operators | after.operators)
            },
            "bytes": {"before": self.given.size(), "after": written},
            "opset": {"before": before.opset, "after": after.opset},
            "passes": list(self.names),
            "changes": dict(self.changes),
            "undone": [dict(entry) for entry in self.undone],
            "check": asdict(self.check),
            "target": self.target,
            "latency": None if self.relative is None else asdict(self.relative),
            "forms": [dict(entry) for entry in self.forms],
            "remembered": self.remembered,
            "seconds": dict(self.seconds),
        }


def fold(
    model: Any,
    *,
    output: str | os.PathLike[str] | None = None,
    target: str | Target | None = None,
    data: Any = None,
    workload: Any = None,
    shapes: Mapping[str, int | Sequence[int | None]] | None = None,
    only: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Any:
    """Rewrite a model into an equal one with fewer nodes; with a target, into its fastest equal form.

    Without a target nothing is measured and the result depends on the model alone. Every pass is checked
    for structure, and the result is run against the original, every optimization of the runtime off; a pass
    that changes the function is left out.

    Args:
        model: A path, ``onnx.ModelProto`` or ``onnx_ir.Model``. It is never changed.
        output: The file to write; needed where ``model`` is a path. It may name the same file.
        target: Where equivalent forms are timed and chosen, ``ort:cpu?threads=1``; None: no forms.
        data: Samples to check on besides generated inputs, and to time on.
        workload: Shapes to time, ``"1x128@0.2; 1x1@0.8"``. None: batch 1.
        shapes: Dynamic dims to fix: input name -> dims (None: stays dynamic), or dim name -> size.
        only: Names of the always-applied folds to use instead of all.
        forms: Names of forms: without a target they are applied, with one they are the candidates.
        progress: Receives progress.

    Returns:
        The same kind: the path written, an ``onnx.ModelProto`` or an ``onnx_ir.Model``.

    Raises:
        OutputError: A path was given without ``output``, or the file cannot be written.
        LaminaError: Model, data, target, workload, shapes or a pass's name is not usable.
    """
    if isinstance(model, (str, os.PathLike)) and output is None:
        raise OutputError(
            f"folding '{os.fspath(model)}' needs the name of the file to write",
            advice='give output="folded.onnx", or the model itself instead of its path',
        )
    result = run_fold(
        model,
        target=target,
        data=data,
        workload=workload,
        shapes=shapes,
        only=only,
        forms=forms,
        progress=progress,
    )
    written = None if output is None else result.save(output)[0]
    if isinstance(model, (str, os.PathLike)):
        return written
    if isinstance(model, onnx.ModelProto):
        message = result.message
        return ir.to_proto(result.program.model) if message is None else onnx.load_from_string(message)
    return result.program if isinstance(model, Program) else result.program.model


def run_fold(
    model: Any,
    *,
    target: str | Target | None = None,
    data: Any = None,
    workload: Any = None,
    shapes: Mapping[str, int | Sequence[int | None]] | None = None,
    only: Sequence[str] | None = None,
    forms: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> FoldResult:
    """Do what :func:`fold` does, and return everything that is known about it.

    Raises:
        LaminaError: Model, data, target, workload, shapes or a pass's name is not usable.
    """
    with collector_paused():
        return _run(model, target, data, workload, shapes, only, forms, progress or Progress())


def _run(
    model: Any,
    target: str | Target | None,
    data: Any,
    workload: Any,
    shapes: Mapping[str, int | Sequence[int | None]] | None,
    only: Sequence[str] | None,
    forms: Sequence[str] | None,
    progress: Progress,
) -> FoldResult:
    always = FOLDS if only is None else tuple(canonical(name) for name in only)
    candidates = None if forms is None else tuple(canonical(name) for name in forms)
    aim = None if target is None else Target.parse(target)
    backend = None if aim is None else get_backend(aim)
    with progress.stage("capture"):
        given = Given(model, shapes)
        program = given.program
        dataset = None if data is None else load_data(data, program)
    job = _Job(given, dataset, always, candidates, progress)
    if aim is None or backend is None:
        return job.proven(job.plain)
    cases = parse_workload(workload, program, dataset)
    with _Clock(backend, aim, cases, program.model) as clock:
        return job.proven(lambda folded, without, _: job.measured(clock, folded, without), alone=True)


class _Clock:
    """A stopwatch that is started when something has to be measured."""

    def __init__(self, backend: Backend, target: Target, workload: Workload, original: ir.Model) -> None:
        self.target, self.memory = target, FormMemory(target, workload)
        self._arguments = (backend, target, workload, original)
        self._open = ExitStack()
        self._stopwatch: Stopwatch | None = None

    def stopwatch(self) -> Stopwatch:
        if self._stopwatch is None:
            folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="lamina-"))
            self._stopwatch = self._open.enter_context(Stopwatch(*self._arguments, Path(folder)))
        return self._stopwatch

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()


@dataclass
class _Job:
    given: Given
    dataset: Dataset | None
    always: tuple[str, ...]
    candidates: tuple[str, ...] | None
    progress: Progress

    def proven(self, make: _Make, *, alone: bool = False) -> FoldResult:
        """Fold, run, verify; a pass that breaks something is left out and folding starts again.

        Args:
            make: Folds a program without the passes of these names, using it up where it can be had again.
            alone: Whether it measures time, so that nothing may run beside it.
        """
        program, banned = self.given.program, dict[str, str]()
        spare = not alone and self.given.is_spare and weight_bytes(program.model) <= SMALL_BYTES
        again, before = self.given.again if spare else None, Census.of(program)
        with Oracle(program, self.dataset, again) as oracle:
            if alone:
                oracle.wait()
            while True:
                with self.progress.stage("fold"):
                    result = make(program, tuple(banned), again)
                with self.progress.stage("check"):
                    found = oracle.judge(result.program)
                    if found.fault is None or not result.names:
                        break
                    banned[oracle.culprit(result.names)] = found.fault
                    program = program if again is None else again()
        if found.fault is not None and found.check.equal is not False:
            raise VerificationError(found.fault, advice="this is a bug in lamina: report it with the model")
        left_out = tuple({"pass": load(n).name, "reason": reason} for n, reason in banned.items())
        seconds = dict(self.progress.seconds)
        return replace(
            result,
            before=before,
            check=found.check,
            undone=(*result.undone, *left_out),
            seconds=seconds,
            message=found.message,
        )

    def plain(self, program: Program, without: tuple[str, ...], again: _Again) -> FoldResult:
        """The exact folds, and the forms that were asked for by name."""
        forms = self.candidates or ()
        return self._result(
            *fold_program(program, forms=forms, only=self.always, without=without, again=again)
        )

    def measured(self, clock: _Clock, program: Program, without: tuple[str, ...]) -> FoldResult:
        """The forms that the target runs fastest: as an earlier run measured them, or measured now."""
        sets: dict[str, Any] = {"candidates": self.candidates, "only": self.always, "without": without}
        found = remembered_forms(program, clock.memory, **sets)
        if found is None:
            found = pick_forms(program, clock.stopwatch(), self.progress, memory=clock.memory, **sets)
        return replace(
            self._result(found.program, found.names, found.records),
            target=str(clock.target),
            relative=found.relative,
            forms=found.log,
            remembered=found.remembered,
        )

    def _result(self, program: Program, names: tuple[str, ...], records: Sequence[Rewrite]) -> FoldResult:
        undone = [r for r in records if r.why.startswith(_UNDONE)]
        changes = Counter(r.pass_name for r in records if r not in undone)
        return FoldResult(
            self.given,
            Census(Counter(), 0),
            program,
            names,
            changes,
            tuple({"pass": r.pass_name, "reason": r.why} for r in undone),
            Check(None),
        )
