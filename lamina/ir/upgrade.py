"""Bring models older than opset 13 to it or a little beyond, and check the result by running both."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir

from lamina.errors import UnsupportedOperator
from lamina.ir.examples import synthesize
from lamina.ir.names import every_node
from lamina.ir.opset import OLDEST, raise_opset

_ADVICE = "export the model again with opset 13 or newer"
_TOO_BIG = 1_000_000_000  # bytes of weights: beyond it the comparison costs more than it tells
_LOGGER = logging.getLogger(__name__)


def upgrade(model: ir.Model, source: str) -> ir.Model:
    """A copy of the normalized ``model`` at opset 13 or 15 that computes the same.

    Raises:
        UnsupportedOperator: An operator has no form there, or the converted model computes something else.
    """
    version = model.opset_imports.get("", 0)
    what = f"opset {version} is too old and the model cannot be converted"
    if version < OLDEST:
        raise UnsupportedOperator(what, where=source, advice=_ADVICE)
    after = model.clone()
    try:
        raise_opset(after, _target(after))
    except UnsupportedOperator as error:
        raise UnsupportedOperator(f"{what}: {error.what}", where=source, advice=_ADVICE) from error
    weights = (v.const_value for v in model.graph.initializers.values())
    if sum(t.nbytes for t in weights if t is not None) < _TOO_BIG:
        _compare(model, after, what, source)
    return after


def _target(model: ir.Model) -> int:
    # trap: onnx's reference evaluator normalizes by the batch in the definitions of opsets 9 to 13
    normalizes = any(n.op_type == "BatchNormalization" and n.domain == "" for n in every_node(model.graph))
    return 15 if normalizes else 13


def _compare(before: ir.Model, after: ir.Model, what: str, source: str) -> None:
    feeds = synthesize(before)
    try:
        expected = _run(before, feeds)
    except Exception as error:  # onnxruntime raises its own untyped errors
        _LOGGER.info("%s: made-up inputs do not run, its conversion is unchecked: %s", source, error)
        return
    try:
        got = _run(after, feeds)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        raise UnsupportedOperator(f"{what}: {reason}", where=source, advice=_ADVICE) from error
    for value, want, have in zip(before.graph.outputs, expected, got, strict=True):
        if not _equal(want, have):
            raise UnsupportedOperator(
                f"{what}: output '{value.name}' changes when it is converted", where=source, advice=_ADVICE
            )


def _equal(want: np.ndarray, have: np.ndarray) -> bool:
    if want.dtype.kind not in "fc" or want.shape != have.shape:
        return np.array_equal(want, have)
    scale = float(np.max(np.abs(want), initial=0.0, where=np.isfinite(want)))
    # The same kernels run; a few ulps of the largest element allow for another blocking.
    return np.allclose(want, have, rtol=0, atol=1e-5 * scale, equal_nan=True)


def _run(model: ir.Model, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"]).run(None, feeds)
