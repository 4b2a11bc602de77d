"""Single-option damages: samples go before options do, and what is not measured lies between what is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr
from stacked_model import WIDTH, stacked

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes import get_transform
from lamina.planner.evaluator import Evaluator
from lamina.planner.shortlist import (
    Effort,
    cheap_values,
    effort,
    fill,
    ranked_groups,
    single_damages,
    spread,
)
from lamina.planner.space import Space, build_space
from lamina.planner.supergraph import build_supergraph
from lamina.quality.divergence import RelativeL2

TARGET = Target.parse("ort:cpu?threads=1")
DEPTH = 6
# Layers' second matrices are scaled by these: how much each branch matters, and in no order.
SCALES = (0.05, 2.0, 0.3, 1.2, 0.1, 0.7)


def _program() -> Program:
    import onnx_ir as ir

    program = stacked(DEPTH)
    for layer, scale in enumerate(SCALES):
        value = program.graph.initializers[f"wb{layer}"]
        assert value.const_value is not None
        value.const_value = ir.Tensor((value.const_value.numpy() * np.float32(scale)), name=value.name)
    return program


def _data(rows: int, seed: int) -> Dataset:
    random = np.random.default_rng(seed)
    return Dataset({"x": random.normal(size=(rows, 3, WIDTH)).astype(np.float32)}, {}, 8)


@pytest.fixture(scope="module")
def space() -> Space:
    from lamina.analysis.statistics import collect

    program = _program()
    transforms = [get_transform("drop"), get_transform("quantize")]
    values = [v.name or "" for node in program.graph for v in node.outputs] + ["x"]
    return build_space(program, transforms, collect(program, _data(16, 0), ranges=sorted(values)), TARGET)


@pytest.fixture(scope="module")
def evaluator(space: Space) -> Evaluator:
    supergraph = build_supergraph(space)
    supergraph.executable = get_backend(TARGET).compile(supergraph.model, TARGET)
    return Evaluator(supergraph, _data(64, 2), _metric(space))


def _metric(space: Space) -> RelativeL2:
    return RelativeL2((space.program.outputs[0].name,))


# -- how much is measured ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        (1000.0, Effort(128, 100)),  # plenty: four batches of 32
        (16.0, Effort(40, 100)),  # a quarter of the time
        (3.5, Effort(16, 100)),  # more than a quarter, for the least that is worth it
        (1.0, Effort(5, 100)),  # half of the time, fewer samples
        (0.1, Effort(1, 50)),  # one sample, half of the options
        (0.0001, Effort(1, 1)),
    ],
)
def test_samples_are_cut_before_options(seconds: float, wanted: Effort) -> None:
    assert effort(seconds, 0.001, 100, 32) == wanted


def test_small_batches_still_give_enough_samples() -> None:
    assert effort(1000.0, 0.001, 100, 4).samples == 64


def test_a_fixed_batch_is_never_torn() -> None:
    assert effort(16.0, 0.001, 100, 32, fixed=True) == Effort(32, 100)
    assert effort(1.0, 0.001, 100, 32, fixed=True) == Effort(32, 15)


# -- what is guessed -----------------------------------------------------------------------------------------


def test_guesses_lie_between_by_rank() -> None:
    found = fill([7, 3, 9, 1, 5], {7: 1e-4, 9: 1e-2, 5: 1.0})
    assert found == {3: pytest.approx(1e-3), 1: pytest.approx(1e-1)}


def test_guesses_rise_even_where_measurements_do_not() -> None:
    found = fill([0, 1, 2, 3, 4], {0: 1e-2, 2: 1e-4, 4: 1.0})
    assert found[1] == pytest.approx(1e-3)  # the two that fall are levelled at their geometric mean
    assert found[1] <= found[3]


def test_where_damages_are_level_the_order_stays() -> None:
    found = fill([4, 3, 2, 1, 0], {4: 1.0, 0: 0.01})  # the ends contradict the order
    assert found[3] < found[2] < found[1] == pytest.approx(0.1)


def test_without_a_finite_measurement_a_guess_is_infinite() -> None:
    assert fill([0, 1], {0: float("inf")}) == {1: float("inf")}
    assert fill([0, 1], {0: 0.0}) == {1: 0.0}
    assert fill([0, 1], {0: 0.5, 1: 0.7}) == {}


def test_measured_options_are_spread_over_ranks_and_groups() -> None:
    groups = [list(range(8)), list(range(8, 12)), [12]]
    chosen = spread(groups, 7)
    assert chosen == [0, 2, 4, 7, 8, 11, 12]
    assert spread(groups, 1) == [3, 9, 12]
    assert spread(groups, 100) == list(range(13))


# -- on a model ---------------------------------------------------------------------------------------------


def test_cheap_values_rank_branches_by_what_they_do(space: Space) -> None:
    cheap = cheap_values(space, _data(16, 3))
    drops = {i: cheap[i] for i, c in enumerate(space.choices) if c.removes}
    layers = [int(space.choices[i].site.nodes[0][-1]) for i in sorted(drops, key=drops.__getitem__)]
    assert layers == list(np.argsort(SCALES))
    assert all(i in cheap for i in range(len(space.choices)))


def test_with_time_everything_is_measured(
    space: Space, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lamina.planner.shortlist.cheap_values", _never)
    told: list[Any] = []
    damage = single_damages(evaluator, _metric(space), _data(16, 3), 1e6, lambda a, b: told.append((a, b)))
    options = [len(c.options) for c in space.choices]
    assert [len(row) for row in damage] == options
    assert told[-1] == (sum(options), sum(options))
    for index in (0, len(options) - 1):
        genome = (*space.nothing[:index], 1, *space.nothing[index + 1 :])
        alone = evaluator.single_divergences(evaluator.selection, _metric(space), [genome])
        assert damage[index][0] == pytest.approx(alone[0])


def _never(*arguments: Any) -> Any:
    raise AssertionError("nothing was to be guessed")


def test_without_time_few_are_measured_and_the_rest_follow(
    space: Space, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = single_damages(evaluator, _metric(space), _data(16, 3), 1e6, lambda a, b: None)
    options = sum(len(c.options) for c in space.choices)
    monkeypatch.setattr("lamina.planner.shortlist.effort", lambda *a, **k: Effort(8, options // 2))
    told: list[Any] = []
    guessed = single_damages(evaluator, _metric(space), _data(16, 3), 1.0, lambda a, b: told.append((a, b)))
    assert 0.3 * options < told[-1][1] < 0.7 * options
    drops = [i for i, c in enumerate(space.choices) if c.removes]
    ranks = spearmanr([guessed[i][0] for i in drops], [full[i][0] for i in drops])[0]
    assert ranks > 0.6
    assert all(np.isfinite(d) and d >= 0 for row in guessed for d in row)


def test_groups_put_unknown_options_in_the_middle(space: Space) -> None:
    where = [(i, k) for i, c in enumerate(space.choices) for k in range(len(c.options))]
    drops = [n for n, (i, _) in enumerate(where) if space.choices[i].removes]
    cheap = {where[n][0]: float(rank) for rank, n in enumerate(drops[:-1])}
    group = next(g for g in ranked_groups(space, where, cheap) if drops[0] in g)
    assert group[0] == drops[0]
    assert group.index(drops[-1]) in (2, 3)
