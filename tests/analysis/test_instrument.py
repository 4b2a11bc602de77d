from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lamina.analysis.instrument import InstrumentedSession, fixed_batch
from lamina.errors import BackendError, DataError
from lamina.ir.program import Program

RNG = np.random.default_rng(12)


def _program(weight: ir.TensorProtocol, *, scale: float | None = None) -> Program:
    """``y = x @ w``, the weight dequantized first where a scale is given."""
    rows = int(weight.shape[0])
    x = ir.Value(name="x", shape=ir.Shape(["b", rows]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="w", const_value=weight, shape=weight.shape, type=ir.TensorType(weight.dtype))
    nodes, weights, right = [], [w], w
    if scale is not None:
        s = ir.Value(name="s", const_value=ir.Tensor(np.array(scale, dtype=np.float32), name="s"))
        weights.append(s)
        nodes.append(ir.node("DequantizeLinear", [w, s], name="dequantize"))
        right = nodes[0].outputs[0]
        right.name = "dequantized"
    elif weight.dtype != ir.DataType.FLOAT:
        nodes.append(ir.node("Cast", [w], {"to": ir.DataType.FLOAT.value}, name="cast"))
        right = nodes[0].outputs[0]
        right.name = "cast_out"
    nodes.append(ir.node("MatMul", [x, right], name="matmul"))
    nodes.append(ir.node("Relu", [nodes[-1].outputs[0]], name="relu"))
    nodes[-2].outputs[0].name, nodes[-1].outputs[0].name = "product", "y"
    graph = ir.Graph(
        [x], [nodes[-1].outputs[0]], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="g"
    )
    return Program(ir.Model(graph, ir_version=10))


def _check(program: Program, expected: np.ndarray, tolerance: float = 1e-5) -> None:
    x = RNG.normal(size=(3, len(expected))).astype(np.float32)
    product, y = InstrumentedSession(program, ["product"], threads=1).run(["product", "y"], {"x": x})
    np.testing.assert_allclose(product, x @ expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(y, np.maximum(x @ expected, 0), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rows", [4, 200])
def test_small_and_large_weights_arrive(rows: int) -> None:
    array = RNG.normal(size=(rows, 7)).astype(np.float32)
    _check(_program(ir.Tensor(array, name="w")), array, 1e-4)


@pytest.mark.parametrize("dtype", ["FLOAT16", "BFLOAT16", "DOUBLE"])
def test_weights_of_other_widths_arrive(dtype: str) -> None:
    array = RNG.normal(size=(200, 7)).astype(ir.DataType[dtype].numpy())
    _check(_program(ir.Tensor(array, dtype=ir.DataType[dtype], name="w")), array.astype(np.float32), 1e-4)


@pytest.mark.parametrize("dtype", ["INT8", "INT4"])
def test_quantized_weights_arrive(dtype: str) -> None:
    kind = ir.DataType[dtype]
    integers = RNG.integers(-8, 8, size=(200, 16))
    weight = ir.Tensor(integers.astype(kind.numpy()), dtype=kind, name="w")
    _check(_program(weight, scale=0.125), integers.astype(np.float32) * 0.125, 1e-4)


@pytest.mark.parametrize("rows", [4, 200])
def test_weights_in_external_files_arrive(tmp_path: Path, rows: int) -> None:
    array = RNG.normal(size=(rows, 7)).astype(np.float32)
    model = _program(ir.Tensor(array, name="w")).model
    ir.save(model, tmp_path / "model.onnx", external_data="weights.bin", size_threshold_bytes=0)
    program = Program(ir.load(tmp_path / "model.onnx"))
    assert isinstance(program.graph.initializers["w"].const_value, ir.ExternalTensor)
    _check(program, array, 1e-4)
    assert isinstance(program.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_a_program_the_runtime_refuses_is_named() -> None:
    program = _program(ir.Tensor(RNG.normal(size=(4, 7)).astype(np.float32), name="w"))
    program.graph.node("relu").op_type = "NoSuchOperator"
    with pytest.raises(BackendError, match=r"ONNX Runtime refuses the program: .*NoSuchOperator"):
        InstrumentedSession(program)


def test_an_unknown_value_is_named() -> None:
    program = _program(ir.Tensor(RNG.normal(size=(4, 7)).astype(np.float32), name="w"))
    with pytest.raises(DataError, match="no value is called 'nope'"):
        InstrumentedSession(program, ["nope"])


def test_a_constant_batch_is_found_only_where_all_inputs_share_it() -> None:
    program = _program(ir.Tensor(RNG.normal(size=(4, 7)).astype(np.float32), name="w"))
    assert fixed_batch(program) is None
    program.graph.inputs[0].shape = ir.Shape([5, 4])
    assert fixed_batch(Program(program.model)) == 5


def test_a_runtime_that_takes_no_weights_from_memory_reads_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime as ort

    if hasattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory"):
        monkeypatch.delattr(ort.SessionOptions, "add_external_initializers_from_files_in_memory")
    array = RNG.normal(size=(200, 7)).astype(np.float32)
    _check(_program(ir.Tensor(array, name="w")), array, 1e-4)
