"""Every rule against the operators' own cases: onnx's node tests with inputs stored and outputs summed up.

Nothing at the interface holds an axis then, so whatever an operator's rule lets go is cut, run, and compared
with the same channels zeroed in the sum.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from coupling_tools import prove, run
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from onnx_cases import Case, cases

from lamina.analysis.coupling import coupled_groups
from lamina.errors import LaminaError
from lamina.ir.capture import capture
from lamina.ir.program import Program

MOST_GROUPS = 4
# Operators whose rule must have been cut by at least one case; the suite has too few axes for some others.
_PROVEN = """
    Add Attention BatchNormalization Clip Concat ConvTranspose DepthToSpace Expand Flatten Gather Gemm
    GlobalAveragePool GroupNormalization InstanceNormalization LayerNormalization MatMul MaxPool Mul PRelu
    Pad RMSNormalization ReduceMean ReduceSum Reshape Slice Softmax SpaceToDepth Split Squeeze Tile Transpose
    Unsqueeze Where
"""
# the fixture runs the whole node suite
pytestmark = pytest.mark.slow


def _summed(case: Case) -> onnx.ModelProto | None:
    """The model with its inputs stored and the squares of each float output summed."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    graph = model.graph
    feeds = case.data_sets[0][0]
    if any(not isinstance(a, np.ndarray) or a.dtype.kind not in "fiub" for a in feeds.values()):
        return None
    stored = [numpy_helper.from_array(a, n) for n, a in feeds.items()]
    del graph.input[:]
    graph.initializer.extend(stored)
    graph.initializer.append(numpy_helper.from_array(np.float32(1), "one"))
    _weigh(graph, {n for n, a in feeds.items() if a.dtype == np.float32})
    kept = [o for o in graph.output if o.type.tensor_type.elem_type == TensorProto.FLOAT]
    others = [o for o in graph.output if o.type.tensor_type.elem_type != TensorProto.FLOAT]
    version = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if not kept or version < 13:
        return None
    del graph.output[:]
    graph.output.extend(others)
    for output in kept:
        total = f"{output.name}_total"
        graph.node.append(helper.make_node("ReduceSumSquare", [output.name], [total], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(total, TensorProto.FLOAT, []))
    return model


def _weigh(graph: onnx.GraphProto, names: set[str]) -> None:
    """Multiply stored inputs by one, so that whatever reads them they are weights to begin from."""
    for name in sorted(names):
        for node in graph.node:
            for place, read in enumerate(node.input):
                if read == name:
                    node.input[place] = f"{name}_weighed"
        graph.node.insert(0, helper.make_node("Mul", [name, "one"], [f"{name}_weighed"]))


def _program(case: Case) -> Program | None:
    model = _summed(case) if case.data_sets else None
    if model is None:
        return None
    try:
        program = capture(model)
        finite = all(np.isfinite(a).all() for a in run(program, {}).values() if a.dtype.kind == "f")
    except Exception:  # what onnxruntime lacks, or capture refuses, is no case here
        return None
    return program if finite else None


@pytest.fixture(scope="module")
def proven() -> tuple[Counter[str], list[str]]:
    """Operator -> groups proven, and what went wrong."""
    counts: Counter[str] = Counter()
    wrong = []
    for case in cases("node"):
        program = None if "_expanded" in case.name else _program(case)
        if program is None:
            continue
        op = case.model.graph.node[0].op_type
        try:
            found = coupled_groups(program, {})
        except LaminaError:
            continue
        for group in found.groups[:MOST_GROUPS]:
            for unit in {0, group.units - 1} if group.units > 1 else {0}:
                try:
                    gap = prove(program, found, {group.name: [unit]}, {}, check=False)
                except Exception as error:
                    wrong.append(f"{case.name} {group.name}: {type(error).__name__} {str(error)[:200]}")
                    continue
                if gap is not None and gap > 1e-4:
                    wrong.append(f"{case.name} {group.name}: differs by {gap:.3g}")
                counts[op] += 1
    return counts, wrong


def test_no_rule_cuts_what_it_must_not(proven: tuple[Counter[str], list[str]]) -> None:
    assert proven[1] == []


def test_the_suite_reaches_the_rules(proven: tuple[Counter[str], list[str]]) -> None:
    assert set(_PROVEN.split()) - set(proven[0]) == set()
