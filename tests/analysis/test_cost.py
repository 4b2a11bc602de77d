from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference

from lamina.analysis.cost import CostResult, cost, parameters, weight_bytes
from lamina.ir.program import Program

RNG = np.random.default_rng(1)


def one_node(
    op: str,
    arrays: Sequence[np.ndarray | None],
    attributes: Mapping[str, Any] | None = None,
    *,
    weights: Sequence[int] = (),
    outputs: int = 1,
    domain: str = "",
) -> CostResult:
    """The cost of a program of one node; ``weights`` are the positions that are initializers."""
    values: list[ir.Value | None] = []
    for i, array in enumerate(arrays):
        if array is None:
            values.append(None)
            continue
        value = ir.Value(name=f"v{i}", shape=ir.Shape(array.shape))
        value.dtype = ir.DataType.from_numpy(array.dtype)
        if i in weights:
            value.const_value = ir.Tensor(array, name=f"v{i}")
        values.append(value)
    node = ir.node(op, values, dict(attributes or {}), num_outputs=outputs, name="n", domain=domain)
    for i, output in enumerate(node.outputs):
        output.name = f"y{i}"
        output.dtype = ir.DataType.FLOAT
    given = [v for i, v in enumerate(values) if v is not None and i not in weights]
    kept = [v for i, v in enumerate(values) if v is not None and i in weights]
    graph = ir.Graph(
        given,
        [node.outputs[0]],
        nodes=[node],
        initializers=kept,
        opset_imports={"": 23 if op == "Attention" else 18, "com.microsoft": 1},
        name="g",
    )
    program = Program(ir.Model(graph, ir_version=10))
    feeds = {f"v{i}": a for i, a in enumerate(arrays) if a is not None and i not in weights}
    return cost(program, feeds)


def floats(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "flops"),
    [
        ("MatMul", [(2, 5, 7), (7, 3)], {}, 2 * 2 * 5 * 7 * 3),
        ("MatMul", [(4, 2, 5, 7), (4, 2, 7, 6)], {}, 2 * 4 * 2 * 5 * 7 * 6),
        ("MatMul", [(7,), (7, 3)], {}, 2 * 7 * 3),
        ("Gemm", [(7, 5), (3, 7), (3,)], {"transA": 1, "transB": 1}, 2 * 5 * 7 * 3 + 5 * 3),
        ("Conv", [(2, 4, 9, 9), (6, 4, 3, 3)], {}, 2 * 2 * 6 * 7 * 7 * 4 * 9),
        (
            "Conv",
            [(1, 4, 8, 8), (8, 2, 3, 3), (8,)],
            {"group": 2, "strides": [2, 2]},
            2 * 8 * 3 * 3 * 2 * 9 + 8 * 9,
        ),
        ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], {"strides": [2, 2]}, 2 * 4 * 25 * 3 * 4),
        ("LSTM", [(6, 2, 5), (1, 16, 5), (1, 16, 4)], {"hidden_size": 4}, 2 * 6 * 2 * 16 * 9 + 9 * 6 * 2 * 4),
        (
            "GRU",
            [(6, 2, 5), (2, 12, 5), (2, 12, 4)],
            {"hidden_size": 4, "direction": "bidirectional"},
            2 * 12 * 2 * 12 * 9 + 8 * 12 * 2 * 4,
        ),
        ("Einsum", [(2, 3, 5), (2, 5, 4)], {"equation": "bij,bjk->bik"}, 2 * 2 * 3 * 5 * 4),
        ("Einsum", [(2, 6, 3, 5), (5, 4)], {"equation": "...ij,jk->...ik"}, 2 * 2 * 6 * 3 * 5 * 4),
        ("Add", [(3, 4), (4,)], {}, 12),
        ("Relu", [(3, 4)], {}, 12),
        ("ReduceMean", [(3, 4)], {"keepdims": 0}, 12),
        ("Softmax", [(3, 4)], {}, 60),
        ("Transpose", [(3, 4)], {}, 0),
        ("AveragePool", [(1, 2, 6, 6)], {"kernel_shape": [3, 3]}, 2 * 16 * 9),
    ],
)
def test_operations_follow_from_shapes(op: str, shapes: list[Any], attributes: Any, flops: int) -> None:
    result = one_node(op, [floats(*s) for s in shapes], attributes)
    assert result.flops == flops
    assert result.estimated == ()
    assert result.operators[0].kind == op


