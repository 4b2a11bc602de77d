"""Where a changed program can be repaired: linear operators and affine norms, and what each should give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.analysis.operators import WeightedOperator, weighted_operators
from lamina.ir.fingerprint import value_digests
from lamina.ir.program import Program
from lamina.ir.shapes import Observed
from lamina.passes.fixed_weights import fixed_operators
from lamina.passes.pass_ import Refusal

NAME = "compensate"
# Norm -> which operands are gain and shift (None: it has no shift).
_NORMS: Mapping[str, tuple[int, int | None]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1, None),
    "SimplifiedLayerNormalization": (1, None),
}


@dataclass(frozen=True)
class RepairSite:
    """One operator of the changed program that may be fitted anew.

    Attributes:
        node: Its name.
        role: ``writer`` (its output ends in a sum), ``reader`` (its output is compared itself) or ``norm``.
        operator: How it reads; None for a norm.
        read: Name of the value it reads (a norm: the value it makes, which its gain scales).
        value: Name of the value that should become ``target``: its output behind the bias and, of a writer,
            behind the residual sums that follow.
        target: Name of that value in the original.
        weight: Operand of :attr:`node` that holds the matrix, kernel or gain.
        bias: Node and operand that hold the bias; None where there is none.
        addable: Whether a bias can be given to an operator without one; costs an operand (Conv, Gemm) or an
            addition (MatMul).
        width: Channels of its output.
        dtype: Numpy name of its output's type.
        fixed: Whether its weight is made from constants and cannot be refitted (quantized forms).
    """

    node: str
    role: str
    operator: WeightedOperator | None
    read: str
    value: str
    target: str
    weight: int
    bias: tuple[str, int] | None
    addable: bool = False
    width: int = 0
    dtype: str = "float32"
    fixed: bool = False


def repair_sites(
    original: Program,
    changed: Program,
    shapes: Mapping[str, Observed],
    original_shapes: Mapping[str, Observed],
    stands_for: Mapping[str, str] | None = None,
) -> Iterator[RepairSite | Refusal]:
    """Every operator behind the change that could make up for it, in execution order.

    What the change does not reach is left out without a word. Values correspond by name, or by
    ``stands_for``: behind a dropped branch its skip stands where its sum was, so the skip's writer is asked
    for the sum.

    Args:
        original: The program the change was made to.
        changed: The program after it.
        shapes: Of the changed program's values for some feeds.
        original_shapes: Of the original's for the same feeds.
        stands_for: Value of ``changed`` -> value of ``original`` whose place it takes.
    """
    finder = _Finder(original, changed, shapes, original_shapes, stands_for or {})
    operators, left = weighted_operators(changed, shapes)
    fixed = fixed_operators(changed, shapes)
    for node in changed.graph:
        name = node.name or ""
        if name in fixed:
            found = finder.linear(node, fixed[name], fixed=True)
        elif name in operators:
            found = finder.linear(node, operators[name])
        elif node.op_type in _NORMS:
            found = finder.norm(node)
        elif name in left:
            found = Refusal(NAME, name, left[name])
        else:
            continue
        if found is not None:
            yield found


class _Finder:
    def __init__(
        self,
        original: Program,
        changed: Program,
        shapes: Mapping[str, Observed],
        original_shapes: Mapping[str, Observed],
        stands_for: Mapping[str, str],
    ) -> None:
        before, after = value_digests([original.model, changed.model])
        self._before = {v.name: d for v, d in before.items() if v.name}
        self._after = {v.name: d for v, d in after.items() if v.name}
        self._rectified = {n.inputs[0].name for n in original.graph if n.op_type == "Relu" and n.inputs[0]}
        self._shapes, self._original_shapes, self._stands_for = shapes, original_shapes, stands_for

    def target(self, value: ir.Value) -> str | None:
        """The original's value that ``value`` should be equal to, if there is one of its shape."""
        name = value.name or ""
        found = self._stands_for.get(name, name)
        if found not in self._before or found not in self._original_shapes or name not in self._shapes:
            return None
        return found if self._original_shapes[found][0] == self._shapes[name][0] else None

    def linear(
        self, node: ir.Node, operator: WeightedOperator, *, fixed: bool = False
    ) -> RepairSite | Refusal | None:
        label = node.name or ""
        if operator.side == 1:
            return Refusal(NAME, label, "its weight stands on the left")
        reason = (None if fixed else _weight_reason(node.inputs[1])) or _gemm_reason(node)
        if reason is not None:
            return Refusal(NAME, label, reason)
        width = self._width(node)
        bias, end = _bias(node, width)
        value, summed = end, False
        target = self.target(end)
        while (following := self._sum_behind(value)) is not None:
            value = following
            if (found := self.target(value)) is not None:
                target, end, summed = found, value, True
        if (found := self._through_relu(value)) is not None:
            target, end, summed = found, value, True
        if target is None:
            return Refusal(NAME, label, "the original has nothing to compare its output with")
        if self._clean(end, target):
            return None
        role = "writer" if summed else "reader"
        addable = bias is None and (len(node.inputs) < 3 or node.inputs[2] is None)
        read, name = operator.activation, end.name or ""
        kind = self._shapes[name][1].name
        return RepairSite(label, role, operator, read, name, target, 1, bias, addable, width, kind, fixed)

    def norm(self, node: ir.Node) -> RepairSite | Refusal | None:
        label, value = node.name or "", node.outputs[0]
        target = self.target(value)
        if target is None or self._clean(value, target):
            return None
        gain, shift = _NORMS[node.op_type]
        rank = len(self._shapes[value.name or ""][0])
        if node.attributes.get_int("axis", -1) not in (-1, rank - 1):
            return Refusal(NAME, label, "it normalizes more than the last axis")
        reason = _weight_reason(node.inputs[gain], alone=False)
        if reason is not None:
            return Refusal(NAME, label, reason)
        has_shift = shift is not None and len(node.inputs) > shift and node.inputs[shift] is not None
        if has_shift and shift is not None and _weight_reason(node.inputs[shift], alone=False) is not None:
            has_shift = False
        bias = (label, shift) if has_shift and shift is not None else None
        name = value.name or ""
        return RepairSite(label, "norm", None, name, name, target, gain, bias)

    def _clean(self, value: ir.Value, target: str | None = None) -> bool:
        """Whether the change does not reach ``value``."""
        name = value.name or ""
        digest = self._after.get(name)
        return digest is not None and digest == self._before.get(target or self._stands_for.get(name, name))

    def _width(self, node: ir.Node) -> int:
        shape = self._shapes[node.outputs[0].name or ""][0]
        return shape[1 if node.op_type == "Conv" else -1]

    def _through_relu(self, value: ir.Value) -> str | None:
        """The sum that ``value`` should be where its Relu stands for one that goes through a Relu too.

        Blocks that end in ``relu(x + f(x))``: without f, the Relu before should be relu(sum), which it is
        where what it reads is that sum.
        """
        uses = value.uses()
        node = next(iter(uses)).node if len(uses) == 1 and not value.is_graph_output() else None
        if node is None or node.op_type != "Relu" or node.domain:
            return None
        name = node.outputs[0].name or ""
        if name not in self._stands_for or (target := self.target(node.outputs[0])) is None:
            return None
        return target if target in self._rectified else None

    def _sum_behind(self, value: ir.Value) -> ir.Value | None:
        """The sum of ``value`` and another activation of its shape, if nothing else reads ``value``."""
        uses = value.uses()
        if len(uses) != 1 or value.is_graph_output():
            return None
        node = next(iter(uses)).node
        if node.op_type != "Add" or node.domain:
            return None
        shape = self._shapes.get(value.name or "")
        same = all(
            v is not None and shape is not None and self._shapes.get(v.name or "", ((),))[0] == shape[0]
            for v in node.inputs
        )
        return node.outputs[0] if same else None


