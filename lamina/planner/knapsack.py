"""The seed: a multiple-choice knapsack over measured prices and estimated damages, solved by HiGHS.

min cost(x) s.t. sum damage(x) <= allowed, cost bounds, one option a site, nothing inside a dropped branch,
and a conversion paid wherever int8 meets float. Additive damage is an assumption that the search then checks.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

import numpy as np

from lamina.budget import FOOTPRINT
from lamina.planner.costs import Border, Costs
from lamina.planner.space import Genome


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what HiGHS writes to the process's stdout away from a caller who pipes JSON through it."""
    try:
        sys.stdout.flush()
        saved = os.dup(1)
    except (OSError, ValueError, AttributeError):  # no such descriptor: nothing can be written either
        yield
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(sink, 1)
        yield
    finally:
        with suppress(OSError, AttributeError, TypeError):
            ctypes.CDLL(None).fflush(None)  # C's own buffer would reach the restored descriptor later
        os.dup2(saved, 1)
        os.close(saved)
        os.close(sink)


class _Rows:
    """Constraint rows ``low <= coefficients . x <= high`` in coordinate form."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, int, float]] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def add(self, coefficients: Mapping[int, float], low: float, high: float) -> None:
        row = len(self.low)
        self.entries += [(row, column, value) for column, value in coefficients.items()]
        self.low.append(low)
        self.high.append(high)


def solve(
    costs: Costs,
    damage: Sequence[Sequence[float]],
    *,
    minimize: str = "latency",
    allowed_damage: float = np.inf,
    bounds: Mapping[str, float] | None = None,
    seconds: float = 5.0,
) -> Genome | None:
    """The best genome under the additive model, or None when no genome meets the bounds.

    Args:
        costs: Prices of every option.
        damage: Estimated damage of every option alone; one list a choice.
        minimize: ``latency``, ``size``, ``flops``, ``footprint`` or ``damage``.
        allowed_damage: Bound on the sum of damages.
        bounds: Axis -> largest total.
        seconds: Time limit; the best solution found so far is returned.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_matrix

    first, count = [], 0
    for choice in costs.space.choices:
        first.append(count)
        count += len(choice.options)
    if not count:
        return costs.space.nothing
    rows = _Rows()
    lent = count + 2 * len(costs.borders)  # the first variable that says whether a loan is out
    variables = lent + len(costs.loans)
    vectors = _axis_vectors(costs, damage, first, variables, count)
    _structure(costs, first, rows)
    _border_rows(costs, first, rows, count)
    _loan_rows(costs, first, rows, lent)
    for axis, bound in (bounds or {}).items():
        if axis in vectors and np.isfinite(bound):
            rows.add(_sparse(vectors[axis]), -np.inf, bound - costs.base[axis])
    if np.isfinite(allowed_damage):
        rows.add(_sparse(vectors["damage"]), -np.inf, allowed_damage)

    objective = vectors[minimize] + 1e-9 * vectors["damage"]
    scale = float(np.abs(objective).max()) or 1.0
    r, c, v = zip(*rows.entries, strict=True)
    matrix = coo_matrix((v, (r, c)), shape=(len(rows.low), variables)).tocsr()
    integrality = np.concatenate([np.ones(count), np.zeros(variables - count)])
    with _silent_stdout():
        result = milp(
            objective / scale,
            constraints=LinearConstraint(matrix, rows.low, rows.high),
            bounds=Bounds(0, 1),
            integrality=integrality,
            options={"time_limit": seconds, "mip_rel_gap": 1e-4},
        )
    if result.x is None:
        return None
    genome = []
    for choice, start in zip(costs.space.choices, first, strict=True):
        taken = np.flatnonzero(result.x[start : start + len(choice.options)] > 0.5)
        genome.append(int(taken[0]) + 1 if len(taken) else 0)
    return costs.space.canonical(genome)


