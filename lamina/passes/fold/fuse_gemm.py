"""Write a matrix product and the Add of its bias as one Gemm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, constant, is_op, sole_consumer, substitute
from lamina.passes.fold.heads import same_dim
from lamina.passes.pass_ import Effect, Rounding

_TYPES = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class _Match:
    left: ir.Value
    right: ir.Value
    bias: ir.Value
    add: ir.Node


@dataclass(frozen=True)
class FuseGemm(LocalFold):
    """Replace MatMul(a, w) + b by Gemm(a, w, b).

    Fires: a and w are matrices, w is constant, and b is a constant that broadcasts to the product.
    Refuses: operands of other ranks; a product that is read elsewhere; a bias that would enlarge the product.
    Shapes: a [m, k], w [k, n], b [n], [1, n], [1], [] or, with m known, [m, n] or [m, 1].
    Effect: Rounding, <= 8 ulps of max|y|: the bias may be added first.
    Cost: O(nodes).
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)
    anchors: ClassVar[tuple[str, ...]] = ("MatMul",)

    def match(self, node: ir.Node) -> _Match | str | None:
        """A product of matrices, and the Add that alone reads it."""
        left, right, product = node.inputs[0], node.inputs[1], node.outputs[0]
        weight = constant(right)
        add = sole_consumer(product)
        if left is None or right is None or weight is None or add is None or not is_op(add, "Add"):
            return None
        others = [v for v in add.inputs if v is not None and v is not product]
        if len(others) != 1 or add.graph is not node.graph or constant(others[0]) is None:
            return None
        if left.shape is None or len(left.shape) != 2 or weight.ndim != 2:
            return "its operands are not known to be matrices"
        if right.dtype not in _TYPES or left.dtype is not right.dtype or others[0].dtype is not right.dtype:
            return "its type is none that the fold knows Gemm to take"
        if not _broadcasts(others[0], left.shape[0], weight.shape[1]):
            return "the bias may enlarge the product"
        return _Match(left, right, others[0], add)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the Gemm in place of the Add."""
        where, result = match.add.name or "Add", match.add.outputs[0]
        substitute(rewriter, result, "Gemm", [match.left, match.right, match.bias])
        rewriter.record(self.name, where, f"bias added in '{node.name}' before it")


def _broadcasts(bias: ir.Value, rows: object, columns: int) -> bool:
    """Whether ``bias`` broadcasts to [rows, columns], and no further."""
    array = constant(bias)
    if array is None or array.ndim > 2:
        return False
    pairs = zip(reversed(array.shape), (columns, rows), strict=False)
    return all(have == 1 or same_dim(have, want) for have, want in pairs)
