"""Capture torch modules and exported programs: torch.export, torch.onnx, then as any ONNX model."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from lamina.errors import CaptureError, UnsupportedOperator
from lamina.ir.capture_onnx import from_ir
from lamina.ir.examples import synthesize
from lamina.ir.program import Program

_OPSET = 20  # the newest the TVM importer takes whole, and it has Gelu
_BATCH = "batch"
_CHATTY = (
    "torch.onnx",
    "torch.export",
    "torch._export",
    "torch.fx",
    "torch._dynamo",
    "onnxscript",
    "onnx_ir",
)


def accepts(model: object) -> bool:
    """Whether ``model`` is something torch can export."""
    return isinstance(model, (torch.nn.Module, torch.export.ExportedProgram))


def capture_torch(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    name: str | None = None,
) -> Program:
    """Export and normalize; a module is traced in eval mode and left as it was.

    Args:
        model: A module (a ``GraphModule`` is one) or an exported program.
        example_inputs: A tensor, a tuple of them, or a mapping by parameter name of ``forward``.
        dynamic_shapes: ``{"x": {0: "batch"}}`` or what ``torch.export`` takes. When None, dim 0 of every
            input is dynamic and called ``batch`` where the module can be exported so, else all is static.
        name: What messages call the model.

    Raises:
        CaptureError: Example inputs are missing, or torch cannot export the module.
        UnsupportedOperator: The module uses an operator that has no ONNX form.
    """
    source = name or _class_name(model)
    if isinstance(model, torch.export.ExportedProgram):
        if example_inputs is None and model.example_inputs is not None:
            args, kwargs = model.example_inputs
        else:
            args, kwargs = _arguments(example_inputs) if example_inputs is not None else ((), {})
        exported, names = model, None
    else:
        if example_inputs is None:
            raise CaptureError(
                "a torch module needs example inputs to be captured",
                where=source,
                advice="pass example_inputs: a tensor, a tuple of them, or a dict by parameter name",
            )
        args, kwargs = _arguments(example_inputs)
        with _evaluating(model):
            exported, names = _export(model, args, kwargs, dynamic_shapes, source)
    normalized = from_ir(_to_onnx(exported, names, source), source)
    if names is None:
        _name_batch(normalized)
    example = _example(normalized, args, kwargs)
    if example is None:
        return Program(normalized, source, synthesize(normalized), True)
    return Program(normalized, source, example, False)


def _class_name(model: object) -> str:
    return f"<{type(model).__name__}>"


def _arguments(given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(given, Mapping):
        return (), {str(k): _tensor(v) for k, v in given.items()}
    if isinstance(given, (tuple, list)):
        return tuple(_tensor(v) for v in given), {}
    return (_tensor(given),), {}


def _tensor(value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule trains or not as before."""
    modes = [(m, m.training) for m in module.modules()]
    with contextlib.suppress(NotImplementedError):  # an unlifted ExportedProgram refuses: its mode is fixed
        module.eval()
    try:
        yield
    finally:
        if modes[0][1]:
            with contextlib.suppress(NotImplementedError):
                module.train()  # some modules override it to undo what their eval() did
        for part, training in modes:
            part.training = training


# -- torch.export ---------------------------------------------------------------------------------------


def _export(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any, source: str
) -> tuple[torch.export.ExportedProgram, Any]:
    """The exported program, and the dynamic dims by name (None when static)."""
    bound = _bind(module, args, kwargs, source)
    if dynamic_shapes is not None:
        names = _complete(dynamic_shapes, bound)
        return _trace(module, args, kwargs, names, source), names
    names = {k: torch.utils._pytree.tree_map(_batch_dim, v) for k, v in bound.items()}
    try:
        return _trace(module, args, kwargs, names, source), names
    except CaptureError:
        return _trace(module, args, kwargs, None, source), None


def _bind(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], source: str
) -> dict[str, Any]:
    try:
        return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise CaptureError(
            f"the example inputs do not fit forward(): {error}",
            where=source,
            advice="give one value for each parameter of forward without a default",
        ) from error


def _batch_dim(leaf: Any) -> dict[int, str] | None:
    return {0: _BATCH} if isinstance(leaf, torch.Tensor) and leaf.ndim else None


def _complete(dynamic_shapes: Any, bound: dict[str, Any]) -> Any:
    """Parameters the user left out are static."""
    if not isinstance(dynamic_shapes, Mapping):
        return dynamic_shapes
    unknown = sorted(set(dynamic_shapes) - set(bound))
    if unknown:
        raise CaptureError(
            f"dynamic_shapes names {unknown}, which forward() was not given",
            advice="its parameters are " + ", ".join(bound),
        )
    return {
        k: dynamic_shapes.get(k, torch.utils._pytree.tree_map(lambda _: None, v)) for k, v in bound.items()
    }