def least_sum(
    harm: Sequence[float],
    saving: Sequence[float],
    least: float,
    nested: Sequence[tuple[int, int]] = (),
    *,
    seconds: float = 5.0,
) -> list[int] | None:
    """The items with the least sum of ``harm`` that together save ``least``; None when all do not.

    Args:
        harm: Of each item, at least 0.
        saving: Of each item, in the unit of ``least``.
        least: What must be saved.
        nested: Pairs (inner, outer) of which at most one is taken: the outer one stands for both.
        seconds: Time limit; the best solution found so far is returned.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    count = len(harm)
    scale = max(max(saving, default=0.0), 1e-300)
    rows = [np.asarray(saving, np.float64) / scale]
    low, high = [least / scale], [np.inf]
    for inner, outer in nested:
        row = np.zeros(count)
        row[[inner, outer]] = 1.0
        rows, low, high = [*rows, row], [*low, -np.inf], [*high, 1.0]
    worst = max(max(harm, default=0.0), 1e-300)
    with _silent_stdout():
        result = milp(
            np.asarray(harm, np.float64) / worst + 1e-9,  # of equal sums the smaller set
            constraints=LinearConstraint(np.stack(rows), low, high),
            bounds=Bounds(0, 1),
            integrality=np.ones(count),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
    return None if result.x is None else [int(i) for i in np.flatnonzero(result.x > 0.5)]


def _axis_vectors(
    costs: Costs, damage: Sequence[Sequence[float]], first: Sequence[int], variables: int, count: int
) -> dict[str, np.ndarray]:
    vectors = {axis: np.zeros(variables) for axis in ("latency", "size", "flops", "damage")}
    for i, choice in enumerate(costs.space.choices):
        for k in range(len(choice.options)):
            column = first[i] + k
            vectors["latency"][column] = costs.latency_delta(i, k + 1)
            vectors["size"][column] = costs.delta["size"][i][k]
            vectors["flops"][column] = costs.delta["flops"][i][k]
            vectors["damage"][column] = max(damage[i][k], 0.0)
    for j, border in enumerate(costs.borders):
        vectors["latency"][count + 2 * j] = border.quantize
        vectors["latency"][count + 2 * j + 1] = border.dequantize
        if costs.joint_bytes and border.producer is not None:
            _joints(costs, border, first, vectors["size"], count + 2 * j)
    vectors["size"][variables - len(costs.loans) :] = [loan.nbytes for loan in costs.loans]
    vectors[FOOTPRINT] = vectors["latency"] + vectors["size"] / max(costs.base["size"], 1.0)
    return vectors


def _joints(costs: Costs, border: Border, first: Sequence[int], size: np.ndarray, quantize: int) -> None:
    """Every int8 reader spares a conversion, unless the tensor has to be converted: for all of them at once.

    Where only some of several readers of a float tensor are int8, that is more than is written.
    """
    for consumer in border.consumers:
        options = range(len(costs.space.choices[consumer].options))
        columns = [first[consumer] + k for k in options if costs.reads_int8(consumer, k + 1)]
        size[columns] += costs.joint_bytes
        size[quantize] -= costs.joint_bytes if columns else 0.0


def _structure(costs: Costs, first: Sequence[int], rows: _Rows) -> None:
    for i, choice in enumerate(costs.space.choices):
        own = {first[i] + k: 1.0 for k in range(len(choice.options))}
        parent = choice.parent
        if parent is not None:  # transitively: a dropped branch already excludes drops inside it
            own |= {first[parent] + k: 1.0 for k in range(len(costs.space.choices[parent].options))}
        rows.add(own, -np.inf, 1.0)
        while parent is not None:
            parent = costs.space.choices[parent].parent
            if parent is not None:
                more = {first[parent] + k: 1.0 for k in range(len(costs.space.choices[parent].options))}
                rows.add({**{c: v for c, v in own.items() if c >= first[i]}, **more}, -np.inf, 1.0)


def _border_rows(costs: Costs, first: Sequence[int], rows: _Rows, count: int) -> None:
    def columns(index: int, side: str) -> dict[int, float]:
        test = costs.reads_int8 if side == "reads" else costs.writes_int8
        options = costs.space.choices[index].options
        return {first[index] + k: 1.0 for k in range(len(options)) if test(index, k + 1)}

    def dropped(index: int) -> dict[int, float]:
        found: dict[int, float] = {}
        parent = costs.space.choices[index].parent
        while parent is not None:
            found |= {first[parent] + k: 1.0 for k in range(len(costs.space.choices[parent].options))}
            parent = costs.space.choices[parent].parent
        return found

    for j, border in enumerate(costs.borders):
        quantize, dequantize = count + 2 * j, count + 2 * j + 1
        made = {} if border.producer is None else columns(border.producer, "writes")
        for consumer in border.consumers:
            read = columns(consumer, "reads")
            if read:  # quantize >= read - made
                rows.add({quantize: 1.0, **{c: -v for c, v in read.items()}, **made}, 0.0, np.inf)
            if made:  # dequantize >= made - read - dropped
                rows.add(
                    {dequantize: 1.0, **{c: -v for c, v in made.items()}, **read, **dropped(consumer)},
                    0.0,
                    np.inf,
                )
        if border.other_readers and made:
            rows.add({dequantize: 1.0, **{c: -v for c, v in made.items()}}, 0.0, np.inf)


def _loan_rows(costs: Costs, first: Sequence[int], rows: _Rows, lent: int) -> None:
    """A loan is out where owner and borrower are taken: z >= owner + borrower - 1."""

    def columns(genes: Sequence[tuple[int, int]]) -> list[dict[int, float]]:
        found: dict[int, dict[int, float]] = {}
        for choice, gene in genes:
            found.setdefault(choice, {})[first[choice] + gene - 1] = -1.0
        return list(found.values())

    for j, loan in enumerate(costs.loans):
        for owner in columns(loan.owners):
            for borrower in columns(loan.borrowers):
                rows.add({lent + j: 1.0, **owner, **borrower}, -1.0, np.inf)


def _sparse(vector: np.ndarray) -> dict[int, float]:
    return {int(i): float(vector[i]) for i in np.flatnonzero(vector)}
