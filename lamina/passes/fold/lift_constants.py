"""Turn Constant nodes into initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class LiftConstants(LibraryFold):
    """Turn every Constant node, in subgraphs too, into an initializer of the same name.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()
    wants: ClassVar[tuple[str, ...]] = ("Constant",)

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("LiftConstantsToInitializersPass", lift_all_constants=True, size_limit=0)(model)
