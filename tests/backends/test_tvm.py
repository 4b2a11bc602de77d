"""The TVM backend on TVM itself: skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from reference import models_dir, needs_reference
from tiny import shorten_timing

import lamina
from lamina.backends import get_backend, tvm_library, tvm_search
from lamina.backends.backend import Case, Target
from lamina.backends.reference import run_reference
from lamina.backends.tvm import Tvm
from lamina.backends.tvm_import import prepare
from lamina.backends.tvm_process import TvmProcess
from lamina.errors import BackendError, DataError, UnsupportedOperator, VerificationError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tvm") is None, reason="TVM is not installed: pip install 'lamina[tvm]'"
)
TARGET = Target.parse("tvm:llvm?threads=1")
FIXED = Target.parse("tvm:llvm?threads=1&shapes=x:2x16")


def mlp(quantized: bool = False) -> ir.Model:
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((16, 32), np.float32),
        "w2": rng.standard_normal((32, 8), np.float32),
        "b1": rng.standard_normal(32, np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Add", ["h", "b1"], ["hb"], name="bias"),
        helper.make_node("Tanh", ["hb"], ["t"], name="act"),
        helper.make_node("MatMul", ["t", "w2"], ["y"], name="second"),
        helper.make_node("ArgMax", ["y"], ["best"], name="best_node", axis=1, keepdims=0),
    ]
    if quantized:
        weights["q"] = rng.integers(-127, 127, (16, 32)).astype(np.int8)
        weights["s"] = np.array(0.01, np.float32)
        nodes.insert(0, helper.make_node("DequantizeLinear", ["q", "s"], ["w1d"], name="dq"))
        nodes[1].input[1] = "w1d"
        del weights["w1"]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8]),
            helper.make_tensor_value_info("best", TensorProto.INT64, ["batch"]),
        ],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


def feeds(rows: int = 2) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(rows).standard_normal((rows, 16), np.float32)}


@pytest.fixture(scope="module")
def executable() -> Iterator[Any]:
    with Tvm().compile(mlp(), TARGET) as made:
        yield made


def test_matches_onnx_runtime_at_several_batch_sizes(executable: Any) -> None:
    assert executable.input_names == ("x",)
    assert executable.output_names == ("y", "best")
    assert executable.library.error < 1e-5
    for rows in (1, 2, 5):
        want, got = run_reference(mlp(), feeds(rows)), executable.run(feeds(rows))
        np.testing.assert_allclose(got["y"], want["y"], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got["best"], want["best"])


def test_refuses_feeds_that_do_not_fit_and_lives_on(executable: Any) -> None:
    for bad in ({}, {"x": np.zeros((2, 15), np.float32)}, {"x": np.zeros((2, 16))}):
        with pytest.raises(DataError):
            executable.run(bad)
    assert executable.run(feeds())["y"].shape == (2, 8)


def test_every_function_is_fused_and_counted() -> None:
    audit = Tvm().audit(mlp(), FIXED)
    assert sum(audit.counts.values()) == 3
    assert any("add" in name and "tanh" in name for name in audit.counts)
    assert audit.fell_back == ()


def test_quantized_operators_fell_back() -> None:
    assert Tvm().audit(mlp(quantized=True), FIXED).fell_back == ("first",)
    assert Tvm().audit(mlp(), FIXED, {"second": "w8a8-dynamic", "first": "drop"}).fell_back == ("second",)


def test_measures_models_in_alternation(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        ir.save(mlp(), tmp_path / f"m{i}.onnx")
        paths.append(tmp_path / f"m{i}.onnx")
    cases = (Case("one", feeds(1), 0.5), Case("four", feeds(4), 0.5))
    result = Tvm().measure(paths, TARGET, cases, seconds=0.2)
    assert [len(row) for row in result] == [2, 2]
    assert all(0 < item.minimum_s <= item.median_s for row in result for item in row)
    assert all(item.samples >= 15 for row in result for item in row)


def test_peak_memory_counts_the_weights(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((4096, 2048), np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4096])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2048])],
        [numpy_helper.from_array(weight, "w")],
    )
    imports = [helper.make_opsetid("", 20)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "wide.onnx")
    case = Case("one", {"x": np.ones((1, 4096), np.float32)})
    peak = Tvm().peak_memory(tmp_path / "wide.onnx", TARGET, case)
    assert weight.nbytes <= peak < 6 * weight.nbytes


def test_the_package_runs_in_a_fresh_process_without_lamina(tmp_path: Path) -> None:
    written = Tvm().package(mlp(), FIXED, tmp_path)
    assert [p.name for p in written] == ["model.so", "model.so.json", "run_tvm.py"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in written)
    np.savez(tmp_path / "in.npz", **feeds())
    command = [sys.executable, str(tmp_path / "run_tvm.py"), "--inputs", "in.npz", "--outputs", "out.npz"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "y: float32[2, 8]" in done.stdout
    with np.load(tmp_path / "out.npz") as outputs:
        np.testing.assert_allclose(outputs["y"], run_reference(mlp(), feeds())["y"], rtol=1e-5, atol=1e-5)
    assert "lamina" not in (tmp_path / "run_tvm.py").read_text()
    bad = {"x": np.zeros((3, 16), np.float32)}
    np.savez(tmp_path / "in.npz", **bad)
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert failed.returncode != 0
    assert "input 'x' has shape" in failed.stderr


def test_wrong_results_never_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    real = tvm_library.compile_reference

    class Other:
        def __init__(self, model: Any) -> None:
            self.inner = real(model)

        def run(self, arrays: Any) -> dict[str, np.ndarray]:
            return {k: v * v.dtype.type(2) for k, v in self.inner.run(arrays).items()}

    monkeypatch.setattr(tvm_library, "compile_reference", Other)
    monkeypatch.setattr("lamina.backends.tvm._STORE", tvm_library.Store())
    with pytest.raises(VerificationError, match=r"output 'y' is off by .* on random inputs"):
        Tvm().compile(mlp(), TARGET)


def test_importer_failures_name_the_node() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Mul", ["s", "two"], ["s2"], name="doubled"),
        helper.make_node("ConstantOfShape", ["s2"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b"])],
        [numpy_helper.from_array(np.array([2, 2]), "two")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    with pytest.raises((UnsupportedOperator, BackendError)) as caught:
        Tvm().compile(ir.from_proto(model), TARGET)
    assert "TVM" in str(caught.value)
    assert "shapes=" in str(caught.value) or caught.value.where


def test_a_process_that_dies_is_an_error_not_a_crash() -> None:
    with TvmProcess(1, "the test") as process:
        with pytest.raises(BackendError, match="failed"):
            process.ask({"do": "load", "library": "/nowhere/model.so", "threads": 1})
        process._child._process.kill()
        with pytest.raises(BackendError, match=r"died during 'load'.*SIGKILL"):
            process.ask({"do": "load", "library": "x", "threads": 1})


def test_capabilities_promise_no_kernels() -> None:
    found = get_backend("tvm:llvm").capabilities(TARGET)
    assert dict(found["forms"]) == {}
    assert found["versions"]["apache-tvm"]
    assert found["opset"] == 22


def test_every_allowed_operator_is_in_tvms_own_list() -> None:
    code = (
        "import json; from tvm.relax.frontend.onnx.onnx_frontend import _get_convert_map as m;"
        "print(json.dumps(sorted(m())))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    from lamina.backends.tvm_operators import ALLOWED

    assert {name for _, name in ALLOWED} - {"If"} <= set(json.loads(out.splitlines()[-1]))


# -- tuning -----------------------------------------------------------------------------------------


def test_tuning_wants_fixed_shapes() -> None:
    with pytest.raises(BackendError, match=r"shapes="):
        Tvm().compile(mlp(), Target.parse("tvm:llvm?threads=1&tune=5"))


def test_a_broken_ffi_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tvm_search, "tuning_trouble", lambda: "the process died: SIGSEGV")
    with pytest.raises(BackendError, match=r"apache-tvm-ffi==0\.1\.14\.post1"):
        Tvm().compile(mlp(), replace(FIXED, options={**FIXED.options, "tune": "5"}))


def test_no_time_to_tune_keeps_the_untuned_library() -> None:
    target = replace(FIXED, options={**FIXED.options, "tune": "0.5", "trials": "2"})
    with Tvm().compile(mlp(), target) as made:
        assert made.library.tuning["kept"] == "untuned"
        assert made.run(feeds())["y"].shape == (2, 8)


@pytest.mark.slow
def test_tunes_within_the_budget_and_remembers() -> None:
    target = replace(FIXED, options={**FIXED.options, "tune": "60", "trials": "3"})
    told: list[tuple[int, int, str]] = []
    with Tvm(lambda *event: told.append(event)).compile(mlp(), target) as made:
        first = made.library.tuning
    assert first["records"] > 0
    assert first["seconds"] < 65
    assert first["kept"] in ("tuned", "untuned")
    assert told[-1][0] > 0
    second = tvm_library.Store().get(prepare(mlp(), {"x": (2, 16)}, None), target).tuning
    assert second is not None
    assert second["from_cache"]
    assert second["records"] == first["records"]


def test_a_half_written_record_is_cut(tmp_path: Path) -> None:
    (tmp_path / "database_workload.json").write_text('["a"]\n["b"]\n')
    (tmp_path / "database_tuning_record.json").write_text("[0, 1]\n[1, [2")
    assert tvm_search._repair(tmp_path) == 1
    assert (tmp_path / "database_tuning_record.json").read_text() == "[0, 1]\n"
    assert tvm_search._repair(tmp_path / "none") == 0


# -- real models ------------------------------------------------------------------------------------


@needs_reference
@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("resnet20_cifar10", ""),
        ("kwt1_speech_commands", ""),
        ("stories260k", "tokens:1x32"),
    ],
)
def test_reference_models_match(model: str, shapes: str) -> None:
    target = Target.parse("tvm:llvm?threads=1" + (f"&shapes={shapes}" if shapes else ""))
    with Tvm().compile(models_dir / f"{model}.onnx", target) as made:
        assert made.library.error < 1e-5


def residual() -> onnx.ModelProto:
    """``head(x + mlp(x))`` where the wide mlp adds next to nothing: what a drop is for."""
    rng = np.random.default_rng(7)
    weights = {
        "up": rng.standard_normal((16, 4096), np.float32),
        "down": (1e-6 * rng.standard_normal((4096, 16))).astype(np.float32),
        "head": rng.standard_normal((16, 4), np.float32),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "up"], ["h"], name="wide"),
        helper.make_node("Relu", ["h"], ["r"], name="act"),
        helper.make_node("MatMul", ["r", "down"], ["b"], name="narrow"),
        helper.make_node("Add", ["x", "b"], ["s"], name="join"),
        helper.make_node("MatMul", ["s", "head"], ["logits"], name="classify"),
    ]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 4])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture(scope="module")
def optimized() -> lamina.Result:
    x = np.random.default_rng(8).standard_normal((90, 16)).astype(np.float32)
    labels = run_reference(ir.from_proto(residual()), {"x": x})["logits"].argmax(axis=1)
    with pytest.MonkeyPatch.context() as patch:
        shorten_timing(patch)
        return lamina.optimize(
            residual(),
            "drop<=5%",
            data={"x": x, "labels": labels},
            metric="top1",
            target="tvm:llvm?threads=1&shapes=x:4x16",
            workload="4",
            seconds=1,
        )


def test_optimize_plans_on_tvm_by_whole_models(optimized: lamina.Result) -> None:
    evidence = optimized.evidence
    assert [m["option"] for m in evidence["moves"]] == ["drop"]
    assert evidence["damage"] <= 0.05
    assert evidence["original_on_onnxruntime_s"] > 0
    assert evidence["n_report"] % 4  # rows that do not divide into the library's four were scored too


def test_an_optimized_model_is_saved_with_its_library(optimized: lamina.Result, tmp_path: Path) -> None:
    written = {path.name for path in optimized.save(tmp_path)}
    assert {"model.onnx", "plan.json", "result.json", "model.so", "model.so.json", "run_tvm.py"} <= written
    x = np.random.default_rng(1).standard_normal((4, 16)).astype(np.float32)
    np.savez(tmp_path / "in.npz", x=x)
    command = [sys.executable, str(tmp_path / "run_tvm.py"), "--inputs", "in.npz", "--outputs", "out.npz"]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    wanted = run_reference(ir.load(tmp_path / "model.onnx"), {"x": x})["logits"]
    with np.load(tmp_path / "out.npz") as outputs:
        np.testing.assert_allclose(outputs["logits"], wanted, rtol=1e-4, atol=1e-5)
