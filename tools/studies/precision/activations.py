"""Damage of uniform 8-bit weights and activations on the reference suite, beside ONNX Runtime's quantizers.

    python -m tools.studies.precision.activations out/ --cases kwt1,minilm --variants static,dynamic

Each variant quantizes every weighted operator in one form. Scored on report samples, which nothing was
chosen on: the task metric, and the divergence of the outputs from float32's, which moves where a metric of a
few hundred samples cannot. What was scored before is read from ``out/activations.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from lamina.analysis.needs import Need
from lamina.analysis.ranges import RANGE_METHODS
from lamina.analysis.statistics import Statistics, collect
from lamina.data import Dataset
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.fold import fold
from lamina.passes.pass_ import Site
from lamina.passes.quantize import Quantize
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move
from lamina.planner.realize import LOOKS
from tools.bench import peers
from tools.bench.cases import CASES, Case

# Report samples used and calibration samples; ONNX Runtime's calibrator is given the same ones.
ROWS = {"resnet56": 2000, "mobilenet": 300, "kwt1": 1200, "stories260k": 64, "minilm": 600}
CALIBRATION = {"stories260k": 32}
TOKENS = 256


@cache
def samples(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Calibration and report samples."""
    data = case.load()
    given, wanted = CALIBRATION.get(case.name, 128), ROWS[case.name]
    calibration = {k: v[:given] for k, v in data["calibration"].items() if k != "labels"}
    report = {k: v[:wanted] for k, v in data["report"].items()}
    if case.name == "stories260k":
        calibration, report = ({k: v[:, :TOKENS] for k, v in d.items()} for d in (calibration, report))
    return calibration, report


@cache
def folded(case: Case, forms: tuple[str, ...] = ()) -> Program:
    """The folded program."""
    return fold(capture(str(case.path)), forms=forms)[0]


@cache
def statistics(case: Case, forms: tuple[str, ...] = ()) -> Statistics:
    """What the planner collects for quantization."""
    program = folded(case, forms)
    sites = [s for s in Quantize().sites(program) if isinstance(s, Site) and s.kind != "embedding"]
    names = [n for s in sites for n in (*s.inputs, *s.outputs)]
    data = Dataset(samples(case)[0], {}, min(16, case.batch_size))
    return collect(program, data, ranges=names, needs=(Need.VECTORS,), looks=LOOKS, threads=1)


def ours(form: str, forms: tuple[str, ...] = (), **options: Any) -> Callable[[Case, Path], Path]:
    """Every site that offers ``form`` takes it, after the folds ``forms``."""

    def make(case: Case, path: Path) -> Path:
        program, transform = folded(case, forms), Quantize(forms=(form,), **options)
        moves = []
        for site in transform.sites(program):
            if isinstance(site, Site):
                offered = transform.options(site, program, statistics(case, forms), "ort:cpu?threads=1")
                moves += [Move(site, o) for o in offered if o.name == form]
        ir.save(apply_moves(program, moves).model, path)
        return path

    return make


def peer(kind: str, **options: Any) -> Callable[[Case, Path], Path]:
    """ONNX Runtime's own quantizer."""

    def make(case: Case, path: Path) -> Path:
        folder = path.parent
        model = peers.preprocessed(peers.one_file(case.path, folder), folder)
        if kind == "dynamic":
            made = peers.dynamic(model, folder, **options)
        else:
            inputs = samples(case)[0]
            made = peers.static(model, folder, inputs, list(inputs), min(16, case.batch_size), **options)
        return made.rename(path)

    return make


