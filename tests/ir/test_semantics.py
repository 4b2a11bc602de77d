"""The table of fenced operators, and the modes that fence an operator."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx_tools import branching, proto

from lamina.ir.capture import capture
from lamina.ir.semantics import FENCED, is_fenced, why_fenced


def test_every_standard_entry_is_an_operator() -> None:
    assert all(onnx.defs.has(op) for domain, op in FENCED if domain == "")


@pytest.mark.parametrize(
    "op", ["RandomNormal", "RandomUniformLike", "Bernoulli", "Multinomial", "Loop", "Scan", "If"]
)
def test_random_and_control_flow(op: str) -> None:
    assert is_fenced(ir.node(op, []))
    assert not is_fenced(ir.node(op, [], domain="someone.else"))


@pytest.mark.parametrize("op", ["MatMul", "Conv", "Identity", "Softmax"])
def test_pure_operators_are_free(op: str) -> None:
    assert why_fenced(ir.node(op, [])) is None


def _dropout(flag: np.ndarray | None, *, as_input: bool = False) -> ir.Node:
    weights = {"r": np.float32(0.5)}
    names = ["x", "r"]
    inputs: dict[str, list[int]] = {"x": [2]}
    if as_input:
        names.append("t")
    elif flag is not None:
        weights["t"] = flag
        names.append("t")
    model = proto([helper.make_node("Dropout", names, ["y"])], inputs, {"y": [2]}, weights)
    if as_input:
        model.graph.input.append(helper.make_tensor_value_info("t", onnx.TensorProto.BOOL, []))
    return capture(model).graph.node(0)


def test_dropout_is_fenced_unless_it_surely_passes_on() -> None:
    assert not is_fenced(_dropout(None))
    assert not is_fenced(_dropout(np.array(False)))
    assert is_fenced(_dropout(np.array(True)))
    assert is_fenced(_dropout(None, as_input=True))


def test_batch_norm_is_fenced_in_training_mode() -> None:
    x = ir.Value(name="x")
    assert not is_fenced(ir.node("BatchNormalization", [x] * 5))
    assert is_fenced(ir.node("BatchNormalization", [x] * 5, {"training_mode": 1}))


def test_captured_control_flow_is_fenced() -> None:
    assert [n.op_type for n in capture(branching()).graph if is_fenced(n)] == ["If"]
