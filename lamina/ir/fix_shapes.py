"""Fix dynamic dims of a program's inputs, so that shape arithmetic on them can be folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from lamina.errors import DataError
from lamina.ir.capture import capture
from lamina.ir.inference import infer_shapes
from lamina.ir.program import Program

Shapes = Mapping[str, int | Sequence[int | None]]


def fix_shapes(program: Program, shapes: Shapes) -> Program:
    """A program whose inputs have these shapes; what is not named stays dynamic.

    Args:
        program: Not changed.
        shapes: Input name -> its dims (None: as it is), or name of a dynamic dim -> its size.

    Raises:
        DataError: A name is neither, or a shape contradicts the model's.
    """
    model = program.clone().model
    inputs = {v.name: v for v in model.graph.inputs if v.name not in model.graph.initializers}
    dynamic = _symbols(inputs.values())
    sizes: dict[str, int] = {}
    for name, given in shapes.items():
        if name in inputs:
            _fix_input(inputs[name], given, sizes)
        elif isinstance(given, int) and name in dynamic:
            _agree(sizes, name, _positive(name, given))
        else:
            known = ", ".join([str(n) for n in inputs] + sorted(dynamic))
            raise DataError(
                f"'{name}' is no input and no dynamic dim with one size", advice=f"choose from: {known}"
            )
    for value in _values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([_fixed(d, sizes) for d in value.shape.dims])
    infer_shapes(model)
    example = None if program.example_is_synthetic else program.example
    return capture(model, name=program.source, example_inputs=example)


def _fix_input(value: ir.Value, given: int | Sequence[int | None], sizes: dict[str, int]) -> None:
    dims = [] if value.shape is None else list(value.shape.dims)
    wanted = [given] if isinstance(given, int) else list(given)
    if value.shape is None or len(dims) != len(wanted):
        raise DataError(
            f"input '{value.name}' has {len(dims)} dims, {len(wanted)} were given",
            advice=f"its shape is {value.shape}",
        )
    for axis, (dim, size) in enumerate(zip(dims, wanted, strict=True)):
        if size is None:
            continue
        _positive(value.name or "", size)
        if isinstance(dim, int) and dim != size:
            raise DataError(f"dim {axis} of input '{value.name}' is {dim}, {size} was given")
        if not isinstance(dim, int) and dim.value is not None:
            _agree(sizes, str(dim.value), size)
        dims[axis] = size
    value.shape = ir.Shape(dims)


def _agree(sizes: dict[str, int], dim: str, size: int) -> None:
    if sizes.setdefault(dim, size) != size:
        raise DataError(f"dynamic dim '{dim}' was given as {sizes[dim]} and as {size}")


def _positive(name: str, size: int) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise DataError(f"'{name}' was given the size {size}", advice="give a positive number")
    return size


def _fixed(dim: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int | ir.SymbolicDim:
    return dim if isinstance(dim, int) else sizes.get(str(dim.value), dim)


def _symbols(values: Iterable[ir.Value]) -> set[str]:
    found: set[str] = set()
    for value in values:
        dims = () if value.shape is None else value.shape.dims
        found.update(str(d.value) for d in dims if not isinstance(d, int) and d.value is not None)
    return found


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph.all_nodes():
        yield from node.outputs
