"""Codes and scales chosen against what the program answers, not against what each operator does.

Rounding operator by operator minimizes errors that later operators may ignore, and cannot trade the error of
one for that of another. Here all weights move together, along the derivative of the outputs' divergence from
the original's, and a step is kept where that divergence falls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.adjoint import Adjoint
from lamina.analysis.instrument import InstrumentedSession
from lamina.analysis.operators import WeightedOperator
from lamina.analysis.output_loss import OutputLoss
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.quantize.coded import Coded, from_rows, to_rows
from lamina.passes.quantize.gptq import descend

# Every so many batches one only says when to stop.
_HOLD_OUT = 8
# Trust in the curvature: its factor at first, after a step that helped, and after one that did not.
_FIRST, _BOLDER, _SHYER = 16.0, 1 / 1.4, 3.0
# Rounds without a better held-out divergence before it ends.
_PATIENCE = 8
# The least curvature of a row, of the mean of its operator's: what one probe missed may matter.
_LEAST = 0.01


@dataclass(frozen=True)
class Rounded:
    """A weight in codes, and where it stands.

    Attributes:
        made: Its codes.
        moments: Mean of x x' of what it multiplies, float64 ``[g, k, k]``, damped; of the activation
            divided by ``factor``.
        factor: What its columns are multiplied by before they are rounded, ``[k]`` or ``[1]``.
        axis: Axis of the weight that numbers its rows.
        shape: Of the weight.
        names: Initializers that hold it: one for each operator that reads it.
        operators: Those operators.
    """

    made: Coded
    moments: np.ndarray
    factor: np.ndarray
    axis: int
    shape: tuple[int, ...]
    names: tuple[str, ...]
    operators: tuple[WeightedOperator, ...]

    def array(self, made: Coded) -> np.ndarray:
        """The float32 weight that operators read."""
        return from_rows(made.rows() / self.factor, self.shape, self.axis).astype(np.float32)


def round_for_outputs(
    original: Program,
    current: Program,
    rounded: Sequence[Rounded],
    batches: Sequence[Dataset],
    feeds: Sequence[Mapping[str, np.ndarray]],
    *,
    rounds: int,
    seconds: float,
    threads: int | None = None,
) -> list[Coded]:
    """Codes with which the outputs are nearer to the original's than with those given, or the same codes.

    Each round takes the divergence's derivative G by every weight W^ and aims at
    ``T_i = W^_i - G_i S^-1 / (t h_i)`` for row i: with S the second moments of what the operator reads and
    ``h_i`` the curvature of the divergence by its output i, that is the minimum of the divergence's quadratic
    model with Kronecker-factored curvature, its other factor cut to the diagonal. :func:`descend` then brings
    codes and scales near T in the metric of S. The trust t falls after a round that helped and rises after
    one that did not, whose codes are dropped. One batch in eight is held out: the codes with the least
    divergence there are returned, if that on the other batches is below the start's too.

    Args:
        original: What the outputs should be.
        current: The program in which the weights are the initializers of ``rounded``.
        rounded: The weights.
        batches: Calibration data, two batches or more.
        feeds: Model inputs of each batch.
        rounds: Most rounds.
        seconds: No round begins after them.
        threads: Threads of a run.

    Raises:
        UnsupportedOperator: An operator between a weight and an output has no derivative in
            :mod:`lamina.analysis.adjoint`.
        BackendError: ONNX Runtime refuses the program.

    Cost: two runs of the program forth and one back over the data a round. Memory: all values of one batch,
    and the original's outputs for all of them.

    Source: form derived. Kronecker-factored curvature: Martens and Grosse 2015, arXiv:1503.05671; against
    outputs of more than a layer: Li et al. 2021 (BRECQ), arXiv:2102.05426, whose block here is all that
    follows; deviates from it: codes descend instead of being learned through a soft rounding.
    """
    end = time.perf_counter() + seconds
    loss = OutputLoss(original)
    names = [name for r in rounded for name in r.names]
    adjoint = Adjoint(current, names, loss.outputs, threads=threads)
    search = _Search(adjoint, loss, rounded, batches, feeds)
    search.look(original, threads)
    made = [r.made for r in rounded]
    best, start_held = made, search.divergence(made, held=True)
    least, idle, trust = start_held, 0, _FIRST
    now, slopes = search.slopes(made)
    for _ in range(rounds):
        if idle >= _PATIENCE or time.perf_counter() > end:
            break
        tried = [r.step(m, g, trust) for r, m, g in zip(search.models, made, slopes, strict=True)]
        idle += 1
        reached = search.divergence(tried, held=False)
        if not reached < now:
            trust *= _SHYER
            continue
        made, trust = tried, trust * _BOLDER
        held = search.divergence(made, held=True)
        if held < least:
            best, least, idle = made, held, 0
        now, slopes = search.slopes(made)
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


class _Search:
    """Divergences of weights in codes from the original, and their derivatives."""

    def __init__(
        self,
        adjoint: Adjoint,
        loss: OutputLoss,
        rounded: Sequence[Rounded],
        batches: Sequence[Dataset],
        feeds: Sequence[Mapping[str, np.ndarray]],
    ) -> None:
        self._adjoint, self._loss, self._rounded = adjoint, loss, rounded
        self._batches, self._feeds = batches, feeds
        held = [i for i in range(len(batches)) if i % _HOLD_OUT == 1]
        self._numbers = {True: held, False: [i for i in range(len(batches)) if i not in held]}
        self._reference: list[dict[str, np.ndarray]] = []
        self.models: list[_Model] = []

    def look(self, original: Program, threads: int | None) -> None:
        """Run the original, and probe the curvature by each row of each weight as it is."""
        session = InstrumentedSession(original, self._loss.outputs, threads=threads)
        generator = np.random.default_rng(0)
        weights = self._weights([r.made for r in self._rounded])
        ends = [[self._adjoint.output_of(o.name) for o in r.operators] for r in self._rounded]
        also = [name for found in ends for name in found]
        squares = [np.zeros(len(r.made.codes)) for r in self._rounded]
        for number, (batch, feeds) in enumerate(zip(self._batches, self._feeds, strict=True)):
            answers = session.run(self._loss.outputs, feeds, where=f"batch {number}")
            reference = dict(zip(self._loss.outputs, answers, strict=True))
            self._reference.append(reference)
            values = self._adjoint.run(feeds, weights)
            slopes = self._adjoint.back(values, self._loss.probe(reference, batch, generator), also)
            for square, r, found in zip(squares, self._rounded, ends, strict=True):
                for operator, name in zip(r.operators, found, strict=True):
                    if name in slopes:
                        square += _row_squares(slopes[name], operator)
        count = self._positions(range(len(self._batches)))
        for square, r in zip(squares, self._rounded, strict=True):
            rows = np.maximum(square, _LEAST * (square.mean() or 1.0)) / count
            self.models.append(_Model(r.moments, np.linalg.inv(r.moments), rows))

    def divergence(self, made: Sequence[Coded], *, held: bool) -> float:
        """Mean over positions of the batches held out, or of the others."""
        weights, total = self._weights(made), 0.0
        for number in self._numbers[held]:
            values = self._adjoint.run(self._feeds[number], weights, outputs_only=True)
            total += self._loss.compare(values, self._reference[number], self._batches[number])[0]
        return total / self._positions(self._numbers[held])

    def slopes(self, made: Sequence[Coded]) -> tuple[float, list[np.ndarray]]:
        """The mean over positions of what is not held out, and its derivative by each weight, ``[n, k]``."""
        weights, total = self._weights(made), 0.0
        sums = [np.zeros(r.made.codes.shape) for r in self._rounded]
        for number in self._numbers[False]:
            values = self._adjoint.run(self._feeds[number], weights)
            part, seeds = self._loss.compare(values, self._reference[number], self._batches[number])
            total += part
            found = self._adjoint.back(values, seeds)
            for whole, r in zip(sums, self._rounded, strict=True):
                for name in r.names:
                    if name in found:
                        whole += to_rows(found[name], r.axis)
        count = self._positions(self._numbers[False])
        return total / count, [s / r.factor / count for s, r in zip(sums, self._rounded, strict=True)]

    def _weights(self, made: Sequence[Coded]) -> dict[str, np.ndarray]:
        pairs = zip(self._rounded, made, strict=True)
        return {name: array for r, m in pairs for array in (r.array(m),) for name in r.names}

    def _positions(self, numbers: Iterable[int]) -> float:
        return sum(self._loss.positions(self._reference[i], self._batches[i]) for i in numbers)


def _row_squares(slope: np.ndarray, operator: WeightedOperator) -> np.ndarray:
    """Sum of squares of derivatives by each output channel, float64."""
    axis = 1 if operator.kind == "conv" else slope.ndim - 1 - operator.side
    others = tuple(i for i in range(slope.ndim) if i != axis)
    return np.asarray(np.square(slope).sum(axis=others, dtype=np.float64))
