"""Codes and scales chosen against what the program answers, not against what each operator does.

Rounding operator by operator minimizes errors that later operators may ignore, and cannot trade the error of
one for that of another. Here all weights move together, along the derivative of the outputs' divergence from
the original's: first far and roughly (:mod:`lamina.passes.quantize.straight_through`), then near and exactly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.passes.quantize.coded import Coded
from lamina.passes.quantize.gptq import descend
from lamina.passes.quantize.output_search import OutputSearch, Rounded
from lamina.passes.quantize.straight_through import learn

# Share of the time for the passes; they end earlier where they are done.
_LEARNING = 0.7
# Runs of both programs over the data that passes, and rounds, must have time for to be begun.
_LEAST_PASSES, _LEAST_ROUNDS = 1, 4
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
    if passes and seconds > _LEAST_PASSES * run:
        made = learn(search, rounded, passes=passes, seconds=_LEARNING * seconds, progress=progress)
    if not rounds or end - time.perf_counter() < _LEAST_ROUNDS * run:
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