PLAIN: dict[str, Any] = {"smoothing": (), "correct_bias": False}
VARIANTS: Mapping[str, Callable[[Case, Path], Path]] = {
    **{f"static {r}": ours("w8a8-static", ranges=r, **PLAIN) for r in RANGE_METHODS},
    "dynamic": ours("w8a8-dynamic", **PLAIN),
    "static bias": ours("w8a8-static", smoothing=()),
    "dynamic bias": ours("w8a8-dynamic", smoothing=()),
    "static smooth": ours("w8a8-static", correct_bias=False),
    "dynamic smooth": ours("w8a8-dynamic", correct_bias=False),
    **{f"static {a}": ours("w8a8-static", smoothing=(a,), correct_bias=False) for a in (0.5, 0.8, "log")},
    **{f"dynamic {a}": ours("w8a8-dynamic", smoothing=(a,), correct_bias=False) for a in (0.5, 0.8, "log")},
    "static equalized": ours("w8a8-static", ("equalize_layers",), **PLAIN),
    "static rotated": ours("w8a8-static", ("rotate_fold",), **PLAIN),
    "w4": ours("w4"),
    "w4a8": ours("w4a8"),
    "w4a8 rotated": ours("w4a8", ("rotate_fold",)),
    "static both": ours("w8a8-static"),
    "dynamic both": ours("w8a8-dynamic"),
    "ort-static": peer("static"),
    "ort-dynamic": peer("dynamic"),
    "ort-static-7": peer("static", reduce_range=True),
    "ort-dynamic-7": peer("dynamic", reduce_range=True),
}


def outputs(case: Case, path: Path) -> list[np.ndarray]:
    """Logits, or unit sentence vectors of both sides, on the report samples."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    report = samples(case)[1]
    if case.metric != "spearman":
        inputs = {k: v for k, v in report.items() if k != "labels"}
        return [_run(session, inputs, case.batch_size)]
    found = []
    for side in "ab":
        inputs = {k[2:]: v for k, v in report.items() if k.startswith(f"{side}.")}
        hidden, mask = _run(session, inputs, case.batch_size), inputs["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        found.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    return found


def _run(session: ort.InferenceSession, inputs: dict[str, np.ndarray], batch: int) -> np.ndarray:
    count = len(next(iter(inputs.values())))
    parts = [{k: v[i : i + batch] for k, v in inputs.items()} for i in range(0, count, batch)]
    return np.concatenate([session.run(None, part)[0] for part in parts])


def score(case: Case, made: list[np.ndarray]) -> float:
    """Points of top-1 or Spearman, or nats of next-token loss."""
    report = samples(case)[1]
    if case.metric == "top1":
        return float((made[0].argmax(1) == report["labels"]).mean() * 100)
    if case.metric == "spearman":
        from scipy.stats import spearmanr

        return float(spearmanr((made[0] * made[1]).sum(1), report["score"]).statistic * 100)
    right = report["tokens"][:, 1:, None]
    return float(-np.take_along_axis(_log_softmax(made[0][:, :-1]), right, -1).mean())


def divergence(case: Case, before: list[np.ndarray], after: list[np.ndarray]) -> float:
    """Mean KL(float32 || quantized) in nats; of sentence vectors 1 - cosine."""
    if case.metric == "spearman":
        cosines = [(a.astype(np.float64) * b).sum(-1) for a, b in zip(before, after, strict=True)]
        return float(1 - np.mean(cosines))
    p, q = _log_softmax(before[0]), _log_softmax(after[0])
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def measure(case: Case, variant: str, folder: Path, known: dict[str, Any]) -> None:
    """Score one variant of one case, and the original where that is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = folder / "original.npz"
    if not kept.exists():
        before = outputs(case, case.path)
        np.savez(kept, *before)
        known[f"{case.name} float32"] = {"metric": score(case, before), "divergence": 0.0}
    with np.load(kept) as file:
        before = [file[k] for k in file.files]
    path = VARIANTS[variant](case, folder / f"{variant.replace(' ', '_')}.onnx")
    after = outputs(case, path)
    known[f"{case.name} {variant}"] = {
        "metric": score(case, after),
        "divergence": divergence(case, before, after),
        "bytes": path.stat().st_size,
    }


def main() -> None:
    """Score what is asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--again", action="store_true", help="score again what was scored before")
    given = parser.parse_args()
    file = given.out / "activations.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name in given.cases.split(","):
        case = next(c for c in CASES if c.name == name)
        for variant in given.variants.split(","):
            if f"{name} {variant}" not in known or given.again:
                measure(case, variant, given.out / name, known)
                file.write_text(json.dumps(known, indent=1))
            for row in ("float32", variant):
                print(f"{name:12} {row:24}", known[f"{name} {row}"], flush=True)


if __name__ == "__main__":
    main()
