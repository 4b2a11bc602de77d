"""Keep one of several equal initializers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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
        for value in model.graph.initializers.values():
            tensor = value.const_value
            # trap: the library hashes arrays as they lie, and refuses strided ones
            if isinstance(tensor, ir.Tensor) and not _is_contiguous(tensor.raw):
                array = np.ascontiguousarray(tensor.numpy())
                value.const_value = ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)
        common("DeduplicateHashedInitializersPass")(model)


def _is_contiguous(raw: object) -> bool:
    return not isinstance(raw, np.ndarray) or bool(raw.flags.c_contiguous)
