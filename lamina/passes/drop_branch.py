"""Drop a residual branch: the sum becomes the skip, and all that only the branch needed leaves the file."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.branch_view import state_behind
from lamina.ir.branches import Branch, find_branches, sum_output
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Need, Option, Refusal, Site, Transform

_LAYER_NORM = "SkipLayerNormalization"
_RMS_NORM = "SkipSimplifiedLayerNormalization"


@dataclass(frozen=True)
class DropBranch(Transform):
    """Replace ``skip + f(skip)`` by ``skip``.

    Fires: every branch that :func:`find_branches` finds with a skip of the shape and dtype of the sum. A
        projection shortcut stays. A fused SkipLayerNormalization becomes the normalization of the skip; its
        bias is that of the branch's last projection and leaves with it.
    Refuses: shapes or dtypes that differ or are unknown (broadcasting would change the interface); a second
        branch that shares its Add with a parallel one (chain-residual-sums separates them); near misses.
    Effect: Lossy; equal to multiplying the branch's output by zero.
    Interface: attention state (past, present) that only the branch touches leaves with it, in :meth:`finish`.
    Cost: sites O(nodes + edges); one emission O(1).
    Source: He et al. 2024, arXiv:2406.15786 (attention and MLP apart). Deviates: the planner chooses.
    """

    paper: ClassVar[str] = "arXiv:2406.15786"
    axes: ClassVar[tuple[str, ...]] = ("latency", "size", "memory", "flops")
    needs: ClassVar[frozenset[Need]] = frozenset(("branches",))
    name: ClassVar[str] = "drop"
    removes_site: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every droppable branch, in execution order, then what nearly was one."""
        found = find_branches(program)
        index = _Index.of(program)
        taken: dict[str, str] = {}
        for branch in found.branches:
            reason = _refusal(branch, index, taken)
            if reason is not None:
                yield Refusal(self.name, branch.name, reason)
                continue
            taken[branch.add] = branch.name
            yield _site(branch, index)
        for near in found.refusals:
            yield Refusal(self.name, near.where, near.reason)

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """The one option: drop, with the index of the operand that stays."""
        add = _Index.of(program).nodes.get(site.nodes[-1])
        names = [] if add is None else [None if v is None else v.name for v in add.inputs[:2]]
        if site.inputs[0] not in names:
            raise PassError(
                f"branch '{site.name}' is not in this program",
                where=f"node '{site.nodes[-1]}'",
                advice="take the sites from the program the options are for",
            )
        return (Option("drop", {"skip_operand": names.index(site.inputs[0])}),)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The skip as the Add reads it now; for a fused Add and normalization, the skip normalized."""
        add = nodes[site.nodes[-1]]
        skip = _live_skip(add, int(option.parameters["skip_operand"]), nodes)
        if add.op_type not in (_LAYER_NORM, _RMS_NORM):
            return [skip]
        stream = sum_output(add)
        return [
            skip if name == stream.name and stream is not add.outputs[0] else _normalize(add, skip, rewriter)
            for name in site.outputs
        ]

    def sum_after(self, site: Site, names: Collection[str]) -> str | None:
        """The skip."""
        return site.inputs[0]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take the dropped branch's nodes out and, with them, its cache inputs and outputs.

        Call it after every reader of the site's outputs was rewired. Safe to call twice; what somebody still
        reads stays.
        """
        nodes = [rewriter.node(name) for name in site.nodes if rewriter.has_node(name)]
        members = set(nodes[:-1] if rewriter.has_node(site.nodes[-1]) else nodes)
        graph = rewriter.model.graph
        states = [v for v in graph.outputs if v.producer() in members]
        past = {
            v: None for state in states for v in sorted(state_behind(state)[0], key=lambda v: v.name or "")
        }
        for value in states:
            graph.outputs.remove(value)
        sweep(rewriter, reversed(nodes))
        gone = [v for v in past if not v.uses() and not v.is_graph_output()]
        for value in gone:
            graph.inputs.remove(value)
        if states:
            names = ", ".join(f"'{v.name}'" for v in (*gone, *states))
            rewriter.record(self.name, site.name, f"cache left the interface: {names}")


