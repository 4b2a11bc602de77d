"""Give each of several parallel residual branches an Add of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.branches import Branch, find_branches
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Effect, Fold, Rounding

_SUMS = ("Add", "Sum")


@dataclass(frozen=True)
class ChainResidualSums(Fold):
    """Rewrite ``x + (a + b)`` as ``(x + a) + b`` where a and b are parallel residual branches.

    Decoders with parallel attention and MLP (GPT-J, GPT-NeoX, Falcon, Phi) add the branches to each other
    first; chained, each branch can be dropped by itself.

    Fires: the branches that :func:`lamina.ir.branches.find_branches` reports with a ``joint``.
    Refuses: anything else; a joint that is not a plain Add or Sum.
    Effect: Rounding, <= 2 ulps of the largest partial sum for each branch: additions are reassociated.
    Cost: O(nodes + edges).
    """

    effect: ClassVar[Effect] = Rounding(ulps=4)

    def idle(self, model: ir.Model) -> bool:
        """Whether no sum is read by another sum alone: joint branches are added to each other first."""
        return not any(n.op_type in _SUMS and any(map(_is_inner, n.inputs)) for n in model.graph)

    def apply(self, rewriter: Rewriter) -> None:
        """Chain every group of parallel branches."""
        groups: dict[str, list[Branch]] = {}
        for branch in find_branches(Program(rewriter.model)).branches:
            if branch.joint is not None:
                groups.setdefault(branch.joint, []).append(branch)
        for joint, branches in groups.items():
            self._chain(rewriter.node(joint), branches, rewriter)

    def _chain(self, joint: ir.Node, branches: list[Branch], rewriter: Rewriter) -> None:
        bodies = [_operand(rewriter.node(b.add), b.body) for b in branches]
        inner = _entering(rewriter.node(branches[0].add), joint)
        if joint.op_type not in _SUMS or inner is None:
            return
        inner_at = next(i for i, v in enumerate(joint.inputs) if v is inner)
        total, result = joint.inputs[1 - inner_at], joint.outputs[0]
        rewriter.at(joint)
        for body in bodies[:-1]:
            label = f"{joint.name}_chain"
            total = rewriter.op("Add", [total, body], name=label, dtype=result.dtype, shape=result.shape)
        rewriter.at(None)
        joint.replace_input_with(1 - inner_at, total)
        joint.replace_input_with(inner_at, bodies[-1])
        self._remove(inner, rewriter)
        rewriter.record(self.name, joint.name or "Add", f"{len(branches)} parallel branches chained")

    def _remove(self, top: ir.Value | None, rewriter: Rewriter) -> None:
        """Remove the inner sums from the outermost in; each was read by the next one only."""
        pending = [top]
        while pending:
            value = pending.pop()
            node = None if value is None else value.producer()
            if value is None or node is None or value.uses() or value.is_graph_output():
                continue
            inputs = list(node.inputs)
            rewriter.remove([node])
            pending.extend(inputs)


def _is_inner(value: ir.Value | None) -> bool:
    """Whether a value is the sum of two that are computed, and read once."""
    node = None if value is None else value.producer()
    if value is None or node is None or node.op_type not in _SUMS or len(value.uses()) != 1:
        return False
    return sum(v is not None and v.const_value is None for v in node.inputs) > 1


def _operand(add: ir.Node, name: str) -> ir.Value:
    return next(v for v in add.inputs if v is not None and v.name == name)


def _entering(add: ir.Node, joint: ir.Node) -> ir.Value | None:
    """The operand of the joint that the inner sum ``add`` ends up in."""
    value = add.outputs[0]
    while True:
        readers = [use.node for use in value.uses()]
        if readers == [joint]:
            return value
        if len(readers) != 1 or readers[0].op_type not in _SUMS:
            return None
        value = readers[0].outputs[0]
