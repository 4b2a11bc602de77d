"""Share weights: a branch runs a relative's matrices, with or without a private low-rank remainder."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.analysis.statistics import Statistics
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import remove_unused_initializers, sweep
from lamina.passes.pass_ import Need, Option, Refusal, Site, Transform
from lamina.passes.repair import unpacked
from lamina.passes.sharing.lender import Lender
from lamina.passes.sharing.remainder import add_remainder, matrix_operand
from lamina.passes.sharing.twins import NAME, Twins

# What the copies' names end in until the originals are gone.
_COPY = "_shared"


@dataclass(frozen=True)
class Share(Transform):
    """Let a branch run the matrices of another branch of its structure: only one set is stored.

    Options: ``reuse-previous``, ``reuse-next`` (its neighbours among the branches of its structure) and
    ``reuse-similar`` (the one whose matrices change the outputs of its own operators least, weighted with
    what they read on calibration data), each as it is; and ``remainder-r``: ``reuse-similar`` plus a private
    ``down up`` of rank r beside every matrix, the truncated singular values of the difference. The branch
    keeps its biases, gains and other vectors. Its graph stays, so time and FLOPs do; a remainder adds r
    multiply-adds a row and column of the matrix.

    What the donor lends are its weights in the program *as given*: whatever another move does to the donor
    (drop, replace, quantize, share), the borrower computes the same, and the donor's weights stay in the file
    for it. Prices say so (:class:`lamina.planner.costs.Loan`). What is nested in a branch that shares has no
    effect; sharing first and quantizing what comes out quantizes the shared weights once.

    Fires: branches with a matrix of MatMul or Gemm, or a kernel of Conv, that only they read, whose
        operators, attributes, wiring, integer constants and shapes of weights are those of another branch.
    Refuses: no such relative; control flow inside; a value besides the body that is read outside.
    Effect: Lossy; exact where the weights are equal. A remainder of full rank is exact but for rounding.
    Interface: unchanged; caches inside the branch stay.
    Cost: sites O(nodes); similarity O(pairs of a family x matrix products of its weights).
    Source: Skrr (run a kept neighbour's weights), Relaxed Recursive Transformers (W_shared + B A started from
        the singular values of the difference). Deviates: without training; the planner chooses; the singular
        values are activation-weighted; the shared weights are one branch's, not a mean.
    """

    paper: ClassVar[str] = "Skrr; Relaxed Recursive Transformers"
    axes: ClassVar[tuple[str, ...]] = ("size",)
    needs: ClassVar[frozenset[Need]] = frozenset(("branches", "inputs"))
    name: ClassVar[str] = NAME
    removes_site: ClassVar[bool] = True
    same_work: ClassVar[frozenset[str]] = frozenset(("reuse-previous", "reuse-next", "reuse-similar"))

    rank_shares: tuple[float, ...] = (1 / 16, 1 / 4)

    def __post_init__(self) -> None:
        if any(not 0 < share <= 1 for share in self.rank_shares):
            raise PassError("rank shares lie between 0 and 1", where=self.name)

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every branch with a relative, in execution order; then the others, with the reason."""
        twins = Twins.of(program)
        yield from twins.sites.values()
        yield from twins.refusals

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """Reuse of neighbours and of the most similar relative, and remainders of the latter."""
        lender = Lender(program, Twins.of(program), statistics)
        donors: dict[str, str] = {}  # donor -> role; a neighbour that is the most similar one counts once
        for role, donor in lender.candidates(site.name):
            donors.setdefault(donor, role)
        found = [lender.reuse(site, donor, f"reuse-{role}") for donor, role in donors.items()]
        similar = lender.similar(site.name)
        for share in self.rank_shares:
            option = lender.remainder(site, similar, share)
            if option is not None and option.name not in [o.name for o in found]:
                found.append(option)
        return tuple(found)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The branch again, with borrowed matrices."""
        lent = _lent(site, option, rewriter)
        remainders = option.parameters.get("remainders", {})
        made: dict[ir.Value, ir.Value] = {}
        for name in site.nodes:
            node = nodes[name]
            inputs = [None if v is None else _now(v, made) for v in node.inputs]
            copy = _copy(node, [v if v is None else lent.get(v.name or "", v) for v in inputs], rewriter)
            made.update(zip(node.outputs, copy.outputs, strict=True))
            operand = matrix_operand(node)
            weight = None if operand is None else node.inputs[operand]
            if operand is None or weight is None or weight.name not in lent:
                continue
            pair = remainders.get(str(site.weights.index(weight.name)))
            x = inputs[1 - operand]
            if pair is not None and x is not None:
                down, up = unpacked(pair["down"]), unpacked(pair["up"])
                made[node.outputs[0]] = add_remainder(node, x, copy.outputs[0], down, up, rewriter)
        places = option.parameters["outputs"]  # trap: the names of what the interface hands out may move
        return [made[nodes[site.nodes[place]].outputs[k]] for place, k in places]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take the branch's own nodes out; what runs in their place gets their names.

        Moves on what is nested in it, and repairs, find the branch's operators and values by these.
        """
        nodes = [rewriter.node(name) for name in site.nodes if rewriter.has_node(name)]
        names = {n.name or "": [v.name for v in n.outputs] for n in nodes}
        sweep(rewriter, reversed(nodes))
        gone = [name for name in names if not rewriter.has_node(name) and rewriter.has_node(f"{name}{_COPY}")]
        copies = {name: rewriter.node(f"{name}{_COPY}") for name in gone}
        for name, copy in copies.items():
            shown = [_hand_out(v, rewriter, keep=copies.values()) for v in copy.outputs]
            labels = [None if out else old for out, old in zip(shown, names[name], strict=True)]
            rewriter.rename(copy, name, labels)


