"""Every reference and zoo model is captured, and computes what the original file computes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx_tools import run
from reference import models_dir, needs_reference, zoo_dir

from lamina.ir.capture import capture
from lamina.ir.scopes import scope_of
from lamina.ir.verify import check, verify_structure

_MODELS = ["kwt1_speech_commands", "minilm/minilm_l6_v2", "stories260k", "mobilenet_v1_025_imagenet"]
_MODELS += ["resnet20_cifar10", "resnet56_cifar10"]
_ZOO = ["ultraface_rfb320", "fastestdet", "ppocr_v2_cls", "magika_standard_v3_3", "dtln_1", "gtcrn_simple"]
_ZOO += ["mnist_cntk"]


def _interface(graph: onnx.GraphProto) -> list[list[str]]:
    weights = {t.name for t in graph.initializer}
    return [[v.name for v in graph.input if v.name not in weights], [v.name for v in graph.output]]


@needs_reference
@pytest.mark.parametrize("name", [f"models/{m}" for m in _MODELS] + [f"zoo/{m}" for m in _ZOO])
def test_captured_models_compute_the_same(name: str) -> None:
    folder, _, rest = name.partition("/")
    path = {"models": models_dir, "zoo": zoo_dir}[folder] / f"{rest}.onnx"
    program = capture(path)
    verify_structure(program)
    check(program)
    original = onnx.load(path, load_external_data=False).graph
    assert [[p.name for p in program.inputs], [p.name for p in program.outputs]] == _interface(original)
    assert program.example_is_synthetic
    assert all(v.shape is not None for n in program.graph for v in n.outputs)
    want, got = run(str(path), program.example), run(program.model, program.example)
    assert any(np.ptp(w) > 0.01 for w in want)
    for w, g in zip(want, got, strict=True):
        # Bit equal where the opset is kept; one old Resize or pooling may pick another kernel.
        np.testing.assert_allclose(g, w, rtol=0, atol=0 if folder == "models" else 4e-6 * np.abs(w).max())


@needs_reference
def test_scopes_come_from_the_exporters_metadata() -> None:
    program = capture(models_dir / "minilm/minilm_l6_v2.onnx")
    scopes = {scope_of(n) for n in program.graph if n.op_type == "MatMul"}
    assert "m.encoder.layer.0.attention.self.query" in scopes
    assert "m.encoder.layer.5.output.dense" in scopes


@needs_reference
def test_made_up_tokens_stay_inside_their_tables() -> None:
    example = capture(models_dir / "minilm/minilm_l6_v2.onnx").example
    assert example["input_ids"].max() < 30522
    assert example["input_ids"].max() > 1000
    assert set(example["token_type_ids"].ravel()) <= {0, 1}
    assert (example["attention_mask"] == 1).all()
    assert len({a.shape for a in example.values()}) == 1
    assert capture(models_dir / "stories260k.onnx").example["tokens"].max() < 512
