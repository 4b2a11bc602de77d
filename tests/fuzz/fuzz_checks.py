"""What must hold of every random model, proven by running it: folds, drops, quantization, files, plans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from fuzz_truth import narrowest, near_truth, true_outputs, ulp
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
# Where there is no truth to measure against: how much further than a run with noise an output may go.
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


def session(source: bytes | str) -> Any:
    """ONNX Runtime without any optimization, on one thread, for a model's bytes or its path."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Packed weights meet another kernel for one row, so whether a weight is constant would change bits.
    options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])


class Runs:
    """Results of models, by their bytes: what is the same to the byte is run once on the same feeds."""

    def __init__(self) -> None:
        self._sessions: dict[bytes | str, Any] = {}
        self._results: dict[tuple[bytes | str, str], list[Arrays]] = {}

    def __call__(
        self, model: onnx.ModelProto | ir.Model | Path, feeds: Sequence[Feeds], label: str = ""
    ) -> list[Arrays]:
        """The outputs for each of the feeds, which ``label`` tells from others of this model.

        A file is always read again: its name says nothing of what lies in it.
        """
        if isinstance(model, Path):
            return _outputs(session(str(model)), feeds)
        proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
        source = proto.SerializeToString(deterministic=True)
        if (source, label) not in self._results:
            if source not in self._sessions:
                self._sessions[source] = session(source)
            self._results[source, label] = _outputs(self._sessions[source], feeds)
        return self._results[source, label]


def _outputs(loaded: Any, feeds: Sequence[Feeds]) -> list[Arrays]:
    return [loaded.run(None, dict(f)) for f in feeds]


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
    subject.captured, subject.judged = program, outcome.fired
    subject.narrowest = narrowest(program.model)
    subject.hold("capture", program.model, ("opset",) if made.spec.opset < 13 else ())
    _interface("capture", made.proto, program)
    folded = _folds(subject, program, outcome)
    _files(folded, folder, subject, outcome)
    rng = np.random.default_rng([5, spec.seed])
    from fuzz_moves import check_moves

    again = apply_named(program, subject.names)
    if again.fingerprint != folded.fingerprint:
        raise Wrong(f"applying {subject.names} by name gives another program than folding")
    check_moves(subject, again, folded, outcome, rng)
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
        self.captured: Program | None = None
        self.folded: list[Arrays] = []  # what the folded program gives
        self.run = Runs()
        self._original = made.reference()
        self.expected = self.run(self._original, self.feeds)
        try:
            self.run(self._original, self.special, "special")
        except Exception:  # a branch that only NaN takes may meet a bug of the runtime's
            self.special = []
        self.narrowest: dict[str, np.dtype[Any]] = {}  # of the floats that an output is computed in
        self.judged: Counter[str] = Counter()
        self._true: list[Arrays] | None = None
        self._noise: list[list[Arrays]] = []

    def noise(self) -> list[list[Arrays]]:
        """What the model gives when every rounded value is off by an ulp or two."""
        if not self._noise:
            self._noise = [
                self.run(build(self.made.spec, noise=i).reference(), self.feeds) for i in range(NOISE_RUNS)
            ]
        return self._noise

    def hold(
        self, what: str, model: ir.Model, names: Sequence[str], expected: list[Arrays] | None = None
    ) -> list[Arrays]:
        """Run ``model``, to which the passes ``names`` were applied, and compare.

        Raises:
            Wrong: An output differs by more than the passes state.
        """
        proto = ir.to_proto(model)
        got = self.run(proto, self.feeds)
        budget = ulps(names)
        for i, (want, have) in enumerate(zip(expected or self.expected, got, strict=True)):
            self.compare(what, i, want, have, budget)
        # a runtime's MaxPool passes NaN over where a window holds anything else, as the zero of a Pad is
        pooled = "pad_into_conv" in names and any(n.op_type == "MaxPool" for n in self._original.graph.node)
        if budget == 0 and expected is None and not pooled:
            special = [self.run(m, self.special, "special") for m in (self._original, proto)]
            for want, have in zip(*special, strict=True):
                self.compare(f"{what} with NaN and infinities", -1, want, have, 0.0)
        return got

    def compare(self, what: str, index: int, want: Arrays, have: Arrays, budget: float) -> None:
        if len(want) != len(have):
            raise Wrong(f"{what}: {len(have)} outputs instead of {len(want)}")
        for k, (name, a, b) in enumerate(zip(self.outputs, want, have, strict=True)):
            reason = differs(a, b, budget, self.narrowest.get(name))
            # between casts the runtime keeps more digits than half has, but not where a cast is shared
            loose = budget or self.narrowest.get(name) == np.float16
            if reason is None or (loose and self._explained(index, k, a, b, budget)):
                continue
            if index < 0 and self.narrowest.get(name) == np.float16:
                continue  # rounding moves what overflows, and there is no truth to judge it by
            raise Wrong(f"{what}: output '{name}' on feeds {index}: {reason} (allowed: {budget} ulps)")

    def _explained(self, index: int, output: int, want: np.ndarray, have: np.ndarray, budget: float) -> bool:
        """Whether the difference is rounding: by a float64 run of the original, or else by noise."""
        if index < 0 or want.dtype.kind != "f" or want.shape != have.shape or want.dtype != have.dtype:
            return False
        if self._true is None:
            self._true = true_outputs(self._original, self.feeds) or []
        if self._true:
            dtype = self.narrowest.get(self.outputs[output], want.dtype)
            near = near_truth(want, have, self._true[index][output], dtype, budget)
            if near:
                self.judged["judged by float64"] += 1
                return True
            if near is not None:
                self.judged["judged by noise though there is a truth"] += 1
                return self._within_noise(index, output, want, have)
        self.judged["judged by noise"] += 1
        return self._within_noise(index, output, want, have)

    def _within_noise(self, index: int, output: int, want: np.ndarray, have: np.ndarray) -> bool:
        spread = np.zeros(want.shape)
        for one in self.noise():
            spread = np.maximum(spread, _distance(one[index][output], want))
        allowed = NOISE_FACTOR * max(float(spread.max(initial=0)), 1e-30)
        return bool(_distance(have, want).max(initial=0) <= allowed)


