"""Codes and scales chosen against what the program answers, not against what each operator does.

Rounding operator by operator minimizes errors that later operators may ignore, and cannot trade the error of
one for that of another. Here all weights move together, along the derivative of the outputs' divergence from
the original's: first far and roughly (:mod:`lamina.passes.quantize.straight_through`), then near and exactly.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.passes.quantize.coded import Coded
from lamina.passes.quantize.gptq import descend
from lamina.passes.quantize.output_search import BATCHES, OutputSearch, Rounded
from lamina.passes.quantize.straight_through import RATE, learn

# Share of the time for the passes where rounds follow; they end earlier where they are done.
_LEARNING = 0.7
# Runs of both programs over the data that passes, and rounds, must have time for to be begun; three rounds.
_LEAST_PASSES, _LEAST_ROUNDS = 1, 12
# Batches in one step of a pass, at most, and as many steps as a pass should have time for before they are.
_LARGEST, _STEPS = 4, 400
# Answers of a program in a batch, with fewer of which a step is smaller.
_ANSWERS = 512
# Trust in the curvature: its factor at first, after a step that helped, and after one that did not.
_FIRST, _BOLDER, _SHYER = 16.0, 1 / 1.4, 3.0
# Rounds without a better held-out divergence before it ends.
_PATIENCE = 8
# The least curvature of a row, of the mean of its operator's: what one probe missed may matter.
_LEAST = 0.01


def round_for_outputs(
    search: OutputSearch,
    rounded: Sequence[Rounded],
    *,
    passes: int,
    rounds: int,
    seconds: float,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Coded]:
    """Codes with which the outputs are nearer to the original's than with those given, or the same codes.

    Codes are learned in passes, then improved in rounds. Each round takes the divergence's derivative G by
    every weight W^ and aims at ``T_i = W^_i - G_i S^-1 / (t h_i)`` for row i: with S the second moments of
    what the operator reads and ``h_i`` the curvature of the divergence by its output i, that is the minimum
    of the divergence's quadratic model with Kronecker-factored curvature, its other factor cut to the
    diagonal. :func:`descend` then brings codes and scales near T in the metric of S. The trust t falls
    after a round that helped and rises after one that did not, whose codes are dropped. One batch in eight
    is held out: the codes with the least divergence there are returned, if that on the other batches is
    below the start's too.

    Args:
        search: The divergence and its derivatives.
        rounded: The weights.
        passes: Most passes of learning.
        rounds: Most rounds behind them.
        seconds: No step begins after them; nothing at all where they would not do for a few passes.
        progress: Called with percents done, of 100, of the passes and of the rounds.

    Cost: two runs of the program forth and one back over the data a round or pass.

    Source: form derived. Kronecker-factored curvature: Martens and Grosse 2015, arXiv:1503.05671; against
    outputs of more than a layer: Li et al. 2021 (BRECQ), arXiv:2102.05426, whose block here is all that
    follows; deviates from it: codes descend instead of being learned through a soft rounding.
    """
    made = [r.made for r in rounded]
    if not search.held or seconds <= 0:
        return made
    start = time.perf_counter()
    end = start + seconds
    search.divergence(made, search.held)
    run = (time.perf_counter() - start) * len(search.batches) / len(search.held)
    follow = rounds > 0 and (1 - _LEARNING * (passes > 0)) * seconds > _LEAST_ROUNDS * run
    if passes and seconds > _LEAST_PASSES * run:
        seconds *= _LEARNING if follow else 1.0
        rate = RATE * _calm(search, made, seconds)
        made = learn(search, rounded, passes=passes, seconds=seconds, rate=rate, progress=progress)
    if not follow:
        return made
    models = _models(search, [replace(r, made=m) for r, m in zip(rounded, made, strict=True)])
    best, least, idle, trust = made, search.divergence(made, search.held), 0, _FIRST
    now, slopes = search.slopes(made, search.seen)
    for i in range(rounds):
        if progress is not None:
            progress(100 * i // rounds, 100, "rounds")
        if idle >= _PATIENCE or time.perf_counter() > end:
            break
        tried = [r.step(m, g, trust) for r, m, g in zip(models, made, slopes, strict=True)]
        idle += 1
        if not search.divergence(tried, search.seen) < now:
            trust *= _SHYER
            continue
        made, trust = tried, trust * _BOLDER
        held = search.divergence(made, search.held)
        if held < least:
            best, least, idle = made, held, 0
        now, slopes = search.slopes(made, search.seen)
    return best


def _calm(search: OutputSearch, made: Sequence[Coded], seconds: float) -> float:
    """Make batches larger where there is time for more steps than are of use; what rate goes with them.

    Many small steps are worth more than few good ones where there is little time; where there is much, more
    steps than so many fit the samples, not the program. Both what they are of and how few answers a step
    sees call for smaller ones.
    """
    search.slopes(made, search.seen[:1])  # the first takes longer
    start = time.perf_counter()
    search.slopes(made, search.seen[:1])
    possible = seconds / (time.perf_counter() - start)
    size = max(1, round(min(possible / _STEPS, _LARGEST)))
    if size > 1:
        search.cut(BATCHES // size)
    answers = search.positions(search.seen[0]) / size
    return float(min(1.0, (answers / _ANSWERS) ** 0.25) / math.sqrt(size))


@dataclass(frozen=True)
class _Model:
    """The quadratic model of the divergence by one weight, but for its slope."""

    moments: np.ndarray
    inverse: np.ndarray
    rows: np.ndarray

    def step(self, made: Coded, slope: np.ndarray, trust: float) -> Coded:
        """Codes and scales nearest to where the model has its minimum."""
        groups, width = self.moments.shape[:2]
        turned = slope.reshape(groups, -1, width) @ self.inverse
        turned /= trust * self.rows.reshape(groups, -1, 1)
        target = made.rows().astype(np.float64).reshape(turned.shape) - turned
        return descend(target, self.moments, made, sweeps=1)


def _models(search: OutputSearch, rounded: Sequence[Rounded]) -> list[_Model]:
    found = search.curvatures([r.made for r in rounded])
    rows = [np.maximum(square, _LEAST * (square.mean() or 1.0)) for square in found]
    return [_Model(r.moments, np.linalg.inv(r.moments), h) for r, h in zip(rounded, rows, strict=True)]
