"""Bad input through the real command line: one clear message, exit code 2, nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx_tools import proto
from tiny import shorten_timing, tiny_data, tiny_model, write_tiny

from lamina.cli import main

DROP = ["--budget", "drop<=1%"]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write_tiny(tmp_path)


def failed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 2) -> str:
    """Run lamina, expect ``code`` and silence on stdout; the message as one line of text."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert stopped.value.code == code, err
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


def optimize_fails(
    capsys: pytest.CaptureFixture[str],
    model: Path,
    data: Path | None,
    *options: object,
    budget: str = "drop<=1%",
) -> str:
    """The message of a failed optimize; checks that the folder holds exactly what it held before."""
    folder = model.parent
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    given = [] if data is None else ["--data", data]
    text = failed(
        capsys, "optimize", model, "-o", folder / "new" / "out", "--budget", budget, *given, *options
    )
    after = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert after == before
    assert not (folder / "new").exists()
    return text


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "other.npz", **arrays)
    return folder / "other.npz"


def test_truncated_model(capsys, files):
    model, data = files
    content = model.read_bytes()
    for keep in (len(content) // 2, 40, 0):
        model.write_bytes(content[:keep])
        text = optimize_fails(capsys, model, data)
        assert "CaptureError" in text
        assert "model.onnx" in text
        assert "truncated or not an ONNX model: export or download it again" in text


def test_text_renamed_to_onnx(capsys, files):
    model, data = files
    model.write_text("these are the weights you are looking for\n" * 20)
    text = optimize_fails(capsys, model, data)
    assert "CaptureError" in text
    assert "export or download it again" in text


def test_missing_model(capsys, files):
    text = optimize_fails(capsys, files[0].with_name("absent.onnx"), files[1])
    assert "there is no file" in text
    assert "absent.onnx" in text


def test_unknown_domain(capsys, files):
    model, data = files
    onnx.save(tiny_model(domain="com.acme"), model)
    text = optimize_fails(capsys, model, data)
    assert "UnsupportedOperator" in text
    assert "com.acme" in text
    assert "Relu" in text


def test_data_with_wrong_names(capsys, files):
    arrays = tiny_data()
    arrays["xs"] = arrays.pop("x")
    text = optimize_fails(capsys, files[0], saved(files[0].parent, **arrays))
    assert "DataError: the data lacks the input x" in text
    assert "rename 'xs' to 'x'" in text


def test_data_with_wrong_shape(capsys, files):
    data = saved(files[0].parent, x=tiny_data()["x"][:, :5])
    text = optimize_fails(capsys, files[0], data)
    assert "input 'x' expects [batch, 16], got [120, 5]" in text
    assert "other.npz" in text


def test_data_with_wrong_dtype(capsys, files):
    data = saved(files[0].parent, x=tiny_data()["x"].astype(np.complex64))
    text = optimize_fails(capsys, files[0], data)
    assert "input 'x' is complex64, the model expects float32" in text


def test_labels_of_another_length(capsys, files):
    arrays = tiny_data()
    data = saved(files[0].parent, x=arrays["x"], labels=arrays["labels"][:-1])
    text = optimize_fails(capsys, files[0], data, "--metric", "top1")
    assert "'labels' has 119 entries for 120 samples" in text


def test_empty_data(capsys, files):
    data = saved(files[0].parent, x=tiny_data()["x"][:0])
    assert "the data is empty" in optimize_fails(capsys, files[0], data)


def test_too_few_samples(capsys, files):
    data = saved(files[0].parent, x=tiny_data()["x"][:2])
    text = optimize_fails(capsys, files[0], data)
    assert "2 samples cannot be split" in text
    assert "give at least 3" in text


def test_data_that_is_no_npz(capsys, files):
    files[1].write_text("x,labels\n")
    text = optimize_fails(capsys, *files)
    assert "cannot be read: not an .npz, or damaged" in text
    assert "data.npz" in text


def test_missing_data_file(capsys, files):
    text = optimize_fails(capsys, files[0], files[0].with_name("absent.npz"))
    assert "there is no such data file" in text


def test_nan_in_data(capsys, files):
    arrays = tiny_data()
    arrays["x"][7, 3] = np.nan
    text = optimize_fails(capsys, files[0], saved(files[0].parent, **arrays))
    assert "DataError" in text
    assert "'x'" in text
    assert "NaN" in text


def test_nan_in_outputs(capsys, files):
    onnx.save(tiny_model(bad_weight=float("nan")), files[0])
    text = optimize_fails(capsys, *files, "--metric", "top1")
    assert "DataError: output 'logits' holds NaN" in text
    assert "run the model on this batch" in text


def test_missing_labels(capsys, files):
    data = saved(files[0].parent, x=tiny_data()["x"])
    text = optimize_fails(capsys, files[0], data, "--metric", "top1")
    assert "DataError" in text
    assert "labels" in text


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--metric", "tpo1"], "metric 'tpo1' is unknown, did you mean top1"),
        (["--metric", "no_such_module:score"], "'no_such_module' cannot be imported"),
        (["--target", "gpu"], "'gpu'"),
        (["--target", "ort:tpu"], "tpu"),
        (["--target", "ort:cpu?threads=none"], "threads"),
        (["--transforms", "drop,quantise"], "there is no transform 'quantise' choose from drop, direct-matching, merge-conv-chain, quantize"),
        (["--workload", "1x2"], "2 sizes given, the model has 1 dynamic dims (batch)"),
        (["--workload", "width=3"], "the model has no dynamic dim 'width', it has batch"),
        (["--minimize", "beauty"], "beauty"),
        (["--selection-data", "a.npz"], "give all three, or --data alone"),
    ],
)
def test_options_nobody_knows(capsys, files, options, expected):
    assert expected in optimize_fails(capsys, *files, *options)


