"""The plans of every drop rule inside the search: what it returns is no worse than the best of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from lamina.errors import LaminaError
from lamina.planner.drop_evidence import DropEvidence, DropSet
from lamina.planner.drop_rules import Rule
from lamina.planner.search import Candidate, Search
from lamina.planner.space import Genome, Space

# Share of the search's time by which plans of rules are measured, where the search goes on; and what they get
# at least, however long the seeds before them took.
SHARE = 0.5
_LEAST_SHARE = 0.3
# Plans past the last feasible one that a greedy rule still makes: damage does not only grow.
_PATIENCE = 2


@dataclass
class _Walk:
    """What became of one rule: its sets so far, how many were measured, why it ended."""

    rule: Rule
    source: Iterator[DropSet] | None = None
    sets: list[DropSet] | None = None
    measured: int = 0
    best: Candidate | None = None
    ended: str = ""


class DropSeeds:
    """Measures the plans of rules; call it with a :class:`Search`.

    Of a rule whose sets grow, the one with the most branches that meets the goal is found by bisection, or,
    where making the next set is itself dear, by going on until damage has been too large twice.

    Args:
        rules: The rules.
        evidence: What they go by.
        space: The search space; branches without a drop there make their sets unusable.
        share: Share of the search's time after which no more is measured; at least 0.3 of it are theirs.
    """

    def __init__(
        self, rules: Sequence[Rule], evidence: DropEvidence, space: Space, *, share: float = SHARE
    ) -> None:
        self.evidence, self.space, self.share = evidence, space, share
        self.walks = [_Walk(rule) for rule in rules]
        self._until = float("inf")
        self._place = {
            choice.site.name: (i, [o.name for o in choice.options].index("drop") + 1)
            for i, choice in enumerate(space.choices)
            if choice.transform.name == "drop"
        }

    def __call__(self, search: Search) -> None:
        """Measure what the rules propose for the search's goal."""
        self._until = search.seconds * max(self.share, search.elapsed() / search.seconds + _LEAST_SHARE)
        for walk in self.walks:
            try:
                self._walk(walk, search)
            except LaminaError as error:  # a rule that cannot work here costs its plans, not the run
                walk.ended = error.what
                continue
            if not walk.measured and not walk.ended:
                walk.ended = "no plan gains more than the best one" if walk.sets else "it proposes nothing"

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
                dropped = [self.space.choices[i].site.name for i, g in enumerate(best.genome) if g]
                predicted = dict(best.predicted)
                row["best"] = {"dropped": dropped, "predicted": predicted, "damage": best.score.damage}
            found.append(row)
        return found

    def genome(self, names: DropSet) -> Genome | None:
        """The genome that drops these branches and nothing else; None where one cannot be dropped alone."""
        genes = list(self.space.nothing)
        for name in names:
            if name not in self._place:
                return None
            index, gene = self._place[name]
            genes[index] = gene
        return self.space.canonical(genes)

    # -- one rule -----------------------------------------------------------------------------------

    def _walk(self, walk: _Walk, search: Search) -> None:
        walk.ended, walk.best = "", None
        if walk.rule.greedy:
            self._forward(walk, search)
            return
        if walk.sets is None:
            walk.sets = list(walk.rule.sets(self.evidence))
        for part in self._growing(walk.sets):
            self._bisect(walk, [g for g in part if _affordable(g, search)], search)

    def _growing(self, sets: Sequence[DropSet]) -> Iterator[list[Genome]]:
        """The sets in parts in which their number of branches grows."""
        known = [(len(s), g) for s in sets if (g := self.genome(s)) is not None]
        part: list[Genome] = [known[0][1]] if known else []
        for (before, _), (now, genome) in pairwise(known):
            if now < before:
                yield part
                part = []
            part.append(genome)
        if part:
            yield part

    def _bisect(self, walk: _Walk, genomes: Sequence[Genome], search: Search) -> None:
        if search.goal.minimize == "damage":  # the sets that cost least damage are the first that fit
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
        for genome in genomes[high + 1 :]:  # damage need not grow with every branch
            if not self._measure(walk, genome, search):
                return

    def _forward(self, walk: _Walk, search: Search) -> None:
        misses = 0
        for names in self._made(walk, search):
            genome = self.genome(names)
            if genome is None:
                return
            if not _affordable(genome, search) or self._beaten(genome, search):
                continue
            good = self._measure(walk, genome, search)
            misses = 0 if good and search.goal.minimize != "damage" else misses + 1
            if misses >= _PATIENCE:
                return

    def _made(self, walk: _Walk, search: Search) -> Iterator[DropSet]:
        """The rule's sets, those made before first; the next one is made while there is time."""
        if walk.sets is None or walk.source is None:
            walk.sets, walk.source = [], walk.rule.sets(self.evidence)
        yield from tuple(walk.sets)
        while not self._late(walk, search):
            made = next(walk.source, None)
            if made is None:
                return
            walk.sets.append(made)
            yield made

    def _measure(self, walk: _Walk, genome: Genome, search: Search) -> bool:
        if genome not in search.archive and self._late(walk, search):
            return False
        candidate = search.measure(genome)
        walk.measured += 1
        if candidate is None or not candidate.feasible(search.goal):
            return False
        goal = search.goal
        if walk.best is None or candidate.objective(goal) < walk.best.objective(goal):
            walk.best = candidate
        return True

    @staticmethod
    def _beaten(genome: Genome, search: Search) -> bool:
        """Whether a plan would gain less than the best one that was measured, as predicted.

        Going on to sets with more branches is then right whatever its damage: were that too large, the
        smaller sets that remain would gain still less.
        """
        best, goal = search.best(), search.goal
        if best is None or goal.minimize == "damage" or genome in search.archive:
            return False
        return search.costs.predict(genome)[goal.minimize] >= best.objective(goal)

    def _late(self, walk: _Walk, search: Search) -> bool:
        if search.elapsed() > self._until:
            walk.ended = "out of time"
            return True
        return False


def _affordable(genome: Genome, search: Search) -> bool:
    predicted = search.costs.predict(genome)
    return all(predicted[a] <= b * (1 + 1e-9) for a, b in search.goal.bounds.items() if a in predicted)
