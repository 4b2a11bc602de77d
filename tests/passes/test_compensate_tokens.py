"""Which tokens a repair is fitted on: never padding, class tokens more where the output is made of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from residual_nets import WIDTH, Net, run, tokens

from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.passes.compensate import Compensated, Compensation, compensate
from lamina.passes.drop_branch import apply_drops


def _repaired(program: Program, dataset: Dataset, how: Compensation) -> tuple[Program, Compensated]:
    (branch,) = find_branches(program).branches
    changed = apply_drops(program, [branch.name])
    return changed, compensate(
        program, changed, dataset, stands_for={branch.skip: branch.output}, how=how, threads=1
    )


def _class_token_net() -> Program:
    """The output is made of token 0, to which the branch does the opposite of what it does to the others."""
    net = Net()
    x = net.op("Tanh", tokens(net))
    place = net.input("place", ["seq", 1])
    s = net.op("Add", x, net.op("Mul", net.op("MatMul", x, net.weight(WIDTH, WIDTH)), place))
    y = net.linear(s, name="after")
    return net.program(net.op("Gather", net.op("Relu", y), net.array(np.array(0, np.int64)), axis=1))


def test_the_first_token_weighs_more_where_the_output_is_made_of_it() -> None:
    program = _class_token_net()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(256, 12, WIDTH)).astype(np.float32)
    place = 2 * np.eye(12, 1, dtype=np.float32) - 1
    data = Dataset({"x": x, "place": place}, {}, 8, layout={"place": 0})
    feeds = {"x": rng.normal(size=(64, 12, WIDTH)).astype(np.float32), "place": place}
    errors = {}
    for name, leads in (("even", (None,)), ("chosen", (None, 0.5, 0.95))):
        _, made = _repaired(program, data, Compensation(leads=leads, shares=(1.0,), ridges=(1e-6,)))
        before, after = run(program, feeds)[0], run(made.program, feeds)[0]
        errors[name] = float(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert errors["chosen"] < 0.5 * errors["even"]


def test_padding_is_not_fitted() -> None:
    net = Net()
    x = net.op("Tanh", tokens(net))
    mask = net.input("attention_mask", ["batch", "seq"])
    column = net.op("Unsqueeze", mask, net.ints(2))
    s = net.op("Add", x, net.linear(net.linear(x)))
    y = net.op("Mul", net.op("Relu", net.linear(s, name="after")), column)
    program = net.program(y)
    rng = np.random.default_rng(0)
    kept = (np.arange(6) < 3).astype(np.float32)
    # padding holds huge values: fitting them would leave nothing for the real tokens
    array = rng.normal(size=(64, 6, WIDTH)) * np.where(kept, 1, 0)[:, None] + 1e3 * (1 - kept[:, None])
    data = Dataset({"x": array.astype(np.float32), "attention_mask": np.tile(kept, (64, 1))}, {}, 8)
    changed, made = _repaired(program, data, Compensation(ridges=(1e-8,), shares=(1.0,)))
    feeds = {name: value[:8] for name, value in data.inputs.items()}
    before, dropped, after = (run(p, feeds)[0] for p in (program, changed, made.program))
    assert np.linalg.norm(after - before) < 1e-3 * np.linalg.norm(dropped - before)


def test_values_are_compared_in_half_precision_models_too() -> None:
    net = Net()
    x = net.op("Tanh", net.input("x", ["batch", "seq", WIDTH], ir.DataType.FLOAT16))

    def half(*shape: int) -> ir.Value:
        return net.array((net.random.standard_normal(shape) / 3).astype(np.float16), "half")

    s = net.op("Add", x, net.op("MatMul", x, half(WIDTH, WIDTH)))
    y = net.op("Relu", net.op("Add", net.op("MatMul", s, half(WIDTH, WIDTH)), half(WIDTH)))
    y.type = ir.TensorType(ir.DataType.FLOAT16)
    program = net.program(y)
    data = Dataset({"x": np.random.default_rng(1).normal(size=(64, 4, WIDTH)).astype(np.float16)}, {}, 8)
    changed, made = _repaired(program, data, Compensation())
    feeds = {"x": data.inputs["x"][:8]}
    before, dropped, after = (run(p, feeds)[0].astype(np.float32) for p in (program, changed, made.program))
    assert np.linalg.norm(after - before) < 0.05 * np.linalg.norm(dropped - before)
    weights = made.program.graph.initializers.values()
    assert {w.dtype for w in weights} == {ir.DataType.FLOAT16}