def test_attention_counts_both_products_and_the_softmax() -> None:
    shapes = [(2, 4, 5, 8), (2, 4, 6, 8), (2, 4, 6, 10)]
    result = one_node("Attention", [floats(*s) for s in shapes])
    assert result.macs == 2 * 4 * 5 * 6 * (8 + 10)
    assert result.flops == 2 * result.macs + 5 * 2 * 4 * 5 * 6


def test_grouped_attention_of_rank_3() -> None:
    result = one_node(
        "Attention",
        [floats(2, 5, 32), floats(2, 6, 16), floats(2, 6, 16)],
        {"q_num_heads": 4, "kv_num_heads": 2},
    )
    assert result.macs == 2 * 4 * 5 * 6 * (8 + 8)


def test_an_operator_without_rule_is_listed() -> None:
    result = one_node("BlackmanWindow", [np.array(10, dtype=np.int64)])
    assert result.flops == 10
    assert result.estimated == ("BlackmanWindow",)


def _diamond() -> tuple[Program, dict[str, np.ndarray]]:
    """y = (reshape(relu(x)) * w) * w, and a weight nobody reads."""
    x = ir.Value(name="x", shape=ir.Shape(["n"]))
    x.dtype = ir.DataType.FLOAT
    weight = ir.Value(name="w", const_value=ir.Tensor(floats(100), name="w"))
    unused = ir.Value(name="dead", const_value=ir.Tensor(floats(50), name="dead"))
    shape = ir.Value(name="s", const_value=ir.Tensor(np.array([-1], dtype=np.int64), name="s"))
    relu = ir.node("Relu", [x], name="relu")
    view = ir.node("Reshape", [relu.outputs[0], shape], name="view")
    first = ir.node("Mul", [view.outputs[0], weight], name="first")
    second = ir.node("Mul", [first.outputs[0], weight], name="second")
    nodes = [relu, view, first, second]
    for node in nodes:
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].dtype = ir.DataType.FLOAT
    graph = ir.Graph(
        [x],
        [second.outputs[0]],
        nodes=nodes,
        initializers=[weight, unused, shape],
        opset_imports={"": 18},
        name="g",
    )
    return Program(ir.Model(graph, ir_version=10)), {"x": floats(100)}


def test_a_shared_weight_counts_once_and_a_dead_one_never() -> None:
    program, feeds = _diamond()
    result = cost(program, feeds)
    assert parameters(program) == result.parameters == 100
    assert weight_bytes(program) == result.weight_bytes == 400
    assert [o.parameters for o in result.operators] == [0, 0, 100, 100]
    assert [o.activation_bytes for o in result.operators] == [800, 800, 800, 800]


def test_peak_is_the_most_alive_at_once_and_views_are_free() -> None:
    program, feeds = _diamond()
    # x with relu_out; then relu_out (seen through the view) with first_out; then first_out with second_out.
    assert cost(program, feeds).peak_activation_bytes == 800
    program.graph.outputs.append(program.graph.inputs[0])
    assert cost(program, feeds).peak_activation_bytes == 1200


@needs_reference
@pytest.mark.parametrize(
    ("file", "shapes", "megamacs", "parameters"),
    [
        ("resnet20_cifar10.onnx", {"x": (1, 3, 32, 32)}, 40.6, 269_034),
        ("mobilenet_v1_025_imagenet.onnx", {"x": (1, 3, 224, 224)}, 41.0, 467_338),
    ],
)
def test_published_counts_come_out(file: str, shapes: Any, megamacs: float, parameters: int) -> None:
    from lamina.ir.capture import capture

    program = capture(models_dir / file)
    result = cost(program, {n: np.zeros(s, dtype=np.float32) for n, s in shapes.items()})
    assert result.macs / 1e6 == pytest.approx(megamacs, rel=0.005)
    assert result.parameters == parameters
    assert result.estimated == ()
