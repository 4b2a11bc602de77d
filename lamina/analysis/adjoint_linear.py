"""Derivatives of products: MatMul and Gemm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.analysis.adjoint_tape import Call, Rule, narrowed

Parts = Sequence[np.ndarray | None]


def _matmul(call: Call) -> Parts:
    a, b, grad = call.read(0), call.read(1), call.grad
    if a.ndim == 1:
        a, grad = a[None], np.expand_dims(grad, -1 if b.ndim == 1 else -2)
    if b.ndim == 1:
        b, grad = b[:, None], grad if call.read(0).ndim == 1 else np.expand_dims(grad, -1)
    parts: list[np.ndarray | None] = [None, None]
    if call.wants[0]:
        parts[0] = narrowed(grad @ b.swapaxes(-1, -2), a.shape).reshape(call.read(0).shape)
    if call.wants[1]:
        if b.ndim == 2:  # one product instead of one a row that are then summed
            made = a.reshape(-1, a.shape[-1]).T @ grad.reshape(-1, grad.shape[-1])
        else:
            made = narrowed(a.swapaxes(-1, -2) @ grad, b.shape)
        parts[1] = made.reshape(call.read(1).shape)
    return parts


def _gemm(call: Call) -> Parts:
    a, b, get = call.read(0), call.read(1), call.node.attributes
    grad = call.grad * np.float32(get.get_float("alpha", 1.0))
    turned = [bool(get.get_int(n, 0)) for n in ("transA", "transB")]
    left, right = (a.T if turned[0] else a), (b.T if turned[1] else b)
    parts: list[np.ndarray | None] = [None, None, None]
    if call.wants[0]:
        parts[0] = right @ grad.T if turned[0] else grad @ right.T
    if call.wants[1]:
        parts[1] = grad.T @ left if turned[1] else left.T @ grad
    shift = call.given(2)
    if shift is not None and call.wants[2]:
        parts[2] = narrowed(call.grad * np.float32(get.get_float("beta", 1.0)), shift.shape)
    return parts


LINEAR: Mapping[str, Rule] = {"MatMul": _matmul, "Gemm": _gemm}
