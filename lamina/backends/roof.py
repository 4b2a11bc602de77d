"""The roofs of a machine, measured once through ONNX Runtime: float32 arithmetic, and traffic by amount.

What an operator moves may lie in a cache, so there is a traffic roof for each amount (Ilic, Pratas, Sousa
2014, "Cache-aware Roofline model: Upgrading the loft", IEEE Computer Architecture Letters 13:1).
"""

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

FORMAT = 3
# Half a millisecond and four on a core of 70 GFLOP/s: long against any start-up cost, and short enough that
# some runs fit between two turns of other work (1024 wide, a busy machine showed a quarter of its speed).
_PRODUCT_WIDTHS = (256, 512)
# Elements of each of three streams. The shortest are long against what a run of ONNX Runtime costs besides,
# and fit a core's own cache; the longest, 64 MB each, lie past the last cache of most machines.
_STREAMS = (1 << 15, 1 << 17, 1 << 19, 1 << 21, 1 << 24)
_LEAST_RUNS = 5
_PRODUCT_SECONDS = 0.3
_STREAM_SECONDS = 0.1


@dataclass(frozen=True)
class Roof:
    """What a machine reaches at best, with one number of threads.

    Attributes:
        flops_per_s: Float32 operations a second of a square MatMul with a constant right side, 256 or 512
            wide, whichever is faster.
        bytes_per_s: Bytes a second of ``z = x + y`` over arrays no cache holds; what is read and written
            counts, the line a store reads first does not (as in STREAM).
        caches: (bytes, bytes a second) of the same sum over smaller arrays, ascending: what moves no more
            than so many bytes may come out of a cache that fast.
        quiet: Whether nothing else ran meanwhile; else it is measured again when the machine is quiet.
        date: When, ISO 8601.
    """

    flops_per_s: float
    bytes_per_s: float
    quiet: bool
    date: str
    caches: tuple[tuple[int, float], ...] = ()

    def traffic(self, moved: int) -> float:
        """Bytes a second for work that moves ``moved`` bytes in all, caches warm."""
        held = (rate for size, rate in self.caches if size >= moved)
        return max(held, default=self.bytes_per_s)

    @property
    def balance(self) -> float:
        """FLOP/byte at which arithmetic and memory meet: below it what no cache holds is bound by memory."""
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
    """Measure both roofs in this process; the fastest of several runs counts, being the least disturbed.

    On one thread its CPU time counts: the wall time of an idle machine.
    """
    rng = np.random.default_rng(0)
    clock = time.thread_time if target.threads == 1 else time.perf_counter
    rates = []
    for width in _PRODUCT_WIDTHS:
        square = rng.standard_normal((width, width), dtype=np.float32)
        run = _runner("MatMul", square, square, target, constant=True)
        rates.append(2 * width**3 / _fastest(run, _PRODUCT_SECONDS, clock))
    traffic = []
    for elements in _STREAMS:
        stream = rng.standard_normal(elements, dtype=np.float32)
        run = _runner("Add", stream, stream.copy(), target, constant=False)
        traffic.append((3 * stream.nbytes, 3 * stream.nbytes / _fastest(run, _STREAM_SECONDS, clock)))
    return Roof(
        flops_per_s=max(rates),
        bytes_per_s=traffic[-1][1],
        quiet=quiet,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        caches=tuple(traffic[:-1]),
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


def _fastest(run: Callable[[], Any], seconds: float, clock: Callable[[], float]) -> float:
    run()
    best, runs, stop = float("inf"), 0, time.perf_counter() + seconds
    while runs < _LEAST_RUNS or time.perf_counter() < stop:
        start = clock()
        run()
        best = min(best, clock() - start)
        runs += 1
    return best


def _read(path: Path) -> Roof | None:
    """What the file holds; None where it is absent, corrupt or of another format."""
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT:
            return None
        caches = tuple((int(size), float(rate)) for size, rate in raw["roof"].pop("caches"))
        found = Roof(**raw["roof"], caches=caches)
        usable = found.flops_per_s > 0 and found.bytes_per_s > 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return found if usable else None