def apply_shares(
    program: Program,
    donors: Mapping[str, str],
    *,
    rank: int = 0,
    statistics: Statistics | None = None,
) -> Program:
    """Let branches run other branches' matrices, on a clone; matrices nobody reads any more leave the file.

    A donor may itself borrow: what it lends are the weights it has in ``program``.

    Args:
        program: The program; never changed.
        donors: Branch -> the branch whose matrices it runs.
        rank: Of the private remainder of every matrix; 0: none. Cut to what a matrix allows.
        statistics: With ``inputs`` (:func:`lamina.analysis.statistics.collect`), remainders are fitted to
            what the branches read; None: to the weights alone.

    Raises:
        PassError: A name is no branch that can share, or the two are not of one structure.
    """
    transform, twins = Share(), Twins.of(program)
    lender = Lender(program, twins, statistics or Statistics(0))
    clone = program.clone()
    unused = frozenset(n for n, v in program.graph.initializers.items() if not v.uses())
    rewriter = Rewriter(clone.model)
    for name in donors:
        if name not in twins.sites:
            raise _unknown(name, twins, program)
    for name in [name for name in twins.sites if name in donors]:
        site, donor = twins.sites[name], donors[name]
        if donor == name or donor not in twins.family[name]:
            raise PassError(
                f"branch '{name}' cannot run the weights of '{donor}'",
                where=program.source,
                advice=f"of its structure are {', '.join(n for n in twins.family[name] if n != name)}",
            )
        option = lender.reuse(site, donor, "reuse") if rank < 1 else lender.at_rank(site, donor, rank)
        nodes = {n: rewriter.node(n) for n in site.nodes}
        values = {v.name: v for n in nodes.values() for v in n.outputs}
        emitted = transform.emit(site, option, rewriter.at(nodes[site.nodes[-1]]), nodes)
        rewriter.at(None)
        for output, value in zip(site.outputs, emitted, strict=True):
            rewriter.replace_uses(values[output], value)
        transform.finish(site, rewriter)
        rewriter.record(NAME, name, f"runs the weights of '{donor}'")
    remove_unused_initializers(clone.model, keep=unused)
    return clone


def _unknown(name: str, twins: Twins, program: Program) -> PassError:
    for refusal in twins.refusals:
        if refusal.where == name:
            return PassError(f"branch '{name}' cannot share: {refusal.reason}", where=program.source)
    known = list(twins.sites)
    near = get_close_matches(name, known, n=3) or known[:3]
    advice = f"did you mean {', '.join(near)}?" if near else "no two branches of this program are alike"
    return PassError(f"no branch is called '{name}'", where=program.source, advice=advice)


# -- emission -----------------------------------------------------------------------------------------


def _lent(site: Site, option: Option, rewriter: Rewriter) -> dict[str, ir.Value]:
    """Own matrix -> the value that takes its place."""
    there = rewriter.model.graph.initializers
    for name in option.borrows:
        if name not in there:
            raise PassError(
                f"branch '{site.name}' borrows '{name}', which is not in the program",
                advice="the plan was made for another model or another version of lamina",
            )
    return {own: there[name] for own, name in zip(site.weights, option.borrows, strict=True)}


def _now(value: ir.Value, made: Mapping[ir.Value, ir.Value]) -> ir.Value:
    """The copy of a value of the branch; any other value as it is.

    In the supergraph what a nested choice makes is read from an If; its else branch ends in the branch's own.
    """
    inner = value
    while inner not in made:
        node = inner.producer()
        if node is None or node.op_type != "If" or "else_branch" not in node.attributes:
            return value
        inner = node.attributes["else_branch"].as_graph().outputs[node.outputs.index(inner)]
    return made[inner]


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None], rewriter: Rewriter) -> ir.Node:
    label = f"{node.name}{_COPY}"
    attributes = {key: attribute.value for key, attribute in node.attributes.items()}
    value = rewriter.op(
        node.op_type, inputs, attributes, outputs=len(node.outputs), domain=node.domain, name=label
    )
    copy = value.producer()
    assert copy is not None
    copy.overload = node.overload
    copy.metadata_props.update(node.metadata_props)
    for old, new in zip(node.outputs, copy.outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        if not old.name:
            new.name = ""
    return copy


def _hand_out(value: ir.Value, rewriter: Rewriter, *, keep: Collection[ir.Node]) -> bool:
    """Whether the interface hands out ``value``; an Identity that was put there to carry it is taken out."""
    outputs = rewriter.model.graph.outputs
    for carrier in [use.node for use in value.uses() if use.node.op_type == "Identity"]:
        shown = carrier.outputs[0]
        if carrier not in keep and shown.is_graph_output() and not value.is_graph_output():
            name, place = shown.name, outputs.index(shown)
            shown.name = rewriter.fresh(f"{name}{_COPY}")
            value.name, outputs[place] = name, value
            rewriter.remove([carrier])
    return value.is_graph_output()
