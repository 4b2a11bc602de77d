from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference

from lamina.analysis.analyze import analyze
from lamina.analysis.profile import profile
from lamina.backends.backend import Case, Target
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program

WIDTH, DEPTH = 16, 3
BLOCK_METRICS = {
    "block-influence",
    "branch-similarity",
    "relative-contribution",
    "angular-distance",
    "layer-input-modification",
}
METRIC_NAMES = BLOCK_METRICS | {
    "void-rate",
    "entropy-increase",
    "direct-matching",
    "linear-cka",
    "representation-quality",
    "lieq-diagnostics",
}
OPERATOR_METRICS = {"outlier-weight-count", "quantization-error-w8", "quantization-error-w4"}


def stacked_program() -> Program:
    """Three residual MLPs: ``x + relu(x A) B``."""
    rng = np.random.default_rng(6)
    x = ir.Value(name="x", shape=ir.Shape(["b", "t", WIDTH]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, weights, current = [], [], x
    for layer in range(DEPTH):
        operands = []
        for part in "ab":
            array = rng.normal(0, 0.2, (WIDTH, WIDTH)).astype(np.float32)
            value = ir.Value(name=f"w{part}{layer}", const_value=ir.Tensor(array, name=f"w{part}{layer}"))
            value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.FLOAT
            operands.append(value)
        weights += operands
        up = ir.node("MatMul", [current, operands[0]], name=f"up{layer}")
        relu = ir.node("Relu", [up.outputs[0]], name=f"relu{layer}")
        down = ir.node("MatMul", [relu.outputs[0], operands[1]], name=f"down{layer}")
        add = ir.node("Add", [current, down.outputs[0]], name=f"add{layer}")
        for node in (up, relu, down, add):
            node.outputs[0].name = f"{node.name}_out"
            node.outputs[0].shape, node.outputs[0].dtype = x.shape, ir.DataType.FLOAT
        nodes += [up, relu, down, add]
        current = add.outputs[0]
    graph = ir.Graph([x], [current], nodes=nodes, initializers=weights, opset_imports={"": 18}, name="stack")
    example = {"x": rng.normal(size=(2, 4, WIDTH)).astype(np.float32)}
    return Program(ir.Model(graph, ir_version=10), example=example)


def samples(rows: int = 12) -> Dataset:
    rng = np.random.default_rng(8)
    return Dataset({"x": rng.normal(size=(rows, 5, WIDTH)).astype(np.float32)}, {}, 4)


def test_parts_are_named_counted_and_rated() -> None:
    result = analyze(stacked_program(), samples())
    assert [b["kind"] for b in result["branches"]] == ["mlp"] * DEPTH
    for branch in result["branches"]:
        assert branch["parameters"] == 2 * WIDTH * WIDTH
        assert branch["flops"] == 2 * (2 * 5 * WIDTH * WIDTH) + 5 * WIDTH
        assert set(branch["metrics"]) == METRIC_NAMES
        assert branch["latency_s"] is None
    assert len(result["blocks"]) == DEPTH
    assert set(result["blocks"][0]["metrics"]) == BLOCK_METRICS
    assert [set(o["metrics"]) for o in result["operators"][:3]] == [OPERATOR_METRICS, set(), OPERATOR_METRICS]
    assert len(result["operators"]) == 4 * DEPTH
    assert result["shapes"] == {"x": [1, 5, WIDTH]}
    assert result["totals"]["parameters"] == 2 * DEPTH * WIDTH * WIDTH


def test_the_result_is_json() -> None:
    result = analyze(stacked_program(), samples(), target=Target())
    assert json.loads(json.dumps(result)) == result


def test_a_block_of_one_branch_rates_like_its_branch() -> None:
    result = analyze(stacked_program(), samples())
    block, branch = result["blocks"][0], result["branches"][0]
    assert block["members"] == [branch["name"]]
    assert block["metrics"] == pytest.approx({n: branch["metrics"][n] for n in BLOCK_METRICS}, rel=1e-4)


def test_without_data_there_are_costs_and_no_metrics() -> None:
    result = analyze(stacked_program())
    assert all(not b["metrics"] for b in result["branches"] + result["blocks"])
    assert result["shapes"] == {"x": [2, 4, WIDTH]}


def test_the_weightiest_case_gives_the_shapes() -> None:
    def case(tokens: int, weight: float) -> Case:
        return Case(f"1x{tokens}", {"x": np.zeros((1, tokens, WIDTH), dtype=np.float32)}, weight)

    result = analyze(stacked_program(), samples(), workload=(case(2, 0.3), case(9, 0.7)))
    assert result["shapes"] == {"x": [1, 9, WIDTH]}


def test_data_that_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="the data has no input 'x'"):
        analyze(stacked_program(), Dataset({"y": np.zeros((3, 5, WIDTH), dtype=np.float32)}, {}))


def test_the_profile_covers_every_product() -> None:
    program = stacked_program()
    found = profile(program, program.example, seconds=0.01)
    products = {n.name for n in program.graph if n.op_type == "MatMul"}
    assert products <= set(found.operators)
    assert set(found.operators) <= {n.name for n in program.graph}
    assert found.runs >= 5


@needs_reference
@pytest.mark.parametrize(
    ("file", "shapes", "kernel"),
    [
        ("resnet20_cifar10.onnx", {"x": (1, 3, 32, 32)}, "Conv"),
        ("kwt1_speech_commands.onnx", {"feats": (1, 98, 40)}, "MatMul"),
    ],
)
def test_fused_kernels_are_attributed_to_their_operators(
    file: str, shapes: dict[str, tuple[int, ...]], kernel: str
) -> None:
    from lamina.ir.capture import capture

    program = capture(models_dir / file)
    feeds = {name: np.ones(shape, dtype=np.float32) for name, shape in shapes.items()}
    found = profile(program, feeds, seconds=0.01)
    weighted = {
        n.name
        for n in program.graph
        if n.op_type == kernel and any(v is not None and v.is_initializer() for v in n.inputs)
    }
    assert weighted <= set(found.operators)
    assert set(found.other) <= {"ReorderInput", "ReorderOutput"}
