"""One case through capture, fold, save and load, run before and after: same, changed or refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx_cases import Case
from onnx_runtimes import RUNTIMES, Runner, reason

from lamina.errors import LaminaError
from lamina.ir.capture import capture
from lamina.ir.io import load, save_model
from lamina.passes.fold import fold, form_names

# A bfloat16 has eight bits: the suite's own runner allows two of its ulps.
_BFLOAT16_RTOL = 2**-6
SAME, CHANGED, REFUSED, NOT_RUNNABLE = "same", "changed", "refused", "not runnable"


@dataclass
class Outcome:
    """What became of one case in one variant.

    Attributes:
        case: Label of the case.
        variant: How its inputs were given.
        refused: lamina's error, or "".
        not_runnable: Per runtime, why the original does not run there or what else it answers.
        same: The runtimes on which every form of the result answers as expected.
        changed: One line for each way in which a result differs: runtime, form and difference.
        fired: The folds and forms that changed something.
        undone: Passes that failed and were rolled back, with the reason.
    """

    case: str
    variant: str
    refused: str = ""
    not_runnable: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    fired: tuple[str, ...] = ()
    undone: tuple[str, ...] = ()

    @property
    def status(self) -> str:
        """``refused``, ``changed``, ``same`` or ``not runnable``."""
        if self.refused:
            return REFUSED
        if self.changed:
            return CHANGED
        return SAME if self.same else NOT_RUNNABLE


def check(case: Case, variant: str, folder: Path) -> Outcome:
    """Put ``case`` through lamina and compare; files go to ``folder``."""
    outcome = Outcome(case.label, variant)
    original = case.model.SerializeToString()
    runnable = _runnable(case, original, outcome)
    try:
        results = list(_results(case, folder, outcome))
    except LaminaError as error:
        outcome.refused = " | ".join(str(error).splitlines())
        return outcome
    for form, data in results:
        outcome.changed += [
            f"{form}: {line}" for line in interface_changes(case.model, onnx.load_from_string(data))
        ]
        for runtime in runnable:
            difference = _difference(case, runtime, data)
            if difference:
                outcome.changed.append(f"{form}, {runtime}: {difference}")
    if not outcome.changed:
        outcome.same = runnable
    return outcome


def _runnable(case: Case, model: bytes, outcome: Outcome) -> list[str]:
    """The runtimes where the original gives what is expected; why not is put into ``outcome``."""
    runnable = []
    for runtime in RUNTIMES:
        difference = _difference(case, runtime, model)
        if difference.startswith("output") and _draws(case.model):
            difference = "it draws random numbers"
        if difference:
            outcome.not_runnable[runtime] = difference
        else:
            runnable.append(runtime)
    return runnable


def _draws(model: onnx.ModelProto) -> bool:
    kinds = {n.op_type for n in model.graph.node}
    return any(k.startswith("Random") or k in ("Bernoulli", "Multinomial") for k in kinds)


def _results(case: Case, folder: Path, outcome: Outcome) -> Iterator[tuple[str, bytes]]:
    """The saved file after folding, and after writing every form that fires on top of that."""
    before = case.model.SerializeToString(deterministic=True)
    program = capture(case.model)
    if case.model.SerializeToString(deterministic=True) != before:
        outcome.changed.append("capture changed the caller's model")
    seen: set[bytes] = set()
    for label, forms in (("folded", ()), ("with forms", form_names())):
        folded, fired, records = fold(program, forms=forms)
        outcome.fired = fired
        outcome.undone = tuple(f"{r.pass_name}: {r.why}" for r in records if r.why.startswith("undone"))
        path = folder / "model.onnx"
        save_model(folded.model, path)
        data = path.read_bytes()
        loaded = load(path)
        if [p.name for p in (*loaded.inputs, *loaded.outputs)] != [
            p.name for p in (*program.inputs, *program.outputs)
        ]:
            outcome.changed.append(f"{label}: the interface changes when the saved file is loaded")
        path.unlink()
        if data not in seen:
            seen.add(data)
            yield label, data


def _difference(case: Case, runtime: str, model: bytes) -> str:
    """How the answers of ``model`` differ from the expected ones, or ""."""
    try:
        run: Runner = RUNTIMES[runtime](model)
        for feeds, expected in case.data_sets:
            answers = run(feeds)
            if len(answers) != len(expected):
                return f"{len(answers)} outputs, expected {len(expected)}"
            for value, got, want in zip(case.model.graph.output, answers, expected, strict=True):
                found = compare(got, want, case.rtol, case.atol)
                if found:
                    return f"output '{value.name}' {found}"
    except Exception as error:  # runtimes raise whatever they like
        return reason(error)
    return ""


def compare(got: Any, want: Any, rtol: float, atol: float) -> str:
    """How ``got`` differs from ``want`` beyond the tolerance, or "" where it does not."""
    if isinstance(want, (list, tuple)):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            return f"is {_kind(got)}, expected {_kind(want)}"
        pairs = zip(got, want, strict=True)
        return next((found for g, w in pairs if (found := compare(g, w, rtol, atol))), "")
    if isinstance(got, (list, tuple)) or (got is None) != (want is None):
        return f"is {_kind(got)}, expected {_kind(want)}"
    if want is None:
        return ""
    return _compare_arrays(np.asarray(got), np.asarray(want), rtol, atol)


def _compare_arrays(got: np.ndarray, want: np.ndarray, rtol: float, atol: float) -> str:
    if got.shape != want.shape:
        return f"has shape {list(got.shape)}, expected {list(want.shape)}"
    if want.dtype.kind in "OUST" or got.dtype.kind in "OUST":
        same = np.array_equal(got.astype(str), want.astype(str))
        return "" if same else "has other texts"
    if got.dtype != want.dtype:
        return f"is {got.dtype}, expected {want.dtype}"
    if got.dtype.name == "bfloat16":
        rtol = max(rtol, _BFLOAT16_RTOL)
    if got.dtype.type.__module__ == "ml_dtypes":
        got, want = got.astype(np.float32), want.astype(np.float32)
    with np.errstate(all="ignore"):
        close = np.isclose(got, want, rtol=rtol, atol=atol, equal_nan=True)
        if close.all():
            return ""
        worst = np.abs(got - want) if got.dtype.kind in "fc" else got != want
    count = close.size - np.count_nonzero(close)
    return f"differs in {count} of {close.size} elements, by up to {np.max(worst)}"


def _kind(value: Any) -> str:
    return f"{len(value)} items" if isinstance(value, (list, tuple)) else type(value).__name__


def interface_changes(before: onnx.ModelProto, after: onnx.ModelProto) -> list[str]:
    """Names, order, types, ranks and dims of inputs and outputs that are not as they were."""
    found = []
    for what, old, new in (
        ("input", _ports(before), _ports(after)),
        ("output", list(before.graph.output), list(after.graph.output)),
    ):
        names, wanted = [v.name for v in new], [v.name for v in old]
        if names != wanted:
            found.append(f"the {what}s were {wanted} and are {names}")
            continue
        found += [
            f"{what} '{a.name}' was {_text(a.type)} and is {_text(b.type)}"
            for a, b in zip(old, new, strict=True)
            if not _same_type(a.type, b.type)
        ]
    return found


def _ports(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    weights = {t.name for t in model.graph.initializer}
    return [v for v in model.graph.input if v.name not in weights]


def _same_type(old: onnx.TypeProto, new: onnx.TypeProto) -> bool:
    """Whether nothing the old type states was changed; what it left open may have been found out."""
    kind = old.WhichOneof("value")
    if kind is None:
        return True
    if kind != new.WhichOneof("value"):
        return False
    if kind in ("sequence_type", "optional_type"):
        return _same_type(getattr(old, kind).elem_type, getattr(new, kind).elem_type)
    if kind == "map_type":
        same_key = old.map_type.key_type == new.map_type.key_type
        return same_key and _same_type(old.map_type.value_type, new.map_type.value_type)
    a, b = getattr(old, kind), getattr(new, kind)
    if a.elem_type and a.elem_type != b.elem_type:
        return False
    if not a.HasField("shape"):
        return True
    return b.HasField("shape") and [_dim(d) for d in a.shape.dim] == [_dim(d) for d in b.shape.dim]


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None
    return dim.dim_param or None


def _text(kind: onnx.TypeProto) -> str:
    return " ".join(str(kind).split())
