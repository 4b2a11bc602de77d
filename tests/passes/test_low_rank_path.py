"""Low-rank paths beside quantized operators."""

from __future__ import annotations

import numpy as np
import pytest
from residual_nets import Net, image, run, text_of
from stacked_model import WIDTH, stacked

from lamina.analysis.moments import Moments
from lamina.analysis.statistics import collect
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.compensate import Compensation, compensate
from lamina.passes.low_rank_path import LowRankPath, Pathed, add_paths, apply_paths, low_rank
from lamina.passes.pass_ import Site
from lamina.passes.quantize import Quantize
from lamina.passes.repair import packed
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from lamina.planner.plan import Move, Plan

EXACT = Compensation(ridges=(1e-10,))
TARGET = Target.parse("ort:cpu?threads=1")


def _quantized(program: Program, form: str, data: Dataset, only: str = "") -> tuple[Program, dict[str, str]]:
    """Every operator in one form, or those whose name begins with ``only``."""
    transform = Quantize()
    sites = [s for s in transform.sites(program) if isinstance(s, Site) and s.name.startswith(only)]
    statistics = collect(program, data, ranges=sorted({v for s in sites for v in (*s.inputs, *s.outputs)}))
    moves = []
    for site in sites:
        option = next(o for o in transform.options(site, program, statistics, TARGET) if o.name == form)
        moves.append(Move(site, option))
    changed = apply_moves(program, moves)
    return changed, standing(moves, changed)


def _data(rows: int = 64, seed: int = 3) -> Dataset:
    x = np.random.default_rng(seed).normal(size=(rows, 6, WIDTH)).astype(np.float32)
    return Dataset({"x": x}, {}, 8)


def _paths(
    form: str, rank: int, only: str = "", how: Compensation = EXACT
) -> tuple[Program, Program, Pathed]:
    program, data = stacked(2), _data()
    changed, stands_for = _quantized(program, form, data, only)
    made = add_paths(program, changed, data, rank=rank, stands_for=stands_for, how=how, threads=1)
    return program, changed, made


def _distance(program: Program, changed: Program) -> float:
    feeds = dict(_data(seed=9).inputs)
    (before,), (after,) = run(program, feeds), run(changed, feeds)
    return float(np.linalg.norm(before - after) / np.linalg.norm(before))


@pytest.mark.parametrize("form", ["w4", "w8", "stored-w4", "stored-w8"])
def test_full_rank_restores_the_float_operators(form: str) -> None:
    program, changed, made = _paths(form, WIDTH)
    assert _distance(program, changed) > 1e-3
    assert len(made.paths) == 4
    assert _distance(program, made.program) < 1e-5


@pytest.mark.parametrize("form", ["w8a8-dynamic", "w8a8-static"])
def test_paths_beside_integer_operators_leave_what_rounding_activations_costs(form: str) -> None:
    program, changed, made = _paths(form, WIDTH, how=Compensation())
    assert made.paths
    assert _distance(program, made.program) < 0.95 * _distance(program, changed)


def test_full_rank_restores_a_float_convolution() -> None:
    net = Net()
    hidden = net.op("Sigmoid", net.op("Conv", image(net), net.weight(4, 4, 3, 3), pads=[1] * 4))
    program = net.program(net.op("Sigmoid", net.op("Conv", hidden, net.weight(3, 4, 3, 3), strides=[2, 2])))
    data = Dataset({"x": np.random.default_rng(3).normal(size=(64, 4, 6, 6)).astype(np.float32)}, {}, 8)
    changed, stands_for = _quantized(program, "stored-w4", data)
    made = add_paths(program, changed, data, rank=99, stands_for=stands_for, how=EXACT, threads=1)
    assert [len(f.path.window["strides"]) for f in made.fitted] == [2, 2]
    (before,), (plain,), (after,) = (run(p, dict(data.inputs)) for p in (program, changed, made.program))
    assert np.abs(plain - before).max() > 1e-3
    assert np.abs(after - before).max() < 1e-5


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_path_lowers_the_error_as_much_as_eckart_and_young_say(rank: int) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(400, 8)) @ random.normal(size=(8, 8))
    wrong = random.normal(size=(8, 5))
    moments = Moments.empty(8, 5)
    moments.add(x, x @ wrong)
    down, up = low_rank(moments, 1e-12, rank)
    sizes = np.linalg.svd(x @ wrong, compute_uv=False)
    left = np.linalg.norm(x @ wrong - x @ down @ up) ** 2
    assert left == pytest.approx((sizes[rank:] ** 2).sum(), rel=1e-6, abs=1e-6)
    assert down.shape == (8, min(rank, 5))


