"""Every reference model through every fold and form: same function, same interface, fewer nodes."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir
import pytest
from folding import interface, ops
from reference import models_dir, needs_reference

from lamina.ir.program import Program
from lamina.passes.fold import FORMS, apply_named, fold

# Model, then operators after all forms: what each model must gain.
CASES = {
    "resnet56_cifar10.onnx": {"Conv": 57, "Slice": 0, "Pad": 0},
    "mobilenet_v1_025_imagenet.onnx": {"Conv": 27},
    "kwt1_speech_commands.onnx": {"Gelu": 12, "Sum": 24, "Attention": 12, "MatMul": 49, "Tanh": 0},
    "stories260k.onnx": {"RMSNormalization": 11, "RotaryEmbedding": 10, "Attention": 5, "Slice": 2},
    "minilm/minilm_l6_v2.onnx": {"Gelu": 6, "Sum": 13, "Attention": 6, "Erf": 0, "Softmax": 0},
}


def session(target: Program) -> object:
    import onnxruntime

    model = target.model.clone()
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.Tensor(value.const_value.numpy(), name=value.name)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])


def feeds(target: Program, batch: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(batch)
    sizes = {"batch": batch, "seq": 7 + batch}
    found = {}
    for port in target.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in port.shape]
        if port.numpy_dtype.kind == "f":
            found[port.name] = rng.normal(size=shape).astype(port.numpy_dtype)
        else:
            top = {"attention_mask": 2, "token_type_ids": 2}.get(port.name, 500)
            found[port.name] = rng.integers(0, top, shape)
    if "attention_mask" in found:
        found["attention_mask"][:, 0] = 1
    return found


@needs_reference
@pytest.mark.parametrize("name", CASES)
def test_reference_model_keeps_its_function(name: str) -> None:
    before = Program(ir.load(models_dir / name), name)
    after, names, records = fold(before, forms=FORMS)
    assert not [r for r in records if r.why.startswith(("undone", "stopped"))]
    assert interface(after) == interface(before)
    assert {op: ops(after)[op] for op in CASES[name]} == CASES[name]
    kept = {n.name for n in before.graph}
    added = [n.name for n in after.graph if n.name not in kept]
    assert all(re.search(r"^lamina_|_rotary$|_split$|_projection$|_rms$", n) for n in added)
    first, second = session(before), session(after)
    for batch in (1, 2):
        feed = feeds(before, batch)
        for expected, got in zip(first.run(None, feed), second.run(None, feed), strict=True):
            assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()
    again = apply_named(before, names)
    assert [n.name for n in again.graph] == [n.name for n in after.graph]


@needs_reference
@pytest.mark.parametrize(
    ("name", "forms"),
    [
        ("stories260k.onnx", ("rotate_fold",)),
        ("stories260k.onnx", ("rotate_fold", "sort_channels")),
        ("stories260k.onnx", ("fuse_rotary", "fuse_attention", "rotate_fold", "sort_channels")),
        ("kwt1_speech_commands.onnx", ("sort_channels",)),
        ("mobilenet_v1_025_imagenet.onnx", ("sort_channels",)),
        ("resnet56_cifar10.onnx", ("sort_channels",)),
        ("minilm/minilm_l6_v2.onnx", ("sort_channels",)),
    ],
)
def test_forms_on_request_keep_the_function(name: str, forms: tuple[str, ...]) -> None:
    before = Program(ir.load(models_dir / name), name)
    after, names, records = fold(before, forms=forms)
    assert not [r for r in records if r.why.startswith("undone")]
    assert {"rotate_fold", "sort_channels"} & set(forms) <= set(names)
    assert interface(after) == interface(before)
    running = session(before), session(after)
    for batch in (1, 3):
        given = feeds(before, batch)
        want, got = (s.run(None, given)[0] for s in running)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
