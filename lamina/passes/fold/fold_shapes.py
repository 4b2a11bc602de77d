"""Replace shape arithmetic whose result is certain by constants, dynamic dims staying dynamic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, constant, is_op, sweep
from lamina.passes.fold.shape_values import Dim, Entry, Known, ShapeValues, as_array
from lamina.passes.pass_ import Effect, Exact, Fold


@dataclass(frozen=True)
class FoldShapes(Fold):
    """Evaluate Shape, Size, Gather, Slice, Concat and integer arithmetic on dims as far as dims are known.

    A result that is certain becomes a constant. The target of a Reshape becomes one too if each entry that
    is not known is the dim of the reshaped value at the same place (0: copied), or is the only such entry
    beside numbers above zero (-1: inferred). The shape of an Expand becomes one if each entry that is not
    known is the dim that is there already (1).

    Refuses: what depends on a dynamic dim otherwise; -1 beside other dynamic dims, for an empty batch makes
    it ambiguous; values of the interface.
    Effect: Exact. The shapes of the program's values are taken as they are, the interface's among them.
    Cost: O(nodes), one forward sweep.
    """

    effect: ClassVar[Effect] = Exact()
    wants: ClassVar[tuple[str, ...]] = ("Shape", "Size")

    def idle(self, model: ir.Model) -> bool:
        """Whether nothing reads a shape."""
        return not any(is_op(n, "Shape", "Size") for n in model.graph)

    def apply(self, rewriter: Rewriter) -> None:
        """Sweep forward once."""
        values = ShapeValues()
        for node in list(rewriter.graph):
            if node.graph is not rewriter.graph:
                continue  # fed only what an earlier target replaced
            if is_op(node, "Reshape", "Expand") and node.outputs[0].dtype is not ir.DataType.STRING:
                self._target(node, values, rewriter)
            known = values.visit(node)
            if known is not None:
                self._whole(node, known, rewriter)

    def _whole(self, node: ir.Node, known: Known, rewriter: Rewriter) -> None:
        output = node.outputs[0]
        array = None if output.dtype is None else as_array(known, output.dtype)
        if array is None or output.is_graph_output() or not output.uses():
            return
        where = node.name or node.op_type
        rewriter.replace_uses(output, rewriter.constant(array, f"{where}_folded"))
        sweep(rewriter, [node])
        rewriter.record(self.name, where, f"it is always {array.tolist()}")

    def _target(self, node: ir.Node, values: ShapeValues, rewriter: Rewriter) -> None:
        source, target = node.inputs[0], node.inputs[1]
        known = values.of(target)
        if source is None or known is None or constant(target) is not None or known.is_scalar:
            return
        if node.op_type == "Expand":
            found = _expanded(known.entries, source)
        elif attribute(node, "allowzero", 0) and 0 in known.entries:
            return  # a dim that is zero, which cannot be told from one that is copied
        else:
            found = _reshaped(known.entries, source)
        if found is None or target is None:
            return
        node.attributes.pop("allowzero", None)
        where, producer = node.name or node.op_type, target.producer()
        array: np.ndarray[Any, Any] = np.array(found, np.int64)
        node.replace_input_with(1, rewriter.constant(array, f"{where}_shape_folded"))
        sweep(rewriter, [] if producer is None else [producer])
        rewriter.record(self.name, where, f"its shape is always {found}")


def _reshaped(entries: tuple[Entry, ...], source: ir.Value) -> list[int] | None:
    """A constant target of a Reshape to the same shape."""
    copied = [0 if isinstance(e, Dim) and e.is_dim_of(source, i) else e for i, e in enumerate(entries)]
    open_at = [i for i, e in enumerate(copied) if not isinstance(e, int)]
    numbers = [e for e in copied if isinstance(e, int)]
    if not open_at:
        return numbers
    if len(open_at) > 1 or any(n < 1 for n in numbers):
        return None
    return [e if isinstance(e, int) else -1 for e in copied]


def _expanded(entries: tuple[Entry, ...], source: ir.Value) -> list[int] | None:
    """A constant shape for an Expand to the same shape."""
    if source.shape is None:
        return None
    ahead = len(entries) - len(source.shape)
    found: list[int] = []
    for i, entry in enumerate(entries):
        if isinstance(entry, int):
            found.append(entry)
        elif isinstance(entry, Dim) and i >= ahead and entry.is_dim_of(source, i - ahead):
            found.append(1)
        else:
            return None
    return found
