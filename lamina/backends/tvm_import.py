"""Make of a model what TVM can import, or refuse it by operator name before TVM is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lamina.backends.tvm_operators import NEED_COMPILER, Unimportable, unimportable
from lamina.errors import BudgetError, DataError, UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.normalize import infer_shapes
from lamina.ir.opset import raise_opset
from lamina.ir.program import Port, Program
from lamina.ir.rewriter import Rewriter

OLDEST_OPSET = 18  # below, TVM has converters for some definitions only
_SHOWN = 5
# operators that hand positions on unchanged, from a Range to the Gather that looks them up
_CARRIERS = frozenset(["Cast", "Expand", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"])
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Prepared:
    """A model ready for TVM.

    Attributes:
        program: As it was given, normalized: what the reference runs.
        model: What TVM is given.
        inputs: Interface inputs with the shapes that were asked for.
        outputs: Names of the outputs.
        limit: Largest size a dynamic input dim may have, or None.
        where: What messages call the model.
    """

    program: Program
    model: ir.Model
    inputs: tuple[Port, ...]
    outputs: tuple[str, ...]
    limit: int | None
    where: str

    @property
    def dynamic(self) -> bool:
        """Whether some input dim is open."""
        return any(not isinstance(d, int) for port in self.inputs for d in port.shape)

    @property
    def runtime_only(self) -> bool:
        """Whether TVM's runtime library can run it without the compiler's."""
        return not any(node.op_type in NEED_COMPILER for node in self.model.graph.all_nodes())


def prepare(model: ir.Model | Path, shapes: Shapes, bound: int | None) -> Prepared:
    """Normalize, pin shapes, fold constants, rewrite what TVM trips over.

    Args:
        model: The model or its file; never changed.
        shapes: Input name -> sizes to compile for; a named dim gets its size in every input.
        bound: Largest value the limit of a Range can take at run time, when the graph does not say.

    Raises:
        UnsupportedOperator: TVM cannot import an operator, or gets it wrong; names node and operator.
        BudgetError: The shapes do not fit the model.
        CaptureError: The model cannot be read.
    """
    name = str(model) if isinstance(model, Path) else (model.graph.name or "model")
    program = capture(model, name=name)
    work = program.clone().model
    if work.opset_imports.get("", 1) < OLDEST_OPSET:
        raise_opset(work, OLDEST_OPSET)
    if shapes:
        _pin(work, shapes, name)
    _fold(work)
    limit = _rewrite_ranges(work, bound, name)
    refuse(list(unimportable(work)), name)
    view = Program(work)
    return Prepared(program, work, view.inputs, tuple(p.name for p in view.outputs), limit, name)


def refuse(found: Sequence[Unimportable], where: str) -> None:
    """Raise when there is something to refuse.

    Raises:
        UnsupportedOperator: Names the first node, and the others' operators.
    """
    if not found:
        return
    first = found[0]
    lines = [f"node '{u.node}' ({u.operator}) {u.reason}" for u in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"and {len(found) - _SHOWN} more")
    advice = "compile it with target ort:cpu; docs/tvm.md lists what TVM can import"
    if any(u.reason.startswith("needs a constant") for u in found):
        advice = "fix the input shapes, e.g. &shapes=input:1x128 in the target; or use target ort:cpu"
    raise UnsupportedOperator(
        f"TVM cannot import {first.operator}: {'; '.join(lines)}", where=where, advice=advice
    )


def parse_shapes(text: str) -> dict[str, tuple[int, ...]]:
    """Read ``tokens:1x128,mask:1x128``.

    Raises:
        BudgetError: The text is not of that form.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for part in filter(None, text.split(",")):
        name, _, sizes = part.rpartition(":")
        numbers = sizes.split("x")
        if not name or not all(n.isdigit() and int(n) > 0 for n in numbers):
            raise BudgetError(
                f"shapes '{part}' is not understood", advice="write them like shapes=tokens:1x128,mask:1x128"
            )
        shapes[name] = tuple(int(n) for n in numbers)
    return shapes


def check_feeds(inputs: Sequence[Port], feeds: Mapping[str, np.ndarray], limit: int | None = None) -> None:
    """Raise unless ``feeds`` fit: TVM reads past the end of what does not.

    Raises:
        DataError: Names, dtypes or shapes differ from the interface.
    """
    names = [port.name for port in inputs]
    missing, extra = [n for n in names if n not in feeds], [n for n in feeds if n not in names]
    if missing or extra:
        raise DataError(
            f"feeds do not fit: missing {missing or 'none'}, unknown {extra or 'none'}",
            advice=f"the inputs are: {', '.join(names)}",
        )
    for port in inputs:
        array = feeds[port.name]
        if array.dtype != port.numpy_dtype:
            raise DataError(f"input '{port.name}' is {array.dtype}, the model takes {port.numpy_dtype}")
        fits = len(array.shape) == len(port.shape) and all(
            have == want if isinstance(want, int) else limit is None or have <= limit
            for have, want in zip(array.shape, port.shape, strict=True)
        )
        if not fits:
            at_most = f", open dims at most {limit}" if limit is not None else ""
            raise DataError(
                f"input '{port.name}' has shape {list(array.shape)}, "
                f"the library was compiled for {list(port.shape)}{at_most}",
                advice="compile again with the shapes you run: &shapes=... in the target",
            )


# -- preparing --------------------------------------------------------------------------------------


