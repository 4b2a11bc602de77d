"""share: branches run each other's matrices, with or without private low-rank remainders."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import WIDTH, Net, image, run, text_of, tokens
from stacked_model import stacked

from lamina.analysis.needs import Need
from lamina.analysis.statistics import Statistics, collect
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.verify import verify_structure
from lamina.passes.pass_ import Option, Refusal, Site
from lamina.passes.sharing.remainder import energy, low_rank
from lamina.passes.sharing.share import Share, apply_shares
from lamina.passes.sharing.twins import Twins

TARGET = Target.parse("ort:cpu?threads=1")
Branch = Callable[[Net, ir.Value], ir.Value]


def _twice(branch: Branch, start: Callable[[Net], ir.Value] = tokens, times: int = 2) -> Program:
    net = Net()
    x = start(net)
    for _ in range(times):
        x = net.op("Add", x, branch(net, x))
    return net.program(net.op("Tanh", x))


def _gemm(net: Net, x: ir.Value) -> ir.Value:
    rows = net.op("Reshape", x, net.ints(-1, WIDTH))
    weight, bias = net.weight(12, WIDTH, name="g.weight"), net.weight(12, name="g.bias")
    hidden = net.op("Relu", net.op("Gemm", rows, weight, bias, transB=1, alpha=0.5))
    made = net.op("Gemm", hidden, net.weight(12, WIDTH, name="h.weight"), net.weight(WIDTH))
    return net.op("Reshape", made, net.ints(-1, 5, WIDTH))


def _mixing(net: Net, x: ir.Value) -> ir.Value:
    """Weights on the left: tokens mixed, not channels."""
    hidden = net.op("Relu", net.op("MatMul", net.weight(7, 5, name="mix.weight"), x))
    return net.op("MatMul", net.weight(5, 7, name="back.weight"), hidden)


def _grouped(net: Net, x: ir.Value) -> ir.Value:
    y = net.op("Conv", x, net.weight(4, 2, 3, 3, name="c.weight"), group=2, pads=[1] * 4)
    y = net.op("Conv", net.op("Relu", y), net.weight(4, 1, 3, 3, name="d.weight"), group=4, pads=[1] * 4)
    return net.op("Conv", net.op("Relu", y), net.weight(4, 4, 1, 1, name="p.weight"))


NETS: Mapping[str, Callable[[], Program]] = {
    "mlp": lambda: _twice(lambda net, x: net.mlp(net.norm(x))),
    "attention": lambda: _twice(lambda net, x: net.attention(net.norm(x))),
    "gemm": lambda: _twice(_gemm),
    "weights on the left": lambda: _twice(_mixing),
    "conv": lambda: _twice(lambda net, x: net.conv(net.op("Relu", net.conv(x))), image),
    "grouped conv": lambda: _twice(_grouped, image),
}


def _feeds(program: Program, rows: int = 3) -> dict[str, np.ndarray]:
    shape = (rows, 4, 6, 6) if len(program.inputs[0].shape) == 4 else (rows, 5, WIDTH)
    return {"x": np.random.default_rng(3).normal(size=shape).astype(np.float32)}


def _with_weights(program: Program, donors: Mapping[str, str]) -> Program:
    """The program with the numbers of the donors' matrices written over the branches' own."""
    sites, clone = Twins.of(program).sites, program.clone()
    for name, donor in donors.items():
        for own, other in zip(sites[name].weights, sites[donor].weights, strict=True):
            array = program.graph.initializers[other].const_value.numpy()
            clone.graph.initializers[own].const_value = ir.Tensor(array, name=own)
    return clone


def _bytes(program: Program, name: str) -> int:
    weights = Twins.of(program).sites[name].weights
    return sum(program.graph.initializers[w].const_value.nbytes for w in weights)


@pytest.fixture(params=NETS)
def program(request: pytest.FixtureRequest) -> Program:
    return NETS[request.param]()


def test_a_branch_runs_its_donors_matrices_and_keeps_the_rest(program: Program) -> None:
    first, second = Twins.of(program).sites
    shared = apply_shares(program, {second: first})
    verify_structure(shared, "share")
    expected = run(_with_weights(program, {second: first}), _feeds(program))
    np.testing.assert_array_equal(run(shared, _feeds(program))[0], expected[0])
    assert np.abs(run(program, _feeds(program))[0] - expected[0]).max() > 1e-3


def test_sharing_equal_weights_is_exact(program: Program) -> None:
    first, second = Twins.of(program).sites
    equal = _with_weights(program, {second: first})
    shared = apply_shares(equal, {second: first})
    np.testing.assert_array_equal(run(shared, _feeds(program))[0], run(equal, _feeds(program))[0])


def test_the_file_is_smaller_by_the_matrices_that_were_the_branchs_own(program: Program) -> None:
    first, second = Twins.of(program).sites
    saved = serialized_size(program.model) - serialized_size(apply_shares(program, {second: first}).model)
    own = Twins.of(program).sites[second].weights
    assert _bytes(program, second) < saved < _bytes(program, second) + 96 * len(own)  # and their names


def test_a_remainder_of_full_rank_is_exact(program: Program) -> None:
    first, second = Twins.of(program).sites
    shared = apply_shares(program, {first: second, second: first}, rank=1000)
    verify_structure(shared, "share")
    np.testing.assert_allclose(run(shared, _feeds(program))[0], run(program, _feeds(program))[0], atol=1e-5)


def test_a_remainder_is_fitted_to_what_the_branch_reads() -> None:
    program = _twice(lambda net, x: net.mlp(x))
    first, second = Twins.of(program).sites
    x = np.random.default_rng(0).normal(size=(32, 5, WIDTH)).astype(np.float32)
    x[..., 2:] *= 0.01  # two directions carry nearly all of what the first branch reads
    statistics = collect(program, Dataset({"x": x}, {}, 8), needs=(Need.INPUTS,))
    plain = apply_shares(program, {first: second}, rank=2)
    fitted = apply_shares(program, {first: second}, rank=2, statistics=statistics)
    errors = [np.square(run(p, {"x": x})[0] - run(program, {"x": x})[0]).mean() for p in (plain, fitted)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_low_rank_is_the_best_there_is(rank: int) -> None:
    random = np.random.default_rng(rank)
    difference = random.normal(size=(2, 9, 6))
    x = random.normal(size=(2, 50, 9)) * np.geomspace(1, 30, 9)
    moments = x.transpose(0, 2, 1) @ x
    for given in (None, moments):
        down, up = low_rank(difference, given, rank)
        assert down.shape == (2, 9, rank)
        assert up.shape == (2, rank, 6)
        left = energy(difference - down @ up, given)
        seen = difference if given is None else x @ difference
        best = np.sum(np.linalg.svd(seen, compute_uv=False)[:, rank:] ** 2)
        assert left == pytest.approx(best, rel=1e-2)  # the damping


def test_rank_is_cut_to_the_shape() -> None:
    difference = np.random.default_rng(0).normal(size=(1, 4, 7))
    down, up = low_rank(difference, None, 99)
    assert down.shape == (1, 4, 4)
    np.testing.assert_allclose(down @ up, difference, atol=1e-12)


def test_a_chain_lends_the_weights_as_they_were_given() -> None:
    program = _twice(lambda net, x: net.mlp(net.norm(x)), times=3)
    a, b, c = Twins.of(program).sites
    donors = {a: b, b: c, c: a}
    expected = run(_with_weights(program, donors), _feeds(program))
    np.testing.assert_array_equal(run(apply_shares(program, donors), _feeds(program))[0], expected[0])


def test_the_program_given_is_left_alone() -> None:
    program = NETS["mlp"]()
    before = text_of(program)
    apply_shares(program, dict([tuple(Twins.of(program).sites)]), rank=2)
    assert text_of(program) == before


# -- sites and options --------------------------------------------------------------------------------


def test_donors_are_neighbours_and_the_most_similar_branch() -> None:
    program = stacked(5)
    weights = program.graph.initializers
    for part in "ab":  # the last branch is nearly the first
        near = weights[f"w{part}0"].const_value.numpy() * np.float32(1.01)
        weights[f"w{part}4"].const_value = ir.Tensor(near, name=f"w{part}4")
    first, *_, last = (s for s in Share().sites(program) if isinstance(s, Site))
    options = {o.name: o for o in Share().options(first, program, Statistics(0), TARGET)}
    assert list(options) == ["reuse-next", "reuse-similar", "remainder-1", "remainder-4"]
    assert options["reuse-next"].borrows == ("wa1", "wb1")
    assert options["reuse-similar"].borrows == options["remainder-4"].borrows == last.weights
    assert options["remainder-4"].parameters["flops_share"] == 1.5  # 2 x 4 x (16 + 16) of 2 x 16 x 16


def test_a_remainder_that_spares_too_little_is_not_offered() -> None:
    program = stacked(2)
    site = next(s for s in Share().sites(program) if isinstance(s, Site))
    names = [o.name for o in Share((1 / 4, 1 / 2)).options(site, program, Statistics(0), TARGET)]
    assert names == ["reuse-next", "remainder-4"]


def _reason(program: Program) -> dict[str, str]:
    return {r.where: r.reason for r in Share().sites(program) if isinstance(r, Refusal)}


def test_refuses_what_has_no_relative() -> None:
    net = Net()
    x = tokens(net)
    x = net.op("Add", x, net.mlp(x))
    x = net.op("Add", x, net.linear(x))
    assert set(_reason(net.program(x)).values()) == {
        "no other branch has its structure and shapes of weights"
    }


def test_refuses_other_attributes_and_constants() -> None:
    def leaky(net: Net, x: ir.Value) -> ir.Value:
        slope = 0.1 * (1 + len(net.nodes))
        return net.linear(net.op("LeakyRelu", net.linear(x), alpha=slope))

    def rolled(net: Net, x: ir.Value) -> ir.Value:
        heads = 2 if len(net.nodes) < 3 else 4
        split = net.op("Reshape", net.linear(x), net.ints(0, 0, heads, WIDTH // heads))
        return net.op("Reshape", net.op("Softmax", split, axis=-1), net.ints(0, 0, WIDTH))

    for branch in (leaky, rolled):
        assert len(_reason(_twice(branch))) == 2


def test_refuses_matrices_that_others_read() -> None:
    net = Net()
    x, weight = tokens(net), None
    for _ in range(2):
        weight = net.weight(WIDTH, WIDTH) if weight is None else weight
        x = net.op("Add", x, net.op("MatMul", net.norm(x), weight))
    assert set(_reason(net.program(x)).values()) == {
        "it has no floating-point matrix or kernel that only it reads"
    }


def test_a_branch_that_shares_already_is_no_site() -> None:
    program = NETS["mlp"]()
    first, second = Twins.of(program).sites
    assert not Twins.of(apply_shares(program, {second: first})).sites


def test_unknown_names_say_what_there_is() -> None:
    program = NETS["mlp"]()
    first, second = Twins.of(program).sites
    with pytest.raises(PassError) as caught:
        apply_shares(program, {"mpl": first})
    assert str(caught.value).startswith("no branch is called 'mpl'\n  at <memory>\n  did you mean ")
    with pytest.raises(PassError) as caught:
        apply_shares(program, {second: second})
    assert str(caught.value) == (
        f"branch '{second}' cannot run the weights of '{second}'\n  at <memory>\n"
        f"  of its structure are {first}"
    )
    net = Net()
    x = tokens(net)
    alone = net.program(net.op("Add", x, net.mlp(x)))
    (name,) = _reason(alone)
    with pytest.raises(PassError) as caught:
        apply_shares(alone, {name: name})
    assert str(caught.value) == (
        f"branch '{name}' cannot share: no other branch has its structure and shapes of weights\n"
        "  at <memory>"
    )


def test_a_donor_that_is_not_there_is_an_error() -> None:
    from lamina.planner.apply import apply_moves
    from lamina.planner.plan import Move

    program = NETS["mlp"]()
    site = next(s for s in Share().sites(program) if isinstance(s, Site))
    with pytest.raises(PassError) as caught:
        apply_moves(
            program,
            [Move(site, Option("reuse-next", {"outputs": []}, borrows=("gone",) * len(site.weights)))],
        )
    assert "borrows 'gone', which is not in the program" in str(caught.value)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_rank_shares_are_checked(share: float) -> None:
    with pytest.raises(PassError) as caught:
        Share((share,))
    assert str(caught.value) == "rank shares lie between 0 and 1\n  at share"


def test_a_name_is_given_away_only_once_it_is_free() -> None:
    rewriter = Rewriter(stacked(1).model)
    with pytest.raises(PassError) as caught:
        rewriter.rename(rewriter.node("up0"), "down0", ["x0"])
    assert str(caught.value) == "a node is called 'down0'\n  remove it before its name is given away"
    rewriter.rename(rewriter.node("up0"), "free", [None])
    assert rewriter.node("free").outputs[0].name == "up0_out"
    assert not rewriter.has_node("up0")
