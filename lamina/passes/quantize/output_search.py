"""How far a program with weights in codes is from the original, and which way each weight lowers that."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.analysis.adjoint import RULES, Adjoint
from lamina.analysis.instrument import InstrumentedSession, feeds_of, fixed_batch
from lamina.analysis.operators import WeightedOperator
from lamina.analysis.output_loss import OutputLoss
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.fold.unfuse import unfuse
from lamina.passes.fold.unfuse_body import body_of
from lamina.passes.quantize.coded import Coded, from_rows, to_rows
from lamina.quality import Metric

# Batches the data is cut into at first: so many steps has a pass whatever the batch size of its owner.
BATCHES = 128
# Every so many of them one only says which codes are best.
_HOLD_OUT = 8
# Bytes of the original's outputs that are kept: with a large vocabulary all would be many times the model.
_KEPT = 256 << 20


@dataclass(frozen=True)
class Rounded:
    """A weight in codes, and where it stands.

    Attributes:
        made: Its codes.
        target: The rows they stand for, float32 ``[n, k]``, times ``factor``.
        moments: Mean of x x' of what it multiplies, float64 ``[g, k, k]``, damped; of the activation
            divided by ``factor``.
        factor: What its columns are multiplied by before they are rounded, ``[k]`` or ``[1]``.
        axis: Axis of the weight that numbers its rows.
        shape: Of the weight.
        names: Initializers that hold it: one for each operator that reads it.
        operators: Those operators.
    """

    made: Coded
    target: np.ndarray
    moments: np.ndarray
    factor: np.ndarray
    axis: int
    shape: tuple[int, ...]
    names: tuple[str, ...]
    operators: tuple[WeightedOperator, ...]

    def array(self, made: Coded) -> np.ndarray:
        """The float32 weight that operators read."""
        return from_rows(made.rows() / self.factor, self.shape, self.axis).astype(np.float32)


class OutputSearch:
    """Divergences of weights in codes from the original, and their derivatives.

    Args:
        original: What the outputs should be.
        current: The program in which the weights are the initializers of ``rounded``.
        rounded: The weights.
        data: Calibration samples; cut into 128 batches, where the program's batch axis is free.
        metric: What :class:`lamina.analysis.output_loss.OutputLoss` counts beside the divergence.
        threads: Threads of a run.

    Attributes:
        batches: The data, cut.
        held: Numbers of the batches held out, one in eight.
        seen: Those of the others.

    Raises:
        UnsupportedOperator: An operator between a weight and an output has no derivative in
            :mod:`lamina.analysis.adjoint`.
        PassError: A fused operator cannot be written as those of which the standard makes it.
        BackendError: ONNX Runtime refuses a program.

    Memory: all inputs, 256 MB of the original's outputs at most, and all values of one batch.
    """

    def __init__(
        self,
        original: Program,
        current: Program,
        rounded: Sequence[Rounded],
        data: Dataset,
        *,
        metric: Metric | None = None,
        threads: int | None = None,
    ) -> None:
        self._loss = OutputLoss(original, metric)
        names = [name for r in rounded for name in r.names]
        self._adjoint = Adjoint(_plain(current), names, self._loss.outputs, threads=threads)
        self._original = InstrumentedSession(original, self._loss.outputs, threads=threads)
        self._rounded = rounded
        self._program, self._data = original, data
        self.cut(BATCHES)

    def cut(self, count: int) -> None:
        """Cut the data into so many batches, or fewer where it is too little or their size is fixed."""
        data, fixed = self._data, fixed_batch(self._program)
        size = fixed or max(data.group, min(data.batch_size, len(data) // count))
        self.batches = [b for b in replace(data, batch_size=size).batches() if fixed in (None, len(b))]
        self._feeds = [feeds_of(self._program, b, f"batch {i}") for i, b in enumerate(self.batches)]
        self.held = [i for i in range(len(self.batches)) if i % _HOLD_OUT == 1]
        self.seen = [i for i in range(len(self.batches)) if i not in self.held]
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        self._bytes = 0

    def reference(self, number: int) -> dict[str, np.ndarray]:
        """What the original answers to a batch."""
        if number in self._kept:
            return self._kept[number]
        answers = self._original.run(self._loss.outputs, self._feeds[number], where=f"batch {number}")
        made = dict(zip(self._loss.outputs, answers, strict=True))
        size = sum(array.nbytes for array in made.values())
        if self._bytes + size <= _KEPT:
            self._kept[number], self._bytes = made, self._bytes + size
        return made

    def positions(self, number: int) -> float:
        """How many answers the divergence from a batch is a mean of."""
        return self._loss.positions(self.reference(number), self.batches[number])

    def divergence(self, made: Sequence[Coded], numbers: Iterable[int]) -> float:
        """Mean over the positions of some batches."""
        weights, total, count = self._weights(made), 0.0, 0.0
        for i in numbers:
            values = self._adjoint.run(self._feeds[i], weights, outputs_only=True)
            reference = self.reference(i)
            total += self._loss.compare(values, reference, self.batches[i])[0]
            count += self.positions(i)
        return total / max(count, 1.0)

    def slopes(self, made: Sequence[Coded], numbers: Iterable[int]) -> tuple[float, list[np.ndarray]]:
        """That mean, and its derivatives by the rows of each weight, float64 ``[n, k]``."""
        weights, total, count = self._weights(made), 0.0, 0.0
        sums = [np.zeros(r.made.codes.shape) for r in self._rounded]
        for i in numbers:
            values, reference = self._adjoint.run(self._feeds[i], weights), self.reference(i)
            part, seeds = self._loss.compare(values, reference, self.batches[i])
            total += part
            count += self._loss.positions(reference, self.batches[i])
            found = self._adjoint.back(values, seeds)
            for whole, r in zip(sums, self._rounded, strict=True):
                for name in r.names:
                    if name in found:
                        whole += to_rows(found[name], r.axis)
        count = max(count, 1.0)
        return total / count, [s / r.factor / count for s, r in zip(sums, self._rounded, strict=True)]

    def curvatures(self, made: Sequence[Coded]) -> list[np.ndarray]:
        """Of the divergence, by each row of each operator's output, ``[n]``: one random probe a position.

        Source: Martens and Grosse 2015, arXiv:1503.05671: the other factor of a Kronecker-factored curvature,
        of which the diagonal is kept.
        """
        generator, count = np.random.default_rng(0), 0.0
        weights = self._weights(made)
        ends = [[self._adjoint.output_of(o.name) for o in r.operators] for r in self._rounded]
        also = [name for found in ends for name in found]
        squares = [np.zeros(len(m.codes)) for m in made]
        for i, (batch, feeds) in enumerate(zip(self.batches, self._feeds, strict=True)):
            reference = self.reference(i)
            count += self._loss.positions(reference, batch)
            values = self._adjoint.run(feeds, weights)
            slopes = self._adjoint.back(values, self._loss.probe(reference, batch, generator), also)
            for square, r, found in zip(squares, self._rounded, ends, strict=True):
                for operator, name in zip(r.operators, found, strict=True):
                    if name in slopes:
                        square += _row_squares(slopes[name], operator)
        return [square / max(count, 1.0) for square in squares]

    def _weights(self, made: Sequence[Coded]) -> Mapping[str, np.ndarray]:
        """Initializer -> float32 array."""
        pairs = zip(self._rounded, made, strict=True)
        return {name: array for r, m in pairs for array in (r.array(m),) for name in r.names}


def _plain(program: Program) -> Program:
    """Fused operators that have no derivative written as those of which the standard makes them."""
    fused = {n.op_type for n in program.graph if not n.domain and n.op_type not in RULES}
    names = sorted(name for name in fused if body_of(name, program.opset) is not None)
    return unfuse(program, names)[0] if names else program


def _row_squares(slope: np.ndarray, operator: WeightedOperator) -> np.ndarray:
    """Sum of squares of derivatives by each output channel, float64."""
    axis = 1 if operator.kind == "conv" else slope.ndim - 1 - operator.side
    others = tuple(i for i in range(slope.ndim) if i != axis)
    return np.asarray(np.square(slope).sum(axis=others, dtype=np.float64))