def _weight_reason(value: ir.Value | None, *, alone: bool = True) -> str | None:
    """Why a weight cannot be fitted anew; ``alone``: whether it must have no other reader."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return "its weight is no initializer"
    if value.is_graph_input():
        return f"weight '{value.name}' is an input of the interface"
    if value.const_value.dtype.numpy() not in (np.float32, np.float64, np.float16):
        return f"weight '{value.name}' is {value.const_value.dtype.name}"
    if alone and (len(value.uses()) > 1 or value.is_graph_output()):
        return f"weight '{value.name}' is shared"
    return None


def _gemm_reason(node: ir.Node) -> str | None:
    if node.op_type != "Gemm":
        return None
    scales = (node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0))
    return None if scales == (1.0, 1.0) else "its Gemm scales its operands"


def _bias(node: ir.Node, width: int) -> tuple[tuple[str, int] | None, ir.Value]:
    """Where the bias of a linear operator is, and the value behind it."""
    value = node.outputs[0]
    if node.op_type in ("Gemm", "Conv"):
        given = node.inputs[2] if len(node.inputs) > 2 else None
        fits = given is not None and _weight_reason(given, alone=False) is None and _size(given) == width
        return ((node.name or "", 2) if fits else None), value
    uses = value.uses()
    if len(uses) == 1 and not value.is_graph_output():
        add = next(iter(uses)).node
        if add.op_type == "Add" and not add.domain and len(add.inputs) == 2:
            operand = 1 if add.inputs[0] is value else 0
            other = add.inputs[operand]
            if other is not None and _weight_reason(other, alone=False) is None and _size(other) == width:
                last = other.shape is not None and len(other.shape) and other.shape[-1] == width
                if last:
                    return (add.name or "", operand), add.outputs[0]
    return None, value


def _size(value: ir.Value) -> int:
    return 0 if value.const_value is None else int(np.prod(value.const_value.shape.numpy()))
