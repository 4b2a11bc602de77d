from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from residual_model import residual_data, residual_program
from test_residual import probes, sums

from lamina.analysis import manager
from lamina.analysis.cost import cost, parameters
from lamina.analysis.manager import Analyses
from lamina.analysis.metrics import METRICS, get_metric
from lamina.analysis.needs import Looks, Need
from lamina.analysis.statistics import BranchProbe, Statistics, collect
from lamina.data import Dataset
from lamina.ir.program import Program


class Counter:
    """An analysis that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, program: Program, *options: object, scale: float = 1.0) -> int:
        self.calls += 1
        return self.calls


def _pair() -> tuple[Program, Program]:
    first, second = residual_program(), residual_program()
    second.graph.node("relu").op_type = "Sigmoid"
    return first, second


def test_a_result_is_computed_once() -> None:
    count, analyses = Counter(), Analyses(residual_program())
    assert [analyses.get(count) for _ in range(3)] == [1, 1, 1]
    assert len(analyses) == 1


def test_options_tell_results_apart_by_value_and_type() -> None:
    count, analyses = Counter(), Analyses(residual_program())
    results = [analyses.get(count, o) for o in (1, 1.0, True, "1", (1,), (True,), frozenset((1,)))]
    assert len(set(results)) == 7
    assert analyses.get(count, (1,)) == results[4]
    assert analyses.get(count, scale=2.0) == analyses.get(count, scale=2.0) == 8


def test_options_without_a_hash_go_by_identity_and_stay_alive() -> None:
    count, analyses = Counter(), Analyses(residual_program())
    feeds = {"x": np.ones(3)}
    assert analyses.get(count, feeds) == analyses.get(count, feeds) == 1
    results = {analyses.get(count, {"x": np.ones(3)}) for _ in range(20)}
    assert len(results) == 20


def test_preserve_keeps_what_the_pass_states_and_drops_the_rest() -> None:
    before, after = _pair()
    count, analyses = Counter(), Analyses(before)
    kept = analyses.get(parameters)
    analyses.get(count)
    following = analyses.preserve(after, [parameters])
    assert len(following) == 1
    assert following.get(parameters) == kept
    assert following.get(count) == 2
    assert len(analyses) == 2


def test_an_equal_program_keeps_everything() -> None:
    count, analyses = Counter(), Analyses(residual_program())
    analyses.get(count)
    assert analyses.preserve(residual_program()).get(count) == 1


def test_analyses_take_what_the_function_takes() -> None:
    program = residual_program()
    feeds = {"x": np.ones((2, 3, 8), dtype=np.float32)}
    assert Analyses(program).get(cost, feeds) == cost(program, feeds)


# -- collected statistics -------------------------------------------------------------------------------


def _runs(monkeypatch: pytest.MonkeyPatch) -> list[frozenset[Need]]:
    """The needs of each run that is really made."""
    made: list[frozenset[Need]] = []

    def counted(*args: Any, **options: Any) -> Statistics:
        made.append(options["needs"])
        return collect(*args, **options)

    monkeypatch.setattr(manager, "collect", counted)
    return made


PROBES = [BranchProbe("b", "x", "body", "sum")]
INFLUENCE, CKA = get_metric("block-influence"), get_metric("linear-cka")


def test_metrics_share_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _runs(monkeypatch)
    analyses, data = Analyses(residual_program()), residual_data(12)
    first = analyses.statistics([INFLUENCE, CKA], data, PROBES)
    assert analyses.statistics([CKA], residual_data(12), PROBES)["data"] is first["data"]
    assert made == [frozenset((Need.LENGTHS, Need.TOKENS))]
    analyses.statistics([CKA], residual_data(13), PROBES)
    assert len(made) == 2


def test_a_changed_sample_is_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _runs(monkeypatch)
    analyses, data = Analyses(residual_program()), residual_data(12)
    analyses.statistics([INFLUENCE], data, PROBES)
    data.inputs["x"][3, 1, 2] += 1
    analyses.statistics([INFLUENCE], data, PROBES)
    assert len(made) == 2


def test_phases_are_kept_apart() -> None:
    analyses = Analyses(residual_program())
    phases = {"prefill": residual_data(12), "decode": residual_data(9, tokens=1)}
    found = analyses.statistics([INFLUENCE], phases, PROBES)
    assert [s.branches["b"].tokens for s in found.values()] == [60, 9]


def test_statistics_survive_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = _runs(monkeypatch)
    first = Analyses(residual_program(), tmp_path).statistics(METRICS, residual_data(12), PROBES)["data"]
    again = Analyses(residual_program(), tmp_path).statistics([INFLUENCE, CKA], residual_data(12), PROBES)
    assert len(made) == 1
    for metric in METRICS:
        program = residual_program()
        assert metric.rate(program, again["data"]) == metric.rate(program, first)
    assert again["data"].branches == first.branches


def test_a_torn_file_costs_a_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = _runs(monkeypatch)
    Analyses(residual_program(), tmp_path).statistics([INFLUENCE], residual_data(12), PROBES)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:100])
    Analyses(residual_program(), tmp_path).statistics([INFLUENCE], residual_data(12), PROBES)
    assert len(made) == 2


def test_ten_times_the_samples_take_no_more_memory() -> None:
    program = sums(("b", 32, 16), 3)

    def peak(rows: int) -> int:
        random = np.random.default_rng(0)
        arrays = {n: random.normal(size=(rows, 32, 16)).astype(np.float32) for n in ("x", "f0", "f1", "f2")}
        data = Dataset(arrays, {}, 8)
        tracemalloc.start()
        looks = Looks(examples=256)  # fewer than there are, so that this statistic has its full size
        collect(program, data, branches=probes(3), needs=frozenset(Need), looks=looks, threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(64)
    assert peak(6400) < 1.3 * peak(640)
