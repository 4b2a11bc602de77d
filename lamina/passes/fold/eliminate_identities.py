"""Remove Identity nodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class EliminateIdentities(LibraryFold):
    """Remove Identity nodes, except those that carry an interface name of a value that has another.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()
    wants: ClassVar[tuple[str, ...]] = ("Identity",)

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("IdentityEliminationPass")(model)
