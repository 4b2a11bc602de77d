"""Reduction and selection nodes appended to a clone, so that no activation has to leave the runtime whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from lamina.errors import DataError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.shapes import Observed

ROWS = "lamina_rows"
HALVES = "halves"
_FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.DOUBLE))


@dataclass(frozen=True)
class Layout:
    """Where the vectors of a value lie.

    Attributes:
        kind: ``tokens``: the last axis holds a vector; ``pixels``: axis 1 does.
        width: Elements of a vector.
        places: Vectors a sample: tokens, or pixels.
        sampled: Whether the first axis numbers samples.
        space: Dimensions the places are laid out in.
    """

    kind: Literal["tokens", "pixels"]
    width: int
    places: int
    sampled: bool
    space: tuple[int, ...] = ()

    @staticmethod
    def of(shape: tuple[int, ...], axis: int | None, rows: int) -> Layout | None:
        """The layout of a value of this shape in a run of ``rows`` samples; None where it has no vectors.

        Args:
            shape: Observed shape.
            axis: Axis of the vectors; None: 1 for rank 4, else the last.
            rows: Samples of that run.
        """
        if len(shape) < 2 or not all(shape):
            return None
        place = (1 if len(shape) == 4 else -1) if axis is None else axis
        place %= len(shape)
        sampled = shape[0] == rows
        if len(shape) == 2 and not sampled and shape[0] % rows == 0 and place == 1:
            # samples and their tokens in one axis, as some exporters flatten them
            return Layout("tokens", shape[1], shape[0] // rows, True, (shape[0] // rows,))
        if place == len(shape) - 1:
            space = shape[1:-1] if sampled else shape[:-1]
            return Layout("tokens", shape[-1], int(np.prod(space, dtype=np.int64)), sampled, space)
        if place == 1:
            return Layout("pixels", shape[1], int(np.prod(shape[2:], dtype=np.int64)), sampled, shape[2:])
        return None


class Taps:
    """A clone of a program that grows outputs; weights stay shared.

    Args:
        program: Left unchanged.
        shapes: Shape of every value that is tapped.
    """

    def __init__(self, program: Program, shapes: Mapping[str, Observed]) -> None:
        self.shapes = shapes
        self._program = program.clone()
        self._rewriter = Rewriter(self._program.model)
        graph = self._program.graph
        self._values = {v.name: v for n in graph for v in n.outputs if v.name}
        self._values |= {v.name: v for v in graph.inputs if v.name and v.name not in graph.initializers}
        self._made: dict[tuple[str, ...], str] = {}
        self._inputs: dict[str, ir.Value] = {}
        self._float: dict[str, ir.Value] = {}

    @property
    def program(self) -> Program:
        """The clone as it is now."""
        return Program(self._program.model, self._program.source)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs added so far that every batch is asked for: lengths and last tokens."""
        return [name for key, name in self._made.items() if _for_every_batch(key)]

    @property
    def looks(self) -> list[str]:
        """Names of the others, which only the batches looked at are asked for."""
        return [name for key, name in self._made.items() if not _for_every_batch(key)]

    @property
    def index_inputs(self) -> list[str]:
        """Names of the index inputs that a run must feed."""
        return list(self._inputs)

    def length(self, name: str, other: str | None = None) -> str:
        """Squared vector lengths along the last axis of a value, or of its difference to another one."""
        key = ("length", name, other or "")
        if key not in self._made:
            value = self._real(name)
            if other is not None:
                value = self._rewriter.op("Sub", [value, self._real(other)], dtype=value.dtype)
            axis = len(self.shapes[name][0]) - 1
            self._made[key] = self._output(self._sum_of_squares(value, axis))
        return self._made[key]

    def tokens(self, name: str, layout: Layout, which: str) -> str:
        """The tokens that the index input numbers, ``[n, width]`` (see :meth:`index_name`)."""
        key = ("tokens", name, which)
        if key not in self._made:
            flat = self._reshape(self._real(name), (-1, layout.width))
            self._made[key] = self._output(self._gather(flat, self._index(index_name(which, layout)), 0))
        return self._made[key]

    def rows(self, name: str, which: str) -> str:
        """The whole samples that the index input ``lamina_rows_<which>`` numbers."""
        key = ("rows", name, which)
        if key not in self._made:
            index = self._index(f"{ROWS}_{which}")
            self._made[key] = self._output(self._gather(self._real(name), index, 0))
        return self._made[key]

    def halves(self, name: str, layout: Layout) -> str:
        """Means of two halves of the tokens of the samples drawn for ``views``: ``[n, 2, width]``."""
        key = (HALVES, name)
        if key not in self._made:
            value = self._reshape(self._real(name), (-1, layout.places, layout.width))
            value = self._gather(value, self._index(f"{ROWS}_views"), 0)
            weights = self._weights(index_name(HALVES, layout), layout.places, value.dtype)
            self._made[key] = self._output(self._rewriter.op("MatMul", [weights, value], dtype=value.dtype))
        return self._made[key]

    # -- nodes ------------------------------------------------------------------------------------------

    def _real(self, name: str) -> ir.Value:
        """The value in float32 or float64: sums of squares leave the range of half precision."""
        if name not in self._values:
            raise DataError(f"no value is called '{name}'", where=self._program.source)
        if name not in self._float:
            value = self._values[name]
            if value.dtype not in _FLOATS and value.dtype is not None:
                value = self._rewriter.op(
                    "Cast", [value], {"to": int(ir.DataType.FLOAT)}, dtype=ir.DataType.FLOAT
                )
            self._float[name] = value
        return self._float[name]

    def _sum_of_squares(self, value: ir.Value, axis: int) -> ir.Value:
        if self._program.opset >= 18:
            axes = self._rewriter.constant(np.array([axis], np.int64), "lamina_axes")
            return self._rewriter.op("ReduceSumSquare", [value, axes], {"keepdims": 0}, dtype=value.dtype)
        flags = {"axes": [axis], "keepdims": 0}
        return self._rewriter.op("ReduceSumSquare", [value], flags, dtype=value.dtype)

    def _reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        target = self._rewriter.constant(np.array(shape, np.int64), "lamina_shape")
        return self._rewriter.op("Reshape", [value, target], dtype=value.dtype)

    def _gather(self, value: ir.Value, index: ir.Value, axis: int) -> ir.Value:
        return self._rewriter.op("Gather", [value, index], {"axis": axis}, dtype=value.dtype)

    def _index(self, name: str) -> ir.Value:
        if name not in self._inputs:
            kind = ir.TensorType(ir.DataType.INT64)
            value = ir.Value(name=name, shape=ir.Shape([f"{name}_count"]), type=kind)
            self._program.graph.inputs.append(value)
            self._inputs[name] = value
        return self._inputs[name]

    def _weights(self, name: str, places: int, dtype: ir.DataType | None) -> ir.Value:
        """The float32 input of this name, ``[n, 2, places]``, in the type of what it weighs."""
        if name not in self._inputs:
            kind = ir.TensorType(ir.DataType.FLOAT)
            value = ir.Value(name=name, shape=ir.Shape([f"{name}_count", 2, places]), type=kind)
            self._program.graph.inputs.append(value)
            self._inputs[name] = value
        weights = self._inputs[name]
        if dtype != ir.DataType.DOUBLE:
            return weights
        return self._rewriter.op("Cast", [weights], {"to": int(dtype)}, dtype=dtype)

    def _output(self, value: ir.Value) -> str:
        self._program.graph.outputs.append(value)
        return value.name or ""


def _for_every_batch(key: tuple[str, ...]) -> bool:
    return key[0] == "length" or key[-1] == "last"


def index_name(which: str, layout: Layout) -> str:
    """The input that numbers tokens of samples with this many: flat, ``row * places + place``."""
    return f"lamina_{which}_{layout.places}"


def lattice(space: tuple[int, ...], most: int) -> np.ndarray:
    """At most ``most`` flat positions of an image, evenly spaced on each axis, int64."""
    counts = list(space)
    while int(np.prod(counts, dtype=np.int64)) > most:
        largest = int(np.argmax(counts))
        counts[largest] = -(-counts[largest] // 2)
    marks = [(np.arange(c) * 2 + 1) * s // (2 * c) for c, s in zip(counts, space, strict=True)]
    grid = np.meshgrid(*marks, indexing="ij")
    return np.ravel_multi_index([g.reshape(-1) for g in grid], space).astype(np.int64)


def on_lattice(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """``[b, c, *space]`` at flat positions: ``[b, c, positions]``."""
    flat = images.reshape(*images.shape[:2], -1)
    return flat if flat.shape[2] == len(places) else flat[:, :, places]
