"""Remove Identity nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.graph import every_node
from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class EliminateIdentities(LibraryFold):
    """Remove Identity nodes, except those that carry an interface name of a value that has another.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def idle(self, model: ir.Model) -> bool:
        """Whether there is no Identity."""
        return not any(n.op_type == "Identity" for n in every_node(model.graph))

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("IdentityEliminationPass")(model)
