"""Where ONNX Runtime spends its time, operator by operator of the program as the user knows it."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.analysis.instrument import InstrumentedSession
from lamina.ir.program import Program

# Runs at the start that still allocate memory and fill caches.
_WARM_UP = 2
_LEAST_RUNS = 5
_MOST_RUNS = 200
# The optimized graph is read back from disk to see what fused; larger models are matched by name alone.
_MOST_BYTES = 1 << 29
_SUFFIX = "_kernel_time"


@dataclass(frozen=True)
class ProfileResult:
    """Time by operator, from the runtime's own profiler (which slows small operators by about 1 microsecond).

    Attributes:
        operators: Node name -> seconds a run. A fused kernel's time goes to the operator it is named after,
            else to the one of its kind (or, failing that, the one) that makes its output.
        other: Kernel type -> seconds a run that no operator of the program explains (layout changes).
        runs: Runs that were looked at.
    """

    operators: Mapping[str, float] = field(default_factory=dict)
    other: Mapping[str, float] = field(default_factory=dict)
    runs: int = 0


def profile(
    program: Program, feeds: Mapping[str, np.ndarray], *, threads: int = 1, seconds: float = 0.5
) -> ProfileResult:
    """Profile the program, fully optimized, on one set of inputs.

    Each kernel's time is the median of the faster half of its runs, warm-up left out: other work on the
    machine only adds, and adds much where one of two threads has to wait.

    Args:
        program: Left unchanged.
        feeds: One array an input.
        threads: Intra-operator threads.
        seconds: Time to spend in runs, beyond a least number of them.

    Raises:
        BackendError: ONNX Runtime refuses the program.
        DataError: ONNX Runtime refuses the feeds.
    """
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        optimized = Path(folder, "optimized.onnx")
        small = sum(t.nbytes for t in _tensors(program)) < _MOST_BYTES

        def configure(options: Any) -> None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder, "profile"))
            if small:
                options.optimized_model_filepath = str(optimized)

        session = InstrumentedSession(program, threads=threads, faithful=False, configure=configure)
        outputs = [port.name for port in program.outputs]
        runs, stop = 0, time.perf_counter() + seconds
        while runs < _WARM_UP + _LEAST_RUNS or (time.perf_counter() < stop and runs < _MOST_RUNS):
            session.run(outputs, feeds)
            runs += 1
        events = json.loads(Path(session.session.end_profiling()).read_text(encoding="utf-8"))
        makes = _outputs_of(optimized) if optimized.is_file() else {}
    return _attribute(program, _kernel_times(events), makes, runs - _WARM_UP)


def _tensors(program: Program) -> list[ir.TensorProtocol]:
    values = program.graph.initializers.values()
    return [v.const_value for v in values if v.const_value is not None]


def _outputs_of(path: Path) -> dict[str, tuple[str, ...]]:
    """Node name -> names of its outputs in a saved model."""
    return {n.name: tuple(v.name or "" for v in n.outputs) for n in ir.load(path).graph if n.name}


def _kernel_times(events: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(kernel name, kernel type) -> seconds a run."""
    samples: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            key = (event["name"][: -len(_SUFFIX)], event["args"]["op_name"])
            samples.setdefault(key, []).append(event["dur"] * 1e-6)
    times = {}
    for key, values in samples.items():
        fastest = sorted(values[_WARM_UP:])
        if fastest:
            times[key] = median(fastest[: math.ceil(len(fastest) / 2)])
    return times


def _attribute(
    program: Program,
    times: Mapping[tuple[str, str], float],
    makes: Mapping[str, tuple[str, ...]],
    runs: int,
) -> ProfileResult:
    nodes = {n.name: n for n in program.graph if n.name}
    producers = {v.name: n for n in program.graph for v in n.outputs if v.name}
    claimed = {name for name, _ in times if name in nodes}
    operators: dict[str, float] = {}
    other: dict[str, float] = {}
    for (kernel, kind), seconds in times.items():
        name = kernel if kernel in nodes else kernel.split("/MatMul", 1)[0].split("/Matmul", 1)[0]
        if name not in nodes:
            name = _fused_into(kernel, kind, makes, producers, claimed)
        if name:
            claimed.add(name)
            operators[name] = operators.get(name, 0.0) + seconds
        else:
            other[kind] = other.get(kind, 0.0) + seconds
    return ProfileResult(operators, other, runs)


def _fused_into(
    kernel: str,
    kind: str,
    makes: Mapping[str, tuple[str, ...]],
    producers: Mapping[str, ir.Node],
    claimed: set[str],
) -> str:
    """The operator a kernel with a made-up name stands for, found from what the kernel makes; '' if none."""
    if kind in ("ReorderInput", "ReorderOutput"):
        return ""
    # Blocked convolutions are named after the value they make.
    value = kernel.removesuffix("_nchwc")
    value = value if value in producers else next((v for v in makes.get(kernel, ()) if v in producers), "")
    if not value:
        return ""
    last = producers[value]
    wanted = kind.removeprefix("Fused").removeprefix("Skip")
    level = [last]
    for _ in range(6):
        for node in level:
            if node.op_type == wanted and node.name not in claimed:
                return node.name or ""
        level = [p for n in level for v in n.inputs if v is not None and (p := v.producer()) is not None]
    return last.name or ""
