"""Residual branches in a row, and writing them anew with some moved to where an earlier or later one is."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.branches import Block, Branch, find_branches
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import sweep
from lamina.passes.fold import cleanup
from lamina.passes.fold.graph import constant, is_op
from lamina.passes.joining.widen import Body, Unlike, Widener
from lamina.passes.pass_ import Option, Refusal, Site, Transform

# Operators between one sum and the next branch: a normalization, an activation, and their constants' sums.
_MOST_BETWEEN = 12


@dataclass(frozen=True)
class BranchChain:
    """Branches whose skips lead into one another.

    Attributes:
        branches: In execution order.
        nodes: Theirs, their Adds, and what lies between, in execution order; the last is the last Add.
        weights: Initializers that only these nodes read.
        norms: Whether anything lies between, as the normalizations of post-norm blocks do.
    """

    branches: tuple[Branch, ...]
    nodes: tuple[str, ...]
    weights: tuple[str, ...]
    norms: bool

    def site(self, transform: str, name: str, kind: str) -> Site:
        """The site of a transform that rewrites all of them."""
        skip, output = self.branches[0].skip, self.branches[-1].output
        return Site(transform, name, kind, self.nodes, (skip,), (output,), self.weights)


class BranchChains:
    """Finds chains in one program; what they share is looked up once, in O(nodes + edges)."""

    def __init__(self, program: Program) -> None:
        self.found = find_branches(program)
        self.nodes = {n.name or "": n for n in program.graph}
        self.position = {name: i for i, name in enumerate(self.nodes)}
        self.values = {v.name or "": v for n in program.graph for v in n.outputs}
        self.values |= {v.name or "": v for v in program.graph.inputs}

    def chain(self, branches: Sequence[Branch]) -> BranchChain | str:
        """The chain of some branches, or why they are none that can be written anew."""
        held: dict[str, None] = {}
        norms = False
        for before, branch in zip([None, *branches], branches, strict=False):
            reason = self._refusal(branch, branches[0])
            if reason is not None:
                return reason
            between = [] if before is None else self._between(before.output, branch.skip)
            if between is None:
                return (
                    f"the sum of '{before.name if before else ''}' does not lead straight to '{branch.name}'"
                )
            norms |= bool(between)
            held.update(dict.fromkeys((*between, *branch.nodes, branch.add)))
        names = sorted(held, key=self.position.__getitem__)
        if names[-1] != branches[-1].add:
            return "operators of the branches come after their last sum"
        reason = self._read_elsewhere(names)
        return reason or BranchChain(tuple(branches), tuple(names), self._weights(names), norms)

    def of_blocks(self, *blocks: Block) -> BranchChain | str:
        """The chain of all branches of some blocks in a row."""
        return self.chain([self.found.named(name) for block in blocks for name in block.branches])

    def _refusal(self, branch: Branch, first: Branch) -> str | None:
        add, skip = self.nodes[branch.add], self.values.get(branch.skip)
        if branch.joint is not None:
            return f"'{branch.name}' is parallel to another branch already"
        if branch.shortcut != "identity" or branch.parent != first.parent:
            return f"the skip of '{branch.name}' is a projection, or it lies in another branch"
        if branch.cache_inputs or branch.cache_outputs:
            return f"'{branch.name}' keeps keys and values: heads of two caches are no one cache"
        if not is_op(add, "Add", "Sum") or len(add.inputs) != 2:
            return f"the sum of '{branch.name}' is fused with a normalization"
        total = self.values[branch.output]
        if (
            skip is None
            or skip.dtype is None
            or not skip.dtype.is_floating_point()
            or skip.dtype != total.dtype
        ):
            return f"the skip of '{branch.name}' is not of a known floating type"
        if skip.shape is None or total.shape is None or skip.shape != total.shape:
            return f"the shapes of skip and sum of '{branch.name}' are not known to agree"
        return None

    def _between(self, start: str, end: str) -> list[str] | None:
        """Nodes that make one value of the stream of another and constants; None where more is needed."""
        found: dict[str, None] = {}
        pending = [self.values[end]]
        while pending:
            value = pending.pop()
            node = value.producer()
            if value.name == start or constant(value) is not None:
                continue
            if node is None or node.name is None or len(found) > _MOST_BETWEEN:
                return None
            if node.name not in found:
                found[node.name] = None
                pending += [v for v in node.inputs if v is not None]
        return list(found)

    def _read_elsewhere(self, names: Sequence[str]) -> str | None:
        inside = {self.nodes[n] for n in names}
        for name in names[:-1]:
            for value in self.nodes[name].outputs:
                if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                    return f"'{value.name}' is read elsewhere"
        return None

    def _weights(self, names: Sequence[str]) -> tuple[str, ...]:
        inside = {self.nodes[n] for n in names}
        read = dict.fromkeys(v for n in names for v in self.nodes[n].inputs if v is not None)
        return tuple(
            v.name or ""
            for v in read
            if v.is_initializer()
            and not v.is_graph_input()
            and not v.is_graph_output()
            and all(use.node in inside for use in v.uses())
        )


def block_pairs(blocks: Sequence[Block]) -> Iterator[tuple[Block, Block]]:
    """Neighbours in each run, without overlap; of an odd number the first block of the run is left alone."""
    runs: dict[int, list[Block]] = {}
    for block in blocks:
        runs.setdefault(block.run, []).append(block)
    for run in runs.values():
        start = len(run) % 2
        yield from zip(run[start::2], run[start + 1 :: 2], strict=True)


def written(
    into: Sequence[int], chain: BranchChain, nodes: Mapping[str, ir.Node], *, wide: bool = True
) -> dict[str, Any]:
    """Parameters of an option that moves branches.

    Args:
        into: For each branch, the one it is computed beside: itself, or another.
        chain: The branches.
        nodes: The program's, by name.
        wide: Whether what is computed side by side has to have the same operators.
    """
    bodies = []
    for branch in chain.branches:
        names = [None if v is None else v.name for v in nodes[branch.add].inputs]
        bodies.append(names.index(branch.body))
    adds = [b.add for b in chain.branches]
    return {"into": list(into), "adds": adds, "bodies": bodies, "wide": wide, "flops_share": 1.0}


def rewrite(site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """Write the branches anew; returns the last sum.

    Branches that are computed beside another read the stream where that one reads it; where its structure is
    theirs they become one operator with it. What lies behind their own sums stays where it was.

    Raises:
        Unlike: Branches that belong together cannot be computed side by side.
    """
    into = [int(i) for i in option.parameters["into"]]
    adds = [nodes[str(name)] for name in option.parameters["adds"]]
    places = [int(i) for i in option.parameters["bodies"]]
    inside = frozenset(nodes.values())
    if not len(into) == len(adds) == len(places) or any(into[i] != i for i in into):
        raise PassError(f"'{site.name}': each branch is computed beside itself, or beside one that stays")
    bodies = [Body(_input(a, 1 - p), _input(a, p), inside) for a, p in zip(adds, places, strict=True)]
    value = bodies[0].source
    for i, add in enumerate(adds):
        if i:
            between = Body(adds[i - 1].outputs[0], bodies[i].source, inside)
            value = Widener(rewriter, value, site.weights).total([between])
        beside = [bodies[j] for j, to in enumerate(into) if to == i]
        groups = [beside] if beside and option.parameters["wide"] else _groups(beside)
        made: dict[Any, Any] = {}
        totals = [
            Widener(rewriter, value, site.weights, apart=len(groups) > 1, made=made).total(g) for g in groups
        ]
        old = add.outputs[0]
        for total in totals:
            name = f"{add.name}_joined"
            value = rewriter.op("Add", [value, total], name=name, dtype=old.dtype, shape=old.shape)
    label = _last_sum(adds[-1].name or "")
    if value.name != label:
        value.name = rewriter.fresh(label)
    return value


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    if value is None:
        raise PassError(f"sum '{node.name}' lost an operand", advice="this is a bug in an earlier move")
    return value


def _groups(bodies: Sequence[Body]) -> list[list[Body]]:
    """Bodies of the same operators together."""
    groups: dict[tuple[str, ...], list[Body]] = {}
    for body in bodies:
        groups.setdefault(_operators(body), []).append(body)
    return list(groups.values())


def _operators(body: Body) -> tuple[str, ...]:
    """Types of a body's operators, from its result on."""
    found: list[str] = []
    seen: set[ir.Value] = {body.source}
    pending = [body.result]
    while pending:
        value = pending.pop()
        node = value.producer()
        if value in seen or node is None or node not in body.nodes:
            continue
        seen.add(value)
        found.append(node.op_type)
        pending += [v for v in node.inputs if v is not None]
    return tuple(found)


