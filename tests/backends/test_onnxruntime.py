from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference

import lamina.backends.onnxruntime as ort_backend
from lamina.backends import BACKENDS, get_backend
from lamina.backends.backend import Target
from lamina.backends.onnxruntime import OnnxRuntime
from lamina.backends.reference import run_reference
from lamina.errors import BackendError, BudgetError

HEAD = '<ir_version: 10, opset_import: ["" : 21, "foo": 1]>\n'
ONE = Target.parse("ort:cpu?threads=1")


def model_of(text: str) -> ir.Model:
    return ir.from_onnx_text(HEAD + text)


def matmul_model(rows: int = 4, seed: int = 0) -> tuple[ir.Model, np.ndarray]:
    weight = np.random.default_rng(seed).standard_normal((rows, rows), dtype=np.float32)
    model = model_of(
        f"g (float[N,{rows}] x) => (float[N,{rows}] y) {{ [mm] y = MatMul(x, w) }}".replace("w)", "x)")
    )
    value = ir.Value(
        name="w",
        shape=ir.Shape(weight.shape),
        type=ir.TensorType(ir.DataType.FLOAT),
        const_value=ir.tensor(weight, name="w"),
    )
    model.graph.register_initializer(value)
    model.graph[0].replace_input_with(1, value)
    return model, weight


def test_runs_a_model_in_memory() -> None:
    model, weight = matmul_model()
    x = np.random.default_rng(1).standard_normal((3, 4), dtype=np.float32)
    executable = OnnxRuntime().compile(model, ONE)
    assert executable.input_names == ("x",)
    np.testing.assert_allclose(executable.run({"x": x})["y"], x @ weight, rtol=1e-5)


def test_runs_a_file(tmp_path: Path) -> None:
    model, weight = matmul_model()
    ir.save(model, tmp_path / "m.onnx")
    x = np.ones((1, 4), np.float32)
    got = OnnxRuntime().compile(tmp_path / "m.onnx", ONE).run({"x": x})["y"]
    np.testing.assert_allclose(got, x @ weight, rtol=1e-5)


def test_runs_external_data_and_models_past_the_message_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = matmul_model(64)
    ir.save(model, tmp_path / "m.onnx", external_data="m.data")
    loaded = ir.load(tmp_path / "m.onnx")
    x = np.ones((1, 64), np.float32)
    inside = OnnxRuntime().compile(loaded, ONE).run({"x": x})["y"]
    monkeypatch.setattr(ort_backend, "IN_MEMORY_BYTES", 100)
    assert ort_backend.serialize(loaded) is None
    outside = OnnxRuntime().compile(loaded, ONE).run({"x": x})["y"]
    np.testing.assert_array_equal(inside, outside)
    assert isinstance(loaded.graph.initializers["w"].const_value, ir.ExternalTensor), (
        "the caller's model was changed"
    )


@needs_reference
def test_reference_agrees_with_the_optimized_runtime_on_two_external_files() -> None:
    path = models_dir / "minilm" / "minilm_l6_v2.onnx"
    model = ir.load(path)
    rng = np.random.default_rng(0)
    feeds = {v.name: np.ones((2, 9), np.int64) for v in model.graph.inputs if v.name}
    feeds["input_ids"] = rng.integers(5, 20000, (2, 9))
    optimized = OnnxRuntime().compile(model, ONE).run(feeds)
    oracle = run_reference(path, feeds)
    for name, value in oracle.items():
        np.testing.assert_allclose(optimized[name], value, atol=2e-5)


def test_reference_runs_nodes_as_written() -> None:
    """Identity chains survive: nothing is folded away in the oracle."""
    model, weight = matmul_model()
    got = run_reference(model, {"x": np.eye(4, dtype=np.float32)})["y"]
    np.testing.assert_allclose(got, weight, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("g (float[2] x) => (float[2] y) { [nn] y = foo.Bar(x) }", "foo:Bar"),
        ("g (float[2] x) => (float[2] y) { [nn] y = Blah(x) }", "Blah 'nn'"),
        ("g (bfloat16[2,2] x) => (bfloat16[2,2] y) { [nn] y = MatMul(x, x) }", "MatMul 'nn'"),
        ("g (float[2,3] x, float[4,5] z) => (float[K,L] y) { [nn] y = MatMul(x, z) }", "MatMul 'nn'"),
    ],
)
def test_refusals_name_the_operator(text: str, place: str) -> None:
    with pytest.raises(BackendError, match="ONNX Runtime refuses model 'g'") as caught:
        OnnxRuntime().compile(model_of(text), ONE)
    assert caught.value.where == place


def test_a_failing_run_names_the_node() -> None:
    model = model_of("g (float[N] x, float[M] z) => (float[K] y) { [adds] y = Add(x, z) }")
    executable = OnnxRuntime().compile(model, ONE)
    with pytest.raises(BackendError, match="failed while running") as caught:
        executable.run({"x": np.ones(3, np.float32), "z": np.ones(2, np.float32)})
    assert caught.value.where == "Add 'adds'"


def test_feeds_that_do_not_fit() -> None:
    model, _ = matmul_model()
    executable = OnnxRuntime().compile(model, ONE)
    with pytest.raises(BackendError, match=r"missing \['x'\], unknown \['z'\]"):
        executable.run({"z": np.ones((1, 4), np.float32)})
    with pytest.raises(BackendError, match="Unexpected input data type"):
        executable.run({"x": np.ones((1, 4), np.float64)})


def test_a_text_file_is_refused_by_path(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_text("hello")
    with pytest.raises(BackendError, match=r"no\.onnx"):
        OnnxRuntime().compile(tmp_path / "no.onnx", ONE)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("ort:gpu", "has no device 'gpu'"),
        ("nope:cpu", "known backends: ort, tvm"),
        ("ort:cpu?turbo=1", "does not know turbo=1"),
        ("ort:cpu?opt=best", "opt=disabled|basic|extended|all"),
    ],
)
def test_unknown_targets(target: str, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        get_backend(target)
    assert message in str(caught.value)


def test_a_backend_that_cannot_be_imported_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lamina.backends.BACKENDS", (("tvm", "lamina.backends.absent", "Tvm"),))
    with pytest.raises(BackendError) as caught:
        get_backend(Target("tvm", "llvm"))
    assert "pip install 'lamina[tvm]'" in str(caught.value)


def test_get_backend_and_default_threads() -> None:
    assert isinstance(get_backend("ort:cpu"), OnnxRuntime)
    assert [name for name, _, _ in BACKENDS] == ["ort", "tvm"]
    assert Target.parse("ort:cpu").threads == len(os.sched_getaffinity(0))
    assert Target.parse("ort:cpu?threads=3").threads == 3


def test_package_writes_the_session_options(tmp_path: Path) -> None:
    model, _ = matmul_model()
    (path,) = OnnxRuntime().package(model, Target.parse("ort:cpu?threads=2&spin=0&opt=extended"), tmp_path)
    written = json.loads(path.read_text())
    assert written["intra_op_num_threads"] == 2
    assert written["graph_optimization_level"] == "ORT_ENABLE_EXTENDED"
    assert written["session_config"] == {"session.intra_op.allow_spinning": "0"}
    assert [p.name for p in tmp_path.iterdir()] == ["session.json"]
