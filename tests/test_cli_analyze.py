"""``lamina analyze`` through the real command line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from stacked_model import WIDTH, stacked
from tiny import write_tiny

from lamina.cli import main
from lamina.ir.io import save_model

HOSTILE = "<b>\"'&\x1b[31m]]>"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("analyze")
    save_model(stacked(3).model, folder / "model.onnx")
    x = np.random.default_rng(8).normal(size=(24, 5, WIDTH)).astype(np.float32)
    np.savez(folder / "data.npz", x=x)
    return folder / "model.onnx", folder / "data.npz"


def run(*arguments: object) -> None:
    try:
        main(["analyze", *map(str, arguments)])
    except SystemExit as stopped:
        if stopped.code:
            raise


def failed(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["analyze", *map(str, arguments)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2, err
    assert out == ""
    assert "Traceback" not in err
    return " ".join(err.split())


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_table_fits_and_ends_with_a_command(
    files: tuple[Path, Path], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = files
    monkeypatch.setenv("COLUMNS", str(width))
    run(model, "--data", data, "--target", "ort:cpu?threads=1")
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("part"))
    end = next(i for i, line in enumerate(lines) if line.startswith("total"))
    assert max(len(line) for line in lines[start : end + 1]) <= width
    assert sum(line.startswith("branch.") for line in lines[start:end]) == 3
    command = shlex.split(lines[-1].removeprefix("next: "))
    assert command[:4] == ["lamina", "optimize", str(model), "-o"]
    assert command[command.index("--data") + 1] == str(data)


def test_json_has_the_promised_keys_and_nothing_else_on_stdout(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    run(model, "--data", data, "--json", "--damages", "--bits", "4", "--samples", "8")
    found = json.loads(capsys.readouterr().out)
    for kind in ("blocks", "branches", "operators"):
        for part in found[kind]:
            assert {"name", "kind", "parameters", "flops", "latency_s", "metrics"} <= set(part)
    assert {"macs", "bytes_moved", "intensity", "bound", "roof_share"} <= set(found["branches"][0])
    assert set(found["damages"]["bits"]["up0"]) == {"4"}
    assert {"angular-distance", "linear-cka", "quantization-error", "output-kl"} <= set(found["matrices"])
    assert len(found["reading"]) == 2
    assert found["next"].startswith("lamina optimize ")
    assert found["files"] == []


def test_figures_and_no_silent_overwriting(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    folder = tmp_path / "new" / "figures"
    given = [model, "--data", data, "--figures", folder, "--no-options"]
    run(*given)
    assert "wrote similarity.svg" in capsys.readouterr().out
    for path in folder.glob("*.svg"):
        ElementTree.parse(path)
    assert {p.stem for p in folder.glob("*.svg")} == {"similarity", "cka", "importance", "bits"}
    (folder / "cka.svg").write_text("mine")
    assert "already holds" in failed(capsys, *given)
    assert (folder / "cka.svg").read_text() == "mine"
    run(*given, "--force")
    assert (folder / "cka.svg").read_text() != "mine"


def test_hostile_names_reach_neither_terminal_nor_xml(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(stacked(2).model, tmp_path / "plain.onnx")
    proto = onnx.load(tmp_path / "plain.onnx")
    for node in proto.graph.node:
        node.name = HOSTILE + node.name
    onnx.save(proto, tmp_path / "model.onnx")
    x = np.random.default_rng(8).normal(size=(24, 5, WIDTH)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x)
    given = [tmp_path / "model.onnx", "--data", tmp_path / "data.npz", "--no-options", "--operators"]
    run(*given, "--figures", tmp_path / "figures")
    assert "\x1b" not in capsys.readouterr().out
    text = (tmp_path / "figures" / "bits.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert any("<b>" in (e.text or "") for e in root.iter())
    run(*given, "--json")
    assert HOSTILE + "up0" in [o["name"] for o in json.loads(capsys.readouterr().out)["operators"]]


def test_a_classifier_with_labels_gets_its_metric(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = write_tiny(tmp_path)
    run(model, "--data", data, "--target", "ort:cpu?threads=1")
    out = capsys.readouterr().out
    assert "--metric top1" in out
    assert "has no residual branch" in out
    assert "--transforms merge-neurons-ot,quantize" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "block-influense"], "did you mean block-influence"),
        (["--bits", "four"], "bits 'four' are not understood"),
        (["--bits", "99"], "99 is no bit width"),
        (["--samples", "0"], "0 samples cannot be looked at"),
        (["--target", "nowhere:cpu"], "nowhere"),
        (["--workload", "1xx"], "workload"),
    ],
)
def test_bad_options_end_with_code_2(
    files: tuple[Path, Path], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = files
    assert message in failed(capsys, model, "--data", data, *arguments)


@pytest.mark.parametrize("arguments", [["--damages"], ["--gradients"], ["--metrics", "void-rate"]])
def test_metrics_without_samples_end_with_code_2(
    files: tuple[Path, Path], arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "metrics need samples give data: --data X.npz" in failed(capsys, files[0], *arguments)


def test_figures_without_samples_make_no_directory(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "figures need samples" in failed(capsys, files[0], "--figures", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failed_analysis_leaves_no_directory(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.onnx").write_bytes(files[0].read_bytes()[:100])
    given = [tmp_path / "broken.onnx", "--data", files[1], "--figures", tmp_path / "a" / "b"]
    assert "CaptureError" in failed(capsys, *given)
    assert not (tmp_path / "a").exists()


def test_figures_into_a_file_are_refused(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("mine")
    assert "OutputError" in failed(capsys, files[0], "--data", files[1], "--figures", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