@pytest.mark.parametrize(
    "budget", ["", "speed<=1", "latency<=fast", "latency>=2x", "drop<=1%, drop<=2%", "size<=-1MB"]
)
def test_budgets_nobody_understands(capsys, files, budget):
    assert "BudgetError" in optimize_fails(capsys, *files, budget=budget)


def test_output_is_a_file(capsys, files):
    place = files[0].parent / "taken"
    place.write_text("precious")
    for output in (place, place / "below"):
        text = failed(capsys, "optimize", files[0], "--data", files[1], *DROP, "-o", output)
        assert "OutputError: cannot write into" in text
        assert "choose another output directory" in text
        assert place.read_text() == "precious"


def test_failure_keeps_an_earlier_result(capsys, files):
    earlier = files[0].parent / "out"
    earlier.mkdir()
    (earlier / "model.onnx").write_text("earlier")
    failed(capsys, "optimize", files[0], "--data", files[1], *DROP, "--metric", "tpo1", "-o", earlier)
    assert [p.name for p in earlier.iterdir()] == ["model.onnx"]
    assert (earlier / "model.onnx").read_text() == "earlier"


def test_impossible_budget(capsys, files, monkeypatch):
    shorten_timing(monkeypatch)
    folder = files[0].parent
    options = ["--data", files[1], "--metric", "top1", "--seconds", 1, "--workload", 8, "-o", folder / "out"]
    text = failed(capsys, "optimize", files[0], "--budget", "size<=100B", *options, code=1).partition(
        "InfeasibleBudget"
    )
    assert text[2].startswith(": no plan meets 'size<=100B'")
    assert "nearest: " in text[2]
    assert "size<=" in text[2].partition("nearest: ")[2]
    assert not (folder / "out").exists()


def test_missing_options_are_usage_errors(capsys, files):
    assert "--budget" in failed(capsys, "optimize", files[0], "-o", "out")
    assert "--output" in failed(capsys, "optimize", files[0], *DROP)
    assert "optimise" in failed(capsys, "optimise", files[0])


def test_json_errors_are_one_object(capsys, files):
    with pytest.raises(SystemExit) as stopped:
        main(
            ["optimize", str(files[0]), "--budget", "speed<=1", "-o", str(files[0].parent / "out"), "--json"]
        )
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (stopped.value.code, found["error"], err) == (2, "BudgetError", "")
    assert "speed" in found["what"]
    assert found["advice"]
    assert found["nearest"] == []


def test_apply_with_what_is_no_plan(capsys, files):
    plan = files[0].parent / "plan.json"
    plan.write_text("{}")
    text = failed(capsys, "apply", files[0], plan, "-o", files[0].parent / "new.onnx")
    assert "not a lamina plan" in text
    text = failed(
        capsys, "apply", files[0], files[0].parent / "absent.json", "-o", files[0].parent / "new.onnx"
    )
    assert "cannot read the plan" in text
    assert not (files[0].parent / "new.onnx").exists()


def test_bench_and_compare_of_different_interfaces(capsys, files):
    other = tiny_model()
    other.graph.input[0].name = other.graph.node[0].input[0] = "y"
    onnx.save(other, files[0].with_name("other.onnx"))
    for verb in ("bench", "compare"):
        text = failed(capsys, verb, files[0], files[0].with_name("other.onnx"))
        assert "the models' inputs differ: ['x'] and ['y']" in text


def test_process_prints_no_traceback(files):
    command = [
        sys.executable,
        "-m",
        "lamina.cli",
        "optimize",
        str(files[0]),
        "--budget",
        "drop<=nothing",
        "-o",
    ]
    done = subprocess.run(
        [*command, str(files[0].parent / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("BudgetError: ")
    assert "Traceback" not in done.stderr


def _chatty(folder: Path) -> dict[str, Path]:
    """Files that make the libraries warn and log: stray keys of external data, a node that cannot be run."""
    model = tiny_model()
    onnx.save(model, folder / "stray.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    shell = onnx.load(folder / "stray.onnx", load_external_data=False)
    for tensor in shell.graph.initializer:
        tensor.external_data[0].key = "lncation"
    onnx.save(shell, folder / "stray.onnx")

    weights = {"w": np.ones(12, np.float32)}
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 2, 3, 0]),
        helper.make_node("ReduceSum", ["t"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    onnx.save(proto(nodes, {"x": ["n"]}, {"y": ["n"]}, weights), folder / "transpose.onnx")
    cut = (folder / "transpose.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(cut[: len(cut) // 2])
    return {name: folder / f"{name}.onnx" for name in ("stray", "transpose", "cut")}


@pytest.mark.parametrize("name", ["stray", "transpose", "cut"])
@pytest.mark.parametrize("verb", ["fold", "compare"])
def test_stderr_holds_one_error_and_nothing_of_the_libraries(tmp_path: Path, name: str, verb: str) -> None:
    path = str(_chatty(tmp_path)[name])
    given = [path, "-o", str(tmp_path / "out.onnx")] if verb == "fold" else [path, path, "--samples", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "lamina.cli", verb, *given], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("  ")]
    if done.returncode == 0:
        assert not lines
    else:
        assert len(lines) == 1
        assert re.match(r"[A-Z]\w+: ", lines[0])
