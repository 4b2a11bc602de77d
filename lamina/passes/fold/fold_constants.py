"""Compute at compile time what does not depend on the inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.amplifiers import heavy_nodes
from lamina.passes.fold.graph import every_node
from lamina.passes.fold.library import LibraryFold, hidden
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
        with hidden(_too_large(model, self.output_elements)):
            if fast is None:
                fold_constants(model, onnx_shape_inference=True, **limits)
            else:
                fast(shape_inference=True, **limits)(model)
        _remove_dead_identities(model)


def _remove_dead_identities(model: ir.Model) -> None:
    """Take out what the library turns operators into and lets nobody read: a pass less has to look for it."""
    for node in list(every_node(model.graph)):
        if node.op_type == "Identity" and node.domain == "" and node.graph is not None:
            output = node.outputs[0]
            if not output.uses() and not output.is_graph_output():
                node.graph.remove(node, safe=True)


def _too_large(model: ir.Model, limit: int) -> list[ir.Node]:
    """Constant nodes whose result is not worth computing: the library looks at its size only afterwards."""
    nodes = list(every_node(model.graph))
    heavy, found = set(heavy_nodes(nodes)), []
    constant: set[ir.Value] = set()
    for node in nodes:
        if not all([v is None or v.const_value is not None or v in constant for v in node.inputs]):
            continue
        constant.update(node.outputs)
        if node in heavy or any(_elements(v) > limit for v in node.outputs):
            found.append(node)
    return found


def _elements(value: ir.Value) -> int:
    """The number of elements where every dim is known, else none."""
    dims = [] if value.shape is None else list(value.shape)
    return math.prod(d for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else 0
