"""``lamina.quantize`` and its command: sensible unasked, whole widths, bounds kept, bad input told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from test_cli_bad_input import failed
from tiny import FEATURES, shorten_timing, tiny_data, tiny_model, write_tiny

import lamina
from lamina.budget import FOOTPRINT
from lamina.cli import main
from lamina.errors import BudgetError, DataError, InfeasibleBudget
from lamina.ir.capture import capture
from lamina.passes.quantize import Quantize
from lamina.planner import goal
from lamina.planner.bits.allocators import allocator_names
from lamina.planner.bits.uniform import level_for, uniform_space
from lamina.planner.space import build_space
from lamina.planner.timing import Relative
from lamina.quantizing import read_bits, wanted

BRIEF = {"target": "ort:cpu?threads=1", "seconds": 3}


@pytest.fixture(autouse=True)
def brief(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "prices"))
    shorten_timing(monkeypatch)
    # runs of ten microseconds, timed for moments: which of two is slower is a matter of luck
    monkeypatch.setattr(goal, "NOT_SLOWER", 1e6)
    monkeypatch.setattr(Relative, "clearly_slower_somewhere", False)


def quantized(**options) -> lamina.Result:
    given = {"data": tiny_data(), "metric": "top1", **BRIEF, **options}
    return lamina.quantize(tiny_model(), **given)


# -- what is asked ------------------------------------------------------------------------------------


def test_widths_as_a_user_writes_them() -> None:
    assert read_bits(None) == 8
    assert read_bits(None, "0.2x") is None
    assert read_bits("mixed") is None
    assert read_bits(4, "0.2x") == read_bits(" 4 ") == 4
    for wrong in ("5", "eight", 16, ""):
        with pytest.raises(BudgetError, match="is not possible"):
            read_bits(wrong)


@pytest.mark.parametrize(
    ("given", "budget", "minimize"),
    [
        ({"width": 8}, "size<=1x, drop<=1%", "latency"),
        ({"width": 4}, "size<=1x", "damage"),
        ({"width": 4, "drop": "2%"}, "size<=1x, drop<=2%", "latency"),
        ({"width": 8, "size": "10MB"}, "size<=10MB", "damage"),
        ({"width": None}, "drop<=1%", FOOTPRINT),
        ({"width": None, "size": "0.2x"}, "size<=0.2x", "damage"),
        ({"width": None, "size": "0.2x", "drop": "1%"}, "size<=0.2x, drop<=1%", "latency"),
        ({"width": None, "latency": "0.5x"}, "latency<=0.5x", "damage"),
        ({"width": None, "latency": "0.5x", "drop": 0.01}, "latency<=0.5x, drop<=0.01", FOOTPRINT),
    ],
)
def test_what_bounds_mean(given: dict, budget: str, minimize: str) -> None:
    assert (str(wanted(**given)[0]), wanted(**given)[1]) == (budget, minimize)


def test_of_one_width_the_forms_that_reach_it_stay_or_the_next_wider() -> None:
    assert level_for([16, 8, 8, 4], 8) == 8
    assert level_for([16, 8, 4], 3) == 4
    assert level_for([4], 8) == 4
    program = capture(tiny_model())
    forms = ("stored-w8", "stored-w4", "float16")
    space = build_space(program, [Quantize(forms=forms)], None, None)  # type: ignore[arg-type]
    for bits, name in ((8, "stored-w8"), (4, "stored-w4")):
        left = uniform_space(space, bits)
        assert [[o.name for o in c.options] for c in left.choices] == [[name]] * 2
    only = build_space(program, [Quantize(forms=("stored-w8",))], None, None)  # type: ignore[arg-type]
    with pytest.raises(BudgetError, match="no operator of the model has a form in 4 bits"):
        uniform_space(only, 4)


# -- what comes ---------------------------------------------------------------------------------------


def test_unasked_the_whole_model_is_in_eight_bits(tmp_path: Path) -> None:
    result = quantized()
    found = result.evidence
    assert found["widths"]["operators"] == {"8": 2}
    assert found["widths"]["mean_bits"] == 8
    assert found["size_ratio"] < 0.35
    assert found["damage"] <= 0.01
    assert set(found["met"]) == {"size", "drop"}
    assert all(check["met"] for check in found["met"].values())
    assert {m["transform"] for m in found["moves"]} == {"quantize"}
    assert found["quantization"] == {"bits": 8, "minimized": "latency", "trust": None}
    written = {p.name for p in result.save(tmp_path)}
    assert written >= {"model.onnx", "plan.json", "result.json"}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    data = tiny_data()
    (logits,) = session.run(None, {"x": data["x"]})
    assert (logits.argmax(axis=1) == data["labels"]).mean() > 0.95
    again = lamina.apply(tiny_model(), tmp_path)
    assert again.fingerprint == result.program.fingerprint


def test_a_plan_whose_file_is_smaller_than_predicted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.planner import pricing

    honest = pricing.written_bytes
    monkeypatch.setattr(pricing, "written_bytes", lambda space: [[b + 500 for b in r] for r in honest(space)])
    result = quantized()
    assert result.evidence["widths"]["operators"] == {"8": 2}
    assert all(check["met"] for check in result.evidence["met"].values())


def test_without_data_nothing_rests_on_ranges_and_the_result_says_what_that_costs() -> None:
    result = quantized(data=None, metric=None)
    assert result.evidence["synthetic_data"]
    assert "made-up inputs" in result.evidence["quantization"]["trust"]
    assert result.evidence["widths"]["operators"] == {"8": 2}
    assert not any("static" in m["option"] for m in result.evidence["moves"])


def test_four_bits_are_the_least_damage_in_four_bits() -> None:
    found = quantized(bits=4).evidence
    assert found["quantization"]["minimized"] == "damage"
    assert set(found["widths"]["operators"]) == {"4"}
    assert found["size_ratio"] < 0.25
    assert set(found["met"]) == {"size"}


@pytest.mark.parametrize("strategy", allocator_names())
def test_every_allocator_keeps_a_size(strategy: str) -> None:
    result = quantized(size="0.3x", strategy=strategy, metric=None)
    found = result.evidence
    assert found["size_ratio"] <= 0.3
    assert found["met"]["size"]["met"]
    (told,) = found["rules"]
    assert told["rule"] == strategy
    assert told["best"]["mean_bits"] < 8
    assert found["damage"] < 0.5


def test_mixed_with_a_drop_saves_bytes_and_keeps_it() -> None:
    found = quantized(bits="mixed", drop="1%").evidence
    assert found["quantization"] == {"bits": "mixed", "minimized": FOOTPRINT, "trust": None}
    assert found["damage"] <= 0.01
    assert found["size_ratio"] < 0.6


# -- the command --------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny(tmp_path)


def test_the_command_writes_and_prints_one_object(files, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = files
    out = model.parent / "out"
    options = [
        "--data",
        data,
        "--metric",
        "top1",
        "--target",
        "ort:cpu?threads=1",
        "--seconds",
        "2",
        "--json",
    ]
    _main("quantize", model, "-o", out, *options)
    told = json.loads(capsys.readouterr().out)
    assert told["quantization"]["bits"] == 8
    assert {Path(f).name for f in told["files"]} >= {"model.onnx", "plan.json", "result.json"}
    assert json.loads((out / "result.json").read_text())["widths"] == told["widths"]


def _main(*arguments: object) -> None:
    try:
        main([str(a) for a in arguments])
    except SystemExit as stopped:
        if stopped.code:
            raise


def test_the_table_says_how_many_bits_operators_have(files, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = files
    _main("quantize", model, "-o", model.parent / "out", "--target", "ort:cpu?threads=1", "--seconds", "2")
    out = " ".join(capsys.readouterr().out.split())
    assert "weighted operators by bits: 2 in 8; 8.00 bits a weight" in out
    assert "no data was given: forms that need ranges were left out" in out


def test_bad_input_is_one_message_and_leaves_nothing(files, capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = files
    folder = model.parent
    before = sorted(folder.rglob("*"))
    for options, said in (
        (["--bits", "5"], "bits=5 is not possible choose 8, 4, 3, 2 or mixed"),
        (["--size", "huge"], "the limit on size must be a positive number"),
        (["--size", "0"], "must be a positive number"),
        (["--drop", "-1%"], "must be a positive number"),
        (["--strategy", "balanced-skip"], "drop rules drop branches"),
        (["--strategy", "nonsense"], "there is no strategy 'nonsense'"),
        (["--metric", "top1"], "DataError"),
        (["--data", folder / "absent.npz"], "absent.npz"),
        (["--target", "gpu:0"], "gpu"),
    ):
        given = ["quantize", model, "-o", folder / "new", *options]
        assert said in failed(capsys, *given), options
    assert "absent.onnx" in failed(capsys, "quantize", folder / "absent.onnx", "-o", folder / "new")
    wrong = folder / "wrong.npz"
    np.savez(wrong, x=np.zeros((40, FEATURES + 1), np.float32))
    assert "DataError" in failed(capsys, "quantize", model, "-o", folder / "new", "--data", wrong)
    wrong.unlink()
    assert sorted(folder.rglob("*")) == before


def test_an_impossible_size_is_exit_code_one_with_the_nearest(files, capsys) -> None:
    model, data = files
    options = ["--size", "0.01x", "--data", data, "--seconds", "2", "--target", "ort:cpu?threads=1"]
    text = failed(capsys, "quantize", model, "-o", model.parent / "new", *options, code=1)
    assert "no plan meets 'size<=0.01x'" in text
    assert "nearest: latency<=" in text
    assert not (model.parent / "new").exists()


def test_errors_of_the_function_are_lamina_errors() -> None:
    with pytest.raises(DataError):
        quantized(data=None)  # labels cannot be made up
    with pytest.raises(InfeasibleBudget) as caught:
        quantized(size="0.02x")
    assert caught.value.nearest