def _distance(have: np.ndarray, want: np.ndarray) -> np.ndarray:
    """How far each element is off: none where both are the same infinity or NaN, infinitely where one is."""
    with np.errstate(invalid="ignore"):
        off = np.abs(have.astype(np.float64) - want)
    same = (have == want) | (np.isnan(have) & np.isnan(want))
    return np.where(same, 0, np.where(np.isnan(off), np.inf, off))


def ulps(names: Sequence[str]) -> float:
    """How far the passes together may move a value; 0 when all of them are exact."""
    total = 0.0
    for name in names:
        effect = Rounding(16) if name in ("opset", "drop", "quantize") else load(name).effect
        total += effect.ulps if isinstance(effect, Rounding) else 0.0
    return total


def differs(
    want: np.ndarray, have: np.ndarray, budget: float, dtype: np.dtype[Any] | None = None
) -> str | None:
    """Why ``have`` is not ``want`` within ``budget`` ulps of the largest element, or None.

    The ulps are those of ``dtype``: a double that is computed from floats is no better than they are.
    """
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
    scale = ulp(want, dtype or want.dtype)
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
    subject.folded = subject.run(folded.model, subject.feeds)
    state = folded.fingerprint
    # Folding twice comes to the same place, as applying by name proves: forms go on from there.
    formed, more, records = fold(folded, forms=form_names(), only=())
    _note(outcome, [n for n in more if n in form_names()], records)
    if any(n in form_names() for n in more):
        try:
            subject.hold(f"fold with forms {names} {more}", formed.model, (*old, *names, *more))
        except Exception as error:
            if "NOT_IMPLEMENTED" not in str(error):
                raise
            outcome.fired["form without a kernel"] += 1
        same_interface("forms", program, formed)
    if program.fingerprint != before or folded.fingerprint != state:
        raise Wrong("folding changed the program it was given")
    return folded


def _note(outcome: Outcome, names: Sequence[str], records: Sequence[object]) -> None:
    outcome.fired.update(set(names))
    for record in records:
        why = str(getattr(record, "why", record))
        if why.startswith("undone"):
            outcome.undone.append(f"{getattr(record, 'pass_name', '')}: {why}")


def _is_known(value: ir.Value) -> bool:
    return value.shape is not None and all(isinstance(d, int) or d.value is not None for d in value.shape)


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
    known = all(_is_known(v) for v in program.graph.outputs)  # what is unknown may be inferred anew
    same = loaded.fingerprint == program.fingerprint
    if known and not same:
        raise Wrong("saving and loading gives another program")
    same_interface("save and load", program, loaded)
    results = [subject.run(path, subject.feeds)]
    if not same:  # else it is the program that gave what is expected
        results.append(subject.run(loaded.model, subject.feeds))
    for got in results:
        for want, have in zip(subject.folded, got, strict=True):
            for a, b in zip(want, have, strict=True):
                if differs(a, b, 0.0):
                    raise Wrong(f"the saved model differs: {differs(a, b, 0.0)}")
    outcome.fired["saved with external data"] += len(written) > 1
    for file in written:
        file.unlink()
