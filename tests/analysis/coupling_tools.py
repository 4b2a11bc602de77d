"""Prove groups by execution: the shrunk program runs, and computes what the masked one does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from lamina.analysis.coupling import ChannelGroup, CouplingResult
from lamina.ir.program import Program
from lamina.passes.shrink import mask_channels, shrink


def run(program: Program, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by name, every optimization off."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    data = ir.to_proto(program.model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feeds)), strict=True))


def checks(program: Program) -> bool:
    """Whether onnx's checker takes the program as it is: it wants shapes that inference may not know."""
    try:
        onnx.checker.check_model(ir.to_proto(program.model))
    except onnx.checker.ValidationError:
        return False
    return True


def weight_elements(program: Program) -> int:
    values = program.graph.initializers.values()
    return sum(int(v.const_value.size) for v in values if v.const_value is not None)


def some_units(group: ChannelGroup, rng: np.random.Generator) -> list[int]:
    """About a third of the units, at least one, not all of several."""
    count = min(max(1, group.units - 1), max(1, group.units // 3))
    return sorted(rng.choice(group.units, size=count, replace=False).tolist())


def prove(
    program: Program,
    coupling: CouplingResult,
    cuts: Mapping[str, list[int]],
    feeds: Mapping[str, np.ndarray],
    *,
    check: bool = True,
) -> float | None:
    """Shrink, check, run; the largest difference over scale to the masked program, None where inexact.

    Also: every weight really has the size the group says. Without ``check`` the model is run, not checked
    (not every valid model states the shapes of its outputs).
    """
    small = shrink(program, coupling, cuts)
    proto = ir.to_proto(small.model)
    if check:
        onnx.checker.check_model(proto)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    groups = [g for g in coupling.groups if g.name in cuts]
    _check_sizes(small, groups, cuts)
    outputs = run(small, feeds)
    if any(g.inexact for g in groups):
        assert all(
            a.shape == b.shape for a, b in zip(outputs.values(), run(program, feeds).values(), strict=True)
        )
        return None
    wanted = run(mask_channels(program, coupling, cuts), feeds)
    assert all(np.isfinite(a).all() for a in wanted.values() if a.dtype.kind == "f")
    return max((_difference(outputs[n], wanted[n]) for n in wanted), default=0.0)


def _check_sizes(small: Program, groups: Iterable[ChannelGroup], cuts: Mapping[str, list[int]]) -> None:
    gone: dict[tuple[str, int], set[int]] = {}
    sizes = {}
    for group in groups:
        for m in group.weights:
            gone.setdefault((m.name, m.axis), set()).update(m.indices[cuts[group.name]].reshape(-1).tolist())
            sizes[m.name, m.axis] = m.size
    for (name, axis), taken in gone.items():
        if name in small.graph.initializers:
            value = small.graph.initializers[name].const_value
            assert value is not None
            assert value.shape.numpy()[axis] == sizes[name, axis] - len(taken)


def _difference(left: np.ndarray, right: np.ndarray) -> float:
    assert left.shape == right.shape
    assert left.dtype == right.dtype
    if left.dtype.kind != "f":
        return float((left != right).mean()) if left.size else 0.0
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    if same.all():
        return 0.0
    with np.errstate(invalid="ignore"):
        gap = np.where(same, 0, np.abs(left.astype(np.float64) - right))
    return float(np.nan_to_num(gap, nan=np.inf).max() / max(1e-6, np.nanmax(np.abs(right))))
