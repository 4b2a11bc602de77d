"""Where in a program, as the user knows it, the planner's sites are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lamina.analysis.analyze import AnalysisResult, PartResult
from lamina.planner.offers import Offer


def place_offers(found: AnalysisResult, given: Sequence[Offer]) -> list[str | None]:
    """Write each offer's options to the parts it belongs to; the innermost part of each, or None.

    Folds may have renamed what they rewrote, so branches are known by the nodes they share, then by name.
    """
    branches = {part["name"]: part for part in found["branches"]}
    operators = {part["name"]: part for part in found["operators"]}
    homes = {node: part for part in found["branches"] for node in part["members"]}
    places = []
    for offer in given:
        part = _branch_of(offer, branches, homes) if offer.removes else None
        if not offer.removes:
            there = [operators[n] for n in offer.nodes if n in operators]
            part = next((p for p in there if p["parameters"]), there[0] if there else None)
        places.append(None if part is None else part["name"])
        outer = None if part is None or offer.removes else homes.get(part["name"])
        for held in (part, outer):
            if held is not None:
                held["options"] += [o for o in offer.options if o not in held["options"]]
    for block in found["blocks"]:
        inside = [o for name in block["members"] for o in branches[name]["options"]]
        block["options"] = list(dict.fromkeys(inside))
    return places


def _branch_of(
    offer: Offer, branches: Mapping[str, PartResult], homes: Mapping[str, PartResult]
) -> PartResult | None:
    shared: dict[str, int] = {}
    for node in offer.nodes:
        if node in homes:
            name = homes[node]["name"]
            shared[name] = shared.get(name, 0) + 1
    if shared:
        return branches[max(shared, key=lambda name: shared[name])]
    return branches.get(offer.site)


def plain_offer(offer: Offer, place: str | None) -> dict[str, Any]:
    """The offer as JSON, with the part it belongs to."""
    return {
        "transform": offer.transform,
        "site": offer.site,
        "kind": offer.kind,
        "nodes": list(offer.nodes),
        "options": list(offer.options),
        "part": place,
    }
