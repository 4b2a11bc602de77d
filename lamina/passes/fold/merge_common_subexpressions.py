"""Compute equal things once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class MergeCommonSubexpressions(LibraryFold):
    """Merge nodes with the same operator, inputs and attributes; random and unknown operators are fenced.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("CommonSubexpressionEliminationPass")(model)
