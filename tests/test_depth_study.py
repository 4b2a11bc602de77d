"""The depth study: orders, repairs and pages, on a random residual MLP."""

from __future__ import annotations

import argparse
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from stacked_model import WIDTH, stacked

from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.passes.drop_branch import apply_drops
from lamina.quality import get_metric
from tools.bench.cases import Case
from tools.studies.depth import neurons
from tools.studies.depth.flatten import trials
from tools.studies.depth.page import summary, svg, tables
from tools.studies.depth.repair import Order, Rows, drops
from tools.studies.depth.scoring import Judge, Study, by_length, short
from tools.studies.depth.share import Subject
from tools.studies.depth.share_page import singles


def _data(seed: int) -> Dataset:
    x = np.random.default_rng(seed).normal(size=(96, 6, WIDTH)).astype(np.float32)
    return Dataset({"x": x}, {}, 16)


@pytest.fixture(scope="module")
def study() -> Study:
    program = stacked(5)
    metric = get_metric(None, program)
    judges = [Judge(program, _data(seed), metric, metric) for seed in (1, 2)]
    case = Case("stack", "", metric.name, dict, "1x6")
    return Study(case, program, _data(3), *judges)


def test_lazy_greedy_drops_what_is_missed_least(study: Study) -> None:
    order = Order(study, lambda note: None)
    order.step()
    harm = {m.site.name: study.order.diverges(Order(study, print, [m]).program) for m in drops(study.program)}
    assert order.names == [min(harm, key=lambda name: harm[name])]
    order.step()
    assert len(set(order.names)) == 2


def test_repairs_carry_over_to_the_next_step_and_help_on_other_data(study: Study) -> None:
    order = Order(study, lambda note: None)
    for _ in range(2):
        order.step()
        assert order.repair()["operators"] > 0
    plain = Order(study, lambda note: None, list(order.moves))
    assert study.report.diverges(order.program) < 0.75 * study.report.diverges(plain.program)


def test_a_set_of_branches_is_scored_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "latency", lambda *_: {"latency": 0.9, "latency_spread": [0.9, 0.9]})
    rows, moves = Rows(study, lambda note: None), list(drops(study.program))
    assert rows.cut(moves[:2]) is rows.cut([moves[1], moves[0]])


