"""Damaged model files through capture, fold and save: ``python -m tools.mutate --count 10000 --seed 0``.

Each file goes through a child process with bounds on time and memory. The outcome must be a LaminaError that
says what to do, or a model that computes what the file computes; never a crash, a hang, another exception, or
a write outside the output folder. Prints a tally as JSON; files that got through wrongly are kept.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tools.mutations import damage, damage_data

sys.path[:0] = [str(Path(__file__).parents[1] / "tests" / "fuzz")]

SECONDS = 20.0  # for one file; the slowest seen takes less than one
MEMORY = 2 << 30  # bytes beyond what the process has when it starts
BASES = 40
GOOD = (
    "same result",
    "runtime refuses the file",
    "refused with advice",
    "result not comparable",
    "runtime dies",
)
_WRITES = frozenset({"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod"})


@dataclass
class Tally:
    """What a run saw: outcomes by name, the errors' types, and the cases that must not happen."""

    files: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    unforeseen: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)
    bad: list[dict[str, Any]] = field(default_factory=list)
    slowest: float = 0.0


def make_bases(folder: Path, count: int) -> list[Path]:
    """Small valid models to damage, every third with external data, in folders of their own."""
    from graphs import build, spec_of

    found = []
    for number in range(count):
        made = build(spec_of(number))
        place = folder / f"base{number}"
        place.mkdir(parents=True)
        path = place / "model.onnx"
        if number % 3 == 0:
            onnx.save(made.proto, path, save_as_external_data=True, location="model.bin", size_threshold=16)
        else:
            onnx.save(made.proto, path)
        found.append(path)
    return found


def make_case(base: Path, place: Path, seed: int) -> Path:
    """A damaged copy of a base model in ``place``."""
    rng = random.Random(seed)
    shutil.copytree(base.parent, place)
    path, data = place / "model.onnx", place / "model.bin"
    os.mkfifo(place / "fifo")
    if data.exists() and rng.random() < 0.25:
        damage_data(data, rng)
    else:
        path.write_bytes(damage(path.read_bytes(), rng))
    return path


# -- in the child -------------------------------------------------------------------------------------


def _try(path: Path, out: Path) -> dict[str, Any]:
    """Capture, fold, save; what came of it. Nothing here may raise but what must not happen."""
    from lamina.errors import LaminaError
    from lamina.ir import io
    from lamina.passes.fold import fold

    try:
        program = io.load(path)
        folded, _, records = fold(program)
        io.save_model(folded.model, out / "model.onnx")
    except LaminaError as error:
        good = bool(error.advice) and bool(error.what)
        outcome = "refused with advice" if good else "refused without advice"
        if error.what.startswith("lamina failed to read a model that onnx.checker accepts"):
            outcome = "bug in reading"
        return {"outcome": outcome, "error": type(error).__name__, "what": error.what[:200]}
    undone = [r.why[:100] for r in records if r.why.startswith("undone")]
    return {"outcome": "saved", "undone": undone, "example": program.example}


