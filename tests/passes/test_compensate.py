"""Closed-form compensation of what a change did."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import WIDTH, Net, image, run, text_of, tokens

from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.branches import find_branches
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import Compensated, Compensation, compensate
from lamina.passes.drop_branch import apply_drops
from lamina.passes.repair import BEHIND, Repair, apply_repairs, packed

LINEAR = Compensation(ridges=(1e-10,), leads=(None,), shares=(1.0,))


def _data(program: Program, rows: int = 64) -> Dataset:
    shape = (rows, 4, 6, 6) if len(program.inputs[0].shape) == 4 else (rows, 5, WIDTH)
    return Dataset({"x": np.random.default_rng(3).normal(size=shape).astype(np.float32)}, {}, 8)


def _difference(program: Program, changed: Program) -> float:
    feeds = {"x": np.random.default_rng(7).normal(size=_data(program).inputs["x"].shape).astype(np.float32)}
    (before,), (after,) = run(program, feeds), run(changed, feeds)
    return float(np.linalg.norm(before - after) / np.linalg.norm(before))


def _net(branch: Callable[[Net, ir.Value], ir.Value], *, bias: bool = True) -> Program:
    """x = in; s = x + branch(x), called ``add``-something; y = relu(lin(s))."""
    net = Net()
    x = net.op("Tanh", tokens(net))
    s = net.op("Add", x, branch(net, x))
    y = net.linear(s, name="after") if bias else net.op("MatMul", s, net.weight(WIDTH, WIDTH))
    return net.program(net.op("Relu", y))


def _constant(net: Net, x: ir.Value) -> ir.Value:
    flat = net.op("MatMul", x, net.array(np.zeros((WIDTH, WIDTH), np.float32)))
    return net.op("Add", flat, net.weight(WIDTH))


def _without(program: Program, count: int = 1) -> tuple[Program, dict[str, str]]:
    branches = find_branches(program).branches[:count]
    return apply_drops(program, [b.name for b in branches]), {b.skip: b.output for b in branches}


def _repaired(program: Program, how: Compensation = LINEAR) -> tuple[Program, Compensated]:
    changed, stands_for = _without(program)
    return changed, compensate(program, changed, _data(program), stands_for=stands_for, how=how, threads=1)


@pytest.mark.parametrize("bias", [True, False])
def test_mean_to_bias_is_exact_for_a_constant_shift(bias: bool) -> None:
    program = _net(_constant, bias=bias)
    how = Compensation(weights=False, add_biases=True, leads=(None,), shares=(1.0,))
    changed, made = _repaired(program, how)
    assert _difference(program, changed) > 0.05
    assert _difference(program, made.program) < 1e-5


def test_without_leave_no_bias_is_added() -> None:
    changed, made = _repaired(_net(_constant, bias=False), Compensation(weights=False))
    assert made.repairs == ()
    assert text_of(made.program) == text_of(changed)


def test_least_squares_recovers_a_linear_disturbance() -> None:
    program = _net(lambda net, x: net.linear(net.linear(x)))
    changed, made = _repaired(program)
    assert _difference(program, changed) > 0.05
    assert _difference(program, made.program) < 1e-4


def test_least_squares_recovers_a_linear_disturbance_of_images() -> None:
    net = Net()
    x = net.op("Tanh", image(net))
    s = net.op("Add", x, net.op("Conv", x, net.weight(4, 4, 1, 1)))
    program = net.program(net.op("Relu", net.op("Conv", s, net.weight(3, 4, 3, 3), pads=[1] * 4)))
    changed, made = _repaired(program)
    assert _difference(program, changed) > 0.05
    assert _difference(program, made.program) < 1e-4


def test_a_writer_before_the_branch_takes_over_what_is_linear_in_its_input() -> None:
    net = Net()
    x = tokens(net)
    hidden = net.gelu(net.linear(x))
    first = net.op("Add", x, net.linear(hidden, name="one"))
    second = net.op(
        "Add", first, net.op("Add", net.op("MatMul", first, net.weight(WIDTH, WIDTH)), net.weight(WIDTH))
    )
    program = net.program(net.op("Relu", second))
    branch = find_branches(program).branches[-1]
    changed = apply_drops(program, [branch.name])
    how = Compensation(roles=("writer",), ridges=(1e-8,))
    made = compensate(
        program, changed, _data(program), stands_for={branch.skip: branch.output}, how=how, threads=1
    )
    assert [f.site.role for f in made.fitted] == ["writer"]
    assert _difference(program, made.program) < 0.9 * _difference(program, changed)


def test_a_writer_before_a_relu_takes_over_a_branch_that_ends_in_one() -> None:
    """Of ``relu(s + f(s))`` the writer of s gives what is linear in its input, below zero too."""
    net = Net()
    x = net.op("Relu", tokens(net))
    s = net.op("Relu", net.op("Add", x, net.linear(net.linear(x), name="one")))
    last = net.op("Relu", net.op("Add", s, net.linear(s, name="two")))
    program = net.program(net.op("MatMul", last, net.weight(WIDTH, WIDTH)))
    branch = find_branches(program).branches[-1]
    changed = apply_drops(program, [branch.name])
    stands_for = {branch.skip: branch.output}
    how = Compensation(roles=("writer",), ridges=(1e-8,), leads=(None,))
    made = compensate(program, changed, _data(program), stands_for=stands_for, how=how, threads=1)
    assert [f.site.target for f in made.fitted] == [branch.output]
    assert _difference(program, made.program) < 0.5 * _difference(program, changed)


def test_the_gain_of_a_norm_takes_over_a_diagonal_branch() -> None:
    net = Net()
    x = net.norm(net.linear(tokens(net)))
    scale = net.array(np.diag(np.linspace(0.2, 1, WIDTH)).astype(np.float32))
    s = net.op("Add", x, net.op("Add", net.op("MatMul", x, scale), net.weight(WIDTH)))
    program = net.program(net.op("Relu", s))
    changed, made = _repaired(program, Compensation(roles=("norm",), ridges=(1e-10,)))
    assert _difference(program, changed) > 0.05
    assert _difference(program, made.program) < 1e-4


def test_two_branches_gone_are_made_up_for_one_after_the_other() -> None:
    net = Net()
    x = net.op("Tanh", tokens(net))
    for i in range(3):
        x = net.op("Add", x, net.mlp(net.norm(x, f"n{i}"), f"m{i}"))
    program = net.program(net.linear(net.norm(x, "last"), name="head"))
    changed, stands_for = _without(program, 2)
    chained = {k: stands_for.get(v, v) for k, v in stands_for.items()}
    made = compensate(program, changed, _data(program, 256), stands_for=chained, threads=1)
    assert made.fitted
    assert _difference(program, made.program) < 0.9 * _difference(program, changed)


def test_bytes_interface_and_inputs_stay() -> None:
    program = _net(lambda net, x: net.linear(net.linear(x)))
    original = text_of(program)
    changed, made = _repaired(program)
    assert abs(serialized_size(made.program.model) - serialized_size(changed.model)) < 64  # names of weights
    assert made.program.inputs == changed.inputs
    assert made.program.outputs == changed.outputs
    assert text_of(program) == original


def test_where_nothing_changed_nothing_is_repaired() -> None:
    program = _net(lambda net, x: net.linear(net.gelu(net.linear(x))))
    made = compensate(program, program.clone(), _data(program), threads=1)
    assert made.repairs == ()
    assert made.fitted == ()


def test_noise_is_left_alone() -> None:
    """Held-out outputs decide: of few random data there is little to learn, and nothing gets worse."""
    program = _net(lambda net, x: net.mlp(x))
    changed, made = _repaired(program, Compensation(rows=16))
    assert _difference(program, made.program) < 1.02 * _difference(program, changed)


def test_repairs_reproduce_the_program() -> None:
    changed, made = _repaired(_net(lambda net, x: net.linear(net.linear(x))))
    assert text_of(apply_repairs(changed, made.repairs)) == text_of(made.program)


def test_a_shared_weight_is_refused() -> None:
    net = Net()
    x = net.op("Tanh", tokens(net))
    shared = net.weight(WIDTH, WIDTH, name="tied")
    s = net.op("Add", x, net.linear(net.gelu(net.linear(x))))
    y = net.op("MatMul", net.op("Relu", net.op("MatMul", s, shared)), shared)
    program = net.program(net.op("Relu", y))
    _, made = _repaired(program)
    assert made.repairs == ()
    assert {r.reason for r in made.refusals} == {"weight 'tied' is shared"}


def test_a_weight_on_the_left_is_refused() -> None:
    net = Net()
    x = net.op("Tanh", net.input("x", ["batch", WIDTH, WIDTH]))
    s = net.op("Add", x, net.linear(net.gelu(net.linear(x))))
    program = net.program(net.op("Relu", net.op("MatMul", net.weight(3, WIDTH), s)))
    changed, stands_for = _without(program)
    data = Dataset({"x": np.ones((16, WIDTH, WIDTH), np.float32)}, {}, 4)
    made = compensate(program, changed, data, stands_for=stands_for, threads=1)
    assert [r.reason for r in made.refusals] == ["its weight stands on the left"]


def test_one_batch_is_not_enough() -> None:
    program = _net(_constant)
    changed, _ = _without(program)
    with pytest.raises(DataError) as caught:
        compensate(program, changed, _data(program, 1))
    assert str(caught.value) == (
        "1 calibration rows do not fill two batches of 1\n"
        "  give more calibration samples: one batch fits, another one checks the fit"
    )


def test_unknown_roles_are_errors() -> None:
    with pytest.raises(PassError) as caught:
        Compensation(roles=("head",))
    assert str(caught.value) == "no operator has the role 'head'\n  choose from norm, writer, reader"


def test_a_repair_of_another_model_is_an_error() -> None:
    program = _net(_constant)
    name = next(n.name for n in program.graph if n.op_type == "MatMul")
    with pytest.raises(PassError) as caught:
        apply_repairs(program, [Repair(name or "", 1, packed(np.zeros((2, 3), np.float32)))])
    assert str(caught.value) == (
        f"weight 'const' is FLOAT [{WIDTH}, {WIDTH}], the repair float32 [2, 3]\n"
        f"  at node '{name}'\n  the plan was made for another model"
    )


def test_an_addition_behind_an_output_keeps_the_interface() -> None:
    net = Net()
    program = net.program(net.op("MatMul", tokens(net), net.weight(WIDTH, WIDTH)))
    shift = np.arange(WIDTH, dtype=np.float32)
    name = next(iter(program.graph)).name or ""
    shifted = apply_repairs(program, [Repair(name, BEHIND, packed(shift))])
    feeds = {"x": np.ones((2, 3, WIDTH), np.float32)}
    np.testing.assert_allclose(run(shifted, feeds)[0], run(program, feeds)[0] + shift, rtol=1e-6)
    assert shifted.outputs == program.outputs