def apply_drops(program: Program, names: Sequence[str]) -> Program:
    """Drop branches by name on a clone; dead nodes, their weights and cache ports leave too.

    A branch nested in another one of ``names`` goes with it.

    Args:
        program: The program; never changed.
        names: Names of branches (:func:`lamina.ir.branches.find_branches`).

    Raises:
        PassError: A name is not a droppable branch of the program.
    """
    transform = DropBranch()
    sites = {s.name: s for s in transform.sites(program) if isinstance(s, Site)}
    for name in names:
        if name not in sites:
            raise _unknown(name, sites, transform, program)
    chosen = [name for name in sites if name in set(names)]  # trap: a later drop may rename an earlier sum
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    for name in chosen:
        _drop(transform, sites[name], transform.options(sites[name], program, None, None)[0], rewriter)
    for name in chosen:
        transform.finish(sites[name], rewriter)
    remove_unused_initializers(clone.model, keep=_unused(program.model))
    return clone


def _drop(transform: DropBranch, site: Site, option: Option, rewriter: Rewriter) -> None:
    nodes = {name: rewriter.node(name) for name in site.nodes}
    outputs = {v.name: v for v in nodes[site.nodes[-1]].outputs}
    emitted = transform.emit(site, option, rewriter.at(nodes[site.nodes[-1]]), nodes)
    rewriter.at(None)
    for name, value in zip(site.outputs, emitted, strict=True):
        rewriter.replace_uses(outputs[name], value)
    rewriter.record(transform.name, site.name, "branch dropped: the sum is its skip")


def _unknown(name: str, sites: Iterable[str], transform: DropBranch, program: Program) -> PassError:
    for refusal in transform.sites(program):
        if isinstance(refusal, Refusal) and refusal.where == name:
            return PassError(f"branch '{name}' cannot be dropped: {refusal.reason}", where=program.source)
    known = list(sites)
    near = get_close_matches(name, known, n=3) or known[:3]
    advice = f"did you mean {', '.join(near)}?" if near else "this program has no branch that can be dropped"
    return PassError(f"no branch is called '{name}'", where=program.source, advice=advice)


# -- sites --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Index:
    """Nodes and values of a program by name; kept as long as the program lives."""

    nodes: dict[str, ir.Node]
    values: dict[str, ir.Value]
    opset: int
    owner: weakref.ref[Program]
    _kept: ClassVar[dict[int, _Index]] = field(default={}, init=False)

    @staticmethod
    def of(program: Program) -> _Index:
        """The index of ``program``, made on first use; programs are immutable."""
        kept = _Index._kept.get(id(program))
        if kept is not None and kept.owner() is program:
            return kept
        nodes = {n.name: n for n in program.graph if n.name}
        values = {v.name: v for n in program.graph for v in n.outputs if v.name}
        values.update({v.name: v for v in program.graph.inputs if v.name})
        key = id(program)
        owner = weakref.ref(program, lambda _: _Index._kept.pop(key, None))
        made = _Index(nodes, values, program.opset, owner)
        _Index._kept[key] = made
        return made


def _site(branch: Branch, index: _Index) -> Site:
    add = index.nodes[branch.add]
    ambient = (n for n in branch.ambient if n in index.values and _is_float(index.values[n]))
    outputs = _shown(add) if add.op_type in (_LAYER_NORM, _RMS_NORM) else (branch.output,)
    return Site(
        transform=DropBranch.name,
        name=branch.name,
        kind=branch.kind,
        nodes=(*branch.nodes, branch.add),
        inputs=(branch.skip, *ambient),
        outputs=outputs,
        weights=branch.weights,
    )


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _shown(add: ir.Node) -> tuple[str, ...]:
    used = (v for v in add.outputs if v.uses() or v.is_graph_output())
    return tuple(v.name or "" for v in used)


def _refusal(branch: Branch, index: _Index, taken: Mapping[str, str]) -> str | None:
    add = index.nodes[branch.add]
    skip, result = index.values[branch.skip], index.values[branch.output]
    if branch.add in taken:
        return (
            f"its Add '{branch.add}' is also that of '{taken[branch.add]}'; apply chain-residual-sums first"
        )
    if add.op_type in (_LAYER_NORM, _RMS_NORM):
        statistics = [v for v in add.outputs[1:3] if v.uses() or v.is_graph_output()]
        if statistics:
            return f"the mean or variance '{statistics[0].name}' of the fused normalization is read"
        if add.op_type == _LAYER_NORM and index.opset < 17:
            return f"LayerNormalization needs opset 17, the program has {index.opset}"
        result = add.outputs[0]
    if skip.dtype is not None and result.dtype is not None and skip.dtype != result.dtype:
        return f"the skip is {skip.dtype.name}, the sum {result.dtype.name}"
    return _shape_refusal(skip, result, fused=add.op_type in (_LAYER_NORM, _RMS_NORM))


