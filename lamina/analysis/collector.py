"""All accumulators of one run: what they add to the graph, what they take from each batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lamina.analysis.attention import AttentionAccumulator
from lamina.analysis.depths import DepthAccumulator, depths_of
from lamina.analysis.examples import ExampleAccumulator
from lamina.analysis.inputs import InputAccumulator
from lamina.analysis.instrument import feeds_of
from lamina.analysis.needs import Looks, Need
from lamina.analysis.operators import WeightedOperator, weighted_operators
from lamina.analysis.residual import BranchAccumulator, BranchProbe, BranchTap, add_voids
from lamina.analysis.sampling import BatchView
from lamina.analysis.taps import Taps
from lamina.analysis.views import ViewAccumulator
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program
from lamina.ir.shapes import Observed, observed_shapes

# Samples of the run that shapes are observed in: a number that is rarely also a number of tokens.
_PROBED_ROWS = 3
OF_OPERATORS = frozenset((Need.INPUTS, Need.VECTORS))
_OF_DEPTHS = frozenset((Need.ANGLES, Need.TOKENS, Need.SPECTRA))


class Collector:
    """Feeds every statistic but ranges.

    Args:
        program: Left unchanged.
        shapes: Observed shape of every value in a run of ``rows`` samples.
        rows: Those samples.
        branches: The probes.
        needs: What to collect.
        looks: How much of the data to look at.
    """

    def __init__(
        self,
        program: Program,
        shapes: Mapping[str, Observed],
        rows: int,
        branches: Sequence[BranchProbe],
        needs: frozenset[Need],
        looks: Looks,
    ) -> None:
        taps = Taps(program, shapes)
        self.skipped: dict[str, str] = {}
        self._branches: list[BranchAccumulator] = []
        self._depths: DepthAccumulator | None = None
        self._attention: AttentionAccumulator | None = None
        self._inputs: InputAccumulator | None = None
        self._examples: ExampleAccumulator | None = None
        if needs & {Need.LENGTHS, Need.EXAMPLES}:
            self._tap_branches(taps, branches, rows, looks.pixels)
        if Need.EXAMPLES in needs:
            self._examples = ExampleAccumulator(self._branches, looks.examples)
        if needs & _OF_DEPTHS:
            self._depths = DepthAccumulator(taps, depths_of(branches), needs, rows, looks.pixels)
            self.skipped |= self._depths.skipped
        self._views: ViewAccumulator | None = None
        if Need.VIEWS in needs:
            self._views = ViewAccumulator(taps, depths_of(branches), rows, looks.pixels)
        if Need.ATTENTION in needs:
            softmaxes = {
                n.name or "": n.outputs[0].name or "" for n in program.graph if n.op_type == "Softmax"
            }
            self._attention = AttentionAccumulator(taps, branches, softmaxes, rows)
        self._operators: dict[str, WeightedOperator] = {}
        if needs & OF_OPERATORS:
            self._operators, refused = weighted_operators(program, shapes)
            self._inputs = InputAccumulator(taps, self._operators, rows, sums=Need.INPUTS in needs)
            self.skipped |= refused | self._inputs.skipped
        self.program, self.index_inputs = taps.program, taps.index_inputs
        self.outputs, self.looks = taps.outputs, taps.looks

    @staticmethod
    def of(
        program: Program,
        batch: Dataset,
        branches: Sequence[BranchProbe],
        needs: frozenset[Need],
        looks: Looks,
    ) -> Collector | None:
        """A collector for data like ``batch``; None where nothing is needed.

        Raises:
            DataError: A probe names no value of the program; the batch does not fit it.
            BackendError: ONNX Runtime refuses the program.
        """
        if not needs:
            return None
        _require_values(program, branches)
        rows = len(batch) if batch.fixed_batch or _is_fixed(program) else min(_PROBED_ROWS, len(batch))
        few = batch if rows == len(batch) else batch.rows(slice(0, max(1, rows // batch.group)))
        feeds = feeds_of(program, few, f"batch 0 (rows 0 to {len(few) - 1})")
        shapes = _shapes(program, feeds, branches, needs)
        return Collector(program, shapes, len(few), branches, needs, looks)

    def add(self, values: Mapping[str, np.ndarray], view: BatchView) -> None:
        """Take in one batch."""
        for branch in self._branches:
            branch.add(values, view)
        add_voids(self._branches, view)
        for part in (self._depths, self._views, self._attention, self._inputs, self._examples):
            if part is not None:
                part.add(values, view)

    def results(self) -> dict[str, Any]:
        """Fields of :class:`lamina.analysis.statistics.Statistics`."""
        empty = {b.tap.probe.name: "no token is left" for b in self._branches if not b.tokens}
        found: dict[str, Any] = {
            "branches": {b.tap.probe.name: b.result() for b in self._branches if b.tokens},
            "skipped": {**self.skipped, **empty},
            "operators": self._operators,
        }
        if self._depths is not None:
            found["depths"] = self._depths.result()
        if self._views is not None:
            found["views"] = self._views.result()
        if self._attention is not None:
            found["attention"] = self._attention.result()
        if self._inputs is not None:
            found["inputs"] = self._inputs.result()
        if self._examples is not None:
            found["examples"], found["example_rows"] = self._examples.result()
        return found

    def _tap_branches(self, taps: Taps, branches: Sequence[BranchProbe], rows: int, pixels: int) -> None:
        for probe in branches:
            tap = BranchTap(taps, probe, rows, pixels)
            if tap.problem:
                self.skipped[probe.name] = tap.problem
            else:
                self._branches.append(BranchAccumulator(tap))


def _is_fixed(program: Program) -> bool:
    from lamina.analysis.instrument import fixed_batch

    return fixed_batch(program) is not None


def _require_values(program: Program, branches: Sequence[BranchProbe]) -> None:
    known = {v.name for n in program.graph for v in n.outputs} | {p.name for p in program.inputs}
    for probe in branches:
        for name in (probe.skip, probe.body, probe.output):
            if name in program.graph.initializers:
                raise DataError(f"'{name}' is a weight, not an activation", where=program.source)
            if name is not None and name not in known:
                raise DataError(
                    f"no value is called '{name}'",
                    where=program.source,
                    advice="only values of the main graph can be observed",
                )


def _shapes(
    program: Program,
    feeds: Mapping[str, np.ndarray],
    branches: Sequence[BranchProbe],
    needs: frozenset[Need],
) -> Mapping[str, Observed]:
    """Shapes in a run on ``feeds``: declared ones where they say enough, else those of a run.

    A run without optimization takes as long as many optimized ones.
    """
    declared = _declared(program, feeds)
    wanted = {n for b in branches for n in (b.skip, b.body, b.output) if n}
    if Need.ATTENTION in needs:
        wanted |= {n.outputs[0].name or "" for n in program.graph if n.op_type == "Softmax"}
    if needs & OF_OPERATORS:
        wanted |= {n.inputs[0].name or "" for n in program.graph if n.op_type == "Conv" and n.inputs[0]}
        wanted |= {
            v.name or ""
            for n in program.graph
            if n.op_type in ("MatMul", "Gemm")
            for v in n.inputs[:2]
            if v is not None and v.const_value is None
        }
    return declared if wanted <= declared.keys() else observed_shapes(program, feeds)


def _declared(program: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, Observed]:
    """Shapes as the program declares them, its symbols bound by the feeds; incomplete ones left out."""
    bound: dict[str, int] = {}
    for port in program.inputs:
        for dim, size in zip(port.shape, feeds[port.name].shape, strict=False):
            if (isinstance(dim, int) and dim != size) or (
                isinstance(dim, str) and bound.get(dim, size) != size
            ):
                return {}
            if isinstance(dim, str):
                bound[dim] = size
    found: dict[str, Observed] = {name: (array.shape, array.dtype) for name, array in feeds.items()}
    for value in (v for n in program.graph for v in n.outputs if v.name):
        if value.shape is None or value.dtype is None:
            continue
        dims = [d if isinstance(d, int) else bound.get(str(d.value), 0) for d in value.shape]
        if all(dims):
            found[value.name or ""] = (tuple(dims), np.dtype(value.dtype.numpy()))
    return found
