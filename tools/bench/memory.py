"""Peak memory and time of quantizing to static 8 bits: lamina's run, its form alone, ONNX Runtime's tool.

    python -m tools.bench.memory [--cases kwt1,mobilenet] [--seconds 5]

Each runs in a process of its own, on the same samples (128 at most). The baseline is what the process holds
with everything imported and the samples loaded; printed is the peak over it, beside the model's size and that
of one batch, which no method can do without. ``lamina.quantize`` times candidates in further processes: the
largest of these is printed too, with all it holds. Time is CPU time of the process, imports left out, beside
that of one run over the samples. Linux only: the peak is ``VmHWM`` of ``/proc``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tools.bench.cases import CASES, Case

SAMPLES = 128


def samples_of(case: Case) -> dict[str, np.ndarray]:
    """Inputs of the calibration samples: arrays of their own, not views of all that was loaded."""
    given = case.load()["calibration"]
    return {k: v[:SAMPLES].copy() for k, v in given.items() if k != "labels"}


def whole_run(case: Case, samples: dict[str, np.ndarray], folder: Path, seconds: float) -> None:
    """``lamina.quantize`` in 8 bits: folds, statistics, search, timing."""
    import lamina

    target = "ort:cpu?threads=1"
    result = lamina.quantize(
        case.path, data=samples, bits=8, target=target, seconds=seconds, batch_size=case.batch_size
    )
    result.save(folder / "out")


def form_alone(case: Case, samples: dict[str, np.ndarray], folder: Path, seconds: float) -> None:
    """Every operator as ``w8a8-static`` where it can be, no search: what ONNX Runtime's tool does."""
    from lamina.analysis.statistics import collect
    from lamina.data import Dataset
    from lamina.ir.capture import capture
    from lamina.ir.io import save_model
    from lamina.passes.fold import fold
    from lamina.passes.pass_ import Site
    from lamina.passes.quantize import Quantize
    from lamina.planner.apply import apply_moves
    from lamina.planner.plan import Move
    from lamina.planner.realize import LOOKS, statistics_of

    program = fold(capture(case.path))[0]
    quantize = Quantize(forms=("w8a8-static",))
    sites = [s for s in quantize.sites(program) if isinstance(s, Site)]
    wanted = sorted({v for s in sites for v in (*s.inputs, *s.outputs)})
    data = Dataset(samples, {}, batch_size=case.batch_size)
    found = collect(program, data, ranges=wanted, needs=statistics_of([quantize.name]), looks=LOOKS)
    moves = [Move(s, o) for s in sites for o in quantize.options(s, program, found, None)]
    save_model(apply_moves(program, moves).model, folder / "form.onnx")


def peer(case: Case, samples: dict[str, np.ndarray], folder: Path, seconds: float) -> None:
    """``quantize_static`` as ONNX Runtime recommends it, after its own pre-processing."""
    from tools.bench import peers

    model = peers.preprocessed(peers.one_file(case.path, folder), folder)
    peers.static(model, folder, samples, list(samples), case.batch_size)


def one_run(case: Case, samples: dict[str, np.ndarray], folder: Path, seconds: float) -> None:
    """The original on the samples, batch by batch: what calibrating takes at least."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(case.path), options, providers=["CPUExecutionProvider"])
    given = [i.name for i in session.get_inputs()]
    for start in range(0, len(next(iter(samples.values()))), case.batch_size):
        session.run(None, {k: samples[k][start : start + case.batch_size] for k in given})


SYSTEMS: dict[str, Callable[[Case, dict[str, np.ndarray], Path, float], None]] = {
    "one run over the samples": one_run,
    "lamina.quantize": whole_run,
    "lamina, the form alone": form_alone,
    "onnxruntime quantize_static": peer,
}


def resident(field: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since it was last reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def measure(case: Case, system: str, seconds: float) -> dict[str, float]:
    """Run one system here, in a process that did nothing before."""
    import onnxruntime.quantization  # noqa: F401  imports are no part of the peak

    import lamina.driver
    import lamina.quantizing  # noqa: F401

    samples = samples_of(case)
    with tempfile.TemporaryDirectory() as folder:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
        before, start = resident("VmRSS"), time.process_time()
        SYSTEMS[system](case, samples, Path(folder), seconds)
        spent = time.process_time() - start
        peak = resident("VmHWM") - before
    batch = sum(a[: case.batch_size].nbytes for a in samples.values())
    return {
        "peak_over_baseline_mb": peak / 1e6,
        "baseline_mb": before / 1e6,
        "cpu_s": spent,
        "model_mb": case.path.stat().st_size / 1e6,
        "batch_mb": batch / 1e6,
        "samples": len(next(iter(samples.values()))),
        "batch_size": case.batch_size,
        "largest_child_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6,
    }


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="kwt1,mobilenet")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    chosen = [c for c in CASES if c.name in options.cases.split(",")]
    if options.one:
        print(json.dumps(measure(chosen[0], options.one, options.seconds)))
        return
    print(
        "| model | quantizer | peak over baseline, MB | model + one batch, MB | largest child, MB | CPU s |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for case in chosen:
        for system in SYSTEMS:
            words = [sys.executable, "-m", "tools.bench.memory", "--cases", case.name, "--one", system]
            words += ["--seconds", str(options.seconds)]
            out = subprocess.run(words, capture_output=True, text=True, check=False)
            if out.returncode:
                print(f"| {case.name} | {system} | failed: {out.stderr.strip().splitlines()[-1]} | | |")
                continue
            found = json.loads(out.stdout.splitlines()[-1])
            child = found["largest_child_mb"]
            print(
                f"| {case.name} ({found['samples']} samples, batch {found['batch_size']}) | {system} "
                f"| {found['peak_over_baseline_mb']:.1f} "
                f"| {found['model_mb']:.1f} + {found['batch_mb']:.1f} | {child:.0f} "
                f"| {found['cpu_s']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