def _shape_refusal(skip: ir.Value, result: ir.Value, *, fused: bool) -> str | None:
    if fused and result.shape is None:
        return None  # a fused Add does not broadcast its skip beyond what the operator states
    if skip.shape is None or result.shape is None:
        unknown = skip if skip.shape is None else result
        return f"the shape of '{unknown.name}' is unknown, so the skip may broadcast"
    if len(skip.shape) != len(result.shape):
        return f"the skip has rank {len(skip.shape)}, the sum rank {len(result.shape)}"
    for a, b in zip(skip.shape, result.shape, strict=True):
        if a != b and (isinstance(a, int) or isinstance(b, int)):
            return f"the skip is {skip.shape}, the sum {result.shape}"
    return None


# -- emission -----------------------------------------------------------------------------------------


def _live_skip(add: ir.Node, operand: int, nodes: Mapping[str, ir.Node]) -> ir.Value:
    """The operand that stays, as it is now: the stored index, unless a member of the branch makes it."""
    members = set(nodes.values())
    skip, body = add.inputs[operand], add.inputs[1 - operand]
    if skip is None or body is None:
        raise PassError(f"sum '{add.name}' lost an operand", advice="this is a bug in an earlier move")
    if skip.producer() in members and body.producer() not in members:
        return body
    return skip


def _normalize(add: ir.Node, skip: ir.Value, rewriter: Rewriter) -> ir.Value:
    """The normalization that was fused with the Add, on the skip alone."""
    old = add.outputs[0]
    epsilon = add.attributes.get_float("epsilon", 1e-12 if add.op_type == _LAYER_NORM else 1e-6)
    label = f"{add.name}_norm"
    if add.op_type == _LAYER_NORM:
        scale, shift = add.inputs[2], add.inputs[3] if len(add.inputs) > 3 else None
        inputs = [skip, scale] if shift is None else [skip, scale, shift]
        attributes = {"axis": -1, "epsilon": epsilon}
        value = rewriter.op("LayerNormalization", inputs, attributes, name=label)
    else:
        value = _rms(add, skip, float(epsilon or 1e-6), rewriter, label)
    if old.dtype or skip.dtype:
        value.type = ir.TensorType(old.dtype or skip.dtype or ir.DataType.FLOAT)
    value.shape = old.shape or skip.shape
    return value


def _rms(add: ir.Node, skip: ir.Value, epsilon: float, rewriter: Rewriter, label: str) -> ir.Value:
    square = rewriter.op("Mul", [skip, skip], name=f"{label}_square")
    if rewriter.model.opset_imports.get("", 1) >= 18:
        axes = rewriter.constant(np.array([-1], np.int64), f"{label}_axes")
        mean = rewriter.op("ReduceMean", [square, axes], name=f"{label}_mean")
    else:
        mean = rewriter.op("ReduceMean", [square], {"axes": [-1]}, name=f"{label}_mean")
    kind = skip.dtype or ir.DataType.FLOAT
    small = rewriter.constant(np.array(epsilon, kind.numpy()), f"{label}_epsilon")
    root = rewriter.op("Sqrt", [rewriter.op("Add", [mean, small], name=f"{label}_add")], name=f"{label}_root")
    unit = rewriter.op("Div", [skip, root], name=f"{label}_unit")
    return rewriter.op("Mul", [unit, add.inputs[2]], name=label)


# -- clean-up -----------------------------------------------------------------------------------------


def sweep(rewriter: Rewriter, nodes: Iterable[ir.Node]) -> None:
    """Remove nodes nobody reads, and what only they read, as far as that goes."""
    pending = list(nodes)[::-1]
    while pending:
        node = pending.pop()
        if node.graph is None or any(v.uses() or v.is_graph_output() for v in node.outputs):
            continue
        producers = [v.producer() for v in node.inputs if v is not None]
        rewriter.remove([node])
        pending.extend(p for p in producers if p is not None)


def _unused(model: ir.Model) -> frozenset[str]:
    return frozenset(n for n, v in model.graph.initializers.items() if not v.uses())


def remove_unused_initializers(model: ir.Model, keep: frozenset[str] = frozenset()) -> None:
    """Remove initializers nobody reads, except ``keep``; and the graph inputs that share their name."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if name not in keep and not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
            if value in graph.inputs:
                graph.inputs.remove(value)
