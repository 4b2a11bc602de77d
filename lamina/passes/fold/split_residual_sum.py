"""Write the residual sum before a normalization as Sum, which no runtime fusion takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, constant, consumers, is_op, substitute
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class SplitResidualSum(LocalFold):
    """Replace the residual ``Add`` that feeds a normalization by ``Sum`` of the same two values.

    ONNX Runtime turns Add and LayerNormalization into its SkipLayerNormalization, whose CPU kernel is
    slower than the two by themselves; Sum adds the same two numbers and does not match that fusion. A
    default session of a standard file keeps the fast kernels, without an option that a user must set.

    Fires: float32 Add of two activations whose result a LayerNormalization or RMSNormalization reads.
    Refuses: a constant operand (a bias, not a residual).
    Effect: Exact, bit for bit.
    Cost: O(normalizations).
    """

    effect: ClassVar[Effect] = Exact()
    anchors: ClassVar[tuple[str, ...]] = ("Add",)

    def match(self, node: ir.Node) -> bool | str | None:
        """Whether this Add feeds a normalization."""
        readers = consumers(node.outputs[0])
        if not any(is_op(r, "LayerNormalization", "RMSNormalization") for r in readers):
            return None
        if any(v is None or constant(v) is not None for v in node.inputs):
            return "one operand is a constant: a bias, not a residual"
        if node.outputs[0].dtype is not ir.DataType.FLOAT:
            return "it is not known to be float32"
        return True

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write Sum."""
        where = node.name or "Add"
        substitute(rewriter, node.outputs[0], "Sum", list(node.inputs))
        rewriter.record(self.name, where, "residual sum before a normalization, written as Sum")
