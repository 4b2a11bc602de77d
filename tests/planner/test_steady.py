"""Plans that samples cannot tell apart are told apart by how much they change the outputs."""

from __future__ import annotations

from toy import plain_choice, toy_program, toy_space

from lamina.planner.evaluator import Score
from lamina.planner.search import Candidate
from lamina.planner.space import Space
from lamina.planner.steady import steadied


def plan(genome: tuple[int, ...], damage: float, surrogate: float, error: float = 0.01) -> Candidate:
    return Candidate(genome, {}, surrogate, Score(1 - damage, damage, error, 300))


def plain_space(count: int) -> Space:
    return Space(toy_program(), tuple(plain_choice(i, [("float", "float")]) for i in range(count)))


def test_within_a_standard_error_the_least_divergence_comes_first():
    lucky, steady, worse = (
        plan((1, 1, 0), -0.02, 5.0),
        plan((1, 0, 0), -0.015, 0.1),
        plan((0, 1, 0), 0.03, 0.01),
    )
    assert steadied([lucky, steady, worse], plain_space(3)) == [steady, lucky, worse]


def test_what_is_certain_stays_in_order():
    plans = [plan((1, 0, 0), 0.0, 5.0, 0.0), plan((0, 1, 0), 0.001, 0.1, 0.0)]
    assert steadied(plans, plain_space(3)) == plans
    assert steadied([], plain_space(3)) == []


def test_sums_of_different_kinds_are_not_compared():
    space = toy_space(toy_program())
    kinds = [c.transform.name for c in space.choices]
    one, other = (tuple(int(name == k) for name in kinds) for k in list(dict.fromkeys(kinds))[:2])
    plans = [plan(one, 0.0, 5.0), plan(other, 0.0, 0.1)]
    assert steadied(plans, space) == plans