def test_an_operator_s_calibrated_error_is_what_the_cut_singular_values_hold() -> None:
    """On the weights alone: S and the truncation as in the paper, from the operator's own input."""
    program, changed, made = _paths("w4", 4, only="up0")
    (found,) = made.fitted
    x = _data().inputs["x"].reshape(-1, WIDTH).astype(np.float64)
    (read,) = run(_only(program, "up0_out"), dict(_data().inputs))
    (now,) = run(_only(changed, found.path.node), dict(_data().inputs))
    missing = (read - now).reshape(-1, WIDTH).astype(np.float64)
    weight = np.linalg.lstsq(x, missing, rcond=None)[0]
    sizes = np.linalg.svd(x @ weight, compute_uv=False) ** 2
    share = float(sizes[4:].sum() / sizes.sum())
    assert found.after / found.before == pytest.approx(share, rel=0.3)
    assert found.full < 1e-4 * found.before


def _only(program: Program, wanted: str) -> Program:
    """The program with one value, or one node's output, as its output."""
    clone = program.clone()
    value = next(v for n in clone.graph for v in n.outputs if wanted in (v.name, n.name))
    clone.graph.outputs[:] = [value]
    return Program(clone.model, example=clone.example)


def test_bytes_are_known_and_the_plan_reproduces_the_program() -> None:
    _, changed, made = _paths("w4", 2, how=Compensation())
    grown = serialized_size(made.program.model) - serialized_size(changed.model)
    weights = sum(f.weight_bytes for f in made.fitted)
    assert weights == len(made.fitted) * 2 * 2 * WIDTH * 4
    assert weights < grown < weights + 700 * len(made.fitted)  # names and nodes
    plan = Plan.from_json(Plan("f", paths=made.paths).to_json())
    assert text_of(apply_paths(changed, plan.paths)) == text_of(made.program)


def test_more_rank_leaves_less_error() -> None:
    errors = [_paths("w4", rank, only="up0")[2].fitted[0].after for rank in (1, 4, 12)]
    assert errors[0] > errors[1] > errors[2]


def test_float_operators_get_no_path() -> None:
    program = stacked(2)
    made = add_paths(program, program.clone(), _data(), threads=1)
    assert made.paths == ()


def test_biases_around_quantized_operators_are_corrected() -> None:
    """Mean-to-bias reaches a bias behind a weight that cannot be refitted itself."""
    net = Net()
    x = net.op("Sigmoid", net.input("x", ["batch", "tokens", WIDTH]))
    program = net.program(net.op("Sigmoid", net.linear(x, width=WIDTH, out=WIDTH)))
    data = _data()
    changed, stands_for = _quantized(program, "w4", data)
    made = compensate(program, changed, data, stands_for=stands_for, threads=1)
    assert [f.site.fixed for f in made.fitted] == [True]
    assert {r.operand for r in made.repairs} <= {0, 1}
    assert _distance(program, made.program) < _distance(program, changed)


def test_a_path_of_no_rank_is_an_error() -> None:
    with pytest.raises(PassError) as caught:
        add_paths(stacked(1), stacked(1), _data(), rank=0)
    assert str(caught.value) == "a path of rank 0 is none\n  give a rank of at least 1"


def test_a_path_of_another_model_is_an_error() -> None:
    array = packed(np.zeros((WIDTH, 1), np.float32))
    with pytest.raises(PassError) as caught:
        apply_paths(stacked(1), [LowRankPath("up0", "elsewhere", array, array)])
    assert str(caught.value) == "nothing gives 'elsewhere'\n  the plan was made for another model"