def _masked(lengths: list[int], width: int = 12) -> Dataset:
    mask = (np.arange(width) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.arange(mask.size).reshape(mask.shape)
    return Dataset({"input_ids": ids, "attention_mask": mask}, {"score": np.arange(len(mask))}, 4)


def test_padding_is_cut_and_no_sample_is_lost() -> None:
    data = _masked([3, 9, 5, 2, 7, 9, 4, 1])
    parts = by_length(data)
    assert sorted(int(s) for part in parts for s in part.extras["score"]) == list(range(8))
    for part in parts:
        mask = part.inputs["attention_mask"]
        assert mask.shape[1] == mask.sum(axis=1).max() == part.inputs["input_ids"].shape[1]
    assert sum(int(part.inputs["attention_mask"].sum()) for part in parts) == 40


def test_the_longest_rows_are_left_out_of_fits() -> None:
    data = short(_masked([3] * 18 + [12, 11]))
    assert data.inputs["input_ids"].shape == (18, 3)


def _model(before: float, after: float) -> dict[str, Any]:
    def way(damage: float) -> dict[str, Any]:
        spread = [damage - 0.01, damage + 0.01]
        facts = {"report": 0.9 - damage, "damage": damage, "damage_ci95": spread, "divergence": 10 * damage}
        return facts | {"latency": 0.8, "latency_spread": [0.79, 0.81], "branches": ["a<b"]}

    row = {"removed": 1, "drop": way(before), "unrepaired": way(before), "repaired": way(after)}
    n = {"calibration": 1, "order": 2, "report": 3}
    named = {"model": "net", "metric": "top1", "divergence": "kl", "branches": 5, "n": n}
    return {**named, "original": {"report": 0.9}, "rows": [row]}


def test_the_summary_is_the_geometric_mean_of_ratios_to_the_better_order() -> None:
    worse = _model(0.04, 0.02)
    worse["rows"][0]["unrepaired"]["damage"] = 0.4
    text = "\n".join(summary([worse, _model(0.04, 0.01), _model(0.04, -0.01)], 0.2))
    assert f"damage, 2 models: {math.sqrt(0.5 * 0.25):.2f}" in text
    assert "1 of 5" in text


def test_tables_and_plot_hold_every_way() -> None:
    models = [_model(0.04, 0.02)]
    assert "| 1 | 0.800; 0.800 | 86.00, +4.00 (+3.00 to +5.00), 0.4 |" in "\n".join(tables(models))
    root = ElementTree.fromstring(svg(models))
    lines = [e for e in root.iter() if e.tag.endswith("polyline")]
    assert len(lines) == 3


# -- sharing ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(study: Study) -> Subject:
    return Subject.of(study, lambda note: None)


def test_pairs_are_measured_with_their_distance(subject: Subject) -> None:
    pairs = list(subject.pairs())
    assert len(pairs) == 5 * 4
    for pair in pairs:
        assert pair["divergence"] > 0
        assert 1 < pair["distance"] < 3  # random matrices: twice the energy of one


def test_greedy_sharing_takes_each_branch_once_and_the_least_first(subject: Subject) -> None:
    moves = [m for m in subject.offered() if m.option.name.startswith("reuse")]
    alone = {k: subject.diverges([m]) for k, m in enumerate(moves)}
    one, two = subject.greedy(moves, alone, 2)
    assert one == two[:1] == [moves[min(alone, key=alone.__getitem__)]]
    assert len({m.site.name for m in two}) == 2


def test_matrices_cut_to_full_rank_are_the_branchs_own(subject: Subject) -> None:
    move = next(m for m in subject.offered() if m.option.name == "remainder-4")
    full = replace(move, option=replace(move.option, name=f"remainder-{WIDTH}"))
    for taken, most in (([full], 1e-9), ([move], np.inf)):
        changed = subject.cut(taken).graph.initializers
        for weight in move.site.weights:
            before = subject.program.graph.initializers[weight].const_value.numpy()
            after = changed[weight].const_value.numpy()
            assert np.square(after - before).sum() < most
            assert np.linalg.matrix_rank(after) == (WIDTH if most < 1 else 4)


def test_the_page_of_sharing_counts_where_dropping_is_better() -> None:
    def pair(branch: str, donor: str, apart: int, value: float) -> dict[str, Any]:
        return {"branch": branch, "donor": donor, "apart": apart, "weighted": value, "divergence": value}

    pairs = [pair("a", "b", 1, 0.5), pair("a", "c", 2, 0.3), pair("b", "a", 1, 0.1), pair("b", "c", 1, 0.2)]
    drop = [{"branch": "a", "divergence": 0.2}, {"branch": "b", "divergence": 0.4}]
    (line,) = list(singles([{"model": "m", "pairs": pairs, "drop": drop}]))[2:]
    assert line == "| m | 2 | 0.3, 0.2 | 0.3, 0.1 | 0.2, 0.1 | 0.2, 0.1 | 1 | 0.20 | - |"


def test_every_way_to_narrow_is_scored_and_shown(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Study, "latency", lambda *_: {"latency": 0.9, "latency_spread": [0.8, 1.0]})
    options = argparse.Namespace(keep=[0.75, 0.5], ways=list(neurons.WAYS), repair=["prune"])
    *_, found = neurons.study(study, options)
    ways = [(row["keep"], row["way"]) for row in found["rows"]]
    assert ways == [
        (k, w) for k in (0.75, 0.5) for w in ("prune", "prune, repaired", *list(neurons.WAYS)[1:])
    ]
    for keep in (0.75, 0.5):
        rows = {row["way"]: row for row in found["rows"] if row["keep"] == keep}
        assert len({row["bytes"] for row in rows.values()}) == 1
        assert rows["prune, repaired"]["divergence"] < rows["prune"]["divergence"]
        assert rows["transport"]["divergence"] < rows["transport-exact"]["divergence"]
    assert all(row["divergence"] > 0 for row in found["rows"])
    assert len(list(neurons.table(found))) == 5 + len(found["rows"])


def test_flattening_is_tried_on_every_pair_beside_the_drop_of_either_block(study: Study) -> None:
    found = list(trials(study.program))
    blocks = [b.name for b in find_branches(study.program).blocks]
    assert [t.where for t in found] == [f"{a}+{b}" for a, b in pairwise(blocks)]
    assert {t.way for t in found} == {"flatten"}
    for trial in found:
        changed = trial.make(study.program)
        dropped = [apply_drops(study.program, names) for names in trial.drops]
        # a dropped last sum leaves an Identity with the name of the output
        assert min(len(list(d.graph)) for d in dropped) == len(list(changed.graph))
