"""What options are predicted to add to a file is what they add."""

from __future__ import annotations

import pytest
from stacked_model import stacked

from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes import get_transform
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.option_bytes import site_framing, written_bytes
from lamina.planner.space import Space, build_space


def noted(trace: int) -> Program:
    """A stack of layers whose nodes carry what exporters write: ``trace`` bytes of metadata each."""
    program = stacked(4)
    for node in program.graph:
        node.metadata_props["stack_trace"] = "x" * trace
    return program


def predicted(space: Space, index: int, gene: int) -> float:
    site = space.choices[index].site
    weights = sum(space.program.graph.initializers[w].const_value.nbytes for w in site.weights)  # type: ignore[union-attr]
    return written_bytes(space)[index][gene] - weights


@pytest.mark.parametrize("trace", [1, 700])
@pytest.mark.parametrize("form", ["stored-w8", "stored-w4", "float16"])
def test_a_quantized_operator_adds_what_is_predicted(trace: int, form: str) -> None:
    program = noted(trace)
    space = build_space(program, [Quantize(forms=(form,))], None, None)  # type: ignore[arg-type]
    before = serialized_size(program.model)
    for index, choice in enumerate(space.choices):
        genome = tuple(int(i == index) for i in range(len(space.choices)))
        after = serialized_size(apply_moves(program, space.moves(genome)).model)
        assert predicted(space, index, 0) == pytest.approx(after - before, abs=150), choice.site.name


def test_a_dropped_branch_takes_its_nodes_with_it() -> None:
    program = noted(700)
    space = build_space(program, [get_transform("drop")], None, None)  # type: ignore[arg-type]
    genome = (1,) + (0,) * (len(space.choices) - 1)
    after = serialized_size(apply_moves(program, space.moves(genome)).model)
    assert predicted(space, 0, 0) == pytest.approx(after - serialized_size(program.model), abs=150)


def test_headers_of_shared_weights_stay() -> None:
    program = noted(1)
    names = [n.name or "" for n in program.graph if n.op_type == "MatMul"][:2]
    first, second = (program.graph.node(name) for name in names)
    nodes = {n.name or "": n for n in program.graph}
    weight = first.inputs[1].name  # type: ignore[union-attr]
    alone = site_framing(program, nodes, names[:1], [weight])
    second.replace_input_with(1, first.inputs[1])
    assert site_framing(program, nodes, names[:1], [weight]) < alone
