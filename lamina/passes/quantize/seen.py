"""What operators that are to be rounded read, of the program as it is and as it should be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamina.analysis.matching import places_of
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.operators import WeightedOperator, patches
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.coded import form_name, to_rows
from lamina.passes.quantize.graph import constant_array

# weight, form, factors
Key = tuple[str, str, str]


@dataclass(frozen=True)
class Work:
    """One operator to round: where it stands and on which grid."""

    site: Site
    option: Option
    operator: WeightedOperator

    @property
    def axis(self) -> int:
        """The weight's axis that numbers output channels."""
        return int(self.operator.kind != "conv" and self.operator.flipped)

    @property
    def key(self) -> Key:
        """What operators that share one weight in codes have in common."""
        given = self.option.parameters
        return self.operator.weight, form_name(given, self.axis), str(given.get("smooth"))

    @property
    def place(self) -> tuple[str, int]:
        """The node, and which of its operands the weight is."""
        return self.operator.name, 1 if self.operator.kind != "matmul" else 1 - self.operator.side


@dataclass
class Seen:
    """What operators read: sums of ``x x'`` and ``x0 x'``, float64 ``[g, k, k]``, and of x, ``[g, k]``.

    x is what is read, x0 what should be.
    """

    square: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    count: int = 0

    @property
    def mean(self) -> np.ndarray:
        """Mean of x, ``[g, k]``."""
        return self.total / max(1, self.count)


def moments_of(
    wave: Sequence[Work],
    current: Program,
    original: Program,
    streams: tuple[Stream, Stream],
    settled: Sequence[str],
    batches: Sequence[Dataset],
    vectors: int,
    weights: str | None,
) -> dict[tuple[object, ...], Seen]:
    """Sums over the data for the operators of one wave; as many vectors of each as :class:`Rounding` says."""
    kinds = {reads_of(w.operator): w for w in wave}
    wanted = list(dict.fromkeys(w.operator.activation for w in wave))
    sums: dict[tuple[object, ...], Seen] = {}
    pairs = zip(
        batches,
        streams[0].run(original, wanted, settled),
        streams[1].run(current, wanted, settled),
        strict=True,
    )
    total = sum(map(len, batches))
    for batch, should, real in pairs:
        for key, item in kinds.items():
            name = item.operator.activation
            width = to_rows(weight_of(original, item), item.axis).shape[1]
            count = max(1, max(vectors, 4 * width) * len(batch) // total)
            x, x0 = (_vectors(v[name], item.operator, batch, count, weights) for v in (real, should))
            if key not in sums:
                group, wide = x.shape[1:]
                empty = np.zeros((group, wide, wide))
                sums[key] = Seen(empty, empty.copy(), np.zeros((group, wide)))
            seen = sums[key]
            # [g, k, n] @ [g, n, k]
            seen.square += x.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
            seen.cross += x0.transpose(1, 2, 0) @ x.transpose(1, 0, 2)
            seen.total += x.sum(axis=0, dtype=np.float64)
            seen.count += len(x)
    return sums


def reads_of(operator: WeightedOperator) -> tuple[object, ...]:
    """What operators with the same input vectors share."""
    window = operator.kernel, operator.strides, operator.pads, operator.dilations
    return operator.activation, operator.kind == "conv", operator.side, operator.group, window


def weight_of(program: Program, item: Work) -> np.ndarray:
    """The operator's weight as it is stored."""
    array = constant_array(program.graph.initializers[item.operator.weight])
    assert array is not None
    return array


def _vectors(
    array: np.ndarray, operator: WeightedOperator, batch: Dataset, count: int, received: str | None
) -> np.ndarray:
    """float32 ``[n, g, k]``: at most ``count`` evenly spaced rows that the operator multiplies."""
    if operator.kind == "conv":
        return patches(array, operator, count)
    moved = np.moveaxis(array, -2, -1) if operator.side else array
    rows = moved.reshape(-1, moved.shape[-1])
    mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
    places = places_of(moved.shape, mask, len(rows), count)
    taken = rows[places]
    if received is not None:
        weights = batch.inputs.get(received, batch.extras.get(received))
        if weights is not None and moved.shape[: weights.ndim] == weights.shape and moved.ndim > weights.ndim:
            each = np.repeat(weights.reshape(-1), len(rows) // weights.size)
            taken = taken * each[places, None]
    return np.asarray(taken[:, None, :], np.float32)