def _pin(model: ir.Model, shapes: Shapes, where: str) -> None:
    inputs = {v.name: v for v in model.graph.inputs if v.name}
    sizes: dict[str, int] = {}
    for name, wanted in shapes.items():
        value = inputs.get(name)
        if value is None:
            raise BudgetError(
                f"shapes: '{name}' is not an input", where=where, advice=f"inputs: {', '.join(inputs)}"
            )
        have = tuple(value.shape) if value.shape is not None else (None,) * len(wanted)
        if len(have) != len(wanted) or any(
            isinstance(h, int) and h != w for h, w in zip(have, wanted, strict=True)
        ):
            raise BudgetError(f"shapes: '{name}' is {value.shape}, not {list(wanted)}", where=where)
        for dim, size in zip(have, wanted, strict=True):
            symbol = dim.value if isinstance(dim, ir.SymbolicDim) else None
            if symbol is not None and sizes.setdefault(symbol, size) != size:
                raise BudgetError(f"shapes: '{symbol}' is both {sizes[symbol]} and {size}", where=where)
        value.shape = ir.Shape(wanted)
    for value in inputs.values():
        _substitute(value, sizes)
    for value in model.graph.outputs:
        _substitute(value, sizes)
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None


def _substitute(value: ir.Value, sizes: Mapping[str, int]) -> None:
    if value.shape is None:
        return
    dims = [
        sizes.get(d.value, d) if isinstance(d, ir.SymbolicDim) and d.value is not None else d
        for d in value.shape
    ]
    value.shape = ir.Shape(dims)


def _fold(model: ir.Model) -> None:
    """Fold shape arithmetic that is constant by now; without it TVM sees dynamic shapes where none are."""
    from onnx_ir.passes import common
    from onnxscript import optimizer

    infer_shapes(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _carry_constant_outputs(model)
    common.RemoveUnusedNodesPass()(model)
    infer_shapes(model)


def _carry_constant_outputs(model: ir.Model) -> None:
    """An output that folded to a constant comes from an Identity: TVM cannot read it off a Constant node."""
    rewriter = Rewriter(model)
    for node in [n for n in model.graph if n.op_type == "Constant" and not n.domain]:
        tensor = node.outputs[0].const_value
        if tensor is not None and node.outputs[0].is_graph_output():
            value = rewriter.constant(tensor.numpy(), f"{node.name or 'constant'}_value", dtype=tensor.dtype)
            rewriter.at(node).replace_uses(node.outputs[0], value)
            rewriter.remove([node])


# -- Range ------------------------------------------------------------------------------------------


def _rewrite_ranges(model: ir.Model, bound: int | None, where: str) -> int | None:
    """Rewrite each open ``Range(0, T, 1)`` to the first T of a constant; the smallest bound used, or None.

    TVM gives the result of such a Range a length that has nothing to do with the T it came from, and later
    operators then do not fit together.
    """
    rewriter = Rewriter(model)
    bounds = []
    for node in [n for n in model.graph if n.op_type == "Range" and not n.domain]:
        if all(v is not None and v.const_value is not None for v in node.inputs):
            continue
        if not _counts_up(node):
            raise _refused_range(node, "counts to an open size but not by one from zero", where)
        largest = _looked_up(node.outputs[0]) or bound
        if largest is None:
            raise _refused_range(node, "counts to an open size, and no table says how far", where)
        bounds.append(largest)
        _slice_positions(rewriter.at(node), node, largest)
    return min(bounds, default=None)


def _refused_range(node: ir.Node, reason: str, where: str) -> UnsupportedOperator:
    return UnsupportedOperator(
        f"TVM cannot import Range: node '{node.name}' {reason}",
        where=where,
        advice="fix the input shapes (&shapes=input:1x128 in the target), or bound the limit (&bound=512)",
    )


def _slice_positions(rewriter: Rewriter, node: ir.Node, largest: int) -> None:
    label = node.name or "range"
    table = rewriter.constant(np.arange(largest, dtype=np.int64), f"{label}_positions")
    zero = rewriter.constant(np.zeros(1, np.int64), f"{label}_zero")
    axis = rewriter.constant(np.zeros(1, np.int64), f"{label}_axis")
    end = rewriter.op("Unsqueeze", [node.inputs[1], axis], name=f"{label}_end", dtype=ir.DataType.INT64)
    part = rewriter.op("Slice", [table, zero, end, axis], name=f"{label}_part", dtype=ir.DataType.INT64)
    part.shape = node.outputs[0].shape
    rewriter.replace_uses(node.outputs[0], part)
    rewriter.remove([node])


def _counts_up(node: ir.Node) -> bool:
    start, _, step = node.inputs
    if start is None or step is None or start.const_value is None or step.const_value is None:
        return False
    values = (start.const_value.numpy().item(), step.const_value.numpy().item())
    return values == (0, 1) and node.outputs[0].dtype == ir.DataType.INT64


def _looked_up(value: ir.Value) -> int | None:
    """Rows of the smallest constant table the positions index, or None where they index none."""
    rows: list[int] = []
    seen, queue = {value}, [value]
    while queue:
        for node, index in tuple(queue.pop().uses()):
            data = node.inputs[0]
            if node.op_type == "Gather" and index == 1 and data is not None and data.const_value is not None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                rows.append(data.const_value.shape.numpy()[axis])
            if node.op_type in _CARRIERS:
                fresh = [v for v in node.outputs if v not in seen]
                seen.update(fresh)
                queue += fresh
    return min(rows, default=None)
