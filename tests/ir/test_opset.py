"""Raising opsets: values, names and metadata stay; what cannot be raised is named and left whole."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_tools import branching, mlp, proto, run
from reference import models_dir, needs_reference

from lamina.errors import UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.verify import check, verify_structure

_X = np.random.default_rng(0).standard_normal((2, 4, 6)).astype(np.float32)


def _raised(model: onnx.ModelProto | Program, version: int) -> Program:
    program = (capture(model) if isinstance(model, onnx.ModelProto) else model).clone()
    raise_opset(program.model, version)
    assert program.opset == version
    verify_structure(program)
    check(program)
    return program


def _one(
    op: str, opset: int, *, weights: dict[str, np.ndarray] | None = None, **attributes: object
) -> onnx.ModelProto:
    node = helper.make_node(op, ["x", *(weights or {})], ["y"], "it", **attributes)
    return proto([node], {"x": _X.shape}, {"y": None}, weights, opset=opset)  # type: ignore[dict-item]


@pytest.mark.parametrize("version", [20, 21, 23, 25])
@pytest.mark.parametrize(
    "name", ["kwt1_speech_commands", "minilm/minilm_l6_v2", "stories260k", "resnet20_cifar10"]
)
@needs_reference
def test_reference_models_compute_the_same(name: str, version: int) -> None:
    program = capture(models_dir / f"{name}.onnx")
    raised = _raised(program, version)
    np.testing.assert_array_equal(
        run(raised.model, program.example)[0], run(program.model, program.example)[0]
    )
    assert [n.name for n in raised.graph] == [n.name for n in program.graph]
    assert [dict(n.metadata_props) for n in raised.graph] == [dict(n.metadata_props) for n in program.graph]


_REDUCTIONS = [
    "ReduceMean",
    "ReduceMax",
    "ReduceMin",
    "ReduceL1",
    "ReduceL2",
    "ReduceSumSquare",
    "ReduceLogSumExp",
]


@pytest.mark.parametrize("op", _REDUCTIONS)
@pytest.mark.parametrize("axes", [None, [1], [0, 2]])
def test_reductions(op: str, axes: list[int] | None) -> None:
    attributes = {} if axes is None else {"axes": axes}
    model = _one(op, 13, keepdims=0, **attributes)
    np.testing.assert_array_equal(run(_raised(model, 18).model, {"x": _X})[0], run(model, {"x": _X})[0])


def test_split_without_sizes() -> None:
    node = helper.make_node("Split", ["x"], ["y", "z"], "it", axis=1)
    model = proto([node], {"x": _X.shape}, {"y": None, "z": None}, opset=13)  # type: ignore[dict-item]
    for got, want in zip(run(_raised(model, 18).model, {"x": _X}), run(model, {"x": _X}), strict=True):
        np.testing.assert_array_equal(got, want)


_OLD = [
    _one("Softmax", 11),
    _one("Softmax", 11, axis=0),
    _one("LogSoftmax", 9, axis=2),
    _one("Softmax", 12, axis=-2),
    _one("Squeeze", 11, axes=[0], weights={}),
    _one("Unsqueeze", 11, axes=[0, 2]),
    _one("ReduceSum", 11, axes=[-1]),
    _one("Slice", 9, starts=[1], ends=[3], axes=[1]),
    _one("Pad", 10, pads=[0, 1, 0, 0, 2, 0], value=1.5),
    _one("Clip", 9, min=-0.5, max=0.25),
    _one("Clip", 9, max=0.25),
    _one("Dropout", 9, ratio=0.3),
    _one("TopK", 9, k=2, axis=1),
    _one("Upsample", 9, weights={"s": np.array([1, 2, 3], np.float32)}, mode="nearest"),
    _one("Upsample", 7, scales=[1.0, 2.0, 2.0], mode="nearest"),
    _one("Resize", 10, weights={"s": np.array([1, 2, 2], np.float32)}, mode="nearest"),
]


def _feeds(model: onnx.ModelProto) -> np.ndarray:
    return _X[:1] if model.graph.node[0].op_type == "Squeeze" else _X


@pytest.mark.parametrize(
    "model", _OLD, ids=lambda m: f"{m.graph.node[0].op_type}-{m.opset_import[0].version}"
)
@pytest.mark.parametrize("version", [13, 20, 25])
def test_operators_older_than_thirteen(model: onnx.ModelProto, version: int) -> None:
    feeds = {"x": _feeds(model)}
    model = onnx.ModelProto.FromString(model.SerializeToString())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = len(feeds["x"])
    if model.graph.node[0].op_type == "TopK":
        model.graph.node[0].output.append("i")
    program = capture(model)
    assert program.opset == 13
    raised = _raised(program, version) if version > 13 else program
    assert [p.name for p in raised.outputs] == ["y"]
    np.testing.assert_array_equal(run(raised.model, feeds)[0], run(model, feeds)[0])


def test_old_coordinates_of_resize_in_four_dims() -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 3, 4)).astype(np.float32)
    for mode in ("nearest", "linear"):
        node = helper.make_node("Upsample", ["x", "s"], ["y"], "up", mode=mode)
        scales = {"s": np.array([1, 1, 2, 3], np.float32)}
        model = proto([node], {"x": x.shape}, {"y": None}, scales, opset=9)  # type: ignore[dict-item]
        np.testing.assert_allclose(
            run(capture(model).model, {"x": x})[0], run(model, {"x": x})[0], rtol=0, atol=1e-6
        )


def test_roi_align_keeps_its_old_coordinates() -> None:
    x = np.random.default_rng(1).standard_normal((1, 2, 8, 8)).astype(np.float32)
    weights = {"rois": np.array([[0.5, 0.5, 6.0, 7.0]], np.float32), "batch": np.zeros(1, np.int64)}
    node = helper.make_node("RoiAlign", ["x", *weights], ["y"], "roi", output_height=3, output_width=3)
    model = proto([node], {"x": x.shape}, {"y": None}, weights, opset=13)  # type: ignore[dict-item]
    np.testing.assert_array_equal(run(_raised(model, 16).model, {"x": x})[0], run(model, {"x": x})[0])


def test_group_normalization_gets_one_scale_a_channel() -> None:
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 6, 5)).astype(np.float32)
    weights = {n: rng.standard_normal(2).astype(np.float32) for n in ("scale", "bias")}
    node = helper.make_node("GroupNormalization", ["x", *weights], ["y"], "norm", num_groups=2)
    model = proto([node], {"x": x.shape}, {"y": x.shape}, weights, opset=18)
    assert capture(model).opset == 21
    got = run(capture(model).model, {"x": x})[0]
    groups = x.reshape(2, 2, -1).astype(np.float64)
    normal = (groups - groups.mean(-1, keepdims=True)) / np.sqrt(groups.var(-1, keepdims=True) + 1e-5)
    want = normal * weights["scale"][:, None] + weights["bias"][:, None]
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=1e-5)


def test_subgraphs_are_raised_too() -> None:
    model = branching()
    model.opset_import[0].version = 13
    then = next(a.g for a in model.graph.node[2].attribute if a.name == "then_branch")
    then.node[1].CopyFrom(helper.make_node("ReduceMax", ["inner"], ["t"], axes=[0], keepdims=1))
    x = np.abs(_X[0, :, :4])
    raised = _raised(model, 20)
    np.testing.assert_array_equal(run(raised.model, {"x": x})[0], run(model, {"x": x})[0])


def test_a_training_batch_norm_is_named_and_nothing_changes() -> None:
    # Before opset 14 training mode showed only in the extra outputs.
    weights = {n: np.ones(4, np.float32) for n in ("scale", "bias", "mean", "variance")}
    outputs = ["y", "mean_out", "variance_out", "saved_mean", "saved_variance"]
    node = helper.make_node("BatchNormalization", ["x", *weights], outputs, "norm")
    mean = helper.make_node("ReduceMean", ["y"], ["z"], "average", axes=[1])
    ports = {"z": None, "mean_out": [4], "variance_out": [4], "saved_mean": [4], "saved_variance": [4]}
    model = proto([node, mean], {"x": _X.shape}, ports, weights, opset=13)  # type: ignore[arg-type]
    program = capture(model).clone()
    before = ir.to_proto(program.model).SerializeToString()
    with pytest.raises(UnsupportedOperator) as caught:
        raise_opset(program.model, 20)
    assert caught.value.what == (
        "BatchNormalization 'norm' cannot be raised to a newer opset: it is in training mode"
    )
    assert ir.to_proto(program.model).SerializeToString() == before


def test_lower_and_equal_versions_change_nothing() -> None:
    program = capture(mlp()).clone()
    for version in (18, 13, 7):
        raise_opset(program.model, version)
    assert program.opset == 18
    assert program.fingerprint == capture(mlp()).fingerprint


def test_versions_out_of_range() -> None:
    program = capture(mlp()).clone()
    with pytest.raises(UnsupportedOperator, match="opset 18 cannot be raised to 26"):
        raise_opset(program.model, 26)
