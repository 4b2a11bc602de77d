"""The FX bridge: any captured program as a differentiable ``torch.fx.GraphModule``.

This module imports no torch; what it needs of it lies behind :func:`to_fx`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.errors import LaminaError
from lamina.ir.program import Program

INITIALIZERS = "initializers"  # key of a module's ``meta``: parameter or buffer name -> initializer name


class MissingTorch(LaminaError):
    """torch is not installed."""


def to_fx(program: Program, *, precision: Any = None) -> Any:
    """Translate a program, operator by operator, into a ``torch.fx.GraphModule``.

    The module takes the program's inputs by position, in the program's order, and returns a tuple of its
    outputs. It runs on the device its weights are on (``module.to("cuda")``): constants made on the fly
    follow their inputs. Shape arithmetic is executed at run time, so dynamic dims stay dynamic; shapes,
    axes and slices that the program computes are read on the host, which on CUDA waits for the device.

    Initializers that are weights (floating, read where an operator has its weights) are ``nn.Parameter``;
    the rest are buffers, small integer constants such as axes are literals of the call. Names are the
    initializers', made fit for attributes; :func:`initializer_names` gives the way back. Each FX node is
    named after its ONNX node and keeps its name and type in ``meta["onnx_name"]`` and ``meta["op_type"]``.

    Differentiable twice, wherever the operator is. Rounding, quantization, comparison and integer results
    pass no gradient: it is zero through ``Round`` and absent through integers (no straight-through).

    Args:
        program: Left unchanged; its weights are copied.
        precision: A floating ``torch.dtype`` that takes the place of every floating type of the program,
            casts included: ``torch.float64`` gives the program in double precision, inputs and all.

    Raises:
        UnsupportedOperator: Operators, types or attributes are not covered: all of them, by node.
        MissingTorch: torch is not installed.
    """
    require_torch()
    from lamina.ir.fx_build import build

    return build(program, precision)


def uncovered(program: Program) -> tuple[str, ...]:
    """Why parts of the program have no FX form, one line an input, output or node; empty when all have.

    Raises:
        MissingTorch: torch is not installed.
    """
    require_torch()
    from lamina.ir.fx_cover import faults

    return faults(program)


def initializer_names(module: Any) -> Mapping[str, str]:
    """Parameter or buffer name of a module from :func:`to_fx` -> name of the initializer it came from."""
    return dict(module.meta[INITIALIZERS])


def require_torch() -> None:
    """Say how to install torch where it is missing.

    Raises:
        MissingTorch: It is.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingTorch(
            "the FX bridge needs torch, which is not installed", advice="pip install 'lamina[torch]'"
        ) from error
