"""One small test for each bug that random models found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import proto, run

from lamina.analysis.statistics import Statistics
from lamina.ir.capture import capture
from lamina.ir.io import load, save_model
from lamina.ir.program import Program
from lamina.passes.drop_branch import DropBranch
from lamina.passes.fold import fold
from lamina.passes.pass_ import Site
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.planner.space import Space, build_space
from lamina.planner.supergraph import FLAGS, build_supergraph

FEEDS = {"x": np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)}


def _undone(records: list[object]) -> list[str]:
    return [str(r) for r in records if "undone" in str(r)]


def test_two_outputs_that_are_the_same_value() -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Identity", ["r"], ["i"]),
        helper.make_node("Identity", ["i"], ["y"]),
        helper.make_node("Identity", ["r"], ["z"]),
    ]
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 4], "z": ["n", 4]})
    folded, _, records = fold(capture(model))
    assert not _undone(records)
    assert len(folded.graph) == 2
    for got, expected in zip(run(folded.model, FEEDS), run(model, FEEDS), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_subgraph_that_hands_an_outer_value_on_through_two_identities() -> None:
    def branch(label: str) -> object:
        nodes = [
            helper.make_node("Identity", ["x"], [f"{label}_a"]),
            helper.make_node("Identity", [f"{label}_a"], [f"{label}_b"]),
        ]
        return helper.make_graph(
            nodes, label, [], [helper.make_tensor_value_info(f"{label}_b", TensorProto.FLOAT, None)]
        )

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Greater", ["s", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["y"], then_branch=branch("t"), else_branch=branch("e")),
    ]
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 4]}, {"zero": np.float32(0)})
    folded, _, _ = fold(capture(model))
    np.testing.assert_array_equal(run(folded.model, FEEDS)[0], FEEDS["x"])


def test_a_materialized_reshape_below_opset_14_has_no_allowzero() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["y"]),
    ]
    weights = {"zero": np.array(0), "axes": np.array([0]), "rest": np.array([2, 2])}
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 2, 2]}, weights, opset=13)
    folded, _, _ = fold(capture(model))
    np.testing.assert_array_equal(run(folded.model, FEEDS)[0], FEEDS["x"].reshape(2, 2, 2))


def _two_branches() -> Program:
    """``x + f(x)`` and another branch on top, both sums handed out, and the input too."""
    rng = np.random.default_rng(1)
    weights = {k: rng.standard_normal((4, 4)).astype(np.float32) for k in ("w1", "w2")}
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"], "m1"),
        helper.make_node("Relu", ["m1"], ["r1"], "r1"),
        helper.make_node("Add", ["x", "r1"], ["s1"], "s1"),
        helper.make_node("MatMul", ["s1", "w2"], ["m2"], "m2"),
        helper.make_node("Relu", ["m2"], ["r2"], "r2"),
        helper.make_node("Add", ["s1", "r2"], ["s2"], "s2"),
    ]
    return capture(proto(nodes, {"x": ["n", 4]}, {"s2": ["n", 4], "x": ["n", 4]}, weights))


def _drops(program: Program) -> list[Move]:
    transform = DropBranch()
    sites = [s for s in transform.sites(program) if isinstance(s, Site)]
    return [Move(s, transform.options(s, program, None, None)[0]) for s in sites]


def test_dropping_an_output_sum_before_the_sum_it_reads() -> None:
    program = _two_branches()
    moves = _drops(program)
    assert len(moves) == 2
    for order in (moves, moves[::-1]):
        dropped = apply_moves(program, order)
        assert [p.name for p in dropped.outputs] == ["s2", "x"]
        np.testing.assert_array_equal(run(dropped.model, FEEDS)[0], FEEDS["x"])


def test_quantizing_what_a_drop_gave_the_name_of_an_output() -> None:
    """The first sum becomes the output when the second branch goes; its product is stored in int8 as well."""
    rng = np.random.default_rng(3)
    weights = {k: rng.standard_normal((n, 32)).astype(np.float32) for k, n in (("w0", 4), ("w2", 32))}
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["s"], "m0"),
        helper.make_node("MatMul", ["s", "w2"], ["m2"], "m2"),
        helper.make_node("Relu", ["m2"], ["r2"], "r2"),
        helper.make_node("Add", ["s", "r2"], ["y"], "sum"),
    ]
    program = capture(proto(nodes, {"x": ["n", 4]}, {"y": ["n", 32]}, weights))
    quantize = Quantize(forms=("float16",), minimum_reduction=1)
    sites = [s for s in quantize.sites(program) if isinstance(s, Site) and s.name == "m0"]
    moves = [Move(s, quantize.options(s, program, Statistics(0), None)[0]) for s in sites]
    assert moves
    applied = apply_moves(program, [*_drops(program), *moves])
    assert [p.name for p in applied.outputs] == ["y"]
    half = weights["w0"].astype(np.float16).astype(np.float32)
    np.testing.assert_allclose(run(applied.model, FEEDS)[0], FEEDS["x"] @ half, rtol=1e-4, atol=1e-5)


def test_a_supergraph_of_a_program_that_hands_an_input_out() -> None:
    program = _two_branches()
    transform = DropBranch()
    space: Space = build_space(program, [transform], Statistics(0), None)  # type: ignore[arg-type]
    graph = build_supergraph(space)
    expected = run(program.model, FEEDS)
    got = run(graph.model, {**FEEDS, FLAGS: graph.flags(space.nothing)})
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_supergraph_of_a_program_with_an_operator_nobody_reads() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["unread"]), helper.make_node("Relu", ["x"], ["y"])]
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 4]})
    weight = np.random.default_rng(0).standard_normal((4, 32)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    program = capture(model)
    space: Space = build_space(program, [Quantize()], Statistics(0), None)  # type: ignore[arg-type]
    assert space.choices
    graph = build_supergraph(space)
    genome = tuple(len(c.options) for c in space.choices)
    for chosen in (space.nothing, genome):
        (got,) = run(graph.model, {**FEEDS, FLAGS: graph.flags(chosen)})
        np.testing.assert_array_equal(got, run(program.model, FEEDS)[0])


def test_dims_that_inference_made_names_up_for_are_not_equal() -> None:
    """The first half of the last axis; nothing is known of any dim, and no two unknown ones are the same."""
    nodes = [
        helper.make_node("Gelu", ["x"], ["g"], domain="com.microsoft"),
        helper.make_node("Reshape", ["g", "split"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("Slice", ["t", "zero", "two", "last", "one"], ["y"]),
        helper.make_node("Slice", ["t", "two", "big", "last", "one"], ["z"]),
        helper.make_node("Add", ["y", "z"], ["s"]),
    ]
    weights = {
        "split": np.array([0, -1, 4]),
        "zero": np.array([0]),
        "two": np.array([2]),
        "last": np.array([1]),
        "one": np.array([1]),
        "big": np.array([2**63 - 1]),
    }
    model = proto(nodes, {"x": ["n", "m"]}, {"s": [None, None, None]}, weights, opset=13)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    program = capture(model)
    assert "unk__" not in "".join(str(v.shape) for n in program.graph for v in n.outputs)
    folded, _, _ = fold(program)
    np.testing.assert_allclose(run(folded.model, FEEDS)[0], run(model, FEEDS)[0], rtol=1e-6)


def test_an_input_that_is_an_output_keeps_the_shape_it_has_as_an_input() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = proto(nodes, {"x": ["n", 4]}, {"y": ["n", 4], "x": ["n", 4]})
    model.graph.output[1].type.tensor_type.ClearField("shape")
    program = capture(model)
    assert program.inputs[0].shape == ("n", 4)
    assert fold(program)[0].outputs == program.outputs


def test_a_constant_output_keeps_its_open_dims_when_saved_and_loaded(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Expand", ["one", "sizes"], ["y"]),
        helper.make_node("Add", ["y", "x"], ["z"]),
    ]
    model = proto(nodes, {"x": [2, 3]}, {"y": [None, None], "z": [2, 3]})
    for name, array in (("one", np.ones(1, np.float32)), ("sizes", np.array([2, 3], np.int64))):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    folded, _, _ = fold(capture(model))
    save_model(folded.model, tmp_path / "m.onnx")
    loaded = load(tmp_path / "m.onnx")
    assert loaded.outputs == folded.outputs
    assert loaded.fingerprint == folded.fingerprint


@pytest.mark.parametrize("fed", [False, True])
def test_a_row_masked_by_the_lowest_float_throughout_stays_the_mean(fed: bool) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((3, 3), np.float32)
    mask[0] = mask[2, 0] = np.finfo(np.float32).min
    nodes = [
        helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "kt"], ["s"]),
        helper.make_node("Add", ["s", "m"], ["a"]),
        helper.make_node("Softmax", ["a"], ["p"]),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    shape = ["n", 2, 3, 4]
    inputs = {name: shape for name in "qkv"} | ({"m": [3, 3]} if fed else {})
    model = proto(nodes, inputs, {"y": shape})
    if not fed:
        model.graph.initializer.append(numpy_helper.from_array(mask, "m"))
    program = capture(model)
    folded, names, _ = fold(program, forms=["fuse_attention"])
    assert "fuse_attention" in names
    feeds = {n: rng.standard_normal((2, 2, 3, 4)).astype(np.float32) for n in "qkv"} | (
        {"m": mask} if fed else {}
    )
    np.testing.assert_allclose(
        run(folded.model, feeds)[0], run(program.model, feeds)[0], rtol=1e-5, atol=1e-6
    )


def test_a_product_composed_below_a_bias_that_adds_an_axis_has_the_shape_of_the_product() -> None:
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["xa"]),
        helper.make_node("Add", ["xa", "wide"], ["biased"]),
        helper.make_node("MatMul", ["biased", "b"], ["y"]),
        helper.make_node("MatMul", ["biased", "c"], ["zc"]),
        helper.make_node("Add", ["zc", "flat"], ["z"]),
    ]
    weights = {n: rng.standard_normal((4, 4)).astype(np.float32) for n in "abc"}
    biases = {"wide": rng.standard_normal((1, 3, 4)), "flat": rng.standard_normal(4)}
    weights |= {n: v.astype(np.float32) for n, v in biases.items()}
    for kept in ({"y": [1, 3, 4]}, {"z": [1, 3, 4]}):
        used = [n for n in nodes if "z" in kept or n.output[0] in ("xa", "biased", "y")]
        used = [n for n in used if "z" not in kept or n.output[0] != "y"]
        model = proto(used, {"x": [1, 4]}, kept, weights)
        folded, _, records = fold(capture(model))
        assert not _undone(records)
        product = next(n for n in folded.graph if n.op_type == "MatMul")
        assert sum(n.op_type == "MatMul" for n in folded.graph) == 1
        assert list(product.outputs[0].shape or []) == [1, 4]
        feeds = {"x": FEEDS["x"][:1]}
        np.testing.assert_allclose(run(folded.model, feeds)[0], run(model, feeds)[0], rtol=1e-5, atol=1e-6)
