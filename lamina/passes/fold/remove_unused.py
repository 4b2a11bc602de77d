"""Remove what nobody reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.ir.names import every_graph
from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import every_node
from lamina.passes.fold.library import LibraryFold, common
from lamina.passes.pass_ import Effect, Exact


@dataclass(frozen=True)
class RemoveUnused(LibraryFold):
    """Remove unused nodes, initializers, functions and operator sets; interface inputs stay.

    Effect: Exact.
    Source: onnx_ir.passes.common.
    """

    effect: ClassVar[Effect] = Exact()

    def idle(self, model: ir.Model) -> bool:
        """Whether everything is read."""
        if model.functions or set(model.opset_imports) - {""}:
            return False
        if not all(_read(v) for graph in every_graph(model.graph) for v in graph.initializers.values()):
            return False
        return all(_read(v) for n in every_node(model.graph) for v in n.outputs)

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        common("RemoveUnusedNodesPass")(model)

    def apply(self, rewriter: Rewriter) -> None:
        """Remove nodes behind the fence, then what the true domains do not need."""
        super().apply(rewriter)
        if rewriter.model.functions:
            common("RemoveUnusedFunctionsPass")(rewriter.model)
        if set(rewriter.model.opset_imports) - {""}:
            common("RemoveUnusedOpsetsPass")(rewriter.model)


def _read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output() or value.is_graph_input()
