"""direct-matching: a branch becomes a linear map of its skip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import WIDTH, Net, image, run, text_of, tokens

from lamina.analysis.matching import MatchProbe, collect_matches
from lamina.analysis.statistics import Statistics
from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.passes import get_transform, transform_names
from lamina.passes.drop_branch import DropBranch
from lamina.passes.pass_ import Option, Refusal, Site
from lamina.passes.repair import packed, unpacked
from lamina.passes.replace_branch import ReplaceBranch
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan
from lamina.planner.space import build_space
from lamina.planner.supergraph import build_supergraph

EXACT = ReplaceBranch(ridges=(1e-12,))
TARGET = Target.parse("ort:cpu?threads=1")


def _net(branch: Callable[[Net, ir.Value], ir.Value], *, norm: bool = False) -> Program:
    """x0 = lin(x); y = lin(x0 + branch(x0)); with ``norm`` x0 = norm(lin(x))."""
    net = Net()
    x = net.linear(tokens(net), name="before")
    x = net.norm(x) if norm else x
    return net.program(net.linear(net.op("Add", x, branch(net, x)), name="after"))


def _images() -> Program:
    net = Net()
    x = net.conv(image(net))
    body = net.conv(x, kernel=1)
    return net.program(net.conv(net.op("Add", x, body)))


def _data(program: Program, rows: int = 32) -> Dataset:
    shape = (rows, 4, 6, 6) if len(program.inputs[0].shape) == 4 else (rows, 5, WIDTH)
    return Dataset({"x": np.random.default_rng(3).normal(size=shape).astype(np.float32)}, {}, 8)


def _options(program: Program, transform: ReplaceBranch = EXACT) -> tuple[Site, dict[str, Option]]:
    matches = collect_matches(program, _data(program), transform.probes(program), threads=1)
    (site,) = [s for s in transform.sites(program) if isinstance(s, Site)]
    options = transform.options(site, program, Statistics(0, matches=matches), TARGET)
    return site, {o.name: o for o in options}


def _difference(program: Program, changed: Program) -> float:
    feeds = {"x": np.random.default_rng(7).normal(size=_data(program).inputs["x"].shape).astype(np.float32)}
    (before,), (after,) = run(program, feeds), run(changed, feeds)
    return float(np.abs(before - after).max() / np.abs(before).max())


def _low_rank(net: Net, x: ir.Value) -> ir.Value:
    thin = net.op("MatMul", x, net.weight(WIDTH, 2))
    return net.op("Add", net.op("MatMul", thin, net.weight(2, WIDTH)), net.weight(WIDTH))


def _constant(net: Net, x: ir.Value) -> ir.Value:
    flat = net.op("MatMul", x, net.array(np.zeros((WIDTH, WIDTH), np.float32)))
    return net.op("Add", flat, net.weight(WIDTH))


def _diagonal(net: Net, x: ir.Value) -> ir.Value:
    scale = np.diag(np.linspace(-1, 2, WIDTH)).astype(np.float32)
    return net.op("Add", net.op("MatMul", x, net.array(scale)), net.weight(WIDTH))


def test_a_full_map_of_a_linear_branch_is_exact() -> None:
    program = _net(lambda net, x: net.linear(net.linear(x)))
    site, options = _options(program)
    assert _difference(program, apply_moves(program, [Move(site, options["full"])])) < 1e-5


def test_a_full_map_of_a_linear_convolution_is_exact() -> None:
    program = _images()
    site, options = _options(program)
    changed = apply_moves(program, [Move(site, options["full"])])
    assert _difference(program, changed) < 1e-5


def test_a_low_rank_map_of_a_low_rank_branch_is_exact_and_a_dearer_one_is_not_offered() -> None:
    program = _net(_low_rank)
    site, options = _options(program, replace(EXACT, rank_shares=(0.25,)))
    assert _difference(program, apply_moves(program, [Move(site, options["rank-2"])])) < 1e-5
    assert "full" not in options


def test_a_diagonal_map_is_exact_where_the_branch_is_diagonal() -> None:
    program = _net(_diagonal)
    site, options = _options(program)
    assert list(options) == ["bias", "diagonal"]
    assert _difference(program, apply_moves(program, [Move(site, options["diagonal"])])) < 1e-5


@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_stands_for_a_constant_branch_and_costs_no_node(norm: bool) -> None:
    program = _net(_constant, norm=norm)
    site, options = _options(program)
    assert list(options) == ["bias"]
    changed = apply_moves(program, [Move(site, options["bias"])])
    assert _difference(program, changed) < 1e-5
    (drop,) = [s for s in DropBranch().sites(program) if isinstance(s, Site)]
    dropped = apply_moves(program, [Move(drop, DropBranch().options(drop, program, None, None)[0])])
    assert len(list(changed.graph)) == len(list(dropped.graph))


def test_a_diagonal_behind_a_norm_costs_no_node() -> None:
    program = _net(_diagonal, norm=True)
    site, options = _options(program)
    changed = apply_moves(program, [Move(site, options["diagonal"])])
    assert _difference(program, changed) < 1e-5
    assert "Mul" not in {n.op_type for n in changed.graph}


def test_a_bias_goes_through_a_residual_sum_to_the_branch_before() -> None:
    net = Net()
    x = tokens(net)
    first = net.op("Add", x, net.linear(net.gelu(net.linear(x)), name="one"))
    second = net.op("Add", first, _constant(net, first))
    program = net.program(net.linear(second, name="after"))
    matches = collect_matches(program, _data(program), EXACT.probes(program), threads=1)
    site = [s for s in EXACT.sites(program) if isinstance(s, Site)][-1]
    option = EXACT.options(site, program, Statistics(0, matches=matches), TARGET)[0]
    changed = apply_moves(program, [Move(site, option)])
    assert _difference(program, changed) < 1e-5
    assert not [n for n in changed.graph if "matched" in (n.name or "")]


def test_the_supergraph_computes_what_the_rewritten_program_does() -> None:
    program = _net(lambda net, x: net.linear(net.gelu(net.linear(x))))
    matches = collect_matches(program, _data(program), EXACT.probes(program), threads=1)
    space = build_space(program, [DropBranch(), EXACT], Statistics(0, matches=matches), TARGET)
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    feeds = _data(program, 4).inputs
    genomes = [(1, 0), *((0, k + 1) for k in range(len(space.choices[1].options)))]
    assert len(genomes) > 2
    for genome in genomes:
        (expected,) = run(apply_moves(program, space.moves(genome)), feeds)
        (got,) = supergraph.run(genome, feeds).values()
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_not_replaced_as_well() -> None:
    program = _net(lambda net, x: net.linear(net.gelu(net.linear(x))))
    matches = collect_matches(program, _data(program), EXACT.probes(program), threads=1)
    space = build_space(program, [DropBranch(), EXACT], Statistics(0, matches=matches), TARGET)
    assert [m.site.transform for m in space.moves((1, 1))] == ["drop"]


def test_a_plan_reproduces_the_map_bit_for_bit() -> None:
    program = _net(lambda net, x: net.linear(net.gelu(net.linear(x))))
    site, options = _options(program)
    plan = Plan("f", moves=(Move(site, options["full"]),))
    again = Plan.from_json(plan.to_json())
    assert text_of(apply_moves(program, plan.moves)) == text_of(apply_moves(program, again.moves))


def test_better_maps_leave_less_error_and_the_program_is_untouched() -> None:
    program = _net(lambda net, x: net.linear(net.gelu(net.linear(x))))
    before = text_of(program)
    _, options = _options(program, ReplaceBranch())
    residuals = [o.parameters["residual"] for o in options.values()]
    assert residuals == sorted(residuals, reverse=True)
    assert 0 < residuals[-1] < 1
    assert text_of(program) == before


def test_nothing_is_offered_without_statistics() -> None:
    program = _net(lambda net, x: net.linear(x))
    (site,) = [s for s in EXACT.sites(program) if isinstance(s, Site)]
    assert EXACT.options(site, program, Statistics(0), TARGET) == ()


def test_it_is_one_of_the_transforms() -> None:
    assert "direct-matching" in transform_names()
    assert isinstance(get_transform("direct-matching"), ReplaceBranch)


def test_a_fused_normalization_is_refused() -> None:
    net = Net()
    x = net.linear(tokens(net))
    gain, shift = net.weight(WIDTH), net.weight(WIDTH)
    body = net.linear(net.gelu(net.linear(x)))
    y = net.op("SkipLayerNormalization", x, body, gain, shift, domain="com.microsoft")
    y.shape = x.shape
    program = net.program(net.op("Relu", y))
    (refusal,) = [r for r in ReplaceBranch().sites(program) if isinstance(r, Refusal)]
    assert refusal.reason == "its sum is fused with a normalization"


def test_illegal_options_are_errors() -> None:
    with pytest.raises(PassError) as caught:
        ReplaceBranch(rank_shares=(2.0,))
    assert str(caught.value) == ("rank shares lie between 0 and 1, ridges are positive\n  at direct-matching")


def test_too_little_data_is_an_error() -> None:
    program = _net(lambda net, x: net.linear(x))
    with pytest.raises(DataError) as caught:
        collect_matches(program, _data(program, 1), [MatchProbe("b", "x", "x", -1)])
    assert str(caught.value) == (
        "1 calibration rows do not fill two batches of 1\n"
        "  give more calibration samples: one batch fits, another one checks the fit"
    )


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_packed_weights_come_back_bit_for_bit(kind: type) -> None:
    array = np.random.default_rng(0).normal(size=(3, 5)).astype(kind)
    again = unpacked(packed(array))
    assert again.dtype == array.dtype
    assert again.tobytes() == array.tobytes()


def test_damaged_weights_are_an_error() -> None:
    data = packed(np.ones(3, np.float32)) | {"shape": [4]}
    with pytest.raises(PassError, match=r"^packed weights cannot be read: cannot reshape"):
        unpacked(data)
