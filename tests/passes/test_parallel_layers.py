"""parallel-layers: branches in a row read the same stream."""

from __future__ import annotations

import numpy as np
import pytest
from residual_nets import run, text_of
from test_flatten_blocks import _blocks, _differ, _feeds, _mute, heads, layer, plain, rms

from lamina.backends.backend import Target
from lamina.errors import PassError
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.passes import get_transform, transform_names
from lamina.passes.joining.parallel_layers import ParallelLayers, parallel_layers
from lamina.passes.pass_ import Refusal, Site
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan

TARGET = Target.parse("ort:cpu?threads=1")


def _branches(program: Program) -> list[str]:
    return [b.name for b in find_branches(program).branches]


@pytest.mark.parametrize("norm", [layer, rms])
def test_it_is_exact_where_the_first_branch_adds_nothing(norm) -> None:
    program = _blocks(heads, plain, norm=norm)
    names = _branches(program)
    quiet = _mute(program, names[0])
    assert _differ(quiet, parallel_layers(quiet, names[:2])) < 1e-5
    assert _differ(program, parallel_layers(program, names[:2])) > 1e-3


def test_the_two_branches_share_one_normalization() -> None:
    program = _blocks(heads, plain)
    beside = parallel_layers(program, _branches(program)[:2])
    counts = [sum(n.op_type == "LayerNormalization" for n in p.graph) for p in (program, beside)]
    assert counts == [4, 3]
    assert len(list(beside.graph)) < len(list(program.graph))


def test_a_normalization_in_plain_operators_is_shared_too() -> None:
    program = _blocks(heads, plain, norm=rms)
    beside = parallel_layers(program, _branches(program)[:2])
    counts = [sum(n.op_type == "ReduceMean" for n in p.graph) for p in (program, beside)]
    assert counts == [4, 3]


def test_two_blocks_become_one_attention_and_one_mlp_on_one_normalization() -> None:
    program = _blocks(heads, plain)
    names = _branches(program)
    quiet = _mute(program, *names[:3])
    flat = parallel_layers(quiet, names)
    assert _differ(quiet, flat) < 1e-5
    kinds = [n.op_type for n in flat.graph]
    assert (kinds.count("LayerNormalization"), kinds.count("Softmax"), kinds.count("Tanh")) == (1, 1, 1)


def test_sites_are_pairs_and_single_blocks_and_a_plan_reproduces_them() -> None:
    program = _blocks(heads, plain)
    transform = ParallelLayers()
    sites = [s for s in transform.sites(program) if isinstance(s, Site)]
    assert [s.name for s in sites] == ["b0+b1", "b0", "b1"]
    for site in sites:
        (option,) = transform.options(site, program, None, TARGET)
        plan = Plan("f", moves=(Move(site, option),))
        again = Plan.from_json(plan.to_json())
        assert text_of(apply_moves(program, plan.moves)) == text_of(apply_moves(program, again.moves))


def test_post_norm_blocks_are_refused_as_moves_but_the_function_leaves_their_norms() -> None:
    program = _blocks(heads, plain, post=True)
    found = list(ParallelLayers().sites(program))
    assert {r.reason for r in found if isinstance(r, Refusal)} == {
        "a normalization or activation stays between the sums, so the branches would share nothing"
    }
    assert not [s for s in found if isinstance(s, Site)]
    beside = parallel_layers(program, _branches(program)[:2])
    assert sum(n.op_type == "LayerNormalization" for n in beside.graph) == 4
    assert np.isfinite(run(beside, _feeds(program))[0]).all()


def test_branches_that_are_not_in_a_row_are_refused() -> None:
    program = _blocks(heads, plain)
    names = _branches(program)
    with pytest.raises(PassError, match="does not lead straight to"):
        parallel_layers(program, [names[0], names[2]])
    with pytest.raises(PassError, match="no branch is called 'nothing'"):
        parallel_layers(program, ["nothing"])


def test_it_is_one_of_the_transforms() -> None:
    assert "parallel-layers" in transform_names()
    assert isinstance(get_transform("parallel-layers"), ParallelLayers)
