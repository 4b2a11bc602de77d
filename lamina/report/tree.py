"""An analysis as rows of a tree: blocks, their branches, operators; plain data in, plain data out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lamina.report.scores import Part, Scores

# Kinds that multiply with a weight or look one up: each is a site of its own; norms and the like are summed.
PRODUCTS = frozenset(
    {"Conv", "ConvTranspose", "DeformConv", "GRU", "Gather", "Gemm", "LSTM", "MatMul", "RNN"}
)
# Operators outside branches that get a row of their own.
SHOWN = 12
# Operators of a model without branches that get one.
SHOWN_ALONE = 60


@dataclass(frozen=True)
class Row:
    """One line of the tree.

    Attributes:
        label: What it is called here (a branch without its block's name).
        level: Depth in the tree.
        kind: What it is.
        parameters: Weight elements.
        flops: Operations.
        seconds: Time of a run; None where not timed.
        redundancy: Name of the branch or block whose score stands here, or empty.
        sensitive: Operators it holds: the most sensitive one's score stands here.
        options: What the planner would consider.
        bound: ``compute``, ``memory`` or empty.
        roof_share: Attainable over measured time, or None.
        strong: Whether it heads others.
    """

    label: str
    level: int
    kind: str
    parameters: int
    flops: int
    seconds: float | None
    redundancy: str = ""
    sensitive: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    bound: str = ""
    roof_share: float | None = None
    strong: bool = False


def rows(found: Mapping[str, Any], *, operators: bool = False) -> list[Row]:
    """The tree: blocks in order with their branches, then what is in no branch.

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        operators: Also the weighted operators of each branch.
    """
    branches = {b["name"]: b for b in found["branches"]}
    inner = _nested(found["branches"])
    hidden = {name for names in inner.values() for name in names}
    nodes = {o["name"]: o for o in found["operators"]} if operators else {}
    every = {o["name"]: o for o in found["operators"]}
    made: list[Row] = []
    for block in found["blocks"]:
        if not any(name in branches for name in block["members"]):
            made += _turn(block, every)
            continue
        members = [name for name in block["members"] if name not in hidden]
        alone = len(block["members"]) == 1
        if not alone and members:
            held = [n for name in block["members"] for n in branches[name]["members"]]
            made.append(_row(block, block["name"], 0, "block", held, block["name"], strong=True))
        for name in members:
            made += _branch(branches, inner, nodes, name, "" if alone else block["name"], 0 if alone else 1)
    made += _outside(found, branches)
    return made


def _turn(block: Part, operators: Mapping[str, Part]) -> Iterator[Row]:
    """A block that holds no branches, and its products."""
    held = [operators[name] for name in block["members"] if name in operators]
    yield _row(block, block["name"], 0, "block", block["members"], strong=True)
    for operator in held:
        if operator["kind"] in PRODUCTS and operator["parameters"]:
            yield _operator(operator, 1, block["name"])


def _branch(
    branches: Mapping[str, Part],
    inner: Mapping[str, Sequence[str]],
    nodes: Mapping[str, Part],
    name: str,
    owner: str,
    level: int,
) -> Iterator[Row]:
    """A branch, the branches nested in it, and its own operators where ``nodes`` has them."""
    branch = branches[name]
    yield _row(branch, _inside(name, owner), level, branch["kind"], branch["members"], name)
    deeper = inner.get(name, ())
    for other in deeper:
        yield from _branch(branches, inner, nodes, other, name, level + 1)
    held = {n for other in deeper for n in branches[other]["members"]}
    for node in branch["members"]:
        if node in nodes and node not in held and nodes[node]["parameters"]:
            yield _operator(nodes[node], level + 1, name)


def _nested(branches: Sequence[Part]) -> dict[str, list[str]]:
    """Branch -> the branches right inside it, in order."""
    inner: dict[str, list[str]] = {}
    held = {b["name"]: frozenset(b["members"]) for b in branches}
    readers: dict[str, list[str]] = {}
    for name, nodes in held.items():
        for node in nodes:
            readers.setdefault(node, []).append(name)
    for name, nodes in held.items():
        around = [o for o in readers.get(next(iter(nodes), ""), ()) if held[o] > nodes]
        if around:
            inner.setdefault(min(around, key=lambda o: len(held[o])), []).append(name)
    return inner


def total(found: Mapping[str, Any]) -> Row:
    """The whole model; its time includes kernels that no operator explains."""
    totals = found["totals"]
    return Row("total", 0, "", totals["parameters"], totals["flops"], whole_time(found), strong=True)


def whole_time(found: Mapping[str, Any]) -> float | None:
    """Seconds of all kernels of a run; None where not timed."""
    totals = found["totals"]
    if "operators_latency_s" not in totals:
        return None
    whole: float = totals["operators_latency_s"] + totals.get("other_latency_s", 0.0)
    return whole


def worst(row: Row, scores: Scores | None) -> str | None:
    """The operator of a row with the highest sensitivity; None where none has one."""
    if scores is None:
        return None
    rated = [name for name in row.sensitive if name in scores.values]
    return max(rated, key=lambda name: scores.values[name], default=None)


def _outside(found: Mapping[str, Any], branches: Mapping[str, Part]) -> Iterator[Row]:
    inside = {n for b in branches.values() for n in b["members"]}
    inside |= {n for b in found["blocks"] for n in b["members"] if n not in branches}
    rest = [o for o in found["operators"] if o["name"] not in inside]
    if not rest:
        return
    level, most = (1, SHOWN) if inside else (0, SHOWN_ALONE)
    if inside:
        yield _sum(rest, f"in no {'branch' if branches else 'block'} ({len(rest)})", 0, strong=True)
    weighted = [o for o in rest if o["parameters"]]
    products = [o for o in weighted if o["kind"] in PRODUCTS or o["metrics"]]
    chosen = {id(o) for o in sorted(products, key=_weight, reverse=True)[:most]}
    yield from (_operator(o, level, "") for o in products if id(o) in chosen)
    more = [o for o in products if id(o) not in chosen]
    if more:
        yield _sum(more, f"{len(more)} more products", level)
    shown = {id(o) for o in products}
    for kind in dict.fromkeys(o["kind"] for o in weighted if id(o) not in shown):
        alike = [o for o in weighted if o["kind"] == kind and id(o) not in shown]
        yield _sum(alike, f"{len(alike)} x {kind}", level)
    plain = [o for o in rest if not o["parameters"]]
    if plain:
        yield _sum(plain, f"{len(plain)} without weights", level)


def _weight(operator: Part) -> tuple[float, int, int]:
    return (operator["latency_s"] or 0.0, operator["flops"], operator["parameters"])


def _operator(operator: Part, level: int, owner: str) -> Row:
    label = _inside(operator["name"], owner) if owner else operator["name"]
    return _row(operator, label, level, operator["kind"], [operator["name"]])


def _row(
    part: Part,
    label: str,
    level: int,
    kind: str,
    held: Sequence[str],
    rated: str = "",
    *,
    strong: bool = False,
) -> Row:
    return Row(
        label or part["name"],
        level,
        kind,
        part["parameters"],
        part["flops"],
        part["latency_s"],
        rated,
        tuple(held),
        tuple(part["options"]),
        part["bound"] or "",
        part["roof_share"],
        strong,
    )


def _sum(parts: Sequence[Part], label: str, level: int, *, strong: bool = False) -> Row:
    times = [p["latency_s"] for p in parts if p["latency_s"] is not None]
    return Row(
        label,
        level,
        "",
        sum(p["parameters"] for p in parts),
        sum(p["flops"] for p in parts),
        sum(times) if times else None,
        sensitive=tuple(p["name"] for p in parts),
        options=_all_options(parts),
        strong=strong,
    )


def _all_options(parts: Iterable[Part]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(option for part in parts for option in part["options"]))


def _inside(name: str, outer: str) -> str:
    """The name without the part it shares with what it is in."""
    if not outer:
        return name
    rest = name.removeprefix(outer)
    return rest.lstrip("./_") if rest != name and rest.lstrip("./_") else name
