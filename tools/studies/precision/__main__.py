"""Damage against size of weight-only quantization, uniform over a model, beside other tools' quantizers.

    python -m tools.studies.precision --out FILE [--models kwt1 minilm] [--schemes "stored-w4 descent"]
        [--forms rotate_fold] [--tokens 512] [--whole] [--peers-python PYTHON,PYTHON]

For each model and scheme: bytes, divergence from the original's outputs on report data, the task's metric
there, CPU seconds. ``--forms`` writes exact forms before, to see what they do to few bits; "original" is then
the formed model in float, and names of schemes end in the forms. Results go into FILE (JSON) one by one; what
it has is kept. Other tools than ONNX Runtime run where ``--peers-python`` names Pythons that have
them, or this one does. One thread. Reads ../shared/data (or $LAMINA_REFERENCE).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from lamina.data import Dataset
from lamina.data.splitting import load_data
from lamina.ir.capture import capture
from lamina.ir.io import serialized_size
from lamina.ir.program import Program
from lamina.passes.fold import fold
from lamina.quality import Run, evaluate, get_metric
from tools.bench.cases import CASES
from tools.bench.quantize_tool import BLOCK_TOOLS
from tools.studies.precision.schemes import SCHEMES, Scheme, by_tool

MODELS = ("resnet56", "mobilenet", "kwt1", "stories260k", "minilm")
Row = dict[str, Any]
# Report samples (of minilm: pairs), and tokens of each story.
_REPORT = {"resnet56": 1000, "mobilenet": 300, "kwt1": 1200, "stories260k": 96, "minilm": 300}
_TOKENS = 128


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--tokens", type=int, default=_TOKENS, help="of each story to calibrate on, at most 512"
    )
    parser.add_argument("--whole", action="store_true", help="judge on all report samples and tokens")
    known = [*SCHEMES, *BLOCK_TOOLS]
    parser.add_argument("--schemes", nargs="*", choices=known, default=list(SCHEMES))
    parser.add_argument("--peers-python", default="", help="Pythons that have other tools, with commas")
    parser.add_argument("--forms", nargs="*", default=[], help="exact forms to write before quantizing")
    options = parser.parse_args(arguments)
    pythons = [python for python in options.peers_python.split(",") if python]
    schemes = {**SCHEMES, **{tool: (4, "peer", by_tool(tool, pythons)) for tool in BLOCK_TOOLS}}
    written = "".join(f" + {form}" for form in options.forms)
    rows: list[Row] = json.loads(options.out.read_text()) if options.out.exists() else []
    for name in options.models:
        done = {r["scheme"] for r in rows if r["model"] == name}
        missing = [s for s in options.schemes if s + written not in done]
        if missing:
            chosen = {scheme: schemes[scheme] for scheme in missing}
            for row in measure(name, chosen, options.forms, options.tokens, whole=options.whole):
                row["scheme"] += written
                if row["scheme"] in done:
                    continue
                rows.append(row)
                options.out.write_text(json.dumps(rows, indent=1))
                print(_line(row), flush=True)
    print(summary(rows))


def measure(
    name: str,
    schemes: Mapping[str, tuple[int, str, Scheme]],
    forms: Sequence[str] = (),
    tokens: int = _TOKENS,
    *,
    whole: bool = False,
) -> Iterator[Row]:
    """One row a scheme, and one of the original in these forms."""
    captured, calibration, report, metric = load(name, tokens, whole=whole)
    original, program = fold(captured)[0], fold(captured, forms=forms)[0]
    divergence, task = get_metric(None, original), get_metric(metric, original)
    plain = runner(ir.to_proto(original.model))

    def judge(model: onnx.ModelProto) -> Row:
        run = runner(model)
        apart = divergence.score(evaluate(run, report, divergence, reference_run=plain))
        return {"divergence": float(apart), "metric": task.score(evaluate(run, report, task))}

    base = {"model": name, "scheme": "original", "whose": "", "bits": 32}
    yield {
        **base,
        **judge(ir.to_proto(program.model)),
        "bytes": serialized_size(program.model),
        "seconds": 0.0,
    }
    for scheme, (bits, whose, make) in schemes.items():
        start = _cpu_seconds()
        row = {"model": name, "scheme": scheme, "whose": whose, "bits": bits}
        try:
            model = make(program, calibration)
            seconds = _cpu_seconds() - start
            row |= {**judge(model), "bytes": model.ByteSize(), "seconds": seconds}
        except Exception as error:  # a peer's failure is a result
            row["error"] = f"{type(error).__name__}: {error}"[:200]
        yield row


def _cpu_seconds() -> float:
    """Of this process and those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def load(name: str, tokens: int = _TOKENS, *, whole: bool = False) -> tuple[Program, Dataset, Dataset, str]:
    """The model, its calibration and report data (a part of it, or all), and its task's metric."""
    case = next(c for c in CASES if c.name == name)
    program, parts = capture(case.path), case.load()
    data = []
    for part, rows in (("calibration", 256), ("report", _REPORT[name])):
        arrays, all_of_it = parts[part], whole and part == "report"
        if name == "stories260k" and not all_of_it:
            kept = tokens if part == "calibration" else _TOKENS
            arrays = {k: v[:, :kept] for k, v in arrays.items()}
        found = load_data(arrays, program, batch_size=16)
        count = found.samples if all_of_it else min(rows, found.samples)
        places = np.linspace(0, found.samples - 1, count).astype(np.int64)
        data.append(found.rows(places))
    return program, data[0], data[1], case.metric


def runner(model: onnx.ModelProto) -> Run:
    """The model in ONNX Runtime as a user runs it, but for products of few-bit weights: in float.

    By itself MatMulNBits rounds activations to 8 bits, of ours and of the peers alike; what is compared here
    is what the weights lose.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]

    def run(feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    return run


def summary(rows: list[Row]) -> str:
    """Remaining damage of each of our schemes over the best peer's of its width, and the geometric mean.

    A peer counts where its file is at least as large as ours: the comparison is at equal or smaller size.
    """
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = [f"{'scheme':20s}" + "".join(f"{m:>13s}" for m in models) + f"{'mean':>9s}"]
    for scheme, (bits, whose, _) in SCHEMES.items():
        if whose != "lamina":
            continue
        ratios = [_over_best_peer(rows, m, scheme, bits) for m in models]
        known = [r for r in ratios if r is not None]
        mean = f"{np.exp(np.mean(np.log(known))):9.2f}" if known else ""
        cells = "".join(f"{'-' if r is None else f'{r:.2f}':>13s}" for r in ratios)
        lines.append(f"{scheme:20s}{cells}{mean}")
    return "\n".join(lines)


def _over_best_peer(rows: list[Row], model: str, scheme: str, bits: int) -> float | None:
    of = {r["scheme"]: r for r in rows if r["model"] == model and "error" not in r}
    ours = of.get(scheme)
    if ours is None:
        return None
    # nothing quantized is no competitor at this width
    most = 0.9 * of["original"]["bytes"]
    peers = [
        r["divergence"]
        for r in of.values()
        if r["whose"] == "peer" and r["bits"] == bits and 0.999 * ours["bytes"] <= r["bytes"] < most
    ]
    return ours["divergence"] / min(peers) if peers else None


def _line(row: Row) -> str:
    head = f"{row['model']:12s} {row['scheme']:44s}"
    if "error" in row:
        return f"{head} {row['error']}"
    return (
        f"{head} {row['bytes'] / 1e6:8.3f} MB  divergence {row['divergence']:.3e}  "
        f"metric {row['metric']:.4f}  {row['seconds']:6.1f} s"
    )


if __name__ == "__main__":
    main()
