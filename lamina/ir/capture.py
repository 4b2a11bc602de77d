"""One door for every kind of model: path, ONNX, onnx_ir, torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lamina.errors import CaptureError, DataError
from lamina.ir import capture_onnx
from lamina.ir.collector import collector_paused
from lamina.ir.examples import synthesize
from lamina.ir.foreseen import foreseen
from lamina.ir.program import Program
from lamina.ir.quiet import quiet


def capture(
    model: Any, *, example_inputs: Any = None, dynamic_shapes: Any = None, name: str | None = None
) -> Program:
    """Turn a model of any supported kind into a program.

    Args:
        model: A path, ``onnx.ModelProto``, ``onnx_ir.Model``, ``Program``, ``torch.nn.Module``,
            ``torch.fx.GraphModule`` or ``torch.export.ExportedProgram``. It is never changed.
        example_inputs: One array or tensor, a tuple of them, or a mapping by input name. A torch module
            needs them; for ONNX they are made up from the shapes when absent.
        dynamic_shapes: For torch modules: ``{"x": {0: "batch"}}`` or what ``torch.export`` takes.
        name: What messages and reports call the model.

    Returns:
        The program, normalized; weights are shared with ``model`` or memory-mapped.

    Raises:
        CaptureError: The model cannot be read, or is none.
        UnsupportedOperator: It uses an operator, domain or opset lamina does not know.
        DataError: The example inputs do not fit the model.
    """
    if isinstance(model, Program):
        return model if example_inputs is None else _with_example(model, example_inputs)
    with collector_paused(), quiet():
        return _capture(model, example_inputs, dynamic_shapes, name)


def _capture(model: Any, example_inputs: Any, dynamic_shapes: Any, name: str | None) -> Program:
    if isinstance(model, (str, os.PathLike)):
        path = Path(os.fspath(model))
        with foreseen(str(path), path):
            return _program(capture_onnx.from_path(path), name or str(path), example_inputs)
    if isinstance(model, onnx.ModelProto):
        source = name or model.graph.name or "<onnx.ModelProto>"
        with foreseen(source, model):
            return _program(capture_onnx.from_proto(model, source), source, example_inputs)
    if isinstance(model, ir.Model):
        source = name or model.graph.name or "<onnx_ir.Model>"
        with foreseen(source, model):
            return _program(capture_onnx.from_ir(model, source), source, example_inputs)
    if "torch" in sys.modules:
        from lamina.ir.capture_torch import accepts, capture_torch

        if accepts(model):
            return capture_torch(model, example_inputs, dynamic_shapes, name)
    raise CaptureError(
        f"a {type(model).__module__}.{type(model).__qualname__} is not a model lamina can read",
        advice="give an .onnx path, an onnx.ModelProto, an onnx_ir.Model, a torch.nn.Module with "
        "example_inputs, or a torch.export.ExportedProgram",
    )


def _program(model: ir.Model, source: str, example_inputs: Any) -> Program:
    program = Program(model, source)
    if example_inputs is None:
        made = synthesize(model)
        tensors = {p.name: made[p.name] for p in program.inputs if p.kind == "tensor"}
        return replace(program, example=tensors, example_is_synthetic=True)
    return _with_example(program, example_inputs)


def _with_example(program: Program, given: Any) -> Program:
    return replace(program, example=match_inputs(program, given), example_is_synthetic=False)


def match_inputs(program: Program, given: Any) -> dict[str, np.ndarray]:
    """Name example inputs and hold them against the program's interface.

    Raises:
        DataError: Names, number, rank, fixed dims or dtypes do not fit.
        UnsupportedOperator: An input is not a tensor.
    """
    program.require_tensors()
    ports = program.inputs
    if isinstance(given, Mapping):
        named = dict(given)
    else:
        items = list(given) if isinstance(given, Sequence) and not isinstance(given, np.ndarray) else [given]
        if len(items) != len(ports):
            raise DataError(
                f"{len(items)} example inputs for {len(ports)} model inputs",
                advice="the model's inputs are " + ", ".join(p.name for p in ports),
            )
        named = {p.name: item for p, item in zip(ports, items, strict=True)}
    missing = [p.name for p in ports if p.name not in named]
    unknown = sorted(set(named) - {p.name for p in ports})
    if missing or unknown:
        wrong = f"example inputs lack {missing}" if missing else f"example inputs name {unknown}"
        raise DataError(wrong, advice="the model's inputs are " + ", ".join(p.name for p in ports))
    return {p.name: _fit(p.name, named[p.name], p.numpy_dtype, p.shape) for p in ports}


def _fit(name: str, given: Any, dtype: np.dtype[Any], shape: tuple[int | str | None, ...]) -> np.ndarray:
    array = given.detach().cpu().numpy() if hasattr(given, "detach") else np.asarray(given)
    fixed = [(i, d) for i, d in enumerate(shape) if isinstance(d, int)]
    if shape and (array.ndim != len(shape) or any(array.shape[i] != d for i, d in fixed)):
        raise DataError(
            f"example input '{name}' has shape {list(array.shape)}, the model wants {_text(shape)}",
            advice="give one array of that shape; named dims may have any size",
        )
    if array.dtype == dtype:
        return np.ascontiguousarray(array)
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise DataError(
            f"example input '{name}' is {array.dtype}, the model wants {dtype}", advice="convert it first"
        )
    return np.ascontiguousarray(array.astype(dtype))


def _text(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if d is None else str(d) for d in shape) + "]"
