"""What must hold of every random model, proven by running it: folds, drops, quantization, files, plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from graphs import SIZES, Made, Spec, build

from lamina.errors import LaminaError
from lamina.ir import io
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.fold import apply_named, fold, form_names
from lamina.passes.fold.catalog import load
from lamina.passes.pass_ import Rounding

Feeds = Mapping[str, np.ndarray]
Arrays = list[np.ndarray]
# Beyond what the passes state: the runtime may block a product of another shape differently.
SLACK_ULPS = 4.0
NOISE_RUNS = 2
NOISE_FACTOR = 16.0
KINDS = ("normal", "edge", "zero")


class Wrong(AssertionError):
    """A result that is not what it must be."""


@dataclass
class Outcome:
    """What one random model showed.

    Attributes:
        fired: Passes that changed it, and checks that had something to do.
        undone: Passes that the pipeline had to roll back, with the reason.
        refused: Why capture refused the model, or "".
        unrunnable: Why ONNX Runtime does not run the model itself, or "".
    """

    made: Made
    fired: Counter[str] = field(default_factory=Counter)
    undone: list[str] = field(default_factory=list)
    refused: str = ""
    unrunnable: str = ""


def session(model: onnx.ModelProto | ir.Model | Path) -> object:
    """ONNX Runtime without any optimization, on one thread."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Packed weights meet another kernel for one row, so whether a weight is constant would change bits.
    options.add_session_config_entry("session.disable_prepacking", "1")
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])


def run(model: onnx.ModelProto | ir.Model | Path, feeds: Sequence[Feeds]) -> list[Arrays]:
    """The outputs for each of the feeds."""
    loaded = session(model)
    return [loaded.run(None, dict(f)) for f in feeds]  # type: ignore[attr-defined]


def check(spec: Spec, folder: Path) -> Outcome:
    """Check one model throughout.

    Raises:
        Wrong: Something gave another result.
    """
    made = build(spec)
    outcome = Outcome(made)
    try:
        subject = _Subject(made)
    except Exception as error:  # a bug of the runtime's: there is nothing to compare with
        outcome.unrunnable = str(error).strip().splitlines()[0]
        return outcome
    try:
        program = capture(made.proto, name=f"fuzz {spec}")
    except LaminaError as error:
        outcome.refused = error.what
        return outcome
    subject.hold("capture", program.model, ("opset",) if made.spec.opset < 13 else ())
    _interface("capture", made.proto, program)
    folded = _folds(subject, program, outcome)
    _files(folded, folder, subject, outcome)
    rng = np.random.default_rng([5, spec.seed])
    from fuzz_moves import check_moves

    check_moves(subject, program, folded, outcome, rng)
    return outcome


class _Subject:
    """A model, its feeds and what it gives for them."""

    def __init__(self, made: Made) -> None:
        self.made = made
        kinds = [KINDS[(i + made.spec.seed) % len(KINDS)] for i in range(len(SIZES))]
        self.feeds = [
            made.feeds(size, i, kind) for i, (size, kind) in enumerate(zip(SIZES, kinds, strict=True))
        ]
        self.special = [made.feeds(SIZES[0], 9, "special")]
        self.outputs = [o.name for o in made.proto.graph.output]
        self.names: tuple[str, ...] = ()  # of the folds that were applied
        self.expected = run(made.reference(), self.feeds)
        self._noise: list[list[Arrays]] = []

    def noise(self) -> list[list[Arrays]]:
        """What the model gives when every rounded value is off by an ulp or two."""
        if not self._noise:
            self._noise = [
                run(build(self.made.spec, noise=i).reference(), self.feeds) for i in range(NOISE_RUNS)
            ]
        return self._noise

    def hold(
        self, what: str, model: ir.Model | Path, names: Sequence[str], expected: list[Arrays] | None = None
    ) -> list[Arrays]:
        """Run ``model``, to which the passes ``names`` were applied, and compare.

        Raises:
            Wrong: An output differs by more than the passes state.
        """
        got = run(model, self.feeds)
        budget = ulps(names)
        for i, (want, have) in enumerate(zip(expected or self.expected, got, strict=True)):
            self.compare(what, i, want, have, budget)
        if budget == 0 and expected is None:
            for want, have in zip(
                run(self.made.reference(), self.special), run(model, self.special), strict=True
            ):
                self.compare(f"{what} with NaN and infinities", -1, want, have, 0.0)
        return got

    def compare(self, what: str, index: int, want: Arrays, have: Arrays, budget: float) -> None:
        if len(want) != len(have):
            raise Wrong(f"{what}: {len(have)} outputs instead of {len(want)}")
        for k, (name, a, b) in enumerate(zip(self.outputs, want, have, strict=True)):
            reason = differs(a, b, budget)
            if reason is None:
                continue
            if budget and self._within_noise(index, k, a, b):
                continue
            raise Wrong(f"{what}: output '{name}' on feeds {index}: {reason} (allowed: {budget} ulps)")

    def _within_noise(self, index: int, output: int, want: np.ndarray, have: np.ndarray) -> bool:
        if want.dtype.kind != "f" or want.shape != have.shape or want.dtype != have.dtype:
            return False
        spread = np.zeros(want.shape)
        for one in self.noise():
            off = np.abs(one[index][output].astype(np.float64) - want)
            spread = np.maximum(spread, np.where(np.isnan(off), np.inf, off))
        allowed = NOISE_FACTOR * max(float(spread.max(initial=0)), 1e-30)
        with np.errstate(invalid="ignore"):
            off = np.abs(have.astype(np.float64) - want)
        off = np.where((have == want) | (np.isnan(have) & np.isnan(want)), 0, off)
        return bool(off.max(initial=0) <= allowed)


