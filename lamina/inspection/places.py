"""Where in a program, as the user knows it, the planner's sites are."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lamina.analysis.analyze import AnalysisResult, PartResult
from lamina.planner.offers import Offer


def place_offers(found: AnalysisResult, given: Sequence[Offer]) -> list[str | None]:
    """Write each offer's options to the parts it belongs to; the innermost part of each, or None.

    Folds may have renamed what they rewrote, so branches are known by the nodes they share, then by name.
    Branches nest: what is offered at an operator is told of each branch that holds it.
    """
    branches = {part["name"]: part for part in found["branches"]}
    operators = {part["name"]: part for part in found["operators"]}
    homes: dict[str, list[PartResult]] = {}
    for branch in found["branches"]:
        for node in branch["members"]:
            homes.setdefault(node, []).append(branch)
    places = []
    for offer in given:
        part = _branch_of(offer, branches) if offer.removes else None
        if not offer.removes:
            there = [operators[n] for n in offer.nodes if n in operators]
            part = next((p for p in there if p["parameters"]), there[0] if there else None)
        places.append(None if part is None else part["name"])
        if part is None:
            continue
        around = [] if offer.removes else homes.get(part["name"], [])
        for held in (part, *around):
            held["options"] += [o for o in offer.options if o not in held["options"]]
    parts = operators | branches  # a block without branches has operators for members
    for block in found["blocks"]:
        inside = [o for name in block["members"] if name in parts for o in parts[name]["options"]]
        block["options"] = list(dict.fromkeys(inside))
    return places


def _branch_of(offer: Offer, branches: Mapping[str, PartResult]) -> PartResult | None:
    """The branch most alike by its nodes: of nested ones the one that holds as many."""
    nodes = set(offer.nodes)
    alike = {name: _overlap(nodes, part["members"]) for name, part in branches.items()}
    best = max(alike, key=lambda name: (alike[name], name == offer.site), default=None)
    return branches[best] if best is not None and alike[best] > 0 else branches.get(offer.site)


def _overlap(nodes: Collection[str], members: Collection[str]) -> float:
    shared = len(set(nodes) & set(members))
    return shared / (len(nodes) + len(members) - shared) if shared else 0.0


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
