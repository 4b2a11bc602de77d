from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import Net

from lamina.analysis.attention import ranks
from lamina.analysis.metrics import scores
from lamina.analysis.needs import Need
from lamina.analysis.statistics import BranchProbe, collect
from lamina.data import Dataset
from lamina.ir.program import Program


def _attention(tokens: int = 6) -> Program:
    """``x + softmax(x x') x``; one map a sample."""
    net = Net()
    x = net.input("x", ["b", tokens, 3])
    turned = net.op("Transpose", x, perm=[0, 2, 1])
    weights = net.op("Softmax", net.op("MatMul", x, turned), axis=-1)
    y = net.op("Add", x, net.op("MatMul", weights, x))
    graph = ir.Graph(net.inputs, [y], nodes=net.nodes, opset_imports=net.domains)
    return Program(ir.Model(graph, ir_version=10))


def _probe(program: Program) -> BranchProbe:
    names = [n.name or "" for n in program.graph]
    return BranchProbe("a", "x", None, program.outputs[0].name, nodes=tuple(names))


def test_the_rank_is_that_of_the_map() -> None:
    program = _attention()
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    x[1] = x[1, :1]  # all tokens alike: rank 1
    x[2, 3:] = x[2, :3]  # three kinds of tokens: rank 3
    x[3] = 0
    data = Dataset({"x": x}, {}, 8)
    statistics = collect(program, data, branches=[_probe(program)], needs={Need.ATTENTION}, threads=1)
    expected = []
    for sample in x.astype(np.float64):
        e = np.exp(sample @ sample.T)
        expected.append(np.linalg.matrix_rank(e / e.sum(1, keepdims=True), tol=1e-6))
    assert expected[1:] == [1, 3, 1]
    assert scores(program, statistics, "attention-rank") == {"a": pytest.approx(np.mean(expected))}
    assert statistics.attention["a"].maps == 4


def test_padding_leaves_the_map() -> None:
    program = _attention()
    x = np.random.default_rng(0).normal(size=(4, 6, 3)).astype(np.float32)
    data = Dataset({"x": x}, {"attention_mask": np.array([[1, 1, 0, 0, 0, 0]] * 4)}, 8)
    statistics = collect(program, data, branches=[_probe(program)], needs={Need.ATTENTION}, threads=1)
    assert statistics.attention["a"].rank == 2
    assert statistics.attention["a"].share == 1.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7)])
def test_ranks_agree_with_singular_values(shape: tuple[int, int]) -> None:
    random = np.random.default_rng(1)
    made = [random.normal(size=(shape[0], k)) @ random.normal(size=(k, shape[1])) for k in range(1, 6)]
    maps = np.stack(made).astype(np.float32)
    expected = np.linalg.matrix_rank(maps.astype(np.float64), tol=None, rtol=max(shape) * 2.0**-23)
    assert ranks(maps).tolist() == expected.tolist() == [1, 2, 3, 4, 5]
    assert ranks(np.zeros((1, *shape), np.float32)).tolist() == [0]
