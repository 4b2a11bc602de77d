"""Generated inputs: every size and value that was promised, valid for the model, the same each time."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from lamina.ir.capture import capture
from lamina.ir.probe_inputs import probe_inputs, size_variants
from lamina.ir.program import Program


def program(inputs, nodes=None, weights=None) -> Program:
    nodes = nodes or [helper.make_node("Identity", [inputs[0][0]], ["y"])]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("y", inputs[0][1], None)],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return capture(model)


FLOATS = [("x", TensorProto.FLOAT, ["batch", "seq", 4])]


def test_sizes_are_the_examples_odd_ones_one_and_two():
    sizes = size_variants(program(FLOATS))
    assert sizes[0] == {"batch": 2, "seq": 8}
    assert {"batch": 3, "seq": 8} in sizes
    assert {"batch": 1, "seq": 1} in sizes
    assert {"batch": 3, "seq": 9} in sizes
    assert {"batch": 2, "seq": 2} in sizes
    assert {"batch": 1, "seq": 8} in sizes


def test_fixed_shapes_have_one_size():
    assert size_variants(program([("x", TensorProto.FLOAT, [2, 4])])) == ({},)


def test_a_real_example_gives_sizes_and_scale():
    base = program(FLOATS)
    example = (100.0 + np.random.default_rng(0).standard_normal((5, 6, 4))).astype(np.float32)
    given = capture(base, example_inputs={"x": example})
    assert size_variants(given)[0] == {"batch": 5, "seq": 6}
    first = next(probe_inputs(given, 1)).feeds["x"]
    assert first.shape == (5, 6, 4)
    assert abs(float(first.mean()) - 100) < 1


def test_dims_computed_from_others_follow():
    inputs = [
        ("x", TensorProto.FLOAT, ["batch", "seq"]),
        ("past", TensorProto.FLOAT, ["batch", "past"]),
        ("all", TensorProto.FLOAT, ["batch", "past + seq"]),
    ]
    for probe in probe_inputs(program(inputs), 12):
        shapes = {k: v.shape for k, v in probe.feeds.items()}
        assert shapes["all"][1] == shapes["x"][1] + shapes["past"][1]
        assert shapes["all"][0] == shapes["x"][0]


def test_values_cover_what_the_labels_say():
    probes = {p.label.split(" ")[0]: p for p in reversed(list(probe_inputs(program(FLOATS), 20)))}
    values = {name: p.feeds["x"] for name, p in probes.items()}
    assert (values["zeros"] == 0).all()
    assert (values["ones"] == 1).all()
    assert (values["negative"] < 0).all()
    assert (np.abs(values["large"]) >= 500).all()
    assert 0 < np.abs(values["tiny"]).max() < 1e-28
    assert 0 < np.abs(values["denormal"]).max() < np.finfo(np.float32).tiny
    assert np.isinf(values["infinite"]).any()
    assert np.isnan(values["nan"]).any()
    assert 0 <= values["uniform"].min() <= values["uniform"].max() <= 1
    assert {p.kind for p in probes.values()} == {"ordinary", "edge", "nonfinite"}
    for name, kind in (("normal", "ordinary"), ("large", "edge"), ("nan", "nonfinite")):
        assert probes[name].kind == kind
    assert all(v.dtype == np.float32 for v in values.values())


@pytest.mark.parametrize("samples", [1, 4, 40])
def test_as_many_as_asked_for_and_more_only_add(samples):
    few, many = list(probe_inputs(program(FLOATS), samples)), list(probe_inputs(program(FLOATS), 50))
    assert len(few) == samples
    for one, other in zip(few, many, strict=False):
        assert one.label == other.label
        np.testing.assert_array_equal(one.feeds["x"], other.feeds["x"])
    last = [p.feeds["x"] for p in many[-12:] if p.label == many[-1].label]
    assert len({a.tobytes() for a in last}) == len(last)  # other seeds, other values


def test_indices_stay_inside_their_table_and_reach_its_ends():
    inputs = [("ids", TensorProto.INT64, ["batch", "seq"])]
    net = program(
        [("x", TensorProto.FLOAT, [1]), *inputs],
        [
            helper.make_node("Gather", ["table", "ids"], ["g"]),
            helper.make_node("Add", ["g", "x"], ["y"]),
        ],
        {"table": np.zeros((7, 3), np.float32)},
    )
    seen = np.concatenate([p.feeds["ids"].ravel() for p in probe_inputs(net, 30)])
    assert (seen.min(), seen.max(), seen.dtype) == (0, 6, np.int64)


def test_masks_have_a_one_in_every_row():
    inputs = [("attention_mask", TensorProto.INT64, ["batch", "seq"])]
    masks = [p.feeds["attention_mask"] for p in probe_inputs(program(inputs), 16)]
    assert all((m[:, 0] == 1).all() and set(np.unique(m)) <= {0, 1} for m in masks)
    assert any((m == 0).any() for m in masks)
    assert any((m == 1).all() for m in masks)


@pytest.mark.parametrize(
    "dtype", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL, TensorProto.INT8, TensorProto.STRING]
)
def test_other_dtypes_keep_theirs_and_stay_in_range(dtype):
    net = program([("x", dtype, ["batch", 4])])
    for probe in probe_inputs(net, 20):
        array = probe.feeds["x"]
        assert array.dtype == (object if dtype == TensorProto.STRING else net.inputs[0].numpy_dtype)
        if array.dtype == np.float16 and probe.kind != "nonfinite":
            assert np.isfinite(array).all()


def test_scalars_and_empty_dims():
    for shape in ([], [0, 3]):
        for probe in probe_inputs(program([("x", TensorProto.FLOAT, shape)]), 20):
            assert probe.feeds["x"].shape == tuple(shape)
