"""The two roofs of a machine, measured once through ONNX Runtime: float32 arithmetic and memory traffic."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.backends._session import make_session
from lamina.backends.backend import Target
from lamina.backends.load import machine_load
from lamina.backends.ort_probe import cpu
from lamina.errors import BackendError, OutputError
from lamina.ir.cache import cache_folder
from lamina.ir.io import write_atomic
from lamina.ir.message import message

FORMAT = 1
# 2 * 1024**3 operations a run: large against any start-up cost, small enough to repeat on a slow core.
_PRODUCT_WIDTH = 1024
# 64 MB a stream, three of them: past the last cache of most machines.
_STREAM_ELEMENTS = 1 << 24
_LEAST_RUNS = 5
_PRODUCT_SECONDS = 0.3
_STREAM_SECONDS = 0.3


@dataclass(frozen=True)
class Roof:
    """What a machine reaches at best, with one number of threads.

    Attributes:
        flops_per_s: Float32 operations a second of a square MatMul with a constant right side.
        bytes_per_s: Bytes a second of ``z = x + y`` over arrays no cache holds; what is read and written
            counts, the line a store reads first does not (as in STREAM).
        quiet: Whether nothing else ran meanwhile; else it is measured again when the machine is quiet.
        date: When, ISO 8601.
    """

    flops_per_s: float
    bytes_per_s: float
    quiet: bool
    date: str

    @property
    def balance(self) -> float:
        """FLOP/byte at which the two roofs meet: below it an operator is bound by memory."""
        return self.flops_per_s / self.bytes_per_s


def roof(target: Target, folder: Path | None = None) -> Roof:
    """The target's roofs: from the cache, or measured now (about a second) and remembered.

    Args:
        target: An ONNX Runtime target; roofs hold for its thread count and session options.
        folder: Of the cache; :func:`lamina.ir.cache.cache_folder` when omitted.

    Raises:
        BackendError: The target is not one of ONNX Runtime's.
    """
    if target.backend != "ort":
        raise BackendError(
            f"target '{target}': roofs are measured on ONNX Runtime only",
            advice="name a target like ort:cpu?threads=2",
        )
    import onnxruntime

    identity = {
        "device": list(cpu()),
        "versions": {"onnxruntime": onnxruntime.__version__},
        "threads": target.threads,
        "options": dict(target.options),
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"roof-{digest}.json"
    known = _read(path)
    quiet = machine_load().quiet
    if known is not None and (known.quiet or not quiet):
        return known
    found = measure_roof(target, quiet=quiet)
    with suppress(OSError, OutputError):  # a folder that cannot be written costs the cache, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"format": FORMAT, **identity, "roof": asdict(found)}, indent=1))
    return found


def measure_roof(target: Target, *, quiet: bool = True) -> Roof:
    """Measure both roofs in this process; the fastest of several runs counts, being the least disturbed."""
    rng = np.random.default_rng(0)
    width = _PRODUCT_WIDTH
    square = rng.standard_normal((width, width), dtype=np.float32)
    stream = rng.standard_normal(_STREAM_ELEMENTS, dtype=np.float32)
    product = _fastest(_runner("MatMul", square, square, target, constant=True), _PRODUCT_SECONDS)
    traffic = _fastest(_runner("Add", stream, stream.copy(), target, constant=False), _STREAM_SECONDS)
    return Roof(
        flops_per_s=2 * width**3 / product,
        bytes_per_s=3 * stream.nbytes / traffic,
        quiet=quiet,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def _runner(
    op: str, left: np.ndarray, right: np.ndarray, target: Target, *, constant: bool
) -> Callable[[], Any]:
    """Run ``op(left, right)`` into memory that stays: fresh pages would be charged to the operator."""
    import onnxruntime

    from lamina.backends.onnxruntime import session_options

    values = []
    for name, array in (("x", left), ("y", right)):
        value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT))
        values.append(value)
    if constant:
        values[1].const_value = ir.Tensor(right, name="y")
    node = ir.node(op, values, name=op)
    node.outputs[0].name, node.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape(left.shape)
    given, kept = (values[:1], values[1:]) if constant else (values, [])
    graph = ir.Graph(
        given, [node.outputs[0]], nodes=[node], initializers=kept, opset_imports={"": 18}, name="roof"
    )
    data = message(ir.Model(graph, ir_version=10)).SerializeToString()
    session = make_session(data, session_options(target))
    binding = session.io_binding()
    for value, array in zip(given, (left, right), strict=False):
        binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(array))
    binding.bind_ortvalue_output("z", onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros_like(left)))
    return lambda: session.run_with_iobinding(binding)


def _fastest(run: Callable[[], Any], seconds: float) -> float:
    run()
    best, runs, stop = float("inf"), 0, time.perf_counter() + seconds
    while runs < _LEAST_RUNS or time.perf_counter() < stop:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best


def _read(path: Path) -> Roof | None:
    """What the file holds; None where it is absent, corrupt or of another format."""
    try:
        raw = json.loads(path.read_text())
        found = Roof(**raw["roof"]) if raw["format"] == FORMAT else None
        usable = found is not None and found.flops_per_s > 0 and found.bytes_per_s > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if usable else None
