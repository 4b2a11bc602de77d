"""Branches that could run each other's weights: the same operators, wired alike, matrices alike in shape."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.branches import Branch, find_branches
from lamina.ir.program import Program
from lamina.passes.pass_ import Refusal, Site
from lamina.passes.sharing.remainder import matrix_operand

NAME = "share"
_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


@dataclass(frozen=True)
class Twins:
    """Which branches of a program could lend each other their matrices.

    Attributes:
        sites: Branch name -> its site, in execution order. ``site.weights`` are its matrices in the order of
            use, so that those of two relatives correspond place by place.
        family: Branch name -> all branches of its structure in execution order, itself included.
        refusals: Branches without a relative, and near misses.
    """

    sites: Mapping[str, Site]
    family: Mapping[str, tuple[str, ...]]
    refusals: tuple[Refusal, ...]
    owner: weakref.ref[Program]
    _kept: ClassVar[dict[int, Twins]] = field(default={}, init=False)

    @staticmethod
    def of(program: Program) -> Twins:
        """The twins of ``program``, found on first use and kept as long as it lives: it is immutable."""
        kept = Twins._kept.get(id(program))
        if kept is not None and kept.owner() is program:
            return kept
        key = id(program)
        made = _find(program, weakref.ref(program, lambda _: Twins._kept.pop(key, None)))
        Twins._kept[key] = made
        return made


def _find(program: Program, owner: weakref.ref[Program]) -> Twins:
    found = find_branches(program)
    nodes = {n.name: n for n in program.graph if n.name}
    sites: dict[str, Site] = {}
    groups: dict[tuple[object, ...], list[str]] = {}
    reasons: dict[str, str] = {}
    for branch in found.branches:
        members = [nodes[name] for name in branch.nodes]
        site = _site(branch, members)
        reason = _refusal(site, members)
        if reason is not None:
            reasons[branch.name] = reason
            continue
        sites[branch.name] = site
        groups.setdefault((branch.kind, *_structure(members, site)), []).append(branch.name)
    family = {name: tuple(names) for names in groups.values() for name in names if len(names) > 1}
    reasons |= {
        n: "no other branch has its structure and shapes of weights" for n in sites if n not in family
    }
    near = [Refusal(NAME, miss.where, miss.reason) for miss in found.refusals]
    return Twins(
        {name: site for name, site in sites.items() if name in family},
        family,
        (*(Refusal(NAME, b.name, reasons[b.name]) for b in found.branches if b.name in reasons), *near),
        owner,
    )


def _site(branch: Branch, members: list[ir.Node]) -> Site:
    inside = set(members)
    own = set(branch.weights)
    reads = [v for n in members for v in n.inputs if v is not None]
    outside = [v for v in reads if v.producer() not in inside and not v.is_initializer()]
    weights = [v.name or "" for n in members if (v := _matrix(n)) is not None and v.name in own]
    shown = [v.name or "" for n in members for v in n.outputs if v.is_graph_output()]
    return Site(
        transform=NAME,
        name=branch.name,
        kind=branch.kind,
        nodes=branch.nodes,
        inputs=tuple(dict.fromkeys(v.name or "" for v in outside)),
        outputs=tuple(dict.fromkeys((branch.body, *shown))),
        weights=tuple(dict.fromkeys(weights)),
    )


def _matrix(node: ir.Node) -> ir.Value | None:
    operand = matrix_operand(node)
    value = None if operand is None else node.inputs[operand]
    fits = value is not None and value.dtype in _DTYPES and not value.is_graph_input()
    return value if fits else None


def _refusal(site: Site, members: list[ir.Node]) -> str | None:
    inside = set(members)
    if not site.weights:
        return "it has no floating-point matrix or kernel that only it reads"
    for node in members:
        if any(a.type in _GRAPHS for a in node.attributes.values()):
            return f"node '{node.name}' holds control flow"
    for value in (v for n in members for v in n.outputs if v.name not in site.outputs):
        if any(use.node not in inside for use in value.uses()):
            return f"'{value.name}' is read outside of it"
    return None


def _structure(members: list[ir.Node], site: Site) -> tuple[object, ...]:
    """Equal for two branches that compute the same but for the numbers in their floating weights."""
    places: dict[ir.Value, object] = {}
    lines: list[object] = []
    for node in members:
        read = tuple(None if v is None else _place(v, places, site) for v in node.inputs)
        lines.append((node.domain, node.op_type, node.overload, read, tuple(sorted(_attributes(node)))))
        for i, value in enumerate(node.outputs):
            places[value] = ("made", len(lines), i)
    shown = tuple(places[v] for n in members for v in n.outputs if v.name in site.outputs)
    return (*lines, shown)


def _place(value: ir.Value, places: dict[ir.Value, object], site: Site) -> object:
    if value not in places:
        tensor = value.const_value if value.is_initializer() else None
        if tensor is None:
            places[value] = ("outside", len(places))
        elif tensor.dtype in _DTYPES:
            lent = value.name in site.weights
            places[value] = ("weight", len(places), lent, tensor.dtype, tuple(tensor.shape.numpy()))
        else:  # axes, shapes, heads: what the branch computes depends on them
            places[value] = ("constant", len(places), tensor.dtype, tensor.numpy().tobytes())
    return places[value]


def _attributes(node: ir.Node) -> Iterator[str]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            yield f"{attribute.name}={tensor.dtype}{tensor.shape}{tensor.numpy().tobytes()!r}"
        else:
            yield f"{attribute.name}={attribute.value}"
