"""A small trained-looking classifier and its samples, made in a moment; and short timings for whole runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

FEATURES, WIDTH, CLASSES = 16, 512, 4


def tiny_model(*, domain: str = "", bad_weight: float | None = None) -> onnx.ModelProto:
    """Two fully connected layers with random weights over ``x [batch, 16]``, dynamic batch."""
    rng = np.random.default_rng(3)
    first = rng.standard_normal((FEATURES, WIDTH)).astype(np.float32)
    if bad_weight is not None:
        first[0, 0] = bad_weight
    second = rng.standard_normal((WIDTH, CLASSES)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu", domain=domain),
        helper.make_node("MatMul", ["r", "w2"], ["logits"], name="second"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(first, "w1"), numpy_helper.from_array(second, "w2")],
    )
    opsets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def tiny_data(samples: int = 120) -> dict[str, np.ndarray]:
    """Inputs and the labels that :func:`tiny_model` itself gives them, so its accuracy is 1."""
    x = np.random.default_rng(5).standard_normal((samples, FEATURES)).astype(np.float32)
    weights = [numpy_helper.to_array(w) for w in tiny_model().graph.initializer]
    return {"x": x, "labels": (np.maximum(x @ weights[0], 0) @ weights[1]).argmax(axis=1)}


def write_tiny(folder: Path) -> tuple[Path, Path]:
    """``model.onnx`` and ``data.npz`` in ``folder``."""
    onnx.save(tiny_model(), folder / "model.onnx")
    np.savez(folder / "data.npz", **tiny_data())
    return folder / "model.onnx", folder / "data.npz"


def shorten_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure for moments instead of seconds: same code, coarser figures."""
    import lamina.driver
    import lamina.planner.finish
    from lamina.planner.timing import Stopwatch

    compare = Stopwatch.compare

    def brief(self: Stopwatch, models: Sequence[Any], *, seconds: float) -> list[Any]:
        return compare(self, models, seconds=min(seconds, 0.3))

    monkeypatch.setattr(Stopwatch, "compare", brief)
    monkeypatch.setattr(lamina.driver, "FINAL_SECONDS", 0.3)
    monkeypatch.setattr(lamina.planner.finish, "BUILDS", 1)
    monkeypatch.setattr(lamina.planner.finish, "ROUNDS", 1)
