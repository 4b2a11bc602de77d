"""Residual branches: ``out = skip + f(skip, ambient)``, found from graph structure alone.

The rule: of the two operands of a sum, the body is the one nothing else reads. Grow the region of nodes whose
every value leads to the body (a node joins once all its readers are in). The region is the branch if what it
reads is the skip, or the skip behind weight-free nodes that others share (a norm), and if a weighted operator
lies on the way. What the region reads otherwise is ambient. Every walk stays inside its own branch, so the
search is linear in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from lamina.ir.branch_kinds import BranchKind, kind_of, repeating_runs, scope_path, unique_names
from lamina.ir.branch_search import Found, NearMiss, Search
from lamina.ir.branch_view import GraphView
from lamina.ir.program import Program

__all__ = ["Block", "Branch", "BranchesResult", "NearMiss", "find_branches"]

_NOT_PARAMETERS = frozenset((ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL, ir.DataType.STRING))


@dataclass(frozen=True)
class Branch:
    """One residual branch. Names, not objects, so that it survives cloning.

    Attributes:
        name: Unique; the module path where known, else ``branch.<k>.<kind>``.
        kind: What it contains.
        nodes: Its member nodes in execution order, without the Add.
        weights: Initializers only members read.
        skip: The operand of the Add that stays when the branch goes.
        body: The operand the branch makes.
        output: The sum.
        add: Name of the Add (or Sum, SkipLayerNormalization) node.
        shortcut: ``identity``, or ``projection`` where the skip is itself computed from ``source``.
        source: The value branch and shortcut fork from; for an identity the skip, or what the skip copies.
        cache_inputs: Interface inputs (past keys and values) only this branch reads.
        cache_outputs: Interface outputs (present keys and values) only this branch makes.
        parameters: Elements of its weights, shape constants and scalars excluded.
        ambient: Values made outside, the skip excluded, that members read.
        parent: Name of the branch this one is nested in.
        joint: For branches added to each other before the skip is: the node at which the skip joins them.
            Then ``skip`` is the other branch's result, and two of them may share one ``add``.
    """

    name: str
    kind: BranchKind
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    skip: str
    body: str
    output: str
    add: str
    shortcut: Literal["identity", "projection"]
    source: str
    cache_inputs: tuple[str, ...] = ()
    cache_outputs: tuple[str, ...] = ()
    parameters: int = 0
    ambient: tuple[str, ...] = ()
    parent: str | None = None
    joint: str | None = None


@dataclass(frozen=True)
class Block:
    """One turn of a repeating run of branches: a transformer layer, a ResNet block.

    Attributes:
        name: ``block.<k>``, or the module path all its branches share.
        branches: Names, in execution order.
        run: Blocks of the same run have the same structure.
        index: Place in the run.
    """

    name: str
    branches: tuple[str, ...]
    run: int
    index: int


@dataclass(frozen=True)
class BranchesResult:
    """What :func:`find_branches` found.

    Attributes:
        branches: In execution order.
        refusals: Sums that nearly were one, with the reason.
        blocks: How the branches repeat; each branch is in one block.
    """

    branches: tuple[Branch, ...] = ()
    refusals: tuple[NearMiss, ...] = ()
    blocks: tuple[Block, ...] = ()

    def named(self, name: str) -> Branch:
        """The branch called ``name``.

        Raises:
            KeyError: There is none.
        """
        for branch in self.branches:
            if branch.name == name:
                return branch
        raise KeyError(name)


def find_branches(program: Program) -> BranchesResult:
    """Find every residual branch of a program; reads only.

    Fires: Add, two-operand Sum, SkipLayerNormalization, SkipSimplifiedLayerNormalization with one operand an
    ancestor of the other (identity), or both fed by one value and one of them a linear path (projection).
    Parallel branches added to each other before the skip (GPT-J) are told apart; nested ones have a parent.
    Refuses: no weighted operator on the way (biases, masks, positions, rotary, GELU); the body or a value on
    every path from the skip is read elsewhere; shapes of skip and sum differ.
    Cost: O(nodes + edges), bounded also on adversarial graphs: walks past 256 steps share one allowance of
    20 steps a node; what does not fit is refused.
    """
    view = GraphView(program.graph)
    search = Search(view)
    found = sorted(search.run(), key=lambda f: (f.add, max(f.region.members)))
    kinds = [kind_of(view, f.region) for f in found]
    paths = [scope_path(view, f.region.members) for f in found]
    names = unique_names(paths, kinds)
    parents = _parents(found)
    branches = tuple(
        _branch(view, f, name, kind, None if parent is None else names[parent])
        for f, name, kind, parent in zip(found, names, kinds, parents, strict=True)
    )
    return BranchesResult(branches, tuple(search.near_misses), _blocks(view, found, branches, paths))


def cache_ports(program: Program) -> tuple[frozenset[str], ...]:
    """For each branch with a cache, the interface inputs and outputs that leave when it is dropped."""
    ports = (frozenset((*b.cache_inputs, *b.cache_outputs)) for b in find_branches(program).branches)
    return tuple(p for p in ports if p)


def _branch(view: GraphView, found: Found, name: str, kind: BranchKind, parent: str | None) -> Branch:
    members = found.region.members
    weights = tuple(_own_weights(view, found))
    add = view.nodes[found.add]
    skip = _name(found.skip)
    return Branch(
        name=name,
        kind=kind,
        nodes=tuple(view.nodes[p].name or "" for p in sorted(members)),
        weights=tuple(_name(w) for w in weights),
        skip=skip,
        body=_name(found.body),
        output=_name(sum_output(add)),
        add=add.name or "",
        shortcut=found.shortcut,
        source=_name(found.source),
        cache_inputs=tuple(_cache_inputs(view, found)),
        cache_outputs=tuple(_name(v) for v in found.region.cache_outputs),
        parameters=sum(_elements(w) for w in weights),
        ambient=tuple(n for n in map(_name, found.region.reads) if n != skip),
        parent=parent,
        joint=None if found.joint is None else view.nodes[found.joint].name,
    )


def sum_output(add: ir.Node) -> ir.Value:
    """The sum a residual Add makes; SkipLayerNormalization may give it beside the normalized value."""
    if add.op_type.startswith("Skip") and len(add.outputs) > 3 and add.outputs[3].name:
        return add.outputs[3]
    return add.outputs[0]


def _name(value: ir.Value) -> str:
    return value.name or ""


def _own_weights(view: GraphView, found: Found) -> Iterator[ir.Value]:
    members = found.region.members
    seen: set[ir.Value] = set()
    for position in sorted(members):
        for value in view.reads[position]:
            if value in seen or not value.is_initializer() or value in view.interface:
                continue
            seen.add(value)
            if value not in view.outputs and all(r in members for r in view.readers[value]):
                yield value


def _elements(weight: ir.Value) -> int:
    tensor = weight.const_value
    if tensor is None or tensor.dtype in _NOT_PARAMETERS or not tuple(tensor.shape):
        return 0
    return int(tensor.size)


def _cache_inputs(view: GraphView, found: Found) -> Iterator[str]:
    """State the interface gives to this branch; the region was only closed because nobody else reads it."""
    state = {v for o in found.region.cache_outputs for v in view.state_of[o]}
    return (_name(v) for v in view.graph.inputs if v in state)


def _parents(found: Sequence[Found]) -> list[int | None]:
    """The smallest branch that holds each branch's Add. Cost: the sum of the branches' sizes."""
    parents: list[int | None] = [None] * len(found)
    owner: dict[int, int] = {}
    for index in sorted(range(len(found)), key=lambda i: -len(found[i].region.members)):
        parents[index] = owner.get(found[index].add)
        for position in found[index].region.members:
            owner[position] = index
    return parents


def _blocks(
    view: GraphView, found: Sequence[Found], branches: Sequence[Branch], paths: Sequence[str]
) -> tuple[Block, ...]:
    groups: dict[str | None, list[int]] = {}
    for index, branch in enumerate(branches):
        groups.setdefault(branch.parent, []).append(index)
    blocks: list[Block] = []
    taken: set[str] = set()
    run = 0
    for group in groups.values():
        signatures = [(branches[i].kind, _weighted_types(view, found[i])) for i in group]
        for start, period, repeats in repeating_runs(signatures):
            for turn in range(repeats):
                first = start + turn * period
                part = group[first : first + period]
                name = _shared_path([paths[i] for i in part])
                name = name if name and name not in taken else f"block.{len(blocks)}"
                taken.add(name)
                blocks.append(Block(name, tuple(branches[i].name for i in part), run, turn))
            run += 1
    return tuple(blocks)


def _weighted_types(view: GraphView, found: Found) -> tuple[str, ...]:
    return tuple(view.nodes[p].op_type for p in sorted(found.region.members) if view.is_weighted(p))


def _shared_path(paths: Sequence[str]) -> str:
    parts = [p.split(".") for p in paths]
    common = parts[0]
    for other in parts[1:]:
        n = sum(1 for _ in _while_equal(common, other))
        common = common[:n]
    return ".".join(common)


def _while_equal(left: Sequence[str], right: Sequence[str]) -> Iterator[str]:
    for a, b in zip(left, right, strict=False):
        if a != b:
            return
        yield a
