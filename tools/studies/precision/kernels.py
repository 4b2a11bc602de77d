"""Time of one product in each form: which of them a runtime has a kernel for.

    python -m tools.studies.precision.kernels [--width 768] [--rows 1 128] [--seconds 0.5]

One MatMul with a square weight in ONNX Runtime, one thread; forms take turns, so that a slow moment of the
machine hits all. Prints the median time of a run in microseconds, and the operators that ran.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from lamina.analysis.streaming import RangeAccumulator
from lamina.ir.program import Program
from lamina.passes.pass_ import Site
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move

FORMS = ("w8a8-static", "w8a8-dynamic", "w4", "w4a8")
_ROUNDS = 15


def product(width: int) -> Program:
    """``y = x W``, x ``[rows, width]``."""
    weight = np.random.default_rng(0).standard_normal((width, width)).astype(np.float32)
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,{width}] x) => (float[N,{width}] y)'
    model = onnx.parser.parse_model(f"{text} {{ y = MatMul(x, w) }}")
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model.graph.node[0].name = "product"
    return Program(ir.from_proto(model))


def variants(program: Program, samples: np.ndarray) -> dict[str, Program]:
    """The product as it is and in each form; of ``w4a8`` with a static scale and with one a token."""
    total = RangeAccumulator()
    total.add(samples)
    known = SimpleNamespace(ranges={"x": total.result()}, inputs={}, operators={})
    transform = Quantize(forms=FORMS)
    (site,) = [s for s in transform.sites(program) if isinstance(s, Site)]
    made = {"float32": program}
    for label, seen in (("", known), (" by token", None)):
        for option in transform.options(site, program, seen, None):
            if not label or option.name == "w4a8":
                made[option.name + label] = apply_moves(program, [Move(site, option)])
    return made


def session(program: Program, path: Path) -> ort.InferenceSession:
    """Optimized for one thread; the optimized graph goes to ``path``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path)
    data = ir.to_proto(program.model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 128])
    parser.add_argument("--seconds", type=float, default=0.5, help="for each form and number of rows")
    given = parser.parse_args()
    rng = np.random.default_rng(1)
    inputs = {n: rng.standard_normal((n, given.width)).astype(np.float32) for n in given.rows}
    programs = variants(product(given.width), inputs[max(inputs)])
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{i}.onnx" for i, name in enumerate(programs)}
        running = {name: session(p, paths[name]) for name, p in programs.items()}
        kernels = {name: Counter(n.op_type for n in onnx.load(p).graph.node) for name, p in paths.items()}
    times = {n: timed(running, x, given.seconds) for n, x in inputs.items()}
    for name in running:
        cells = "  ".join(f"{times[n][name]:9.1f} us at {n} rows" for n in inputs)
        print(f"{name:18} {cells}  {dict(kernels[name])}")


def timed(running: dict[str, ort.InferenceSession], x: np.ndarray, seconds: float) -> dict[str, float]:
    """Median microseconds of a run of each session."""
    found: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(_ROUNDS):
        for name, one in running.items():
            start, count = time.perf_counter(), 0
            while not count or time.perf_counter() - start < seconds / _ROUNDS:
                one.run(None, {"x": x})
                count += 1
            found[name].append((time.perf_counter() - start) / count * 1e6)
    return {name: statistics.median(values) for name, values in found.items()}


if __name__ == "__main__":
    main()
