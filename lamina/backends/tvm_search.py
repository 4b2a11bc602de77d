"""Tuning from the outside: the time budget, the kept records, and whether the result is worth having."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.backends.backend import Feeds, Target
from lamina.backends.ort_probe import cpu
from lamina.backends.tvm_library import (
    _WORTH,
    Library,
    check,
    compare_speed,
    compile_header,
    compile_tuned,
    write_interface,
)
from lamina.backends.tvm_process import Report, TimeUp, TvmProcess, versions
from lamina.errors import BackendError, LaminaError, VerificationError
from lamina.ir.io import write_atomic

DEFAULT_TRIALS = 16
_COMPARE_S = 3.0
_RECORDS = ("database_workload.json", "database_tuning_record.json")
_PIN = "pip install --no-deps apache-tvm-ffi==0.1.14.post1"


@functools.lru_cache(maxsize=1)
def tuning_trouble() -> str | None:
    """Why tuning does not work here, or None; found by trying it in a child process, once."""
    try:
        with TvmProcess(1, "the tuning check") as process:
            process.ask({"do": "health"}, timeout=180.0)
    except BackendError as error:
        return error.what
    return None


def require_tuning() -> None:
    """Raise unless MetaSchedule works.

    Raises:
        BackendError: It does not; says what to install.
    """
    trouble = tuning_trouble()
    if trouble is not None:
        found = ", ".join(f"{k} {v}" for k, v in versions().items())
        raise BackendError(
            f"TVM cannot tune here ({found}): {trouble}",
            advice=f"newer FFI releases crash in it: {_PIN}; or leave tune= out of the target",
        )


def tune_library(
    library: Library, target: Target, folder: Path, feeds: Mapping[str, Feeds], report: Report | None
) -> Library:
    """Search schedules within ``tune=SECONDS``; the tuned library if right and faster, else this one.

    Raises:
        BackendError: Tuning does not work here, or the shapes are open.
    """
    require_tuning()
    if library.prepared.dynamic:
        raise BackendError(
            "TVM tunes fixed shapes only, and this model has open dims",
            where=library.prepared.where,
            advice="name the shapes in the target: &shapes=input:1x128",
        )
    database = _database(library, target)
    outcome = _search(library, target, folder, database, report)
    if not outcome["records"]:
        return _keep(
            library, target, {**outcome, "kept": "untuned", "reason": "nothing was recorded in time"}
        )
    tuned = compile_tuned(library, target, folder, database)
    try:
        tuned = replace(tuned, error=check(tuned.path, tuned.prepared, target, feeds))
    except VerificationError as error:
        return _keep(library, target, {**outcome, "kept": "untuned", "reason": f"wrong: {error.what}"})
    ratio = compare_speed([library.path, tuned.path], target, feeds["random"], _COMPARE_S)
    outcome = {**outcome, "tuned_over_untuned": ratio.median, "ratio_10_90": [ratio.low, ratio.high]}
    if ratio.median < _WORTH:
        return _keep(tuned, target, {**outcome, "kept": "tuned", "reason": "measured faster"})
    return _keep(library, target, {**outcome, "kept": "untuned", "reason": "measured no faster"})


def _keep(library: Library, target: Target, outcome: Mapping[str, Any]) -> Library:
    kept = replace(library, tuning=dict(outcome))
    write_interface(kept, target)
    return kept


def _database(library: Library, target: Target) -> Path:
    """Where the records of this program on this machine are kept."""
    name = json.dumps([library.lowered, library.cpu, cpu()[0], target.threads, versions()], sort_keys=True)
    root = os.environ.get("LAMINA_CACHE") or Path.home() / ".cache" / "lamina"
    return Path(root) / "tvm" / hashlib.sha256(name.encode()).hexdigest()[:32]


def _search(
    library: Library, target: Target, folder: Path, database: Path, report: Report | None
) -> dict[str, Any]:
    """Spend what of the budget earlier runs did not spend; what is known afterwards."""
    seconds = float(target.options["tune"])
    trials = int(target.options.get("trials", DEFAULT_TRIALS))
    state = _read_state(database)
    finished = state["finished"] and state["trials"] >= trials
    if finished or (state["trials"] >= trials and state["seconds"] >= seconds):
        return {**state, "records": _repair(database), "from_cache": True}
    database.mkdir(parents=True, exist_ok=True)
    header = {**compile_header(target), "do": "tune", "model": str(folder / "model.onnx")}
    header |= {"database": str(database), "trials": trials}
    start = time.monotonic()
    done = False
    with TvmProcess(target.threads, library.prepared.where) as process:
        try:
            process.ask(header, timeout=seconds, report=report)
            done = True
        except TimeUp:
            pass  # what was recorded until now counts
        except LaminaError as error:
            if not _repair(database):
                raise
            state["failure"] = error.what
    shutil.rmtree(database / "logs", ignore_errors=True)
    state |= {"seconds": state["seconds"] + time.monotonic() - start, "finished": done, "trials": trials}
    write_atomic(database / "state.json", json.dumps(state))
    return {**state, "records": _repair(database), "from_cache": False}


def _read_state(database: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((database / "state.json").read_text())
        return {
            "seconds": float(state["seconds"]),
            "finished": bool(state["finished"]),
            "trials": int(state["trials"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {"seconds": 0.0, "finished": False, "trials": 0}


def _repair(database: Path) -> int:
    """Cut what a killed search left half written; the number of whole records."""
    counts = []
    for name in _RECORDS:
        path = database / name
        if not path.exists():
            return 0
        lines = path.read_text(errors="replace").splitlines()
        whole = [line for line in lines if _is_json(line)]
        if len(whole) < len(lines) or not path.read_text(errors="replace").endswith("\n"):
            write_atomic(path, "".join(f"{line}\n" for line in whole))
        counts.append(len(whole))
    return counts[1]


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
