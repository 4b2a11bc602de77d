"""Forms are chosen by whole-model measurement, in combination, and remembered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lamina.backends.backend import Case, Target
from lamina.backends.measure import Ratio
from lamina.errors import BackendError
from lamina.ir.program import Program
from lamina.passes.fold import apply_named, form_names
from lamina.planner import form_memory, forms
from lamina.planner.form_memory import FormMemory
from lamina.planner.forms import pick_forms
from lamina.planner.timing import Relative
from lamina.progress import Progress

# A decomposed GELU after a decomposed RMS norm: two forms match, each on its own nodes.
TEXT = """<ir_version: 9, opset_import: ["" : 20]> g (float[b, 8] x) => (float[b, 8] y)
    <float two = {2.0}, float[1] eps = {0.00001}, float root = {1.4142135}, float one = {1.0},
     float half = {0.5}, int64[1] last = {-1}> {
    square = Pow(x, two)
    mean = ReduceMean<keepdims = 1>(square, last)
    shifted = Add(mean, eps)
    length = Sqrt(shifted)
    unit = Div(x, length)
    n = Mul(unit, scale)
    scaled = Div(n, root)
    erf = Erf(scaled)
    raised = Add(erf, one)
    product = Mul(n, raised)
    y = Mul(product, half)
}"""


def two_forms() -> Program:
    from onnx_ir.passes.common import ShapeInferencePass

    model = ir.from_onnx_text(
        TEXT.replace("int64[1] last", "float[8] scale = {1,2,3,4,5,6,7,8}, int64[1] last")
    )
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    ShapeInferencePass()(model)
    return Program(model)


class FakeStopwatch:
    """Times a model by a rule on its operators instead of a clock."""

    def __init__(self, seconds: Callable[[frozenset[str]], float]) -> None:
        self.seconds, self.calls = seconds, 0
        self.timer = SimpleNamespace(target=Target("ort", "cpu", 1))
        self.workload = (Case("b1", {"x": np.zeros((1, 8), np.float32)}),)

    def compare(self, models: Sequence[ir.Model], *, seconds: float) -> list[Relative]:
        self.calls += 1
        ratios = [self.seconds(frozenset(n.op_type for n in m.graph)) for m in models]
        return [Relative(r, r, r, {"b1": Ratio(r, r, r)}) for r in ratios]


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    monkeypatch.setattr(forms, "machine_load", lambda: SimpleNamespace(quiet=True))
    known: Mapping[str, Any] = {"device": {"cpu": "test"}, "versions": {"runtime": "1"}}
    backend = SimpleNamespace(capabilities=lambda target: known)
    monkeypatch.setattr(form_memory, "get_backend", lambda target: backend)


def pick(stopwatch: FakeStopwatch, **options: Any) -> forms.Folded:
    return pick_forms(two_forms(), stopwatch, Progress(), **options)  # type: ignore[arg-type]


def entry(found: forms.Folded, form: str) -> list[dict[str, object]]:
    return [e for e in found.log if e["form"] == form]


def test_a_form_that_pays_is_kept_and_one_that_does_not_is_left():
    found = pick(FakeStopwatch(lambda ops: 1.0 - 0.2 * ("Gelu" in ops) + 0.2 * ("RMSNormalization" in ops)))
    assert "fuse_gelu" in found.names
    assert "fuse_rms_normalization" not in found.names
    assert found.relative.ratio == pytest.approx(0.8)
    assert entry(found, "fuse_gelu")[0]["kept"] is True


def test_forms_that_pay_only_together_are_found():
    both = {"Gelu", "RMSNormalization"}
    found = pick(FakeStopwatch(lambda ops: 0.7 if both <= ops else 1.0))
    assert {"fuse_gelu", "fuse_rms_normalization"} <= set(found.names)
    assert any(e.get("tried") == "all together" and e["kept"] for e in found.log)


def test_a_kept_form_that_hurts_beside_a_later_one_is_left_out_again():
    def seconds(ops: frozenset[str]) -> float:
        gelu, rms = "Gelu" in ops, "RMSNormalization" in ops
        return {(False, False): 1.0, (True, False): 0.9, (True, True): 0.8, (False, True): 0.6}[gelu, rms]

    found = pick(FakeStopwatch(seconds))
    assert "fuse_rms_normalization" in found.names
    assert "fuse_gelu" not in found.names
    assert found.relative.ratio == pytest.approx(0.6)


def test_no_time_for_combinations_keeps_what_the_first_pass_found():
    seconds = FakeStopwatch(lambda ops: 1.0 - 0.2 * ("Gelu" in ops))
    found = pick(seconds, combinations_s=0.0)
    assert "fuse_gelu" in found.names
    assert found.log[-1].get("reason") == "time for combinations was up"


def test_a_form_that_does_not_match_is_not_measured():
    stopwatch = FakeStopwatch(lambda ops: 1.0)
    found = pick(stopwatch)
    assert not entry(found, "fuse_rotary")
    assert not entry(found, "convolve_shortcut")


def test_a_form_the_runtime_refuses_is_on_record():
    def seconds(ops: frozenset[str]) -> float:
        if "RMSNormalization" in ops:
            raise BackendError("no kernel for RMSNormalization")
        return 1.0

    found = pick(FakeStopwatch(seconds))
    assert entry(found, "fuse_rms_normalization")[0]["reason"] == "no kernel for RMSNormalization"
    assert "fuse_rms_normalization" not in found.names


def test_the_second_run_measures_nothing_and_decides_the_same():
    first = FakeStopwatch(lambda ops: 1.0 - 0.2 * ("Gelu" in ops))
    found = pick(first)
    second = FakeStopwatch(lambda ops: 5.0)
    again = pick(second)
    assert first.calls > 0
    assert second.calls == 0
    assert again.remembered
    assert not found.remembered
    assert (again.names, again.relative, again.log) == (found.names, found.relative, found.log)
    assert again.program.fingerprint == found.program.fingerprint
    assert apply_named(two_forms(), again.names).fingerprint == again.program.fingerprint


def test_other_shapes_and_other_candidates_are_measured_on_their_own():
    pick(FakeStopwatch(lambda ops: 1.0))
    other = FakeStopwatch(lambda ops: 1.0)
    other.workload = (Case("b4", {"x": np.zeros((4, 8), np.float32)}),)
    assert not pick(other).remembered
    assert other.calls > 0
    assert not pick(FakeStopwatch(lambda ops: 1.0), candidates=["fuse_gelu"]).remembered


def test_a_known_comparison_is_not_repeated_for_another_decision():
    pick(FakeStopwatch(lambda ops: 1.0))
    stopwatch = FakeStopwatch(lambda ops: 1.0)
    pick(stopwatch, candidates=["fuse_gelu"])
    assert stopwatch.calls == 0


def test_what_was_measured_beside_other_work_is_measured_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(forms, "machine_load", lambda: SimpleNamespace(quiet=False))
    pick(FakeStopwatch(lambda ops: 1.0))
    busy = FakeStopwatch(lambda ops: 1.0)
    assert pick(busy).remembered  # as good as what could be measured now
    monkeypatch.setattr(forms, "machine_load", lambda: SimpleNamespace(quiet=True))
    quiet = FakeStopwatch(lambda ops: 1.0)
    assert not pick(quiet).remembered
    assert quiet.calls > 0


@pytest.mark.parametrize("damage", ["", "{", '{"format": 1}', '{"format": 1, "records": [1]}'])
def test_a_damaged_file_costs_the_memory_and_nothing_else(damage: str):
    stopwatch = FakeStopwatch(lambda ops: 1.0)
    pick(stopwatch)
    path = FormMemory(stopwatch.timer.target, stopwatch.workload).path
    assert path.exists()
    path.write_text(damage)
    assert not pick(stopwatch).remembered


def test_a_pass_that_may_not_be_used_is_not():
    found = pick(FakeStopwatch(lambda ops: 0.5 if "Gelu" in ops else 1.0), without=["fuse_gelu"])
    assert "fuse_gelu" not in found.names
    assert not entry(found, "fuse_gelu")
    assert "fuse_gelu" in form_names()
