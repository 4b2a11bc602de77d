"""Whose matrices a branch could run, what that changes, and the low-rank remainders that make up for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis.statistics import Statistics
from lamina.ir.program import Program
from lamina.passes.pass_ import Option, Site
from lamina.passes.repair import packed
from lamina.passes.sharing.remainder import as_matrices, energy, low_rank
from lamina.passes.sharing.twins import Twins

# A remainder must store less than this share of the matrices it spares.
_MOST_STORED = 0.75


@dataclass(frozen=True)
class Lender:
    """Finds donors and makes options from a program's own weights.

    Attributes:
        program: The program as given.
        twins: Which of its branches are of one structure.
        statistics: With ``inputs``, errors are weighted with what operators read.
    """

    program: Program
    twins: Twins
    statistics: Statistics

    def candidates(self, name: str) -> Iterator[tuple[str, str]]:
        """(role, donor), the most similar one last: one that is also a neighbour goes by that name."""
        family = self.twins.family[name]
        place = family.index(name)
        if place > 0:
            yield "previous", family[place - 1]
        if place + 1 < len(family):
            yield "next", family[place + 1]
        yield "similar", self.similar(name)

    def similar(self, name: str) -> str:
        """The relative whose matrices change the outputs of the branch's own operators least."""
        others = [other for other in self.twins.family[name] if other != name]
        return min(others, key=lambda other: self.distance(name, other))

    def distance(self, name: str, donor: str) -> float:
        """Mean over matrices of the relative squared error of their outputs, each with its own inputs."""
        own, other = self.twins.sites[name], self.twins.sites[donor]
        found = []
        for weight, lent in zip(own.weights, other.weights, strict=True):
            node = self._reader(own, weight)
            mine = as_matrices(node, self._array(weight))
            moments = self._moments(node, mine)
            error = energy(as_matrices(node, self._array(lent)) - mine, moments)
            found.append(error / max(energy(mine, moments), 1e-300))
        return float(np.mean(found))

    def reuse(self, site: Site, donor: str, name: str) -> Option:
        """Run the donor's matrices as they are."""
        parameters = {"donor": donor, "flops_share": 1.0, "outputs": self._outputs(site)}
        return Option(name, parameters, borrows=self.twins.sites[donor].weights)

    def remainder(self, site: Site, donor: str, share: float) -> Option | None:
        """A remainder of so large a share of each full rank; None where it spares too little."""
        sizes = [as_matrices(self._reader(site, w), self._array(w)).shape for w in site.weights]
        rank = max(1, round(share * min(min(shape[1:]) for shape in sizes)))
        stored = sum(g * min(rank, i, o) * (i + o) for g, i, o in sizes)
        if stored > _MOST_STORED * sum(g * i * o for g, i, o in sizes):
            return None
        return self.at_rank(site, donor, rank)

    def at_rank(self, site: Site, donor: str, rank: int) -> Option:
        """Run the donor's matrices with a remainder of ``rank`` beside each."""
        pairs, extra, own = {}, 0, 0
        lent = self.twins.sites[donor].weights
        for place, (weight, other) in enumerate(zip(site.weights, lent, strict=True)):
            node, array = self._reader(site, weight), self._array(weight)
            mine = as_matrices(node, array)
            difference = mine - as_matrices(node, self._array(other))
            down, up = low_rank(difference, self._moments(node, mine), rank)
            pairs[str(place)] = {
                "down": packed(down.astype(array.dtype)),
                "up": packed(up.astype(array.dtype)),
            }
            extra, own = extra + down.size + up.size, own + mine.size
        facts = {**self.reuse(site, donor, "").parameters, "flops_share": 1.0 + extra / own}
        return Option(f"remainder-{rank}", {**facts, "remainders": pairs}, borrows=lent)

    def _outputs(self, site: Site) -> list[list[int]]:
        """Which node of the site makes each of its outputs, and as which of its own."""
        nodes = {n.name: n for n in self.program.graph}
        made = [(v.name, [i, k]) for i, n in enumerate(site.nodes) for k, v in enumerate(nodes[n].outputs)]
        places = dict(made)
        return [places[name] for name in site.outputs]

    def _array(self, weight: str) -> np.ndarray:
        tensor = self.program.graph.initializers[weight].const_value
        assert tensor is not None
        return tensor.numpy()

    def _reader(self, site: Site, weight: str) -> ir.Node:
        inside = set(site.nodes)
        uses = (use.node for use in self.program.graph.initializers[weight].uses())
        return next(node for node in uses if node.name in inside)

    def _moments(self, node: ir.Node, matrices: np.ndarray) -> np.ndarray | None:
        seen = self.statistics.inputs.get(node.name or "")
        if seen is None or seen.moments.shape != (*matrices.shape[:2], matrices.shape[1]):
            return None
        return seen.moments
