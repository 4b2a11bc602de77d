"""Random models through every check, as many as wanted: ``python -m tools.fuzz --count 20000 --seed 0``.

Prints a tally as JSON; every model with a wrong result is made as small as it fails, and saved with its spec.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "fuzz")]

_CHUNK = 50


@dataclass
class Tally:
    """What a run of the fuzzer saw."""

    graphs: int = 0
    nodes: int = 0
    wrong: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    unrunnable: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)
    fired: Counter[str] = field(default_factory=Counter)
    pieces: Counter[str] = field(default_factory=Counter)
    opsets: Counter[str] = field(default_factory=Counter)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Add the counts of another run."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(value)
            else:
                setattr(self, name, mine + value)


def examine(first: int, last: int) -> Tally:
    """Check the models of seeds ``first`` to ``last - 1``."""
    from fuzz_checks import check
    from graphs import spec_of

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    gc.freeze()  # what is imported stays; going through it for garbage again and again is a tenth of the time
    gc.set_threshold(100_000, 20, 20)
    tally = Tally()
    with tempfile.TemporaryDirectory(prefix="lamina-fuzz-") as name:
        for seed in range(first, last):
            spec = spec_of(seed)
            tally.graphs += 1
            try:
                _count(tally, check(spec, Path(name)))
            except Exception as error:  # whatever it is, it is what is looked for
                tally.wrong += 1
                smaller, reason = shrink(spec, error, Path(name))
                tally.failures.append({"number": seed, "spec": asdict(smaller), "reason": reason})
    return tally


def _count(tally: Tally, outcome: Any) -> None:
    made = outcome.made
    tally.nodes += len(made.proto.graph.node)
    tally.opsets[str(made.spec.opset)] += 1
    tally.pieces.update(set(made.pieces))
    tally.fired.update(name for name, count in outcome.fired.items() if count)
    tally.undone.update(text[:120] for text in set(outcome.undone))
    if outcome.refused:
        tally.refused[outcome.refused[:120]] += 1
    if outcome.unrunnable:
        tally.unrunnable[outcome.unrunnable[:120]] += 1


def shrink(spec: Any, error: Exception, folder: Path) -> tuple[Any, str]:
    """Leave out pieces as long as the same kind of failure stays; the spec and its reason."""
    from graphs import build

    spec = replace(spec, opset=build(spec).spec.opset)
    best, kind = _reason(error), _kind(error)
    index = 0
    while index < len(spec.pieces):
        smaller = replace(spec, pieces=spec.pieces[:index] + spec.pieces[index + 1 :])
        found = _fails(smaller, folder)
        if found is not None and _kind(found) == kind:
            spec, best = smaller, _reason(found)
        else:
            index += 1
    return spec, best


def _fails(spec: Any, folder: Path) -> Exception | None:
    from fuzz_checks import check

    try:
        check(spec, folder)
    except Exception as error:  # see examine()
        return error
    return None


def _kind(error: Exception) -> str:
    return f"{type(error).__name__} {str(error)[:12]}"


def _reason(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(place.filename).name}:{place.lineno}: {str(error)[:600]}"


def save(failure: dict[str, Any], folder: Path) -> None:
    """Write the model and its spec."""
    import onnx
    from graphs import Spec, build

    folder.mkdir(parents=True, exist_ok=True)
    spec = failure["spec"]
    made = build(Spec(spec["seed"], tuple(spec["pieces"]), spec["grid"], spec["opset"]))
    onnx.save(made.proto, folder / f"{failure['number']}.onnx")
    (folder / f"{failure['number']}.json").write_text(json.dumps(failure, indent=1) + "\n")


def _chunks(first: int, count: int | None) -> Iterator[tuple[int, int]]:
    start, end = first, None if count is None else first + count
    while end is None or start < end:
        stop = start + _CHUNK if end is None else min(start + _CHUNK, end)
        yield start, stop
        start = stop


def run(
    first: int, count: int | None, jobs: int, seconds: float | None, folder: Path, quiet: bool = False
) -> Tally:
    """Check models until ``count`` or ``seconds`` is reached; failing ones go to ``folder``."""
    total, started = Tally(), time.monotonic()
    with ProcessPoolExecutor(jobs) if jobs > 1 else tempfile.TemporaryFile() as pool:
        pending: list[Any] = []
        for span in _chunks(first, count):
            if jobs > 1:
                pending.append(pool.submit(examine, *span))  # type: ignore[union-attr]
                found = pending.pop(0).result() if len(pending) >= 2 * jobs else Tally()
            else:
                found = examine(*span)
            _absorb(total, found, folder, started, quiet)
            if seconds is not None and time.monotonic() - started > seconds:
                break
        for future in pending:
            _absorb(total, future.result(), folder, started, quiet)
    return total


def _absorb(total: Tally, found: Tally, folder: Path, started: float, quiet: bool) -> None:
    total.add(found)
    for failure in found.failures:
        save(failure, folder)
        print(f"WRONG {failure['number']}: {failure['reason']}", file=sys.stderr)
    if found.graphs and not quiet:
        spent = time.monotonic() - started
        print(f"{total.graphs} graphs, {total.wrong} wrong, {spent:.0f} s", file=sys.stderr, flush=True)


def main() -> int:
    """Read the command line, run, print the tally; 1 when something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=None, help="models to check; without it, no end")
    parser.add_argument("--seed", type=int, default=0, help="number of the first model")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long")
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"), help="where failing models go")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args()
    tally = run(given.seed, given.count, given.jobs, given.seconds, given.out, given.quiet)
    print(json.dumps({k: v for k, v in vars(tally).items() if k != "failures"}, indent=1))
    return 1 if tally.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