def _trace(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: Any, source: str
) -> torch.export.ExportedProgram:
    # trap: a failed export leaves its dynamic marks on the tensors it was given
    args, kwargs = torch.utils._pytree.tree_map(_fresh, (args, kwargs))
    if names is not None:
        args, kwargs = _widen(args, kwargs, names, list(inspect.signature(module.forward).parameters))
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(module, args, kwargs, dynamic_shapes=_dims(names))
    except Exception as error:  # torch.export raises user errors, guards and internal errors of many types
        raise CaptureError(
            f"torch.export cannot trace the module: {_reason(error)}",
            where=source,
            advice="check that the example inputs run, replace control flow that depends on values by "
            "torch.cond or torch.where, state fewer dynamic_shapes, or export it yourself and pass the file",
        ) from error


def _fresh(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _dims(names: Any) -> Any:
    """Names become dims torch finds the range of; everything torch knows itself stays."""
    if isinstance(names, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(names, Mapping):
        return {k: _dims(v) for k, v in names.items()}
    if isinstance(names, (list, tuple)):
        return type(names)(_dims(v) for v in names)
    return names


def _widen(
    args: tuple[Any, ...], kwargs: dict[str, Any], names: Any, parameters: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Double dynamic dims of size 1 for tracing: torch takes 1 for a constant."""
    if not isinstance(names, Mapping):
        return tuple(_doubled(a, n) for a, n in zip(args, names, strict=False)), kwargs
    wide = tuple(_doubled(a, names.get(p)) for a, p in zip(args, parameters, strict=False))
    return wide + args[len(wide) :], {k: _doubled(v, names.get(k)) for k, v in kwargs.items()}


def _doubled(value: Any, spec: Any) -> Any:
    if not isinstance(value, torch.Tensor) or spec is None:
        return value
    axes = spec.items() if isinstance(spec, Mapping) else enumerate(spec)
    for axis, dim in axes:
        if dim is not None and not isinstance(dim, int) and value.shape[axis] == 1:
            value = torch.cat([value, value], axis)
    return value


# -- torch.onnx -----------------------------------------------------------------------------------------


def _to_onnx(exported: torch.export.ExportedProgram, names: Any, source: str) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            done = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=_OPSET,
                optimize=True,
                verbose=False,
                dynamic_shapes=names,
            )
    except Exception as error:  # torch.onnx wraps whatever its conversion raised
        missing = re.search(r"No ONNX function found for <OpOverload\(op='([^']+)'", _chain(error))
        if missing:
            raise UnsupportedOperator(
                f"torch operator '{missing[1]}' has no ONNX form",
                where=source,
                advice="replace it in the module, or export to ONNX yourself with a custom translation",
            ) from error
        raise CaptureError(
            f"torch.onnx cannot convert the module: {_reason(error)}",
            where=source,
            advice="export to ONNX yourself and pass the file",
        ) from error
    model: ir.Model = done.model
    return model


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(str(error))
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints, warns and logs; errors still come out as errors."""
    loggers = [logging.getLogger(n) for n in _CHATTY]
    levels = [logger.level for logger in loggers]
    sink = io.StringIO()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# -- afterwards -----------------------------------------------------------------------------------------


def _name_batch(model: ir.Model) -> None:
    """An exported program forgot its dims' names: the symbol that leads the first input becomes ``batch``."""
    shapes = [v.shape for v in model.graph.inputs if v.shape is not None and len(v.shape)]
    lead = shapes[0][0] if shapes else None
    if not isinstance(lead, ir.SymbolicDim) or not re.fullmatch(r"s\d+", str(lead.value)):
        return
    values = [*model.graph.inputs, *(v for n in model.graph.all_nodes() for v in n.outputs)]
    for value in values:
        if value.shape is not None and any(d == lead for d in value.shape):
            value.shape = ir.Shape([_BATCH if d == lead else d for d in value.shape])


def _example(model: ir.Model, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, np.ndarray] | None:
    """The example inputs by ONNX input name; None where they cannot be told apart."""
    leaves = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    names = [v.name or "" for v in model.graph.inputs]
    if set(names) == set(kwargs) and not args:
        leaves = [kwargs[n] for n in names]
    if len(leaves) != len(names):
        return None
    return {n: t.detach().cpu().numpy().copy() for n, t in zip(names, leaves, strict=True)}
