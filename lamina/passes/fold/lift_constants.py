"""Turn Constant nodes into initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.graph import every_node
from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class LiftConstants(LibraryFold):
    """Turn every Constant node, in subgraphs too, into an initializer of the same name.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def idle(self, model: ir.Model) -> bool:
        """Whether there is no Constant."""
        return not any(n.op_type == "Constant" for n in every_node(model.graph))

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("LiftConstantsToInitializersPass", lift_all_constants=True, size_limit=0)(model)