def _compare(path: Path, out: Path, feeds: Mapping[str, np.ndarray]) -> str:
    """Whether the saved model computes what the damaged file computes, where the runtime takes that."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    provider = ["CPUExecutionProvider"]
    try:
        session = onnxruntime.InferenceSession(str(path), options, provider)
        known = {i.name for i in session.get_inputs()}
        want = session.run(None, {k: v for k, v in feeds.items() if k in known})
    except Exception:  # whatever it does not like
        return "runtime refuses the file"
    have = onnxruntime.InferenceSession(str(out / "model.onnx"), options, provider).run(None, dict(feeds))
    return _verdict(want, have)


def _verdict(want: list[Any], have: list[Any]) -> str:
    if len(want) != len(have):
        return "other outputs"
    for a, b in zip(want, have, strict=True):
        if not isinstance(a, np.ndarray):
            continue
        if a.dtype != b.dtype or a.shape != b.shape:
            return "other type or shape"
        if a.dtype.kind != "f":
            if not np.array_equal(a, b):
                return "other values"
            continue
        scale = float(np.abs(a).max(initial=0))
        if not np.isfinite(scale) or scale > 1e30 or not np.isfinite(b).all():
            return "result not comparable"
        # Damaged weights may cancel, so this is no exactness test; that is tools.fuzz.
        if not np.allclose(a, b, rtol=0, atol=1e-3 * scale + 1e-30):
            return "other values"
    return "same result"


class _Watch:
    """Notes every file that Python code of this process makes, changes or removes outside ``out``."""

    def __init__(self, out: Path) -> None:
        self.seen: list[str] = []
        self.armed = False
        self._inside = str(out) + os.sep
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed or not _may_write(event, arguments):
            return
        for place in arguments[:2] if event in ("os.rename", "os.link") else arguments[:1]:
            if isinstance(place, int):  # an open file: noted when it was opened
                continue
            known = isinstance(place, (str, bytes, os.PathLike))
            name = os.path.abspath(os.fsdecode(place)) if known else event
            if not (name + os.sep).startswith(self._inside) and name != os.devnull:
                self.seen.append(f"{event} {name}")


def _may_write(event: str, arguments: tuple[Any, ...]) -> bool:
    if event != "open":
        return event in _WRITES or event in ("os.system", "subprocess.Popen", "socket.connect")
    flags = arguments[2] if isinstance(arguments[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))


def _child(pipe: int, bases: list[Path], seeds: list[int], folder: Path) -> None:
    """Go through the seeds, a line of JSON before and after each."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    sys.dont_write_bytecode = True
    out = folder / "out"
    _limit_memory()
    watch = _Watch(out)
    with os.fdopen(pipe, "w", buffering=1) as report:
        for seed in seeds:
            place = folder / f"case{seed}"
            path = make_case(bases[seed % len(bases)], place, seed)
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            before = _listing(folder)
            _say(report, seed=seed, phase="lamina")
            started = time.monotonic()
            watch.armed = True
            try:
                found = _try(path, out)
            except BaseException as error:  # exactly what must not happen
                found = {"outcome": "traceback", "what": _last(error)}
            watch.armed = False
            found["seconds"] = time.monotonic() - started
            if found["outcome"] == "saved":
                _say(report, seed=seed, phase="runtime")
                try:
                    found["outcome"] = _compare(path, out, found["example"])
                except Exception as error:  # the saved model does not run although the file does
                    found = {**found, "outcome": "saved model does not run", "what": str(error)[:300]}
            found.pop("example", None)
            if watch.seen or _listing(folder) != before:
                found = {**found, "outcome": "wrote elsewhere", "what": str(watch.seen[:3])}
                watch.seen.clear()
            _say(report, seed=seed, phase="done", **found)
            if found["outcome"] in GOOD:
                shutil.rmtree(place)
            else:
                (place / "fifo").unlink()


def _limit_memory() -> None:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmSize:"):
            limit = int(line.split()[1]) * 1024 + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _listing(folder: Path) -> list[tuple[str, int]]:
    """Everything but what lies in the output folder, with its size."""
    out = str(folder / "out")
    found = []
    for root, _, files in os.walk(folder):
        if not root.startswith(out):
            found += [(os.path.join(root, f), os.lstat(os.path.join(root, f)).st_size) for f in files]
    return sorted(found)


def _last(error: BaseException) -> str:
    places = traceback.extract_tb(error.__traceback__)
    own = next((p for p in reversed(places) if "lamina" in p.filename), places[-1])
    text = f"{type(error).__name__} at {Path(own.filename).name}:{own.lineno}: {error}"
    return text[:300]


def _say(report: Any, **facts: Any) -> None:
    report.write(json.dumps(facts) + "\n")


# -- in the parent ------------------------------------------------------------------------------------


