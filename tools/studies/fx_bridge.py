"""How the FX bridge compares with ONNX Runtime on the reference models, and how stable ``hawq-trace`` is.

python -m tools.studies.fx_bridge equal     differences and times, one line a model
python -m tools.studies.fx_bridge hawq      agreement of two seeds, for both curvatures

Reads ../shared/data (or $LAMINA_REFERENCE). CPU time, one thread, median of 7 runs after 2.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from scipy.stats import spearmanr

from lamina.analysis.gradients import gradient_metrics
from lamina.data import Dataset
from lamina.ir.capture import capture
from lamina.ir.fx import to_fx
from lamina.ir.program import Program

_ROOT = Path(os.environ.get("LAMINA_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "data"))


def _median_ms(run: Callable[[], object]) -> float:
    times = []
    for _ in range(9):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return float(np.median(times[2:])) * 1e3


def _feeds(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {k: np.asarray(v) for k, v in program.example.items()}
    for port in program.inputs:
        if port.dtype.is_floating_point():
            feeds[port.name] = rng.standard_normal(feeds[port.name].shape).astype(port.numpy_dtype)
        elif port.name == "bytes":
            text = np.resize(np.frombuffer(Path(__file__).read_bytes(), np.uint8), feeds["bytes"].size)
            feeds["bytes"] = text.reshape(feeds["bytes"].shape).astype(port.numpy_dtype)
    return feeds


def equal() -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    for path in [*sorted((_ROOT / "models").rglob("*.onnx")), *sorted((_ROOT / "zoo").glob("*.onnx"))]:
        program = capture(path)
        module, feeds = to_fx(program), _feeds(program)
        inputs = [torch.from_numpy(feeds[p.name]) for p in program.inputs]
        session = onnxruntime.InferenceSession(str(path), options)
        wanted = session.run(None, feeds)
        with torch.no_grad():
            answers = [a.numpy() for a in module(*inputs)]
            fx = _median_ms(lambda m=module, i=inputs: m(*i))
        ort = _median_ms(lambda s=session, f=feeds: s.run(None, f))
        pairs = list(zip(answers, wanted, strict=True))
        worst = max(float(np.abs(a - w).max()) for a, w in pairs)
        relative = max(float(np.abs(a - w).max() / np.abs(w).max()) for a, w in pairs)
        times = f"fx {fx:.2f} ms, onnxruntime {ort:.2f} ms: {fx / ort:.1f}x"
        print(f"{path.stem:28s} max abs {worst:.2e}, of the scale {relative:.2e}; {times}", flush=True)


def _cases() -> Iterator[tuple[str, Dataset]]:
    images = np.load(_ROOT / "sets/cifar10_train_2000.npz")
    x = ((images["images"][:64] / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 3, 1, 2)
    yield "resnet20_cifar10", Dataset({"x": x.astype(np.float32)}, {"labels": images["labels"][:64]}, 16)
    speech = np.load(_ROOT / "sets/speech_commands_kwt_2400.npz")
    feats = speech["feats"][:64].astype(np.float32)
    yield "kwt1_speech_commands", Dataset({"feats": feats}, {"labels": speech["labels"][:64]}, 16)
    tokens = np.load(_ROOT / "sets/tinystories_tok512_758x512.npz")["tokens"][:16, :128]
    yield "stories260k", Dataset({"tokens": tokens.astype(np.int64)}, {}, 4)


def hawq() -> None:
    for name, data in _cases():
        program = capture(_ROOT / "models" / f"{name}.onnx")
        for curvature in ("hessian", "gauss-newton"):
            runs = [
                gradient_metrics(program, data, ("hawq-trace",), (4,), seed=seed, curvature=curvature)
                for seed in (0, 1)
            ]
            scores = [[o.hawq[4].mean for o in run.operators] for run in runs]
            traces = [o.trace for o in runs[0].operators if o.trace is not None]
            error = np.median([t.standard_error / abs(t.mean) for t in traces])
            agreement = spearmanr(*scores)[0]
            print(
                f"{name:24s} {runs[0].loss} {curvature}: two seeds {agreement:.3f}, "
                f"relative error {error:.2f}, negative {sum(t.mean < 0 for t in traces)} of {len(traces)}, "
                f"{runs[0].seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"equal": equal, "hawq": hawq}[sys.argv[1] if len(sys.argv) > 1 else "equal"]()
