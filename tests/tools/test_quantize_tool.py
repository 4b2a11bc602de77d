"""Other tools in processes of their own: what they are given, what comes back, how a failure is told."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.bench import peers
from tools.bench.cases import Case
from tools.bench.quantize import others
from tools.bench.quantize_tool import BLOCK_TOOLS, TOOLS, Reader, Samples
from tools.studies.precision.schemes import _with_outputs, by_tool

SIZE, ROWS = 64, 12


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """One product whose logits are the input."""
    weight = numpy_helper.from_array(np.eye(SIZE, dtype=np.float32), "w")
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", SIZE]) for n in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """Rows whose largest entry is at their number; of the selection labels one in four is another."""
    rows = np.eye(SIZE, dtype=np.float32)[:ROWS]
    labels = np.arange(ROWS)
    labels[::4] += 1
    parts = {"calibration": {"x": rows}, "selection": {"x": rows, "labels": labels}}
    return peers.write_samples(tmp_path / "samples.npz", parts, "top1", 5)


def test_samples_come_back_in_batches_that_can_be_read_again(samples: Path) -> None:
    reader = Reader(Samples(str(samples)))
    assert [len(batch["x"]) for batch in reader] == [5, 5, 2]
    assert reader.get_next() is None
    reader.rewind()
    assert np.array_equal(reader.get_next()["x"], np.eye(SIZE, dtype=np.float32)[:5])


def test_the_score_is_the_metric_on_selection_rows(model: Path, samples: Path) -> None:
    assert Samples(str(samples)).score(str(model)) == 75.0


def test_a_loss_is_scored_so_that_higher_is_better(tmp_path: Path) -> None:
    tokens = numpy_helper.from_array(np.zeros((4, 4), np.float32), "w")  # four equally likely words
    x = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["n", 3])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, 4])
    graph = helper.make_graph([helper.make_node("Gather", ["w", "tokens"], ["y"])], "g", [x], [y], [tokens])
    path = tmp_path / "lm.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    rows = {"tokens": np.zeros((2, 3), np.int64)}
    file = peers.write_samples(
        tmp_path / "s.npz", {"calibration": rows, "selection": rows}, "cross-entropy", 2
    )
    assert Samples(str(file)).score(str(path)) == pytest.approx(1 / np.log(4))


@pytest.mark.skipif(importlib.util.find_spec("onnxsim") is None, reason="onnxsim is not installed")
def test_a_tool_writes_a_model_that_runs(model: Path, samples: Path, tmp_path: Path) -> None:
    assert peers.python_with("onnxsim", []) == sys.executable
    made = peers.by_tool("onnxsim", sys.executable, model, samples, tmp_path / "made.onnx")
    assert "DequantizeLinear" in {node.op_type for node in onnx.load(made).graph.node}
    assert Samples(str(samples)).score(str(made)) == 75.0


@pytest.mark.skipif(importlib.util.find_spec("olive") is not None, reason="olive is installed")
def test_a_tool_that_fails_says_the_first_line_of_its_error(
    model: Path, samples: Path, tmp_path: Path
) -> None:
    with pytest.raises(RuntimeError, match=r"^ModuleNotFoundError: No module named 'olive'$"):
        peers.by_tool("olive-static", sys.executable, model, samples, tmp_path / "made.onnx")


def test_tools_that_no_python_has_are_named(
    model: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOOLS, "nncf", ("no-such-distribution", TOOLS["nncf"][1]))
    monkeypatch.setitem(BLOCK_TOOLS, "onc-rtn", ("no-such-distribution", BLOCK_TOOLS["onc-rtn"][1]))
    case = Case("tiny", str(model), "top1", dict, "1@1.0")
    found, missing = others(case, tmp_path, {}, samples, {"ort dynamic", "nncf"}, [sys.executable])
    assert list(found) == ["ort dynamic"]
    assert missing == {"nncf": "not run: no Python given has no-such-distribution"}
    with pytest.raises(RuntimeError, match="no Python given has no-such-distribution"):
        by_tool("onc-rtn", [])(None, None)  # type: ignore[arg-type]


def test_outputs_that_a_tool_renamed_get_their_names_back(model: Path) -> None:
    made = onnx.load(model)
    made.graph.node[0].output[0] = made.graph.output[0].name = "y_Q4"
    named = _with_outputs(made, ["y"])
    onnx.checker.check_model(named)
    assert [value.name for value in named.graph.output] == ["y"]
    assert [node.op_type for node in named.graph.node] == ["MatMul", "Identity"]


def test_a_tool_that_ends_well_without_a_model_has_failed(model: Path, samples: Path, tmp_path: Path) -> None:
    true = shutil.which("true")
    assert true is not None
    with pytest.raises(RuntimeError, match=r"^ended without a model$"):
        peers.by_tool("onc-tuned", true, model, samples, tmp_path / "made.onnx")
