"""Verification: whole programs pass, each broken invariant is named with pass and node."""

from __future__ import annotations

import time
from collections.abc import Callable

import onnx_ir as ir
import pytest
from onnx_tools import branching, mlp

from lamina.errors import VerificationError
from lamina.ir.capture import capture
from lamina.ir.verify import check, verify_structure


@pytest.mark.parametrize("make", [mlp, branching])
def test_captured_programs_are_whole(make: object) -> None:
    program = capture(make())  # type: ignore[operator]
    for subject in (program, program.model, program.clone()):
        verify_structure(subject)
        check(subject)


def _node(model: ir.Model, name: str) -> ir.Node:
    return next(n for n in model.graph if n.name == name)


def _early(model: ir.Model) -> None:
    node = _node(model, "down")
    model.graph.remove(node)
    model.graph.insert_before(_node(model, "up"), node)


def _removed(model: ir.Model) -> None:
    model.graph.remove(_node(model, "relu"))


def _no_data(model: ir.Model) -> None:
    model.graph.initializers["w1"].const_value = None


def _unregistered(model: ir.Model) -> None:
    del model.graph.initializers["w1"]


def _same_value_name(model: ir.Model) -> None:
    _node(model, "relu").outputs[0].name = "h1"


def _same_node_name(model: ir.Model) -> None:
    _node(model, "relu").name = "up"


def _nameless(model: ir.Model) -> None:
    _node(model, "relu").name = ""


def _nameless_value(model: ir.Model) -> None:
    _node(model, "relu").outputs[0].name = ""


def _too_many_inputs(model: ir.Model) -> None:
    relu = _node(model, "relu")
    relu.resize_inputs(2)
    relu.replace_input_with(1, model.graph.inputs[0])


def _no_such_operator(model: ir.Model) -> None:
    _node(model, "relu").op_type = "Rleu"


def _foreign_output(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT))


def _no_outputs(model: ir.Model) -> None:
    model.graph.outputs.clear()


def _untyped_output(model: ir.Model) -> None:
    model.graph.outputs[0].type = None


@pytest.mark.parametrize(
    ("damage", "what", "where"),
    [
        (
            _early,
            "value 'h3' is used before it is defined, or out of its scope",
            "MatMul 'down', input 0; defined by Relu 'relu' at position 4, used at 1",
        ),
        (
            _removed,
            "value 'h3' is used after its node was removed",
            "MatMul 'down', input 0; defined by Relu 'relu', which is in no graph",
        ),
        (_no_data, "initializer 'w1' has no data", "the graph's initializers"),
        (
            _unregistered,
            "value 'w1' is used but never defined",
            "MatMul 'up', input 1; defined by nothing",
        ),
        (_same_value_name, "two values are called 'h1'", "Relu 'relu'"),
        (_same_node_name, "two nodes are called 'up'", "Relu 'up'"),
        (_nameless, "a Relu node has no name", "Relu 'h3'"),
        (_nameless_value, "a value that is read has no name", "Relu 'relu'"),
        (
            _too_many_inputs,
            "Relu 'relu' has 2 inputs and 1 outputs, expected 1 to 1 and 1 to 1",
            "Relu 'relu'",
        ),
        (_no_such_operator, "opset 18 has no operator 'Rleu'", "Rleu 'relu'"),
        (_foreign_output, "output 'y' is produced by nothing in scope", "the graph's outputs"),
        (_no_outputs, "the graph has no outputs", "its interface"),
        (_untyped_output, "output 'y' has no type", "its interface"),
    ],
)
def test_broken_invariants_are_named(damage: Callable[[ir.Model], None], what: str, where: str) -> None:
    model = capture(mlp()).clone().model
    damage(model)
    with pytest.raises(VerificationError) as caught:
        verify_structure(model, "fold-something")
    assert str(caught.value) == (
        f"after fold-something: {what}\n  at {where}\n  this is a bug in the pass: report it with the model"
    )


def test_a_value_may_not_leave_its_subgraph() -> None:
    model = capture(branching()).clone().model
    choose = next(n for n in model.graph if n.op_type == "If")
    inner = choose.attributes["then_branch"].as_graph().node(0).outputs[0]
    model.graph.append(ir.node("Relu", [inner], name="thief"))
    with pytest.raises(VerificationError, match="or out of its scope"):
        verify_structure(model)


def test_subgraphs_may_not_read_what_comes_later() -> None:
    model = capture(branching()).clone().model
    choose = next(n for n in model.graph if n.op_type == "If")
    late = ir.node("Relu", [model.graph.inputs[0]], name="late")
    late.outputs[0].name = "late_out"
    model.graph.append(late)
    choose.attributes["then_branch"].as_graph().node(0).replace_input_with(0, late.outputs[0])
    with pytest.raises(VerificationError, match="'late_out' is used before it is defined"):
        verify_structure(model)


def test_check_finds_contradictions() -> None:
    program = capture(mlp()).clone()
    value = _node(program.model, "up").outputs[0]
    value.shape = ir.Shape(["batch", 99])
    with pytest.raises(
        VerificationError, match=r"value 'h1' has shape \[batch,99\] but inferred as \[None, 16\]"
    ):
        check(program)
    value.shape = ir.Shape(["batch", 16])
    value.dtype = ir.DataType.INT64
    with pytest.raises(VerificationError, match="value 'h1' is INT64 but inferred as FLOAT"):
        check(program)


def test_check_passes_the_checkers_message_on() -> None:
    program = capture(mlp()).clone()
    _node(program.model, "relu").attributes["bogus"] = ir.AttrInt64("bogus", 1)
    with pytest.raises(VerificationError, match="Unrecognized attribute: bogus"):
        check(program)


def test_one_walk_costs_microseconds_a_node() -> None:
    model = capture(mlp()).clone().model
    graph, last = model.graph, model.graph.outputs[0]
    for i in range(5000):
        node = ir.node("Relu", [last], name=f"relu{i}")
        node.outputs[0].name = f"r{i}"
        graph.append(node)
        last = node.outputs[0]
    verify_structure(model)
    start = time.process_time()
    verify_structure(model)
    assert (time.process_time() - start) / 5000 < 60e-6  # some 4 us on an idle machine
