"""Compute at compile time what does not depend on the inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold
from lamina.passes.pass_ import Effect, Rounding


@dataclass(frozen=True)
class FoldConstants(LibraryFold):
    """Fold constant subgraphs and infer shapes on the way, with onnxscript's optimizer.

    Attributes:
        input_elements: Operands larger than this are left to run time.
        output_elements: Results larger than this are not stored, so that the file does not grow.

    Effect: Rounding; the reference evaluator computes in numpy what the runtime would compute itself.
    Source: onnxscript.optimizer.fold_constants.
    """

    input_elements: int = 8_192
    output_elements: int = 65_536

    effect: ClassVar[Effect] = Rounding(ulps=4)

    def run(self, model: ir.Model) -> None:
        """Call the library, equal shape inferences once."""
        from onnxscript.optimizer import fold_constants

        from lamina.passes.fold.remembered_inference import remembering_pass

        limits = {"input_size_limit": self.input_elements, "output_size_limit": self.output_elements}
        fast = remembering_pass()
        if fast is None:
            fold_constants(model, onnx_shape_inference=True, **limits)
        else:
            fast(shape_inference=True, **limits)(model)
