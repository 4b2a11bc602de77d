"""One backend case through the FX bridge: covered or why not, equal or how not."""

from __future__ import annotations

from typing import Any

import numpy as np

from lamina.ir.capture import capture
from lamina.ir.fx import to_fx, uncovered

# The suite's own tolerance is for float32. Two ulps of a narrower type, as in onnx's own runner.
_RTOL = {"BFLOAT16": 2**-6, "FLOAT16": 2**-9}
# What a line of `uncovered` says -> the kind of reason docs/fx.md counts.
REASONS = {
    "has no FX form": "operator without a form",
    "is of type": "element type",
    "runs subgraphs": "control flow",
    "a domain of its own": "domain",
    "not a tensor": "sequence or optional",
    "random": "random",
    "training mode": "training",
}


def reason(case: Any) -> str:
    """The kind of the first reason why the case has no FX form; empty when it has one."""
    lines = uncovered(capture(case.model))
    return next(kind for text, kind in REASONS.items() if text in lines[0]) if lines else ""


def difference(case: Any, device: str = "cpu", rtol: float = 0.0, atol: float = 0.0) -> str | None:
    """How the FX module's answers differ from those that ship with the case; None where they do not.

    Args:
        case: From ``onnx_cases``.
        device: Where the module runs.
        rtol: Least relative tolerance, beside the case's own.
        atol: Likewise, absolute.
    """
    from lamina.ir.fx_values import to_numpy, to_tensor

    program = capture(case.model)
    module = to_fx(program).to(device)
    for feeds, expected in case.data_sets:
        answers = module(*(to_tensor(feeds[p.name], p.dtype).to(device) for p in program.inputs))
        for answer, shipped, port in zip(answers, expected, program.outputs, strict=True):
            got, want = to_numpy(answer), np.asarray(shipped)
            if port.dtype.name == "BFLOAT16":
                want = want.astype(np.float32)
            if got.shape != want.shape or got.dtype != want.dtype:
                return f"{port.name}: {got.dtype}{got.shape} for {want.dtype}{want.shape}"
            bounds = (max(case.rtol, rtol, _RTOL.get(port.dtype.name, 0)), max(case.atol, atol))
            if not np.allclose(got, want, rtol=bounds[0], atol=bounds[1], equal_nan=True):
                return f"{port.name}: differs beyond rtol {bounds[0]}, atol {bounds[1]}"
    return None
