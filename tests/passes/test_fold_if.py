"""If with a constant condition: its branch moves in, names and captured values stay right."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from folding import interface, ops, run

from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.verify import verify_structure
from lamina.passes.fold import apply_named, fold, load

FEEDS = [{"x": np.float32([[1, -2, 3]])}, {"x": np.float32([[0, 0, -1], [5, 6, -7]])}]


def build(body: str, outputs: str = "float[N,3] y", *, inputs: str = "", **flags: object) -> Program:
    """A captured program; ``flags`` are constant conditions."""
    ahead = ""
    for name, flag in flags.items():
        dims = "[1]" if isinstance(flag, list) else ""
        ahead += f"{name} = Constant <value = bool{dims} {{{int(bool(np.asarray(flag).reshape(())))}}}> () "
    head = f'<ir_version: 10, opset_import: ["" : 18]> g (float[N,3] x{inputs}) => ({outputs})'
    return capture(ir.to_proto(ir.from_onnx_text(f"{head} {{ {ahead}{body} }}")))


def folded(before: Program) -> Program:
    after = apply_named(before, ["fold_constant_if"])
    verify_structure(after)
    assert interface(after) == interface(before)
    for feed in FEEDS:
        for got, expected in zip(run(after, feed), run(before, feed), strict=True):
            assert np.array_equal(got, expected)
    assert not load("fold_constant_if").fires(after.model)  # type: ignore[attr-defined]
    return after


def branches(then: str, other: str, outputs: tuple[str, str] = ("float[N,3] p", "float[N,3] q")) -> str:
    first, second = f"t () => ({outputs[0]}) {{ {then} }}", f"e () => ({outputs[1]}) {{ {other} }}"
    return f"<then_branch = {first}, else_branch = {second}>"


@pytest.mark.parametrize(("condition", "left"), [(True, "Exp"), ([False], "Neg")])
def test_the_taken_branch_stays(condition: object, left: str) -> None:
    body = f"a = Relu(x) b = If (z) {branches('p = Exp(a)', 'q = Neg(a)')} y = Mul(b, a)"
    after = folded(build(body, z=condition))
    assert ops(after) == {"Relu": 1, left: 1, "Mul": 1}


def test_the_other_branch_no_longer_counts_as_a_reader() -> None:
    body = f"a = Relu(x) y = If (z) {branches('p = Exp(x)', 'q = Neg(a)')}"
    after = folded(build(body, z=True))
    relu = next(n for n in after.graph if n.op_type == "Relu")
    assert not relu.outputs[0].uses()
    assert ops(fold(after)[0]) == {"Exp": 1}


def test_nested_ifs_fold_inside_each_other() -> None:
    inner = branches("p2 = Exp(x)", "q2 = Neg(x)", ("float[N,3] p2", "float[N,3] q2"))
    body = f"y = If (z) {branches(f'w = If (f) {inner} p = Relu(w)', 'q = Abs(x)')}"
    assert ops(folded(build(body, z=True, f=False))) == {"Neg": 1, "Relu": 1}


def test_an_if_inside_a_branch_that_is_decided_at_run_time() -> None:
    inner = branches("p2 = Exp(x)", "q2 = Neg(x)", ("float[N,3] p2", "float[N,3] q2"))
    other = inner.replace("2", "3")
    outer = branches(f"w = If (z) {inner} p = Relu(w)", f"q = If (z) {other}")
    body = f"s = ReduceSum <keepdims=0> (x) c = Cast <to=9> (s) y = If (c) {outer}"
    after = folded(build(body, z=True))
    assert ops(after)["If"] == 1
    assert sum(n.op_type == "If" for n in after.graph.all_nodes()) == 1


def test_branch_outputs_that_are_constants_or_outer_values() -> None:
    constant = "p = Constant <value = float[1,3] {1.0, 2.0, 3.0}> ()"
    after = folded(build(f"a = If (z) {branches(constant, 'q = Neg(x)')} y = Add(x, a)", z=True))
    assert ops(after)["If"] == 0
    after = folded(build(f"a = Relu(x) y = If (z) {branches('p = Identity(a)', 'q = Neg(x)')}", z=True))
    assert ops(after) == {"Relu": 1, "Identity": 1}
    lifted = apply_named(build(f"y = If (z) {branches(constant, 'q = Neg(x)')}", z=True), ["lift_constants"])
    after = apply_named(lifted, ["fold_constant_if"])
    assert np.array_equal(run(after, FEEDS[0])[0], np.float32([[1, 2, 3]]))
    assert after.outputs[0].name == "y"


def test_several_outputs_and_one_value_for_two_of_them() -> None:
    kind = ("float[N,3] p, float[N,3] p1", "float[N,3] q, float[N,3] q1")
    text = branches("p = Exp(x) p1 = Relu(p)", "q = Neg(x) q1 = Abs(q)", kind)
    after = folded(build(f"y, w = If (z) {text}", "float[N,3] y, float[N,3] w", z=True))
    assert ops(after)["Exp"] == 1
    assert [p.name for p in after.outputs] == ["y", "w"]


def test_a_weight_of_the_branch_becomes_one_of_the_graph() -> None:
    then = "c = Constant <value = float[3] {1.0, 2.0, 3.0}> () p = Add(x, c)"
    before = apply_named(build(f"y = If (z) {branches(then, 'q = Neg(x)')}", z=True), ["lift_constants"])
    after = folded(before)
    assert "c" in after.graph.initializers or any(
        "c" in (v.name or "") for v in after.graph.initializers.values()
    )


def test_computed_and_overridable_conditions_stay() -> None:
    text = branches("p = Exp(x)", "q = Neg(x)")
    before = build(f"y = If (z) {text}", inputs=", bool z")
    assert ops(apply_named(before, ["fold_constant_if"])) == {"If": 1}
    flag = before.model.graph.inputs[1]
    flag.const_value = ir.Tensor(np.array(True), name="z")
    before.model.graph.register_initializer(flag)
    assert ops(apply_named(before, ["fold_constant_if"])) == {"If": 1}
    found = load("fold_constant_if").refusals(before.model)  # type: ignore[attr-defined]
    assert [r.reason for r in found] == ["its condition is not constant"]