def run(
    first: int, count: int, keep: Path | None, *, seconds: float | None = None, quiet: bool = True
) -> Tally:
    """Damage ``count`` files, seeds from ``first`` on; bad cases are copied to ``keep``."""
    import onnxruntime

    import lamina.ir.io
    import lamina.passes.fold  # noqa: F401  imported before forking

    onnxruntime.set_default_logger_severity(4)
    tally, started = Tally(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lamina-mutate-") as name:
        folder = Path(name)
        bases = make_bases(folder, BASES)
        work = folder / "work"
        seeds = list(range(first, first + count))
        while seeds:
            batch, seeds = seeds[:200], seeds[200:]
            while batch:
                work.mkdir(exist_ok=True)
                done = _batch(bases, batch, work, tally)
                _keep(work, tally, keep)
                shutil.rmtree(work)
                batch = batch[done:]
            if not quiet:
                spent = time.monotonic() - started
                print(
                    f"{tally.files} files, {len(tally.bad)} bad, {spent:.0f} s", file=sys.stderr, flush=True
                )
            if seconds is not None and time.monotonic() - started > seconds:
                break
    return tally


def _batch(bases: list[Path], seeds: list[int], folder: Path, tally: Tally) -> int:
    """Run one child; how many of ``seeds`` are done with, the one it died on included."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        code = 1
        try:
            _child(writer, bases, seeds, folder)
            code = 0
        finally:
            os._exit(code)
    os.close(writer)
    done, phase = 0, "lamina"
    for facts in _lines(reader, child):
        phase = facts["phase"]
        if phase == "done":
            done += 1
            _note(tally, facts)
    _, status = os.waitpid(child, 0)
    if done == len(seeds):
        return done
    how = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit {status >> 8}"
    if phase == "runtime":  # the damaged file itself kills ONNX Runtime: not ours to prevent
        _note(tally, {"seed": seeds[done], "outcome": "runtime dies", "what": how})
    else:
        what = "hang" if how == "SIGKILL" else "crash"
        _note(tally, {"seed": seeds[done], "outcome": what, "what": how})
    return done + 1


def _lines(reader: int, child: int) -> Iterator[dict[str, Any]]:
    """What the child says; it is killed when it says nothing for too long."""
    left = b""
    while True:
        ready, _, _ = select.select([reader], [], [], SECONDS)
        if not ready:
            os.kill(child, signal.SIGKILL)
        data = os.read(reader, 1 << 16)
        if not data:
            os.close(reader)
            return
        *lines, left = (left + data).split(b"\n")
        yield from (json.loads(line) for line in lines)


def _note(tally: Tally, facts: dict[str, Any]) -> None:
    tally.files += 1
    tally.outcomes[facts["outcome"]] += 1
    tally.slowest = max(tally.slowest, facts.get("seconds", 0.0))
    tally.undone.update(facts.get("undone", []))
    if "error" in facts:
        tally.errors[facts["error"]] += 1
    if facts.get("what", "").startswith("the model cannot be read:"):
        tally.unforeseen[facts["what"][:150]] += 1
    if facts["outcome"] not in GOOD or facts.get("error") == "VerificationError":
        tally.bad.append(facts)


def _keep(work: Path, tally: Tally, keep: Path | None) -> None:
    if keep is None:
        return
    for facts in tally.bad:
        place, target = work / f"case{facts['seed']}", keep / f"{facts['seed']}"
        if place.exists() and not target.exists():
            (place / "fifo").unlink(missing_ok=True)
            shutil.copytree(place, target, symlinks=True)
            (target / "outcome.json").write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    """Read the command line, run, print the tally; 1 when something bad happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="files to damage")
    parser.add_argument("--seed", type=int, default=0, help="number of the first")
    parser.add_argument("--seconds", type=float, default=None, help="stop after this long")
    parser.add_argument("--out", type=Path, default=Path("mutate-failures"), help="where bad cases go")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    given = parser.parse_args()
    tally = run(given.seed, given.count, given.out, seconds=given.seconds, quiet=given.quiet)
    print(json.dumps(vars(tally), indent=1))
    return 1 if tally.bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
