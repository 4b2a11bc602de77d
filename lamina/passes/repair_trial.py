"""Trying repairs: what an operator's weights would become, and whether the outputs come nearer for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from lamina.analysis.matching import is_held
from lamina.analysis.moments import Correction
from lamina.analysis.operators import constant
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import remove_unused_initializers
from lamina.passes.repair import BEHIND, Repair, packed, put, unpacked
from lamina.passes.repair_sites import RepairSite
from lamina.quality import Metric

# Half-way a trial may be so many times the best so far, and go on.
_CLEARLY = 1.25

Place = tuple[str, int]  # a node and which of its operands


class Trial:
    """Says whether repairs bring the outputs nearer to the original's, on held-out batches.

    Attributes:
        best: The least divergence so far.
    """

    def __init__(
        self, original: Program, batches: Sequence[Dataset], streams: tuple[Stream, Stream], metric: Metric
    ) -> None:
        self._metric, self._stream, self._batches = metric, streams[1], batches
        self._numbers = [i for i in range(len(batches)) if is_held(i)]
        self._outputs = [port.name for port in original.outputs]
        rest = streams[0].rest(original, self._outputs)
        self._reference = [rest.run(i, {}) for i in self._numbers]
        self._features: list[np.ndarray] = []
        self.best = float("inf")

    def begin(self, program: Program, places: Mapping[Place, np.ndarray]) -> None:
        """Compile what follows the stream once, with the operands at ``places`` left open."""
        self._names: dict[Place, str] = {}
        self._weights: dict[str, np.ndarray] = {}

        def loosen(piece: Program) -> list[str]:
            # each gets an initializer of its own first, so that nobody else sees what is tried
            rewriter = Rewriter(piece.model)
            for place, array in places.items():
                if rewriter.has_node(place[0]):  # else no output depends on it
                    name = put(rewriter, *place, array).name or ""
                    self._names[place], self._weights[name] = name, array
            remove_unused_initializers(piece.model)
            return list(self._weights)

        self._rest = self._stream.rest(program, self._outputs, loosen)

    def better(self, repairs: Sequence[Repair] = ()) -> bool:
        """Whether the outputs diverge less with the repairs than with everything tried before.

        Given up half-way where they diverge clearly more by then.
        """
        places = [(r, self._names.get((r.node, r.operand))) for r in repairs]
        weights = {**self._weights, **{name: unpacked(r.array) for r, name in places if name is not None}}
        features: list[np.ndarray] = []
        for done, number in enumerate(self._numbers):
            if done and done == len(self._numbers) // 2 and self._features:
                reached, was = (
                    self._metric.score(np.concatenate(f[:done])) for f in (features, self._features)
                )
                if reached > _CLEARLY * was:
                    return False
            made, reference = self._rest.run(number, weights), self._reference[done]
            features.append(self._metric.features(made, self._batches[number], reference))
        found = self._metric.score(np.concatenate(features))
        if not found < self.best:
            return False
        self.best, self._features = found, features
        return True


def open_places(wave: Sequence[RepairSite], program: Program, *, add_biases: bool) -> dict[Place, np.ndarray]:
    """Every operand that repairs of these sites may replace, as it is; zeros where there is none yet."""
    nodes = {n.name: n for n in program.graph}
    found: dict[Place, np.ndarray] = {}
    for site in wave:
        node = nodes[site.node]
        if not site.fixed:
            weight = constant(node.inputs[site.weight])
            if weight is None:
                raise PassError(f"the weight of '{site.node}' is gone", advice="this is a bug in compensate")
            found[site.node, site.weight] = weight
        if site.bias is not None:
            bias = constant(nodes[site.bias[0]].inputs[site.bias[1]])
            if bias is None:
                raise PassError(f"the bias of '{site.node}' is gone", advice="this is a bug in compensate")
            found[site.bias] = bias
        elif add_biases and site.addable and site.operator is not None:
            found[_added(node)] = np.zeros(site.width, np.dtype(site.dtype))
    return found


def _added(node: ir.Node) -> Place:
    """Where a bias goes that an operator does not have yet."""
    return (node.name or "", BEHIND if node.op_type == "MatMul" else 2)


def repairs_of(site: RepairSite, found: Correction, places: Mapping[Place, np.ndarray]) -> Iterator[Repair]:
    """The site's weight and bias with the correction added, in the dtypes they are stored in."""
    fits = bool(np.any(found.matrix))
    weight = places[site.node, site.weight] if fits else np.zeros(0)
    if fits and site.operator is None:
        # the gain scales what the norm made; the correction, what gain and shift made of it
        fresh = (1 + found.matrix) * weight.astype(np.float64)
        yield Repair(site.node, site.weight, packed(fresh.astype(weight.dtype)))
    elif fits and site.operator is not None:
        change = found.matrix.T if site.operator.flipped else found.matrix
        fresh = weight.astype(np.float64) + change.reshape(weight.shape)
        yield Repair(site.node, site.weight, packed(fresh.astype(weight.dtype)))
    scaled = fits and site.operator is None
    place = site.bias or next((p for p in places if p[0] == site.node and p[1] != site.weight), None)
    if place is None or not (scaled or np.any(found.offset)):
        return
    bias = places[place].astype(np.float64)
    fresh = bias * (1 + found.matrix) if scaled else bias
    fresh = fresh + found.offset.reshape(bias.shape)
    yield Repair(*place, packed(fresh.astype(places[place].dtype)))
