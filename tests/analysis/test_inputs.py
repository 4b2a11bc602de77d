"""Second moments and quantization errors against the operators' own arithmetic in float64."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import Net

from lamina.analysis.inputs import SecondMoments
from lamina.analysis.metrics import scores
from lamina.analysis.needs import Looks, Need
from lamina.analysis.operators import weighted_operators
from lamina.analysis.statistics import Statistics, collect
from lamina.analysis.weight_error import quantization_errors, round_to_nearest
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes

ALL = Looks(inputs=10**6, kept=10**6, patched=10**6, patched_of=1, pixels=10**6)


def _program(net: Net, output: ir.Value) -> Program:
    graph = ir.Graph(
        net.inputs, [output], nodes=net.nodes, initializers=net.initializers, opset_imports=net.domains
    )
    return Program(ir.Model(graph, ir_version=10))


def _inputs(program: Program, x: np.ndarray, looks: Looks = ALL, **extras: np.ndarray) -> Statistics:
    data = Dataset({"x": x}, extras, len(x))
    return collect(program, data, needs={Need.INPUTS}, looks=looks, threads=1)


def _matrix(kind: str) -> tuple[Program, np.ndarray]:
    net = Net(seed=5)
    x = net.input("x", ["b", 4, 6])
    if kind == "matmul":
        return _program(net, net.op("MatMul", x, net.weight(6, 3))), np.random.default_rng(1).normal(
            size=(5, 4, 6)
        ).astype(np.float32)
    flat = net.op("Reshape", x, net.ints(-1, 6))
    flat.shape, flat.dtype = ir.Shape(["rows", 6]), ir.DataType.FLOAT
    transposed = kind == "gemm-transposed"
    weight = net.weight(3, 6) if transposed else net.weight(6, 3)
    y = net.op("Gemm", flat, weight, transB=int(transposed))
    return _program(net, y), np.random.default_rng(1).normal(size=(5, 4, 6)).astype(np.float32)


def _own(program: Program, x: np.ndarray) -> tuple[str, np.ndarray]:
    """Name of the only operator and its output without bias, in float64, [vectors, out]."""
    found, _ = weighted_operators(program, observed_shapes(program, {"x": x}))
    ((name, operator),) = found.items()
    return name, x.reshape(-1, 6).astype(np.float64) @ operator.matrices(program)[0].T


@pytest.mark.parametrize("kind", ["matmul", "gemm", "gemm-transposed"])
def test_second_moments_of_a_matrix(kind: str) -> None:
    program, x = _matrix(kind)
    name, output = _own(program, x)
    seen = _inputs(program, x).inputs[name]
    flat = x.reshape(-1, 6).astype(np.float64)
    assert seen.vectors == 20
    assert seen.moments[0] == pytest.approx(flat.T @ flat, rel=1e-5)
    assert (seen.minimum, seen.maximum) == (x.min(), x.max())
    matrix = weighted_operators(program, observed_shapes(program, {"x": x}))[0][name].matrices(program)[0]
    assert np.trace(matrix @ seen.moments[0] @ matrix.T) == pytest.approx(np.square(output).sum(), rel=1e-5)


CONVS = {
    "plain": ((3, 8, 9), (5, 3, 3, 3), {}),
    "padded": ((3, 8, 9), (5, 3, 3, 3), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
    "dilated": ((3, 9, 9), (5, 3, 3, 2), {"dilations": [2, 3], "pads": [1, 1, 1, 1]}),
    "same": ((3, 8, 9), (5, 3, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "grouped": ((4, 6, 6), (6, 2, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ((4, 6, 6), (4, 1, 3, 3), {"group": 4}),
    "one-dimensional": ((3, 11), (5, 3, 4), {"strides": [3], "pads": [2, 1]}),
}


@pytest.mark.parametrize("kind", CONVS)
def test_the_output_error_of_a_rounded_kernel_is_that_of_running_it(kind: str) -> None:
    space, kernel, attributes = CONVS[kind]
    net = Net(seed=6)
    weight = net.weight(*kernel)
    program = _program(net, net.op("Conv", net.input("x", ["b", *space]), weight, **attributes))
    x = np.random.default_rng(1).normal(0.2, 1, size=(4, *space)).astype(np.float32)
    statistics = _inputs(program, x)
    ((name, found),) = quantization_errors(program, statistics, bits=(4,)).items()
    operator = statistics.operators[name]
    stored = weight.const_value.numpy()
    rounded = round_to_nearest(4)(operator.matrices(program)).reshape(kernel)
    outputs = [_run(program, weight, w, x) for w in (stored, rounded.astype(np.float32))]
    expected = np.square(outputs[1] - outputs[0]).sum() / np.square(outputs[0]).sum()
    assert found[4].output == pytest.approx(expected, rel=1e-4)
    assert found[4].weight == pytest.approx(
        np.square(rounded - stored).sum() / np.square(stored).sum(), rel=1e-5
    )


def _run(program: Program, weight: ir.Value, array: np.ndarray, x: np.ndarray) -> np.ndarray:
    from lamina.analysis.instrument import InstrumentedSession

    clone = program.clone()
    clone.graph.initializers[weight.name or ""].const_value = ir.Tensor(array, name=weight.name)
    (output,) = InstrumentedSession(clone, threads=1).run([program.outputs[0].name], {"x": x})
    return output.astype(np.float64)


def test_the_activation_error_is_that_of_rounded_inputs() -> None:
    program, x = _matrix("matmul")
    name, output = _own(program, x)
    errors = quantization_errors(program, _inputs(program, x), bits=(4,))[name][4]
    low, high = float(x.min()), float(x.max())
    scale = (high - low) / 15
    zero = np.rint(-low / scale)
    rounded = (np.clip(np.rint(x / scale) + zero, 0, 15) - zero) * scale
    matrix = _inputs(program, x).operators[name].matrices(program)[0]
    changed = rounded.reshape(-1, 6) @ matrix.T - output
    assert errors.activation == pytest.approx(np.square(changed).sum() / np.square(output).sum(), rel=1e-4)


def test_fewer_bits_are_never_better_and_scores_are_output_errors() -> None:
    program, x = _matrix("matmul")
    statistics = _inputs(program, x)
    (errors,) = quantization_errors(program, statistics).values()
    assert errors[8].output < errors[4].output < errors[3].output < errors[2].output
    ((_, score),) = scores(program, statistics, "quantization-error-w4").items()
    assert score == errors[4].output


def test_outlier_weight_count_is_its_definition() -> None:
    program, x = _matrix("matmul")
    statistics = _inputs(program, x)
    ((name, score),) = scores(program, statistics, "outlier-weight-count").items()
    weights = statistics.operators[name].matrices(program)
    expected = np.mean([abs(w - weights.mean()) > weights.std() for w in weights.reshape(-1)])
    assert score == expected
    assert 0 < score < 1


def test_only_some_vectors_are_taken_and_padding_never() -> None:
    program, x = _matrix("matmul")
    x = np.tile(x, (8, 1, 1))
    x[:, 3] = 1e6
    mask = np.array([[1, 1, 1, 0]] * len(x), np.int64)
    (seen,) = _inputs(program, x, Looks(inputs=30, kept=7), attention_mask=mask).inputs.values()
    assert (seen.vectors, len(seen.kept)) == (30, 7)
    assert seen.maximum < 10


def test_blocks_do_not_change_the_sum() -> None:
    vectors = np.random.default_rng(0).normal(size=(1300, 1, 4)).astype(np.float32)
    many, one = SecondMoments(1, 4, 0), SecondMoments(1, 4, 0)
    for start in range(0, 1300, 37):
        many.add(vectors[start : start + 37], 0)
    one.add(vectors, 0)
    wide = vectors[:, 0].astype(np.float64)
    assert many.result().moments[0] == pytest.approx(wide.T @ wide, rel=1e-5)
    assert one.result().moments[0] == pytest.approx(wide.T @ wide, rel=1e-5)


def test_a_weight_left_of_the_activation_is_left_out_with_a_reason() -> None:
    net = Net()
    program = _program(net, net.op("MatMul", net.weight(3, 4), net.input("x", ["b", 4, 6])))
    statistics = _inputs(program, np.zeros((2, 4, 6), np.float32))
    assert statistics.skipped == {"node_matmul": "its weight stands left of the activation"}


@pytest.mark.parametrize("kind", ["matmul", "gemm"])
def test_vectors_alone_are_those_of_the_moments(kind: str) -> None:
    program, x = _matrix(kind)
    data = Dataset({"x": x}, {}, len(x))
    bare = collect(program, data, needs={Need.VECTORS}, looks=ALL, threads=1).inputs
    for name, whole in _inputs(program, x).inputs.items():
        assert bare[name].moments.size == 0
        np.testing.assert_array_equal(bare[name].kept, whole.kept)
        assert bare[name].vectors == whole.vectors


def test_the_reach_of_each_input_is_exact() -> None:
    program, x = _matrix("matmul")
    (stat,) = _inputs(program, x).inputs.values()
    np.testing.assert_array_equal(stat.lows[0], x.reshape(-1, 6).min(axis=0))
    np.testing.assert_array_equal(stat.highs[0], x.reshape(-1, 6).max(axis=0))
    assert (stat.minimum, stat.maximum) == (x.min(), x.max())
