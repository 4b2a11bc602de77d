"""What a model takes with every weight in so many bits, as a bound on its size."""

from __future__ import annotations

from dataclasses import replace

from lamina.budget import Bound
from lamina.ir.io import serialized_size
from lamina.planner.bits.evidence import BitEvidence, allowed_damages, widths_of
from lamina.planner.prepare import Prepared, build
from lamina.planner.request import Request
from lamina.planner.space import Genome

# Beyond the larger of two models that are whole in that width: conversions depend on the neighbours.
_ROOM = 1.01


def at_width(request: Request, prepared: Prepared) -> Request:
    """The request with a size that only models whole in the asked width reach; as it is where none is asked.

    Two such models are built, of the smallest forms and of the fastest; the larger file is the bound, so that
    every mix of schemes in between fits. A tighter bound of the user's stays.
    """
    if request.bits is None:
        return request
    genomes = [whole(prepared, axis) for axis in ("size", "latency")]
    sizes = [serialized_size(build(request, prepared, g).program.model) for g in dict.fromkeys(genomes)]
    bytes_ = float(round(_ROOM * max(sizes)))
    original = serialized_size(request.program.model)
    given = request.budget.bound("size")
    if given is not None and given.limit(original) <= bytes_:
        return request
    bound = Bound("size", bytes_, "bytes", f"{bytes_ / 1e6:.4g}MB")
    return replace(request, budget=replace(request.budget, size=bound))


def whole(prepared: Prepared, axis: str) -> Genome:
    """The genome with every operator in the form that is cheapest on an axis."""
    costs = prepared.costs
    harm = allowed_damages(costs, [[0.0] * len(c.options) for c in costs.space.choices])
    evidence = BitEvidence(costs, harm, widths_of(costs))
    genes = {i: evidence.genes(i) for i in evidence.weighted}
    cheapest = {i: min(g, key=lambda k: evidence.cost(i, k, axis)) for i, g in genes.items() if g}
    return evidence.genome(cheapest)
