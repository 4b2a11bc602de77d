"""Remove what nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class RemoveUnused(LibraryFold):
    """Remove unused nodes, initializers, functions and operator sets; interface inputs stay.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("RemoveUnusedNodesPass")(model)

    def apply(self, rewriter: Rewriter) -> None:
        """Remove nodes behind the fence, then what the true domains do not need."""
        super().apply(rewriter)
        common("RemoveUnusedFunctionsPass")(rewriter.model)
        common("RemoveUnusedOpsetsPass")(rewriter.model)
