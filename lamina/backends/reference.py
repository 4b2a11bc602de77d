"""The oracle: ONNX Runtime with every optimization off, on one thread."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Target
from lamina.backends.onnxruntime import OnnxRuntime, OrtExecutable

REFERENCE = Target("ort", "cpu", 1, {"opt": "disabled"})


def compile_reference(model: ir.Model | Path | bytes) -> OrtExecutable:
    """Compile ``model`` (``bytes``: serialized) for the reference; keep it to run many feeds.

    Raises:
        BackendError: ONNX Runtime refuses the model.
    """
    return OnnxRuntime().compile(model, REFERENCE)


def run_reference(model: ir.Model | Path, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run ``model`` once, node by node as written; arrays keyed by output name.

    Raises:
        BackendError: ONNX Runtime refuses the model or the feeds.
    """
    return compile_reference(model).run(feeds)
