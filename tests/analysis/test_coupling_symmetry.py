"""What is proven to be a symmetry is one by execution; what mixes up roles is not proven."""

from __future__ import annotations

import numpy as np
import pytest
from coupling_tools import run
from residual_nets import Net
from test_coupling_random import random_program

from lamina.analysis.coupling import coupled_groups
from lamina.analysis.coupling_rules import relation_of
from lamina.analysis.coupling_symmetry import broken_by, reordered
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes


def feeds_of(program: Program, seed: int = 0) -> dict[str, np.ndarray]:
    shape = [d if isinstance(d, int) else 2 for d in program.inputs[0].shape]
    return {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}


def permuted(program: Program, sources: dict[tuple[str, int], np.ndarray]) -> Program:
    """A clone whose weights are permuted along their axes."""
    import onnx_ir as ir

    clone = program.clone()
    for (name, axis), source in sources.items():
        value = clone.graph.initializers.get(name)
        if value is not None:
            value.const_value = ir.Tensor(value.const_value.numpy().take(source, axis=axis), name=name)
    return clone


@pytest.mark.parametrize("block", range(6))
def test_every_proven_permutation_of_a_random_network_keeps_the_function(block: int) -> None:
    proven = 0
    for seed in range(block * 10, block * 10 + 10):
        program = random_program(seed)
        feeds = feeds_of(program, seed)
        tensors = observed_shapes(program, feeds)
        relations = [relation_of(node, tensors) for node in program.graph]
        expected, rng = run(program, feeds), np.random.default_rng(seed)
        for group in coupled_groups(program, feeds).groups:
            sources = reordered(group, rng.permutation(group.units))
            if broken_by(relations, sources) is not None:
                continue
            proven += 1
            for name, got in run(permuted(program, sources), feeds).items():
                scale = np.abs(expected[name]).max() + 1e-6
                assert np.abs(got - expected[name]).max() <= 1e-4 * scale, (seed, group.name)
    assert proven >= 10


def two_roles() -> Program:
    """Channels 0 to 3 as A (relu) and B (tanh), in the order A0 A1 B0 B1 B2 B3 A2 A3."""
    net = Net()
    x = net.input("x", (None, 6))
    h = net.op("MatMul", x, net.weight(6, 4, name="up"))
    both = net.op("Concat", net.op("Relu", h), net.op("Tanh", h), axis=-1)
    mixed = net.op("Gather", both, net.ints(0, 1, 4, 5, 6, 7, 2, 3), axis=-1)
    return net.program(net.op("MatMul", mixed, net.weight(8, 3, name="down")))


def test_units_whose_channels_play_other_roles_may_not_change_places() -> None:
    program = two_roles()
    feeds = feeds_of(program)
    tensors = observed_shapes(program, feeds)
    relations = [relation_of(node, tensors) for node in program.graph]
    (group,) = coupled_groups(program, feeds).groups
    down = next(m for m in group.members if m.name == "down")
    assert down.indices.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]
    expected = next(iter(run(program, feeds).values()))
    for order, allowed in (([1, 0, 2, 3], True), ([0, 1, 3, 2], True), ([2, 1, 0, 3], False)):
        sources = reordered(group, np.array(order))
        got = next(iter(run(permuted(program, sources), feeds).values()))
        assert np.allclose(got, expected, atol=1e-5) == allowed
        assert (broken_by(relations, sources) is None) == allowed