def ulps(names: Sequence[str]) -> float:
    """How far the passes together may move a value; 0 when all of them are exact."""
    total = 0.0
    for name in names:
        effect = Rounding(16) if name in ("opset", "drop", "quantize") else load(name).effect
        total += effect.ulps if isinstance(effect, Rounding) else 0.0
    return total + SLACK_ULPS if total else 0.0


def differs(want: np.ndarray, have: np.ndarray, budget: float) -> str | None:
    """Why ``have`` is not ``want`` within ``budget`` ulps of the largest element, or None."""
    want, have = np.asarray(want), np.asarray(have)
    if want.dtype != have.dtype or want.shape != have.shape:
        return f"{have.dtype}{list(have.shape)} instead of {want.dtype}{list(want.shape)}"
    if want.dtype.kind != "f":
        return None if np.array_equal(want, have) else "other values"
    if np.array_equal(want, have, equal_nan=True):
        return None
    finite = np.isfinite(want)
    if (
        not np.array_equal(want[~finite], have[~finite], equal_nan=True)
        or not np.isfinite(have[finite]).all()
    ):
        return "NaN or infinity in other places"
    scale = np.spacing(np.abs(want[finite]).max(initial=np.finfo(want.dtype).tiny).astype(want.dtype))
    off = float(np.abs(have[finite].astype(np.float64) - want[finite]).max() / scale)
    return None if off <= budget else f"off by {off:.3g} ulps of the largest element"


def _interface(what: str, proto: onnx.ModelProto, program: Program) -> None:
    weights = {t.name for t in proto.graph.initializer}
    inputs = [i.name for i in proto.graph.input if i.name not in weights]
    outputs = [o.name for o in proto.graph.output]
    if [p.name for p in program.inputs] != inputs or [p.name for p in program.outputs] != outputs:
        raise Wrong(f"{what}: the interface changed")
    kinds = {i.name: i.type.tensor_type.elem_type for i in (*proto.graph.input, *proto.graph.output)}
    for port in (*program.inputs, *program.outputs):
        if int(port.dtype) != kinds[port.name]:
            raise Wrong(f"{what}: '{port.name}' is {port.dtype}")


def same_interface(what: str, before: Program, after: Program) -> None:
    """Names, types, ranks and dims of the interface are what they were."""
    if [p.name for p in after.outputs] != [p.name for p in before.outputs] or after.inputs != before.inputs:
        raise Wrong(f"{what}: the interface changed: {before.outputs} -> {after.outputs}")
    for value, old, new in zip(before.graph.outputs, before.outputs, after.outputs, strict=True):
        if old.dtype != new.dtype or (value.shape is not None and old.shape != new.shape):
            raise Wrong(f"{what}: output '{old.name}' changed from {old} to {new}")


def _folds(subject: _Subject, program: Program, outcome: Outcome) -> Program:
    old = ("opset",) if outcome.made.spec.opset < 13 else ()
    before = program.fingerprint
    folded, names, records = fold(program)
    subject.names = names
    _note(outcome, names, records)
    subject.hold(f"fold {names}", folded.model, (*old, *names))
    same_interface("fold", program, folded)
    again = apply_named(program, names)
    if again.fingerprint != folded.fingerprint:
        raise Wrong(f"applying {names} by name gives another program than folding")
    formed, names, records = fold(program, forms=form_names())
    _note(outcome, [n for n in names if n in form_names()], records)
    if any(n in form_names() for n in names):
        try:
            subject.hold(f"fold with forms {names}", formed.model, (*old, *names))
        except Exception as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            outcome.fired["form without a kernel"] += 1
        same_interface("forms", program, formed)
    if program.fingerprint != before:
        raise Wrong("folding changed the program it was given")
    return folded


def _note(outcome: Outcome, names: Sequence[str], records: Sequence[object]) -> None:
    outcome.fired.update(set(names))
    for record in records:
        why = str(getattr(record, "why", record))
        if why.startswith("undone"):
            outcome.undone.append(f"{getattr(record, 'pass_name', '')}: {why}")


def _files(program: Program, folder: Path, subject: _Subject, outcome: Outcome) -> None:
    """Saved and loaded again, in one file or two, it is the same program and gives the same bits."""
    path = folder / "model.onnx"
    threshold = io.EXTERNAL_ABOVE
    if subject.made.spec.seed % 3 == 0:
        io.EXTERNAL_ABOVE = 0
    try:
        written = io.save_model(program.model, path)
    finally:
        io.EXTERNAL_ABOVE = threshold
    loaded = io.load(path)
    known = all(v.shape is not None for v in program.graph.outputs)  # what is unknown may be inferred anew
    if known and loaded.fingerprint != program.fingerprint:
        raise Wrong("saving and loading gives another program")
    same_interface("save and load", program, loaded)
    expected = run(program.model, subject.feeds)
    for got in (run(path, subject.feeds), run(loaded.model, subject.feeds)):
        for want, have in zip(expected, got, strict=True):
            for a, b in zip(want, have, strict=True):
                if differs(a, b, 0.0):
                    raise Wrong(f"the saved model differs: {differs(a, b, 0.0)}")
    outcome.fired["saved with external data"] += len(written) > 1
    for file in written:
        file.unlink()
