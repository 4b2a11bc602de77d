"""Streams: a program run piece by piece, with weights left open."""

from __future__ import annotations

import numpy as np
import pytest
from residual_nets import WIDTH, Net, run, tokens

from lamina.analysis.stream import Stream
from lamina.ir.program import Program


def _program() -> Program:
    """Two linear branches behind each other: ``first``, ``second``."""
    net = Net()
    x = net.op("Tanh", tokens(net))
    s = net.op("Add", x, net.linear(x, name="first"))
    return net.program(net.op("Add", s, net.linear(net.op("Relu", s), name="second")))


def _feeds(batches: int = 2) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.normal(size=(3, 5, WIDTH)).astype(np.float32)} for _ in range(batches)]


def _sum(program: Program) -> str:
    return next(n for n in program.graph if n.op_type == "Relu").inputs[0].name or ""


@pytest.mark.parametrize("start", [False, True])
def test_the_rest_is_what_the_whole_program_gives(start: bool) -> None:
    program, feeds = _program(), _feeds()
    stream, output = Stream(feeds, threads=1), program.outputs[0].name
    if start:
        middle = _sum(program)
        list(stream.run(program, [middle], [middle]))
    rest = stream.rest(program, [output])
    for number, given in enumerate(feeds):
        assert np.array_equal(rest.run(number, {})[output], run(program, given)[0])


def test_a_weight_left_open_is_given_to_each_run_and_the_program_keeps_its_own() -> None:
    program, feeds = _program(), _feeds()
    middle, output = _sum(program), program.outputs[0].name
    stream = Stream(feeds, threads=1)
    list(stream.run(program, [middle], [middle]))
    node = [n for n in program.graph if n.op_type == "MatMul"][-1]
    name, tensor = node.inputs[1].name or "", node.inputs[1].const_value
    assert tensor is not None
    weight = tensor.numpy()
    rest = stream.rest(program, [output], lambda _: [name])
    same = rest.run(0, {name: weight})[output]
    other = rest.run(0, {name: np.zeros_like(weight)})[output]
    assert np.array_equal(same, run(program, feeds[0])[0])
    assert np.abs(other - same).max() > 1e-3
    assert node.inputs[1].const_value is tensor


def test_what_was_run_is_not_in_what_is_left() -> None:
    program, feeds = _program(), _feeds()
    middle, output = _sum(program), program.outputs[0].name
    stream = Stream(feeds, threads=1)
    list(stream.run(program, [middle], [middle]))
    first, second = (n.name for n in program.graph if n.op_type == "MatMul")
    left: list[str | None] = []

    def look(piece: Program) -> list[str]:
        left.extend(n.name for n in piece.graph)
        return []

    stream.rest(program, [output], look)
    assert second in left
    assert first not in left
    assert {first, second} < {n.name for n in program.graph}
