"""Independent judge: loads ONNX files in onnxruntime and nothing of lamina; scores and times them.

Its metrics are written from their definitions, so that an error in lamina's own would show.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from tools.bench.cases import CASES, Case


def session(path: Path, threads: int) -> ort.InferenceSession:
    """A default session (full graph optimization)."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_all(path: Path, inputs: dict[str, np.ndarray], batch: int) -> np.ndarray:
    """First output on all rows."""
    runner = session(path, 2)
    count = len(next(iter(inputs.values())))
    parts = [
        runner.run(None, {k: v[i : i + batch] for k, v in inputs.items()})[0] for i in range(0, count, batch)
    ]
    return np.concatenate(parts)


def score(case: Case, path: Path, samples: dict[str, np.ndarray]) -> float:
    """The case's metric: points (0..100) for top-1 and Spearman, nats for the next-token loss."""
    if case.metric == "top1":
        inputs = {k: v for k, v in samples.items() if k != "labels"}
        logits = run_all(path, inputs, case.batch_size)
        return float((logits.argmax(1) == samples["labels"]).mean() * 100)
    if case.metric == "cross-entropy":
        runner, losses = session(path, 2), []
        for i in range(0, len(samples["tokens"]), case.batch_size):
            tokens = samples["tokens"][i : i + case.batch_size]
            logits = runner.run(None, {"tokens": tokens})[0][:, :-1].astype(np.float64)
            top = logits.max(-1, keepdims=True)
            log_sum = np.log(np.exp(logits - top).sum(-1)) + top[..., 0]
            right = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
            losses.append(log_sum - right)
        return float(np.concatenate(losses).mean())
    sides = []
    for side in "ab":
        inputs = {k[2:]: v for k, v in samples.items() if k.startswith(f"{side}.")}
        hidden = run_all(path, inputs, case.batch_size)
        mask = inputs["attention_mask"][..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        sides.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
    from scipy.stats import spearmanr

    return float(spearmanr((sides[0] * sides[1]).sum(1), samples["score"]).statistic * 100)


def damage(case: Case, original: float, value: float) -> float:
    """Points lost; percent of increase for a loss."""
    return (value / original - 1) * 100 if case.metric == "cross-entropy" else original - value


def ratio(
    original: Path, other: Path, feeds: dict[str, np.ndarray], threads: int, rounds: int = 25
) -> dict[str, float]:
    """Time of ``other`` over ``original``, alternating short bursts in one process, median over rounds."""
    runners = [session(original, threads), session(other, threads)]
    for runner in runners:
        for _ in range(5):
            runner.run(None, feeds)
    start = time.perf_counter()
    runners[0].run(None, feeds)
    burst = max(3, int(0.03 / max(time.perf_counter() - start, 1e-6)))
    ratios = []
    for _ in range(rounds):
        times = []
        for runner in runners:
            runner.run(None, feeds)
            samples = []
            for _ in range(burst):
                begin = time.perf_counter()
                runner.run(None, feeds)
                samples.append(time.perf_counter() - begin)
            times.append(float(np.median(samples)))
        ratios.append(times[1] / times[0])
    low, middle, high = np.percentile(ratios, [10, 50, 90])
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def shapes(case: Case, samples: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Feeds of the case's two timed shapes, cut from calibration samples."""
    inputs = {k: v for k, v in samples.items() if k != "labels"}
    found = {}
    for item in case.workload.split(";"):
        sizes = [int(n) for n in item.split("@")[0].strip().split("x")]
        feeds = {}
        for name, rows in inputs.items():
            cut = rows[: sizes[0]]
            if len(sizes) > 1:
                cut = cut[:, : sizes[1]]
                if cut.shape[1] < sizes[1]:
                    cut = np.concatenate([cut] * (sizes[1] // cut.shape[1] + 1), axis=1)[:, : sizes[1]]
            feeds[name] = np.ascontiguousarray(cut)
        found["x".join(map(str, sizes))] = feeds
    return found


def judge(case: Case, optimized: Path, *, threads: int = 1) -> dict[str, Any]:
    """Everything about one optimized file against the original."""
    data = case.load()
    original, value = (score(case, path, data["report"]) for path in (case.path, optimized))
    timed = {n: ratio(case.path, optimized, f, threads) for n, f in shapes(case, data["calibration"]).items()}
    return {
        "case": case.name,
        "metric": case.metric,
        "original": original,
        "optimized": value,
        "damage_percent": damage(case, original, value),
        "bytes": optimized.stat().st_size,
        "ratios": timed,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=[c.name for c in CASES])
    parser.add_argument("optimized", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    found = judge(next(c for c in CASES if c.name == chosen.case), chosen.optimized, threads=chosen.threads)
    print(json.dumps(found, indent=1))
