"""Bias correction: what quantizing changes in an operator's mean output, taken out through its bias."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.passes.pass_ import Site
from lamina.passes.quantize.graph import constant_tensor
from lamina.passes.quantize.linear import linear_of
from lamina.passes.quantize.smoothing import factors, smoothed_weight
from lamina.passes.quantize.static import channel_weights

# Fewer vectors say too little about a mean.
_LEAST_VECTORS = 16


def bias_shift(
    site: Site, nodes: Mapping[str, ir.Node], statistics: Any, parameters: Mapping[str, Any]
) -> list[float] | None:
    """``E[W x] - E[W^ x^]`` for each output channel, or None where there is no bias or no data.

    x^ is x in uint8 where the option has a range for it. A mean over n vectors has the variance v / n; the
    estimate m is shrunk by ``m^2 / (m^2 + v / n)``, so that noise is not added where nothing is shifted.
    Only operators that have a bias, and convolutions, whose kernels add one for nothing, are corrected.
    Source: Nagel et al. 2019, arXiv:1906.04721, sec. 4.2 (empirical form). Deviates: shrunk.

    Args:
        site: A convolution or matrix product.
        nodes: Its nodes.
        statistics: Its ``inputs`` holds calibration vectors by operator name.
        parameters: Of the option.
    """
    stat = (getattr(statistics, "inputs", None) or {}).get(site.nodes[0])
    if stat is None or len(stat.kept) < _LEAST_VECTORS:
        return None
    x = stat.kept
    if site.kind == "conv":
        weight = nodes[site.nodes[0]].inputs[1]
        axis, alpha, factor = 0, 1.0, np.float32(1.0)
    else:
        product = linear_of(site, nodes)
        if product.left or product.bias is None:
            return None
        axis, alpha = product.channel_axis, product.alpha
        weight, factor = smoothed_weight(product, parameters), factors(parameters)
    assert weight is not None
    tensor, (made, _) = constant_tensor(weight), channel_weights(weight, parameters, axis)
    assert tensor is not None
    exact = _rows(tensor.numpy(), axis, x.shape[1])
    rows = _rows(made.codes, axis, x.shape[1]) * made.scale.reshape(x.shape[1], -1, 1)
    scaled = x / factor
    given = parameters.get("input")
    if given is not None:
        codes = np.clip(np.rint(scaled / np.float32(given["scale"])) + given["zero_point"], 0, 255)
        rounded = (codes - given["zero_point"]) * np.float32(given["scale"])
    else:
        rounded = scaled
    lost = np.einsum("ngk,gok->ngo", scaled, exact) - np.einsum("ngk,gok->ngo", rounded, rows)
    lost = lost.reshape(len(x), -1) * alpha
    mean, noise = lost.mean(axis=0), lost.var(axis=0) / len(x)
    shift = mean * mean**2 / np.maximum(mean**2 + noise, 1e-30)
    return [float(v) for v in shift.astype(np.float32)]


def _rows(array: np.ndarray, axis: int, groups: int) -> np.ndarray:
    """float32 ``[group, out / group, k]``."""
    moved = np.moveaxis(array, axis, 0)
    return moved.reshape(groups, moved.shape[0] // groups, -1).astype(np.float32)
