"""Fused operators written as plain ones: same values, and the branches of the model before it was fused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import F, Weights, layer, norm
from encoders import build as plain
from folding import interface, ops, run, ulps
from reference import models_dir, needs_reference

from lamina.errors import PassError
from lamina.ir.branches import Branch, find_branches
from lamina.ir.io import load
from lamina.ir.program import Program
from lamina.passes.fold.unfuse import RULES, unfuse

D = 6
LIMIT = 64


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(F)


WEIGHTS = {
    "g": random(D, seed=1),
    "b": random(D, seed=2),
    "c": random(D, seed=3),
    "m": random(D, 4, seed=4),
    "mt": random(4, D, seed=5),
    "four": random(4, seed=6),
    "k": random(8, 3, 2, 2, seed=7),
    "eight": random(8, seed=8),
    "words": random(11, D, seed=9),
    "places": random(16, D, seed=10),
    "kinds": random(2, D, seed=11),
    "qkv": random(D, 3 * D, seed=12),
    "qkvb": random(3 * D, seed=13),
    "wide": random(D, 4 + 4 + 8, seed=14),
    "wideb": random(16, seed=15),
    "w3": random(3, D, D, seed=16),
}


def build(
    body: str, inputs: str = "float[N,T,6] x", outputs: str = "float[N,T,6] y", opset: int = 18
) -> Program:
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    text += f" g ({inputs}) => ({outputs}) {{ {re.sub(r'ms[.]', 'com.microsoft.', body)} }}"
    used = [ir.Tensor(v, name=k) for k, v in WEIGHTS.items() if re.search(rf"\b{k}\b", body)]
    model = ir.from_onnx_text(text, initializers=used)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.shape, value.dtype = ir.Shape(value.const_value.shape), value.const_value.dtype
    for node in model.graph:
        node.name = f"node_{next(v.name for v in node.outputs if v.name)}"
    from lamina.ir.inference import infer_shapes

    infer_shapes(model)
    return Program(model)


def feed(program: Program, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(sum(sizes.values()))
    found = {}
    for port in program.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in port.shape]
        if port.numpy_dtype.kind == "f":
            found[port.name] = rng.normal(0, 2, shape).astype(port.numpy_dtype)
        else:
            found[port.name] = rng.integers(0, 2, shape).astype(port.numpy_dtype)
    return found


def check(before: Program, names: list[str] | None = None, limit: float = LIMIT) -> Program:
    after, _, records = unfuse(before, names)
    assert not [r for r in records if "left as it is" in r.why]
    assert interface(after) == interface(before)
    assert len({n.name for n in after.graph}) == len(after.graph)
    for sizes in ({"N": 1, "T": 5}, {"N": 3, "T": 2}):
        given = feed(before, sizes)
        for got, expected in zip(run(after, given), run(before, given), strict=True):
            assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
            assert ulps(got, expected) <= limit
    again, changed, _ = unfuse(after, names)
    assert (changed, ops(again)) == ((), ops(after))
    return after


XY = "float[N,T,6] x, float[N,T,6] s"
FUSED = {
    "gelu": ("y = ms.Gelu(x)", {}),
    "bias gelu": ("y = ms.BiasGelu(x, b)", {}),
    "fast gelu": ("y = ms.FastGelu(x)", {}),
    "fast gelu with bias": ("y = ms.FastGelu(x, b)", {}),
    "quick gelu": ("y = ms.QuickGelu(x)", {}),
    "silu": ("y = ms.QuickGelu <alpha=1.0> (x)", {}),
    "skip": ("y = ms.SkipLayerNormalization <epsilon=0.1> (x, s, g, b)", {"inputs": XY}),
    "skip, default epsilon": ("y = ms.SkipLayerNormalization (x, s, g, b)", {"inputs": XY}),
    "skip with bias": ("y = ms.SkipLayerNormalization (x, s, g, b, c)", {"inputs": XY}),
    "skip without beta": ("y = ms.SkipLayerNormalization (x, s, g)", {"inputs": XY}),
    "skip broadcast": (
        "y = ms.SkipLayerNormalization (x, s, g)",
        {"inputs": "float[N,T,6] x, float[1,T,6] s"},
    ),
    "skip with its sum": (
        "n, , , h = ms.SkipLayerNormalization (x, s, g, b, c) y = Mul(n, h)",
        {"inputs": XY},
    ),
    "skip, its sum an output": (
        "y, , , h = ms.SkipLayerNormalization (x, s, g, b, c)",
        {"inputs": XY, "outputs": "float[N,T,6] y, float[N,T,6] h"},
    ),
    "skip of opset 15": ("y = ms.SkipLayerNormalization (x, s, g)", {"inputs": XY, "opset": 15}),
    "skip rms": ("y = ms.SkipSimplifiedLayerNormalization (x, s, g)", {"inputs": XY}),
    "skip rms of opset 15": (
        "n, , , h = ms.SkipSimplifiedLayerNormalization <epsilon=0.5> (x, s, g, c) y = Add(n, h)",
        {"inputs": XY, "opset": 15},
    ),
    "product": ("p = ms.FusedMatMul <alpha=0.5> (x, m) y = ms.FusedMatMul <transB=1> (p, m)", {}),
    "transposed product": (
        "y = ms.FusedMatMul <transA=1, alpha=-2.0> (x, s)",
        {"inputs": XY, "outputs": "float[N,6,6] y"},
    ),
    "gemm": (
        'y = ms.FusedGemm <transB=1, alpha=0.5, activation="LeakyRelu", activation_alpha=0.2> (x, mt, four)',
        {"inputs": "float[N,6] x", "outputs": "float[N,4] y"},
    ),
    "embedding": (
        "y, ids, h = ms.EmbedLayerNormalization <epsilon=0.01> (i, j, words, places, kinds, g, b)",
        {"inputs": "int32[N,T] i, int32[N,T] j", "outputs": "float[N,T,6] y, float[N,T,6] h"},
    ),
    "attention": ("y = ms.Attention <num_heads=2> (x, qkv, qkvb)", {}),
    "attention, positions masked": (
        "y = ms.Attention <num_heads=3, scale=0.3> (x, qkv, qkvb, k1)",
        {"inputs": "float[N,T,6] x, int32[N,T] k1"},
    ),
    "attention, pairs masked": (
        "y = ms.Attention <num_heads=1, mask_filter_value=-3.0> (x, qkv, qkvb, k1)",
        {"inputs": "float[N,T,6] x, int32[N,T,T] k1"},
    ),
    "attention, other sizes": (
        "y = ms.Attention <num_heads=2, qkv_hidden_sizes=[4, 4, 8]> (x, wide, wideb)",
        {"outputs": "float[N,T,8] y"},
    ),
    "attention, scores added to": (
        "y = ms.Attention <num_heads=2> (x, qkv, qkvb, , , a)",
        {"inputs": "float[N,T,6] x, float[N,2,T,T] a"},
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_operators_of_onnxruntime(name: str) -> None:
    body, options = FUSED[name]
    after = check(build(body, **options))
    assert not [n for n in after.graph if n.domain]


ACTIVATIONS = [
    'activation="Relu"',
    'activation="Sigmoid"',
    'activation="Tanh"',
    'activation="LeakyRelu", activation_params=[0.3]',
    'activation="Clip", activation_params=[-0.5, 0.7]',
    'activation="HardSigmoid", activation_params=[0.1, 0.4]',
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolutions_with_activation(activation: str) -> None:
    options = f"{activation}, pads=[1, 0, 1, 0], strides=[1, 2]"
    before = build(f"y = ms.FusedConv <{options}> (x, k, eight)", "float[N,3,T,8] x", "float[N,8,S,4] y")
    assert ops(check(before))["Conv"] == 1


def test_a_convolution_with_a_sum() -> None:
    before = build(
        'y = ms.FusedConv <activation="Relu"> (x, k, eight, z)',
        "float[N,3,T,8] x, float[N,8,S,7] z",
        "float[N,8,S,7] y",
    )
    after, _, _ = unfuse(before)
    given = {"x": random(2, 3, 5, 8), "z": random(2, 8, 4, 7, seed=1)}
    assert ops(after) == {"Conv": 1, "Add": 1, "Relu": 1}
    assert ulps(run(after, given)[0], run(before, given)[0]) <= LIMIT


LEFT = {
    "attention, later positions masked": (
        "y = ms.Attention <num_heads=2, unidirectional=1> (x, qkv, qkvb)",
        "float[N,T,6] x",
        "it masks later positions",
    ),
    "attention, lengths": (
        "y = ms.Attention <num_heads=2> (x, qkv, qkvb, k1)",
        "float[N,T,6] x, int32[N] k1",
        "its mask is not one of positions",
    ),
    "product, batches transposed": (
        "y = ms.FusedMatMul <transBatchA=1> (x, w3)",
        "float[T,3,6] x",
        "it transposes batches",
    ),
    "product of unknown rank": (
        "e = ms.Unknown(x) y = ms.FusedMatMul <transB=1> (x, e)",
        "float[N,T,6] x",
        "the rank of what it transposes is unknown",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_exact_is_left(name: str) -> None:
    body, inputs, reason = LEFT[name]
    before = build(body, inputs)
    after, changed, records = unfuse(before)
    assert (changed, ops(after)) == ((), ops(before))
    assert [r.why.partition(": ")[2] for r in records] == [reason]


def test_nodes_in_subgraphs() -> None:
    body = (
        "y = If (flag) <then_branch = a () => (float[N,T,6] p) { p = ms.FastGelu(x) },"
        " else_branch = c1 () => (float[N,T,6] q) { q = ms.BiasGelu(x, b) }>"
    )
    before = build(body, "float[N,T,6] x, bool flag")
    after, changed, _ = unfuse(before)
    assert set(changed) == {"com.microsoft.FastGelu", "com.microsoft.BiasGelu"}
    for flag in (True, False):
        given = {"x": random(2, 3, 6), "flag": np.array(flag)}
        assert ulps(run(after, given)[0], run(before, given)[0]) <= LIMIT


# -- standard operators, by name --------------------------------------------------------------------

STANDARD = {
    "Gelu": ("y = Gelu(x)", {}),
    "Gelu tanh": ('y = Gelu <approximate="tanh"> (x)', {}),
    "LayerNormalization": ("y = LayerNormalization <axis=-1, epsilon=0.01> (x, g, b)", {}),
    "RMSNormalization": ("y = RMSNormalization <axis=-1> (x, g)", {}),
    "RotaryEmbedding": (
        "y = RotaryEmbedding (x4, co, si)",
        {"inputs": "float[N,2,T,6] x4, float[N,T,3] co, float[N,T,3] si", "outputs": "float[N,2,T,6] y"},
    ),
    "Attention": (
        "y = Attention <q_num_heads=2, kv_num_heads=2> (x, s, s)",
        {"inputs": XY},
    ),
    "Attention causal": (
        "y = Attention <is_causal=1, scale=0.7> (q4, k4, v4)",
        {"inputs": "float[N,4,T,6] q4, float[N,2,T,6] k4, float[N,2,T,6] v4", "outputs": "float[N,4,T,6] y"},
    ),
}


@pytest.mark.parametrize("name", STANDARD)
def test_standard_operators_by_name(name: str) -> None:
    body, options = STANDARD[name]
    operator = name.split()[0]
    before = build(body, **options, opset=23)
    assert unfuse(before)[1] == ()
    assert ops(check(before, [operator]))[operator] == 0


def test_a_name_is_of_the_standard_where_both_have_it() -> None:
    before = build("h = Gelu(x) y = ms.Gelu(h)", opset=20)
    assert ops(unfuse(before, ["Gelu"])[0])["Gelu"] == 1
    assert unfuse(before, ["com.microsoft.Gelu"])[1] == ("com.microsoft.Gelu",)
    assert unfuse(before, ["FastGelu"])[1] == ()
    after, changed, _ = unfuse(before, ["Gelu", "com.microsoft.Gelu"])
    assert set(changed) == {"Gelu", "com.microsoft.Gelu"}
    assert ops(after)["Gelu"] == 0


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PassError) as error:
        unfuse(build("y = Neg(x)"), ["MatMul"])
    assert str(error.value).startswith("there is no rule for unfusing 'MatMul' at opset 18")
    assert all(name in str(error.value) for name in RULES)


# -- whole models -----------------------------------------------------------------------------------


def fused_by_onnxruntime(path: Path, folder: Path) -> Program:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "fused.onnx")
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "fused.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
    onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return load(folder / "fused.onnx")


def shape(branches: tuple[Branch, ...]) -> list[tuple[object, ...]]:
    return [(b.kind, b.parameters, b.shortcut) for b in branches]


def test_an_encoder_fused_by_onnxruntime_has_its_branches_back(tmp_path: Path) -> None:
    w = Weights(0, 16)
    first, x = layer(w, 0, "x0")
    second, x = layer(w, 1, x)
    text = f"{first} {second} {norm(w, 'y', x)} z = Neg(y)"
    before = plain(text, w, "float[N,T,16] x0", "float[N,T,16] z")
    ir.save(before.model.clone(), tmp_path / "plain.onnx")
    fused = fused_by_onnxruntime(tmp_path / "plain.onnx", tmp_path)
    assert ops(fused)["SkipLayerNormalization"] >= 1
    after, changed, _ = unfuse(fused)
    assert "com.microsoft.SkipLayerNormalization" in changed
    assert shape(find_branches(after).branches) == shape(find_branches(before).branches)
    given = {"x0": random(2, 3, 16)}
    assert ulps(run(after, given)[0], run(before, given)[0]) <= LIMIT


@needs_reference
@pytest.mark.parametrize(
    "name", ["minilm/minilm_l6_v2.onnx", "kwt1_speech_commands.onnx", "resnet20_cifar10.onnx"]
)
def test_reference_models_fused_by_onnxruntime_have_their_branches_back(name: str, tmp_path: Path) -> None:
    fused = fused_by_onnxruntime(models_dir / name, tmp_path)
    after, _, records = unfuse(fused)
    assert not [r for r in records if "left as it is" in r.why]
    assert not [n for n in after.graph if n.domain]
    assert shape(find_branches(after).branches) == shape(find_branches(load(models_dir / name)).branches)
