"""What analyses cost, in plain runs of the model over the same data: all forward-only metrics, all drops.

    python -m tools.bench.analysis [--models kwt1,minilm] [--rounds 5] [--drop-batches 8] [--batches N]

CPU time of this process, one thread, equal batches. A plain run makes a session and runs every batch; the
metrics make theirs, collect, and rate every site; the drops cut, make a session for each branch and run every
batch. The two are measured in alternation, and a ratio is that of neighbours; median, least and greatest over
rounds are given. Exit code 1 where a median is over its bound.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lamina.analysis.instrument import InstrumentedSession, feeds_of
from lamina.analysis.metrics import METRICS
from lamina.analysis.needs import union
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import damages
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.single_drops import drop_variants
from lamina.quality.choose import get_metric
from lamina.quality.metric import Metric
from tools.bench.cases import CASES, ROOT, Case

MOST_METRICS, MOST_DROPS = 1.5, 0.6


@dataclass(frozen=True)
class Ratio:
    """Times over a plain run's, from rounds in alternation."""

    median: float
    least: float
    greatest: float
    plain_s: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.least:.2f} to {self.greatest:.2f})"


def calibration(case: Case, program: Program) -> Dataset:
    """The calibration samples of the data's manifest: of CIFAR-10 all 2,000, of the others the suite's.

    Of mobilenet all 400 images: 100 take 0.2 s, which making sessions and instruments alone takes too.
    """
    splits = case.load()
    arrays = splits["calibration"]
    if case.name == "mobilenet":
        arrays = {"x": np.concatenate([arrays["x"], splits["report"]["x"]])}
    if case.name.startswith("resnet"):
        with np.load(ROOT / "sets" / "cifar10_train_2000.npz") as file:
            images = file["images"].astype(np.float32) / 255.0
        images = (images - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        arrays = {"x": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}
    return Dataset({port.name: arrays[port.name] for port in program.inputs}, {}, case.batch_size)


def plain(program: Program, data: Dataset) -> None:
    session = InstrumentedSession(program, threads=1)
    names = [port.name for port in program.outputs]
    for batch in data.batches():
        session.run(names, feeds_of(program, batch))


def all_metrics(program: Program, data: Dataset) -> None:
    probes = [BranchProbe.of(branch) for branch in find_branches(program).branches]
    statistics = collect(program, data, branches=probes, needs=union(METRICS), threads=1)
    for metric in METRICS:
        metric.rate(program, statistics)


def all_drops(program: Program, variants: dict[str, Program], data: Dataset, metric: Metric) -> None:
    damages(program, variants, data, metric, threads=1)


def ratio(plain_run: Callable[[], None], other: Callable[[], None], rounds: int, over: int = 1) -> Ratio:
    """CPU time of ``other`` over ``over`` plain runs; each round measures plain, other, plain."""
    found, base = [], []
    before = cpu(plain_run)
    for _ in range(rounds):
        spent = cpu(other)
        after = cpu(plain_run)
        found.append(spent / over / ((before + after) / 2))
        base.append(after)
        before = after
    return Ratio(float(np.median(found)), min(found), max(found), float(np.median(base)))


def cpu(run: Callable[[], None]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def measured(
    names: list[str] | None, rounds: int, drop_batches: int, batches: int | None = None
) -> Iterator[dict[str, object]]:
    cases = [replace(CASES[0], name="resnet20", model="resnet20_cifar10.onnx"), *CASES]
    for case in cases:
        if not case.path.exists() or (names and case.name not in names):
            continue
        program = capture(str(case.path))
        data = calibration(case, program)
        if batches is not None:
            data = data.rows(slice(0, batches * case.batch_size))
        plain(program, data.rows(slice(0, case.batch_size)))  # imports and first touches count for nobody
        all_metrics(program, data.rows(slice(0, case.batch_size)))
        whole = ratio(lambda: plain(program, data), lambda: all_metrics(program, data), rounds)  # noqa: B023
        row: dict[str, object] = {"model": case.name, "samples": len(data), "metrics": asdict(whole)}
        variants = drop_variants(program)
        if variants:
            part = data.rows(slice(0, drop_batches * case.batch_size))
            metric = get_metric(None, program)
            drops = ratio(
                lambda: plain(program, part),  # noqa: B023
                lambda: all_drops(program, variants, part, metric),  # noqa: B023
                max(1, rounds // 2),
                len(variants),
            )
            row |= {"branches": len(variants), "drop_samples": len(part), "drops": asdict(drops)}
        yield row


def table(rows: list[dict[str, object]]) -> Table:
    made = Table(title="cost in plain runs over the same data (CPU time, 1 thread)")
    for head in ("model", "samples", "plain s", "all metrics", "branches", "drop samples", "all drops / L"):
        made.add_column(head)
    for row in rows:
        whole, drops = Ratio(**row["metrics"]), row.get("drops")  # type: ignore[arg-type]
        made.add_row(
            str(row["model"]),
            str(row["samples"]),
            f"{whole.plain_s:.2f}",
            str(whole),
            str(row.get("branches", 0)),
            str(row.get("drop_samples", "")),
            str(Ratio(**drops)) if drops else "",  # type: ignore[arg-type]
        )
    return made


def failures(rows: list[dict[str, object]]) -> list[str]:
    """Which bounds are broken."""
    found = []
    for row in rows:
        for key, most in (("metrics", MOST_METRICS), ("drops", MOST_DROPS)):
            numbers = row.get(key)
            if isinstance(numbers, dict) and numbers["median"] > most:
                found.append(f"{row['model']}: {key} cost {numbers['median']:.2f}, bound {most}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", help="names, separated by commas; all by default")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drop-batches", type=int, default=8)
    parser.add_argument("--batches", type=int, help="at most so many batches of calibration data")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    names = options.models.split(",") if options.models else None
    for row in measured(names, options.rounds, options.drop_batches, options.batches):
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    Console().print(table(rows))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        options.out.write_text(json.dumps({**machine, "rows": rows}, indent=1))
    broken = failures(rows)
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
