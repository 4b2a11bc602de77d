"""Time micro-models in one worker process, one session alive at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from statistics import median
from types import TracebackType

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Target
from lamina.backends.load import machine_load
from lamina.backends.onnxruntime import serialize
from lamina.backends.reference import compile_reference
from lamina.backends.workers import Worker
from lamina.errors import BackendError
from lamina.ir.program import Program
from lamina.planner.price_models import Unit, replicate
from lamina.planner.price_store import Price

RUN_S = 0.7e-3  # one run of a micro-model should take about this long
MOST_REPLICAS = 32
MOST_BYTES = 2**27  # of weights in one micro-model, unless one copy has more
BURSTS = 4
BURST_S = 0.006
LONG_S = 0.01  # a unit that takes longer is not repeated in bursts

_CASE = "unit"
# Kernels ONNX Runtime inserts around a lone convolution; between neighbours of one form they cancel.
_LAYOUT = ("ReorderInput", "ReorderOutput", "Transpose")
_SPATIAL = frozenset({"Conv", "ConvInteger", "MaxPool", "AveragePool", "GlobalAveragePool", "Pad", "Concat"})


class PriceBench:
    """A worker process that prices units.

    Args:
        target: Threads and session options.
        weight_bytes: Weights of the whole program: replicas never hold more, so that a cache which would not
            hold the program's weights does not hold the micro-model's either way round.
    """

    def __init__(self, target: Target, weight_bytes: int) -> None:
        self.target, self._limit = target, weight_bytes
        self._worker: Worker | None = None
        self._overhead: float | None = None
        # CPU time of a single thread is as good on a busy machine
        self._quiet = target.threads == 1 or machine_load().quiet

    def measure(self, signature: str, unit: Unit, feeds: Mapping[str, np.ndarray]) -> Price:
        """Price one unit: copies of it in one session, the least of several bursts.

        Raises:
            BackendError: The runtime refuses the unit.
        """
        worker, overhead = self._ready()
        first = _trial(worker, unit, feeds)
        count = self._replicas(first, unit)
        model, aliases = replicate(unit, count)
        data = _serialized(model)
        worker.feed(_CASE, feeds, aliases)
        bursts = _bursts(worker, data, first)
        seconds = max(min(bursts) - overhead, 0.0) / count
        if any(node.op_type in _SPATIAL for node in unit.model.graph):
            seconds *= 1.0 - _layout_share(worker, unit, data)
        spread = (max(bursts) - min(bursts)) / count
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        return Price(signature, seconds, spread, count, date, self._quiet)

    def _replicas(self, first: float, unit: Unit) -> int:
        wanted = int(np.clip(round(RUN_S / max(first, 1e-7)), 1, MOST_REPLICAS))
        each = unit.weight_bytes
        room = max(MOST_BYTES if not self._limit else min(MOST_BYTES, self._limit), each)
        return max(1, min(wanted, room // each)) if each else wanted

    def _ready(self) -> tuple[Worker, float]:
        """The worker, started again where a unit took it down, and the time of an empty run."""
        if self._worker is None or not self._worker.alive:
            self._worker = Worker(self.target, "a micro-model")
            self._overhead = None
        if self._overhead is None:
            unit = _unit_of("g (float[1] x) => (float[1] y) { y = Identity(x) }")
            self._worker.feed(_CASE, {"x": np.zeros(1, np.float32)})
            self._overhead = min(_bursts(self._worker, _serialized(unit.model), 0.0))
        return self._worker, self._overhead

    def close(self) -> None:
        """End the worker."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def __enter__(self) -> PriceBench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def capture(program: Program, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Contents of inner values, inputs and overridable initializers in one run of ``program``.

    Raises:
        BackendError: The program cannot be run on the feeds.
    """
    found = {name: feeds[name] for name in names if name in feeds}
    initializers = program.graph.initializers
    for name in names:
        if name not in found and name in initializers and initializers[name].const_value is not None:
            found[name] = initializers[name].const_value.numpy()  # type: ignore[union-attr]
    inner = [name for name in names if name not in found]
    if not inner:
        return found
    clone = program.clone()
    values = {v.name: v for node in clone.graph for v in node.outputs}
    present = {v.name for v in clone.graph.outputs}
    clone.graph.outputs.extend(values[name] for name in inner if name not in present)
    return {**found, **compile_reference(clone.model).run_outputs(inner, feeds)}


def border_unit(count: int, kind: str, spatial: bool) -> tuple[Unit, dict[str, np.ndarray]]:
    """A conversion of ``count`` elements; if ``spatial``, with the layout integer convolutions work in."""
    shape = (1, 16, count // 64, 4) if spatial else (count,)
    dims = ",".join(map(str, shape))
    scalars = "<float s = {0.02}, uint8 z = {128}>"
    if kind == "quantize":
        body = "a = QuantizeLinear(x, s, z) y = Transpose<perm = [0, 2, 3, 1]>(a)"
        body = body if spatial else "y = QuantizeLinear(x, s, z)"
        unknown = ",".join(f"d{i}" for i in range(len(shape)))
        unit = _unit_of(f"g (float[{dims}] x) => (uint8[{unknown}] y) {scalars} {{ {body} }}")
        return unit, {"x": np.linspace(-3, 3, count, dtype=np.float32).reshape(shape)}
    body = "a = Transpose<perm = [0, 3, 1, 2]>(x) y = DequantizeLinear(a, s, z)"
    body = body if spatial else "y = DequantizeLinear(x, s, z)"
    unknown = ",".join(f"d{i}" for i in range(len(shape)))
    unit = _unit_of(f"g (uint8[{dims}] x) => (float[{unknown}] y) {scalars} {{ {body} }}")
    return unit, {"x": (np.arange(count) % 256).astype(np.uint8).reshape(shape)}


def _trial(worker: Worker, unit: Unit, feeds: Mapping[str, np.ndarray]) -> float:
    """Roughly how long one copy takes."""
    worker.feed(_CASE, feeds)
    number = worker.open(_serialized(unit.model))
    try:
        return min(_samples(worker, number, 0.001, least=2, most=20))
    finally:
        if worker.alive:
            worker.close_session(number)


def _bursts(worker: Worker, data: bytes, first: float) -> list[float]:
    """Median seconds of each burst of runs of a serialized model."""
    number = worker.open(data)
    try:
        if first > LONG_S:
            return [min(_samples(worker, number, 3 * LONG_S, least=2, most=8))]
        bursts: list[float] = []
        for wanted in (BURSTS, 2 * BURSTS):
            while len(bursts) < wanted:
                bursts.append(median(_samples(worker, number, BURST_S, least=3)))
            if sorted(bursts)[1] < 1.05 * min(bursts):
                break  # two bursts agree on the least; otherwise something else was running
        return bursts
    finally:
        if worker.alive:
            worker.close_session(number)


def _samples(
    worker: Worker, number: int, seconds: float, *, least: int, most: int = 1_000_000
) -> list[float]:
    """CPU time where one thread does the work, which other processes on the machine cannot stretch."""
    alone = worker.target.threads == 1
    return worker.time(number, _CASE, seconds, least=least, most=most, warm=1, bound=True, cpu=alone)


def _layout_share(worker: Worker, unit: Unit, data: bytes) -> float:
    """Share of kernel time spent on layout changes that the unit itself does not ask for."""
    own = {node.op_type for node in unit.model.graph}
    kernels = worker.kernels(data, _CASE)
    total = sum(kernels.values())
    layout = sum(s for kind, s in kernels.items() if kind in _LAYOUT and kind not in own)
    return layout / total if total > 0 else 0.0


def _serialized(model: ir.Model) -> bytes:
    data = serialize(model)
    if data is None:
        raise BackendError("the operator's weights are too large to be priced on their own")
    return data


def _unit_of(text: str) -> Unit:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    return Unit(model, {})