class JoinedBranches(Transform):
    """Base of the transforms whose options write branches in a row anew (:func:`written`)."""

    axes: ClassVar[tuple[str, ...]] = ("latency",)
    removes_site: ClassVar[bool] = True

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The branches written anew."""
        return [rewrite(site, option, rewriter, nodes)]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take out what was replaced."""
        sweep(rewriter, reversed([rewriter.node(n) for n in site.nodes if rewriter.has_node(n)]))

    def sum_after(self, site: Site, names: Collection[str]) -> str | None:
        """The last sum that was written."""
        made = _last_sum(site.nodes[-1])
        return made if made in names else None

    def judged(self, program: Program, tried: Sequence[tuple[Site, Option]]) -> Iterator[Site | Refusal]:
        """The sites that can be written so, by an option of each, and why others cannot."""
        for (site, _), reason in zip(tried, why_not(program, tried), strict=True):
            yield site if reason is None else Refusal(self.name, site.name, reason)


def not_here(site: Site) -> PassError:
    """What is wrong where ``site`` belongs to another program."""
    return PassError(
        f"blocks '{site.name}' are not in this program",
        advice="take the sites from the program the options are for",
    )


def _last_sum(add: str) -> str:
    return f"{add}_joined_out"


def apply_written(program: Program, transform: Transform, site: Site, option: Option) -> Program:
    """The program with one option applied, on a clone; what it replaces leaves.

    Raises:
        PassError: The branches cannot be written so.
    """
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    nodes = {name: rewriter.node(name) for name in site.nodes}
    old = nodes[site.nodes[-1]].outputs[0]
    (value,) = transform.emit(site, option, rewriter.at(nodes[site.nodes[-1]]), nodes)
    rewriter.at(None).replace_uses(old, value)
    sweep(rewriter, reversed(list(nodes.values())))
    rewriter.record(transform.name, site.name, option.name)
    return cleanup(clone)


def why_not(program: Program, pairs: Sequence[tuple[Site, Option]]) -> Iterator[str | None]:
    """For each site and option why it cannot be written; None where it can. Tried on a clone.

    Cost: O(nodes + weight elements) a pair.
    """
    model = program.clone().model
    rewriter = Rewriter(model)
    for site, option in pairs:
        scratch = ir.Graph([], [], nodes=[], name="lamina_scratch")
        nodes = {name: rewriter.node(name) for name in site.nodes}
        try:
            rewrite(site, option, Rewriter(model, scratch, parent=rewriter), nodes)
        except Unlike as error:
            yield error.what
        else:
            yield None
