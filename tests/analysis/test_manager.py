from __future__ import annotations

import numpy as np
from residual_model import residual_program

from lamina.analysis.cost import cost, parameters
from lamina.analysis.manager import Analyses
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
