"""The plans of every rule inside the search: what it returns is no worse than the best of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lamina.errors import LaminaError
from lamina.planner.search import Candidate, Search
from lamina.planner.space import Genome, Space

# Share of the search's time by which plans of rules are measured, where the search goes on; and what they get
# at least, however long the seeds before them took.
SHARE = 0.5
_LEAST_SHARE = 0.3
# Plans past the last feasible one that a greedy rule still makes: damage does not only grow. So many plans of
# any other rule are measured whatever the time.
_PATIENCE = 2
# How much a plan takes (branches gone, ticks saved), and the plan; None where the space does not hold it.
Step = tuple[float, Genome | None]


@dataclass(frozen=True)
class Source:
    """One rule's plans.

    Attributes:
        name: The rule.
        plans: Makes them, from one that changes little to more; where they take less than the one before, a
            new row of growing plans begins.
        greedy: Whether making the next one is itself dear.
    """

    name: str
    plans: Callable[[], Iterator[Step]]
    greedy: bool = False


@dataclass
class _Walk:
    """What became of one rule: its plans so far, how many were measured, why it ended."""

    rule: Source
    source: Iterator[Step] | None = None
    made: list[Step] | None = None
    measured: int = 0
    lately: int = 0  # since the search (re)started
    best: Candidate | None = None
    ended: str = ""


class RuleSeeds:
    """Measures the plans of rules; call it with a :class:`Search`.

    Of a rule whose plans grow, the one that takes most and meets the goal is found by bisection, or, where
    making the next plan is itself dear, by going on until damage has been too large twice.

    Args:
        rules: Where the plans come from.
        space: The search space.
        share: Share of the search's time after which no more is measured but two plans of every rule that is
            not greedy; at least 0.3 of it are theirs.
    """

    def __init__(self, rules: Sequence[Source], space: Space, *, share: float = SHARE) -> None:
        self.space, self.share = space, share
        self.walks = [_Walk(rule) for rule in rules]
        self._until = float("inf")

    def __call__(self, search: Search) -> None:
        """Measure what the rules propose for the search's goal; the best of each is a favourite."""
        self._until = search.seconds * max(self.share, search.elapsed() / search.seconds + _LEAST_SHARE)
        for walk in self.walks:
            try:
                self._walk(walk, search)
            except LaminaError as error:  # a rule that cannot work here costs its plans, not the run
                walk.ended = error.what
                continue
            if not walk.measured and not walk.ended:
                walk.ended = "no plan gains more than the best one" if walk.made else "it proposes nothing"
            if walk.best is not None:
                search.favourites.add(walk.best.genome)

    def alone(self, name: str) -> RuleSeeds:
        """One rule by itself, with the plans it has made so far and all of the time."""
        one = RuleSeeds([], self.space, share=1.0)
        one.walks = [walk for walk in self.walks if walk.rule.name == name]
        return one

    def report(self) -> list[dict[str, Any]]:
        """Per rule: how many of its plans were measured, the best that met the goal, and why it ended."""
        found = []
        for walk in self.walks:
            best = walk.best
            row: dict[str, Any] = {
                "rule": walk.rule.name,
                "measured": walk.measured,
                "best": None,
                "ended": walk.ended,
            }
            if best is not None:
                sites = [self.space.choices[i].site.name for i, g in enumerate(best.genome) if g]
                predicted = dict(best.predicted)
                row["best"] = {"sites": sites, "predicted": predicted, "damage": best.score.damage}
            found.append(row)
        return found

    # -- one rule -----------------------------------------------------------------------------------

    def _walk(self, walk: _Walk, search: Search) -> None:
        walk.ended, walk.best, walk.lately = "", None, 0
        if walk.rule.greedy:
            self._forward(walk, search)
            return
        if walk.made is None:
            walk.made = list(walk.rule.plans())
        for part in _growing(walk.made):
            self._bisect(walk, [g for g in part if search.affordable(g)], search)

    def _bisect(self, walk: _Walk, genomes: Sequence[Genome], search: Search) -> None:
        if search.goal.minimize == "damage":  # the plans that cost least damage are the first that fit
            for genome in genomes[:_PATIENCE]:
                self._measure(walk, genome, search)
            return
        low, high = -1, len(genomes)
        while high - low > 1:
            middle = (low + high) // 2
            if self._beaten(genomes[middle], search) or self._measure(walk, genomes[middle], search):
                low = middle
            else:
                high = middle
        for genome in genomes[high + 1 :]:  # damage need not grow with every step
            if not self._measure(walk, genome, search):
                return

    def _forward(self, walk: _Walk, search: Search) -> None:
        misses = 0
        for _, genome in self._made(walk, search):
            if genome is None:
                return
            if not search.affordable(genome) or self._beaten(genome, search):
                continue
            good = self._measure(walk, genome, search)
            misses = 0 if good and search.goal.minimize != "damage" else misses + 1
            if misses >= _PATIENCE:
                return

    def _made(self, walk: _Walk, search: Search) -> Iterator[Step]:
        """The rule's plans, those made before first; the next one is made while there is time."""
        if walk.made is None or walk.source is None:
            walk.made, walk.source = [], walk.rule.plans()
        yield from tuple(walk.made)
        while not self._late(walk, search):
            made = next(walk.source, None)
            if made is None:
                return
            walk.made.append(made)
            yield made

    def _measure(self, walk: _Walk, genome: Genome, search: Search) -> bool:
        if genome not in search.archive and self._late(walk, search):
            return False
        candidate = search.measure(genome)
        walk.measured += 1
        walk.lately += 1
        if candidate is None or not candidate.feasible(search.goal):
            return False
        goal = search.goal
        if walk.best is None or candidate.objective(goal) < walk.best.objective(goal):
            walk.best = candidate
        return True

    @staticmethod
    def _beaten(genome: Genome, search: Search) -> bool:
        """Whether a plan would gain less than the best one that was measured, as predicted.

        Going on to plans that take more is then right whatever its damage: were that too large, the
        smaller plans that remain would gain still less.
        """
        best, goal = search.best(), search.goal
        if best is None or goal.minimize == "damage" or genome in search.archive:
            return False
        return search.costs.predict(genome)[goal.minimize] >= best.objective(goal)

    def _late(self, walk: _Walk, search: Search) -> bool:
        owed = not walk.rule.greedy and walk.lately < _PATIENCE
        if search.elapsed() > self._until and not owed:
            walk.ended = "out of time"
            return True
        return False


def _growing(plans: Sequence[Step]) -> Iterator[list[Genome]]:
    """The plans in rows in which what they take grows."""
    known = [(amount, genome) for amount, genome in plans if genome is not None]
    part: list[Genome] = [known[0][1]] if known else []
    for (before, _), (now, genome) in pairwise(known):
        if now < before:
            yield part
            part = []
        part.append(genome)
    if part:
        yield part
