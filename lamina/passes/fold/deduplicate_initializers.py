"""Keep one of several equal initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class DeduplicateInitializers(LibraryFold):
    """Keep one of several initializers equal in type, shape and content (hashed, then compared).

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("DeduplicateHashedInitializersPass")(model)
