"""Where two models part: found by name in any graph, by value where names tell nothing."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import lamina
from lamina.comparison.divergence import _FIRST_BATCH, _Search
from lamina.errors import BackendError

WIDTH = 6


def deep(layers: int, *, broken: int | None = None, prefix: str = "", seed: int = 0) -> onnx.ModelProto:
    """Rotations and negations in a chain; one weight is a little off, ``prefix`` renames all inside."""
    rng = np.random.default_rng(seed)
    nodes, weights, last = [], [], "x"
    for i in range(layers):
        weight = np.linalg.qr(rng.standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
        if i == broken:
            weight = weight * np.float32(1.01)
        weights.append(numpy_helper.from_array(weight, f"{prefix}w{i}"))
        out = "y" if i == layers - 1 else f"{prefix}h{i}"
        nodes.append(helper.make_node("MatMul", [last, f"{prefix}w{i}"], [f"{prefix}m{i}"], f"{prefix}mm{i}"))
        nodes.append(helper.make_node("Neg", [f"{prefix}m{i}"], [out], f"{prefix}neg{i}"))
        last = out
    return built(nodes, weights)


def built(nodes, weights, outputs=("y",)) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("broken", [0, 1, 17, 38, 39])
def test_the_broken_layer_is_found_by_name(broken):
    found = lamina.compare(deep(40), deep(40, broken=broken), samples=2).first_divergence
    assert (found.name, found.node, found.operator) == (f"m{broken}", f"mm{broken}", "MatMul")
    assert (found.other_node, found.matched_by) == (f"mm{broken}", "name")
    assert found.agrees == ((f"h{broken - 1}",) if broken else ())
    assert found.max_rel == pytest.approx(0.01, rel=1e-2)


def test_runs_grow_with_the_logarithm():
    runs = [
        lamina.compare(deep(n), deep(n, broken=n // 3), samples=2).first_divergence.runs for n in (16, 256)
    ]
    assert runs[1] <= 1 + math.log2(2 * 256)
    assert runs[1] <= runs[0] + 4


@pytest.mark.parametrize("broken", [0, 3, 9])
def test_without_common_names_it_is_found_by_value(broken):
    """An export with other names: what agrees is recognized by what it computes."""
    found = lamina.compare(deep(10), deep(10, broken=broken, prefix="other_"), samples=2).first_divergence
    assert (found.name, found.node, found.operator) == (f"m{broken}", f"mm{broken}", "MatMul")
    assert (found.other_name, found.matched_by) == (f"other_m{broken}", "value")
    assert found.agrees == ((f"h{broken - 1}",) if broken else ())
    assert found.max_rel == pytest.approx(0.01, rel=1e-2)


def wide(branches: int, broken: int | None) -> onnx.ModelProto:
    """Parallel branches that meet in one Sum: the graph has no depth to bisect."""
    nodes, weights = [], []
    for i in range(branches):
        factor = np.float32(i + (1.5 if i == broken else 1.0))
        weights.append(numpy_helper.from_array(factor, f"f{i}"))
        nodes.append(helper.make_node("Mul", ["x", f"f{i}"], [f"p{i}"], f"mul{i}"))
        nodes.append(helper.make_node("Sin", [f"p{i}"], [f"s{i}"], f"sin{i}"))
    nodes.append(helper.make_node("Sum", [f"s{i}" for i in range(branches)], ["y"], "sum"))
    return built(nodes, weights)


@pytest.mark.parametrize("broken", [0, 40, 79])
def test_one_of_many_parallel_branches(broken):
    found = lamina.compare(wide(80, None), wide(80, broken), samples=2).first_divergence
    assert found.name == f"p{broken}"
    assert found.runs <= 2 + math.log2(160 / _FIRST_BATCH) + math.log2(160)


def test_a_fold_that_went_wrong_is_reported_at_the_tensor_both_have():
    """The first model's inner tensor that a fold removed is no divergence: the next common one is."""
    scale = numpy_helper.from_array(np.full(WIDTH, 2.0, np.float32), "scale")
    plain = built(
        [
            helper.make_node("Mul", ["x", "scale"], ["inner"], "scaling"),
            helper.make_node("Relu", ["x"], ["side"], "relu"),
            helper.make_node("Add", ["inner", "side"], ["joined"], "join"),
            helper.make_node("Tanh", ["joined"], ["y"], "tanh"),
        ],
        [scale],
    )
    folded = built(
        [
            helper.make_node("Relu", ["x"], ["side"], "relu"),
            helper.make_node("Add", ["x", "side"], ["joined"], "join"),
            helper.make_node("Tanh", ["joined"], ["y"], "tanh"),
        ],
        [],
    )
    found = lamina.compare(plain, folded, samples=2).first_divergence
    assert (found.name, found.node, found.agrees) == ("joined", "join", ("side",))


def test_what_a_subgraph_reads_counts_as_its_input():
    def model(factor: float) -> onnx.ModelProto:
        branch = [helper.make_node("Neg", ["h"], ["t"], "neg")]
        other = [helper.make_node("Abs", ["h"], ["e"], "abs")]
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in "te"]
        nodes = [
            helper.make_node("Mul", ["x", "f"], ["h"], "mul"),
            helper.make_node("ReduceSum", ["x"], ["total"], "total", keepdims=0),
            helper.make_node("Greater", ["total", "zero"], ["sign"], "sign"),
            helper.make_node(
                "If",
                ["sign"],
                ["y"],
                "choose",
                then_branch=helper.make_graph(branch, "then", [], info[:1]),
                else_branch=helper.make_graph(other, "else", [], info[1:]),
            ),
        ]
        weights = {"f": np.float32(factor), "zero": np.float32(0)}
        return built(nodes, [numpy_helper.from_array(a, n) for n, a in weights.items()])

    found = lamina.compare(model(1.0), model(1.1), samples=4).first_divergence
    assert (found.name, found.operator) == ("h", "Mul")


def test_the_worst_of_several_outputs_is_followed():
    def model(factor: float) -> onnx.ModelProto:
        nodes = [
            helper.make_node("Neg", ["x"], ["y"], "neg"),
            helper.make_node("Mul", ["x", "f"], ["z"], "mul"),
        ]
        return built(nodes, [numpy_helper.from_array(np.float32(factor), "f")], outputs=("y", "z"))

    found = lamina.compare(model(1.0), model(3.0), samples=4)
    assert [o.equal for o in found.outputs] == [True, False]
    assert found.first_divergence.name == "z"


def test_a_runtime_that_shows_no_inner_values_leaves_the_verdict(monkeypatch):
    def refuse(self, names):
        raise BackendError("no")

    monkeypatch.setattr(_Search, "differ", refuse)
    found = lamina.compare(deep(3), deep(3, broken=1), samples=2)
    assert not found.equal
    assert found.first_divergence is None
