"""Find the best plan: knapsack seeds, then budget-preserving search on measured damage.

Seeds come from the additive model; it is an assumption, so every seed is measured, and the search goes on
from the best one by single upgrades and swaps, each judged on a few samples first and on all before it is
believed (staged selection after EvoPress, Sieberling et al. 2024).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.planner.costs import Costs
from lamina.planner.evaluator import Evaluator, Score
from lamina.planner.knapsack import solve
from lamina.planner.space import Genome

# Standard errors added to a measured damage. One would prefer the luckiest of the candidates that change much
# (their errors are large) to none at all; report data has the last word anyway.
CAUTION = 0.5
# Plans looked for around one that proved broken as a whole.
DETOURS = 8
# Share of the present cost that a change must save: less would drown in the noise of the prices.
LEAST_GAIN = 0.001


@dataclass(frozen=True)
class Goal:
    """What the search is after.

    Attributes:
        minimize: ``latency``, ``size``, ``flops``, ``footprint`` or ``damage``.
        bounds: Axis -> largest allowed total, in the units of :class:`Costs`.
        allowed_damage: Largest damage, in the metric's damage unit; inf when unbounded.
        caution: Standard errors added to a measured damage before it is held against the bound.
    """

    minimize: str
    bounds: Mapping[str, float] = field(default_factory=dict)
    allowed_damage: float = float("inf")
    caution: float = CAUTION

    def affords(self, predicted: Mapping[str, float]) -> bool:
        """Whether predicted totals keep every bound on a cost."""
        return all(predicted[a] <= b * (1 + 1e-9) for a, b in self.bounds.items() if a in predicted)


@dataclass(frozen=True)
class Candidate:
    """A genome with its predicted costs and its measured score."""

    genome: Genome
    predicted: Mapping[str, float]
    surrogate: float
    score: Score

    def feasible(self, goal: Goal) -> bool:
        """Whether it meets the goal: costs as predicted, damage as measured with caution."""
        return goal.affords(self.predicted) and self.score.bound(goal.caution) <= goal.allowed_damage

    def objective(self, goal: Goal) -> float:
        """What is minimized."""
        return self.score.bound(goal.caution) if goal.minimize == "damage" else self.predicted[goal.minimize]


class Search:
    """Searches genomes within a time budget; deterministic for a seed up to when time runs out.

    Args:
        costs: Prices.
        damage: Divergence of every option alone: one list a choice.
        evaluator: Measures candidates.
        goal: What to look for.
        seconds: Time budget for measuring.
        seed: Of the random proposals.
        report: Called with (done seconds, total seconds, note).
        seeds: Measures plans of its own, each through :meth:`measure`, whenever the search (re)starts.
        only_seeds: Whether the plans of ``seeds`` are all there is: nothing is solved for, nothing improved.
    """

    def __init__(
        self,
        costs: Costs,
        damage: Sequence[Sequence[float]],
        evaluator: Evaluator,
        goal: Goal,
        *,
        seconds: float = 120.0,
        seed: int = 0,
        report: Callable[[float, float, str], None] | None = None,
        seeds: Callable[[Search], None] | None = None,
        only_seeds: bool = False,
    ) -> None:
        self.seeds, self.only_seeds = seeds, only_seeds
        self.costs, self.evaluator, self.goal = costs, evaluator, goal
        self.damage = [[d if np.isfinite(d) else 1e9 for d in row] for row in damage]
        self.seconds, self.random = seconds, np.random.default_rng(seed)
        self.report = report or (lambda done, total, note: None)
        self.archive: dict[Genome, Candidate] = {}
        self.forbidden: set[tuple[int, int]] = set()
        self.favourites: set[Genome] = set()  # plans that are to be built and timed whatever is predicted
        self.detoured: set[Genome] = set()
        self.screen = max(1, len(evaluator.batches) // 4)
        self.start = time.perf_counter()

    # -- measuring ----------------------------------------------------------------------------------

    def affordable(self, genome: Genome) -> bool:
        """Whether a genome keeps every bound on a cost, as predicted."""
        return self.goal.affords(self.costs.predict(genome))

    def elapsed(self) -> float:
        """Seconds since the search was made."""
        return time.perf_counter() - self.start

    def out_of_time(self) -> bool:
        """Whether the time budget is spent."""
        return self.elapsed() > self.seconds

    def forbid(self, genes: Collection[tuple[int, int]]) -> bool:
        """Leave options (choice, gene) out from now on, as they proved broken; whether that was news."""
        new = set(genes) - self.forbidden
        self.forbidden |= new
        for index, gene in new:
            self.damage[index][gene - 1] = 1e9
        self.archive = {g: c for g, c in self.archive.items() if not new.intersection(enumerate(g))}
        return bool(new)

    def detour(self, genome: Genome) -> bool:
        """Measure the best plans that leave out one of a genome's options, as the whole proved broken.

        Returns:
            Whether this was not done for ``genome`` before.
        """
        if genome in self.detoured or self.only_seeds:
            return False
        self.detoured.add(genome)
        allowed = self.surrogate(genome)
        for index, gene in [(i, g) for i, g in enumerate(genome) if g][:DETOURS]:
            row = self.damage[index]
            kept, row[gene - 1] = row[gene - 1], 1e9
            if self.goal.minimize == "damage":
                other = solve(self.costs, self.damage, minimize="damage", bounds=self.goal.bounds)
            else:
                other = self._solve(allowed)
            row[gene - 1] = kept
            if other is not None:
                self.measure(other)
        return True

    def surrogate(self, genome: Genome) -> float:
        """Sum of single-site divergences."""
        return sum(self.damage[i][g - 1] for i, g in enumerate(genome) if g)

    def measure(self, genome: Genome) -> Candidate | None:
        """Score on all samples, unless a few already show that it is hopeless; None then."""
        genome = self.costs.space.canonical(genome)
        if self.forbidden.intersection(enumerate(genome)):
            return None
        if genome in self.archive:
            return self.archive[genome]
        if self.screen < len(self.evaluator.batches):
            first = self.evaluator.score(genome, self.screen)
            limit = self.goal.allowed_damage
            if self.goal.minimize == "damage" and (best := self.best()) is not None:
                limit = min(limit, best.score.damage)
            if first.bound(-2.0) > limit:
                return None
        candidate = Candidate(
            genome, self.costs.predict(genome), self.surrogate(genome), self.evaluator.score(genome)
        )
        self.archive[genome] = candidate
        best = self.best()
        note = "" if best is None else f"{len(self.archive)} measured, best {best.objective(self.goal):.3g}"
        self.report(self.elapsed(), self.seconds, note)
        return candidate

    def best(self) -> Candidate | None:
        """The best feasible candidate so far."""
        feasible = [c for c in self.archive.values() if c.feasible(self.goal)]
        return min(feasible, key=lambda c: (c.objective(self.goal), c.surrogate), default=None)

    # -- searching ----------------------------------------------------------------------------------

    def run(self) -> list[Candidate]:
        """All measured candidates; feasible ones first, best first."""
        self.measure(self.costs.space.nothing)
        if not self.only_seeds:
            self._seed_uniform()
            if self.goal.minimize == "damage":
                self._seed_by_cost()
            else:
                self._seed_by_damage()
        if self.seeds is not None:
            self.seeds(self)
        if not self.only_seeds:
            if self.best() is None:
                self._nearest()
            self._improve()
        return self.ranked()

    def ranked(self) -> list[Candidate]:
        """All measured candidates so far; feasible ones first, best first."""
        goal = self.goal
        return sorted(
            self.archive.values(), key=lambda c: (not c.feasible(goal), c.objective(goal), c.surrogate)
        )

    def tighten(self, surrogate: float) -> None:
        """Measure the best plans whose single-site divergences sum to less than ``surrogate``.

        For when the best one proved worse on other samples: a sum of divergences is a steadier sign of that
        than a metric on a few hundred samples, on which the best of many is partly the luckiest.
        """
        for share in (1.0, 0.9):
            genome = self._solve(share * surrogate)
            if genome is not None:
                self.measure(genome)

    def beyond(self, shares: Sequence[float]) -> list[Candidate]:
        """Plans whose single-site divergences sum to more than the best one's, by ``shares``; scored in full.

        They miss the bound on damage by little: what may be repaired is worth knowing, hopeless or not.
        """
        best = self.best()
        least = min((d for row in self.damage for d in row if 0 < d < 1e8), default=0.0)
        base, found = max(least, 0.0 if best is None else best.surrogate), []
        for share in shares:
            genome = self._solve(share * base)
            if genome is None or self.forbidden.intersection(enumerate(genome)):
                continue
            if genome not in self.archive:
                score = self.evaluator.score(genome)
                made = Candidate(genome, self.costs.predict(genome), self.surrogate(genome), score)
                self.archive[genome] = made
            found.append(self.archive[genome])
        return found

    def _nearest(self) -> None:
        """Nothing meets the goal: measure what is cheapest, on each bounded axis and within the drop."""
        for axis in self.goal.bounds:
            genome = solve(self.costs, self.damage, minimize=axis)
            if genome is not None and genome not in self.archive:
                score = self.evaluator.score(genome)
                found = Candidate(genome, self.costs.predict(genome), self.surrogate(genome), score)
                self.archive[genome] = found
        if self.goal.minimize != "damage":
            goal, self.goal = self.goal, replace(self.goal, bounds={})
            self._seed_by_damage()
            self.goal = goal

    def _solve(self, allowed: float) -> Genome | None:
        if self.only_seeds:
            return None
        return solve(
            self.costs,
            self.damage,
            minimize=self.goal.minimize,
            allowed_damage=allowed,
            bounds=self.goal.bounds,
        )

    def _seed_uniform(self) -> None:
        """One option wherever it is offered, as uniform tools do: sums of damages may hide that it holds.

        From the best predicted one on, until one meets the goal; that one is timed whatever is predicted.
        """
        space = self.costs.space
        names = {o.name for choice in space.choices if not choice.removes for o in choice.options}
        plans = {space.uniform(name) for name in names}
        for genome in sorted(filter(self.affordable, plans), key=self._value):
            candidate = None if self.out_of_time() else self.measure(genome)
            if candidate is not None and candidate.feasible(self.goal):
                self.favourites.add(candidate.genome)
                return

    def _seed_by_cost(self) -> None:
        for slack in (1.0, 0.98, 0.95, 0.9):
            bounds = {axis: bound * slack for axis, bound in self.goal.bounds.items()}
            genome = solve(self.costs, self.damage, minimize="damage", bounds=bounds)
            if genome is not None:
                self.measure(genome)
        for alone in self._transforms_alone():
            genome = solve(self.costs, alone, minimize="damage", bounds=self.goal.bounds)
            if genome is not None:
                self.measure(genome)

    def _transforms_alone(self) -> Iterator[list[list[float]]]:
        """Divergences with the options of one transform only, for each: sums mislead most where kinds mix."""
        names = [choice.transform.name for choice in self.costs.space.choices]
        for name in dict.fromkeys(names) if len(set(names)) > 1 else ():
            rows = zip(names, self.damage, strict=True)
            yield [row if own == name else [1e9] * len(row) for own, row in rows]

    def _seed_by_damage(self) -> None:
        """Walk the surrogate bound from loose to tight, then bisect around where feasibility changes."""
        positive = [d for row in self.damage for d in row if 0 < d < 1e8]
        if not positive:
            return
        low, high = (
            min(positive) / 2,
            sum(max(row, default=0.0) for row in self.damage if max(row, default=0.0) < 1e8),
        )
        low, high = float(np.log(low)), float(np.log(max(high, 2 * low)))
        for _ in range(9):
            if self.out_of_time() and self.best() is not None:
                return
            middle = (low + high) / 2
            genome = self._solve(float(np.exp(middle)))
            candidate = None if genome is None else self.measure(genome)
            if genome is None or (candidate is not None and candidate.feasible(self.goal)):
                low = middle
            else:
                high = middle

    def _improve(self) -> None:
        """Upgrades and swaps from the best candidate until time is out or nothing helps."""
        tried: set[Genome] = set()
        weight = np.ones(len(self.damage))  # learned: how much worse than its surrogate a choice proved
        while not self.out_of_time():
            best = self.best()
            if best is None:
                return
            improved = False
            for genome, changed in self._proposals(best.genome, weight):
                if self.out_of_time():
                    return
                if genome in tried or genome in self.archive:
                    continue
                tried.add(genome)
                candidate = self.measure(genome)
                good = candidate is not None and candidate.feasible(self.goal)
                weight[changed] *= 0.8 if good else 1.6
                if (
                    good
                    and candidate is not None
                    and candidate.objective(self.goal) < best.objective(self.goal)
                ):
                    improved = True
                    break
            if not improved:
                return

    def _proposals(self, genome: Genome, weight: np.ndarray) -> Iterator[tuple[Genome, list[int]]]:
        """Better-by-prediction neighbours: single changes by gain per damage, then random swaps."""
        now = self._value(genome)
        least = self._least_gain(now)
        singles = []
        for i, choice in enumerate(self.costs.space.choices):
            for gene in range(len(choice.options) + 1):
                if gene == genome[i]:
                    continue
                other = self.costs.space.canonical((*genome[:i], gene, *genome[i + 1 :]))
                gain = now - self._value(other)
                if gain > least and self.affordable(other):
                    risk = max(self.surrogate(other) - self.surrogate(genome), 1e-9) * weight[i]
                    singles.append((gain / risk, other, [i]))
        singles.sort(key=lambda s: -s[0])
        yield from ((other, changed) for _, other, changed in singles[:24])
        yield from self._swaps(genome, weight, now)

    def _swaps(self, genome: Genome, weight: np.ndarray, now: float) -> Iterator[tuple[Genome, list[int]]]:
        """Undo one or two moves, redo others; kept when the prediction is still better."""
        count = len(genome)
        taken = [i for i, g in enumerate(genome) if g]
        for _ in range(200):
            genes = list(genome)
            some = min(len(taken), int(self.random.integers(1, 3)))
            undo = [int(i) for i in self.random.choice(taken, size=some, replace=False)] if taken else []
            for i in undo:
                genes[i] = 0
            changed = list(undo)
            for i in self.random.permutation(count)[: int(self.random.integers(1, 4))]:
                if i not in changed:
                    genes[i] = int(self.random.integers(0, len(self.costs.space.choices[i].options) + 1))
                    changed.append(int(i))
            other = self.costs.space.canonical(genes)
            if self._value(other) < now - self._least_gain(now) and self.affordable(other):
                yield other, changed

    def _least_gain(self, now: float) -> float:
        """What a change must gain to be worth a measurement."""
        return 1e-6 if self.goal.minimize == "damage" else LEAST_GAIN * now

    def _value(self, genome: Genome) -> float:
        if self.goal.minimize == "damage":
            return self.surrogate(genome)
        return self.costs.predict(genome)[self.goal.minimize]
