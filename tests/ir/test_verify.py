"""Verification: whole programs pass, each broken invariant is named with pass and node."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from onnx_tools import branching, mlp
from work import steps

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


def _withdrawn_operator(model: ir.Model) -> None:
    _node(model, "relu").op_type = "Upsample"


def _no_import(model: ir.Model) -> None:
    _node(model, "relu").domain = "com.microsoft"


def _wrong_domain_operator(model: ir.Model) -> None:
    model.opset_imports["ai.onnx.ml"] = 3
    _node(model, "relu").domain = "ai.onnx.ml"


def _too_young_operator(model: ir.Model) -> None:
    _node(model, "relu").op_type = "Gelu"  # since opset 20


def _mixed_types(model: ir.Model) -> None:
    _node(model, "up").outputs[0].dtype = ir.DataType.DOUBLE


def _impossible_type(model: ir.Model) -> None:
    _node(model, "down").outputs[0].dtype = ir.DataType.STRING


def _other_data(model: ir.Model) -> None:
    value = model.graph.initializers["b1"]
    value.const_value = ir.Tensor(np.zeros(3, np.float32), name="b1")


def _other_dtype(model: ir.Model) -> None:
    value = model.graph.initializers["b1"]
    value.const_value = ir.Tensor(np.zeros(16, np.float16), name="b1")


def _two_definitions(model: ir.Model) -> None:
    model.graph.initializers["x"] = model.graph.inputs[0]
    model.graph.inputs[0].const_value = ir.Tensor(np.zeros(8, np.float32), name="x")
    model.graph.inputs.append(model.graph.inputs[0])


@pytest.mark.parametrize(
    ("damage", "what", "where"),
    [
        (_withdrawn_operator, "opset 18 has withdrawn the operator 'Upsample'", "Upsample 'relu'"),
        (_no_import, "the model imports no opset of domain 'com.microsoft'", "Relu 'relu'"),
        (_wrong_domain_operator, "opset 3 has no operator 'ai.onnx.ml.Relu'", "Relu 'relu'"),
        (_too_young_operator, "opset 18 has no operator 'Gelu'", "Gelu 'relu'"),
        (
            _mixed_types,
            "types of MatMul 'up' do not fit: output 0 is tensor(double) but input 0 is tensor(float)",
            "MatMul 'up'",
        ),
        (
            _impossible_type,
            "types of MatMul 'down' do not fit: output 0 ('Y') is tensor(string), which MatMul does not take",
            "MatMul 'down'",
        ),
        (
            _other_data,
            "initializer 'b1' is declared [16], its data [3]",
            "the graph's initializers",
        ),
        (
            _other_dtype,
            "initializer 'b1' is declared FLOAT, its data FLOAT16",
            "the graph's initializers",
        ),
        (_two_definitions, "value 'x' is defined twice", "the graph's inputs"),
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


def _branch(model: ir.Model) -> ir.Graph:
    return next(n for n in model.graph if n.op_type == "If").attributes["then_branch"].as_graph()


def test_a_subgraph_may_not_hand_an_outer_value_back() -> None:
    """Runtimes refuse it: an Identity must carry the value."""
    model = capture(branching()).clone().model
    _branch(model).outputs[0] = model.graph.node(0).outputs[0]
    with pytest.raises(VerificationError, match="output 'total' of a subgraph is a value"):
        verify_structure(model)


def test_branches_give_as_many_values_as_their_if() -> None:
    model = capture(branching()).clone().model
    _branch(model).outputs.append(_branch(model).node(0).outputs[0])
    with pytest.raises(VerificationError, match="has 1 outputs, its branch gives 2"):
        verify_structure(model)


def test_types_inside_subgraphs_are_held_against_each_other() -> None:
    model = capture(branching()).clone().model
    _branch(model).node(0).outputs[0].dtype = ir.DataType.FLOAT16
    with pytest.raises(VerificationError, match=r"Mul '\w+' do not fit: output 0 is tensor\(float16\)"):
        verify_structure(model)


def test_types_that_nobody_knows_are_no_fault() -> None:
    model = capture(mlp()).clone().model
    for node in model.graph:
        node.outputs[0].type = model.graph.outputs[0].type if node.outputs[0].is_graph_output() else None
    verify_structure(model)


def test_operators_of_runtimes_are_left_alone() -> None:
    model = capture(mlp()).clone().model
    model.opset_imports["com.microsoft"] = 1
    node = _node(model, "relu")
    node.domain, node.op_type = "com.microsoft", "AnythingAtAll"
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


def _long(count: int) -> ir.Model:
    model = capture(mlp()).clone().model
    graph, last = model.graph, model.graph.outputs[0]
    for i in range(count):
        node = ir.node("Relu", [last], name=f"relu{i}")
        node.outputs[0].name = f"r{i}"
        node.outputs[0].type, node.outputs[0].shape = last.type, last.shape
        graph.append(node)
        last = node.outputs[0]
    return model


@pytest.mark.parametrize("walk", [verify_structure, check])
def test_work_is_linear_in_nodes(walk: Callable[[ir.Model], None]) -> None:
    small, large = _long(200), _long(1600)
    walk(small)
    assert steps(lambda: walk(large)) < 8.5 * steps(lambda: walk(small))
