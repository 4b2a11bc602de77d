"""Damage against size and against measured latency: every form everywhere, and every allocator's plan.

    python -m tools.studies.precision.frontier out/ [--cases kwt1,minilm] [--seconds 15]
        [--only planner,bits-ilp]

A *form* is given to every operator that offers it and, where weights are coded, rounded by ``descent``. An
*allocator* gets one bound, half-way between the files of ``stored-w8`` and ``stored-w4``, and mixes forms
within it; ``planner`` is the joint search. Damage: points of top-1 or Spearman, percent of the loss, in a
default session on report samples that nothing was chosen on; divergence of the outputs from float32's beside
it. Latency: ratio to the original, one thread, all models of a case in alternation, each in a process of its
own. Results go into ``out/frontier.json`` case by case; what it has is kept.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

import lamina
from lamina.data.splitting import load_data
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize import Quantize
from lamina.passes.quantize.rounding import Rounding, round_options
from lamina.passes.quantize.transform import FORMS, NAMED_FORMS
from lamina.planner.apply import apply_moves
from lamina.planner.bits.allocators import allocator_names
from lamina.planner.plan import Move
from tools.bench import judge
from tools.bench.cases import CASES, Case
from tools.bench.run import file_bytes, timed
from tools.studies.precision.activations import divergence, folded, outputs, samples, score, statistics

Make = Callable[[Case, Path], Path]
TARGET = "ort:cpu?threads=1"
# Half-way between their files is what allocators are bounded by.
BOUNDS = ("stored-w8", "stored-w4")


def uniform(form: str) -> Make:
    """Every operator that offers ``form`` takes it."""

    def make(case: Case, path: Path) -> Path:
        program, transform = folded(case), Quantize(forms=(form,))
        chosen: list[tuple[Site, Option]] = []
        for site in transform.sites(program):
            if isinstance(site, Site):
                offered = transform.options(site, program, statistics(case), TARGET)
                chosen += [(site, o) for o in offered if o.name == form]
        if not chosen:
            raise LookupError("no operator offers it")
        data = load_data(samples(case)[0], program, batch_size=min(16, case.batch_size))
        options = round_options(program, chosen, data, Rounding("descent"), threads=1)
        moves = [Move(site, option) for (site, _), option in zip(chosen, options, strict=True)]
        ir.save(apply_moves(program, moves).model, path)
        return path

    return make


def allocated(strategy: str | None, size: float, seconds: float) -> Make:
    """The plan of one allocator, or of the planner's own search, within ``size`` bytes."""

    def make(case: Case, path: Path) -> Path:
        result = lamina.quantize(
            case.path,
            data=case.load(),
            metric=case.metric,
            target=TARGET,
            workload=case.workload,
            batch_size=case.batch_size,
            size=f"{size / 1e6:.4f}MB",
            strategy=strategy,
            seconds=seconds,
        )
        result.save(path.with_suffix(""))
        return path.with_suffix("") / "model.onnx"

    return make


def measure(case: Case, out: Path, seconds: float, only: Collection[str] = ()) -> list[dict[str, Any]]:
    """One row a form, and with ``seconds`` one an allocator, of one case; of some of them with ``only``."""
    out.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {"float32": {}}
    models = {"float32": case.path}

    def build(name: str, make: Make) -> None:
        start = time.process_time()
        rows[name] = {}
        try:
            models[name] = make(case, out / f"{name}.onnx")
        except Exception as error:  # a form or an allocator that does not apply is a finding
            rows[name]["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        rows[name]["seconds"] = time.process_time() - start
        print(f"{case.name} {name}: {rows[name]}", flush=True)

    for form in (*FORMS, *NAMED_FORMS):
        if not only or form in {*only, *BOUNDS}:
            build(form, uniform(form))
    bounds = [file_bytes(models[n]) for n in BOUNDS if n in models]
    if seconds and len(bounds) == len(BOUNDS):
        for strategy in (None, *allocator_names()):
            if not only or (strategy or "planner") in only:
                build(strategy or "planner", allocated(strategy, sum(bounds) / 2, seconds))
    times = timed(case, models, 1, seconds=3.0 * len(models))
    reference = outputs(case, case.path)
    for name, path in models.items():
        made = outputs(case, path)
        value = score(case, made)
        rows[name] |= {
            "bytes": file_bytes(path),
            "metric": value,
            "damage": judge.damage(case, score(case, reference), value),
            "divergence": divergence(case, reference, made),
            "latency": times[name],
        }
    return [{"case": case.name, "name": name, **row} for name, row in rows.items()]


def table(rows: list[Mapping[str, Any]]) -> str:
    """Markdown, a case a block, smallest file last."""
    lines = []
    for name in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == name]
        whole = next(row["bytes"] for row in own if row["name"] == "float32")
        lines += [f"| {name} | size | damage | divergence | latency |", "| --- | --- | --- | --- | --- |"]
        for row in sorted(own, key=lambda r: -r.get("bytes", 0)):
            if "error" in row:
                lines.append(f"| {row['name']} | | {row['error']} | | |")
                continue
            latency = ", ".join(f"{t['ratio']:.2f}" for t in row["latency"].values())
            said = f"{row['damage']:+.2f} | {row['divergence']:.3g} | {latency}"
            lines.append(f"| {row['name']} | {row['bytes'] / whole:.3f} | {said} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", default=",".join(c.name for c in CASES))
    parser.add_argument("--seconds", type=float, default=15.0, help="of search an allocator; 0: forms alone")
    parser.add_argument("--only", default="", help="forms and allocators, with commas; all by default")
    given = parser.parse_args()
    only = [name for name in given.only.split(",") if name]
    given.out.mkdir(parents=True, exist_ok=True)
    kept = given.out / "frontier.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else []
    for case in CASES:
        if case.name in given.cases.split(",") and case.name not in {row["case"] for row in rows}:
            rows += measure(case, given.out / case.name, given.seconds, only)
            kept.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
