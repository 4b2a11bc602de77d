"""Every genome run on the supergraph equals the model that applying its moves gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from toy import Clamp, Cut, Halve, Straddle, toy_program, toy_space

import lamina.planner.apply as apply_module
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.errors import BackendError, PassError
from lamina.ir.io import serialized_size
from lamina.planner.apply import apply_moves
from lamina.planner.option_bytes import stored_bytes
from lamina.planner.plan import Move, Plan
from lamina.planner.supergraph import build_supergraph

TARGET = Target.parse("ort:cpu?threads=1")


@pytest.fixture(autouse=True)
def _toy_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {t.name: t for t in (Cut(), Halve(), Clamp())}
    monkeypatch.setattr(apply_module, "get_transform", known.__getitem__)


def test_every_genome_equals_the_applied_model() -> None:
    program = toy_program()
    space = toy_space(program)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    genomes = {
        space.canonical(g) for g in itertools.product(*[range(len(c.options) + 1) for c in space.choices])
    }
    assert len(genomes) > 100
    for genome in sorted(genomes)[::3]:
        applied = apply_moves(program, space.moves(genome))
        expected = get_backend(TARGET).compile(applied.model, TARGET).run({"x": x})["y"]
        np.testing.assert_allclose(supergraph.run(genome, {"x": x})["y"], expected, rtol=1e-5, atol=1e-6)


def test_partly_overlapping_site_is_pulled_into_the_branch() -> None:
    space = toy_space(toy_program())
    branch = next(c for c in space.choices if c.site.name == "branch.c1")
    assert "c5" in branch.span
    clamp = next(c for c in space.choices if c.transform.name == "clamp")
    assert clamp.parent is not None
    assert space.choices[clamp.parent] == branch


def test_of_sites_that_go_and_overlap_partly_the_larger_stays() -> None:
    space = toy_space(toy_program(), Straddle(), Cut())
    assert [c.transform.name for c in space.choices] == ["cut", "cut"]
    assert {c.transform.name for c in toy_space(toy_program(), Straddle()).choices} == {"straddle"}


def test_genes_inside_a_dropped_branch_are_zero_in_canonical_form() -> None:
    space = toy_space(toy_program())
    everything = tuple(1 for _ in space.choices)
    canonical = space.canonical(everything)
    assert [c.transform.name for c, g in zip(space.choices, canonical, strict=True) if g] == ["cut", "cut"]


def test_the_given_program_is_never_changed() -> None:
    program = toy_program()
    before = [n.name for n in program.graph], [o.name for o in program.outputs]
    space = toy_space(program)
    build_supergraph(space)
    apply_moves(program, space.moves(space.uniform("drop")))
    assert ([n.name for n in program.graph], [o.name for o in program.outputs]) == before


def test_dropping_everything_removes_the_weights_and_keeps_the_interface() -> None:
    program = toy_program()
    space = toy_space(program, Cut())
    dropped = apply_moves(program, space.moves(space.uniform("drop")))
    assert not dropped.graph.initializers
    assert [(p.name, p.shape) for p in dropped.outputs] == [(p.name, p.shape) for p in program.outputs]
    assert serialized_size(dropped.model) < serialized_size(program.model) / 2


def test_stored_bytes_counts_what_an_option_adds() -> None:
    space = toy_space(toy_program(), Halve())
    assert stored_bytes(space) == [[4, 4]] * 4


def test_a_plan_survives_json_exactly() -> None:
    space = toy_space(toy_program())
    moves = space.moves(space.uniform("half"))
    plan = Plan("f" * 8, ("fuse-gelu",), (*moves, Move(moves[0].site, moves[0].option, "why", -1e-3, 0.1)))
    assert Plan.from_json(plan.to_json()) == plan


def test_moves_of_another_model_are_refused_by_name() -> None:
    program = toy_program()
    moves = toy_space(program).moves(toy_space(program).uniform("half"))
    other = toy_program()
    other.graph.node("a1").name = "renamed"
    with pytest.raises(PassError, match="site 'a1' needs node 'a1'"):
        apply_moves(other, moves)


def test_running_an_uncompiled_supergraph_says_so() -> None:
    space = toy_space(toy_program())
    with pytest.raises(BackendError, match="not compiled"):
        build_supergraph(space).run(space.nothing, {})


def test_moves_apply_in_any_order() -> None:
    program = toy_program()
    space = toy_space(program, Cut())
    moves = space.moves(space.uniform("drop"))
    x = np.random.default_rng(2).normal(size=(3, 8)).astype(np.float32)
    for order in (moves, moves[::-1]):
        applied = apply_moves(program, order)
        assert [p.name for p in applied.outputs] == ["y"]
        found = get_backend(TARGET).compile(applied.model, TARGET).run({"x": x})["y"]
        np.testing.assert_array_equal(found, np.maximum(x, 0))
