"""A process that holds models and times them on request: ``python -m lamina.backends._worker``.

It imports numpy and ONNX Runtime, nothing else, so that it starts fast and adds little to what it measures.
Requests and answers are frames (:mod:`._frames`) over stdin and stdout; it ends when stdin does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from lamina.backends import _session
from lamina.backends._frames import Frame, read_frame, write_frame

Run = Callable[[], Any]


class OrtRunner:
    """One ONNX Runtime session; makes timed calls of it."""

    def __init__(self, frame: Frame) -> None:
        asked = frame.header
        # The pool of a session nobody runs must not spin: it would slow every other process being measured.
        entries = {"session.force_spinning_stop": "1"}
        options = _session.make_options(
            asked["threads"], level=asked["level"], spin=asked["spin"], entries=entries
        )
        if asked.get("profile"):
            options.enable_profiling = True
            options.profile_file_prefix = asked["profile"]
        self.session = _session.make_session(frame.blob or asked["path"], options)
        self.input_names = [i.name for i in self.session.get_inputs()]
        self._codes = {i.name for i in self.session.get_inputs() if i.type == "tensor(int8)"}
        self.output_names = [o.name for o in self.session.get_outputs()]

    def prepare(self, feeds: Mapping[str, np.ndarray], bound: bool) -> Run:
        """A call without arguments that runs once; ``bound`` leaves copies of inputs and outputs out."""
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise ValueError(f"the feeds lack inputs {missing}")
        # a cache may hold codes where the original's holds floats; which codes changes no time
        own = {n: feeds[n].astype(np.int8) if n in self._codes else feeds[n] for n in self.input_names}
        if not bound:
            return lambda: self.session.run(None, own)
        binding = self.session.io_binding()
        for name, array in own.items():
            binding.bind_cpu_input(name, array)
        for name in self.output_names:
            binding.bind_output(name, "cpu")
        return lambda: self.session.run_with_iobinding(binding)


@dataclass
class _State:
    runners: dict[int, Any] = field(default_factory=dict)
    feeds: dict[str, Mapping[str, np.ndarray]] = field(default_factory=dict)
    calls: dict[tuple[int, str, bool], Run] = field(default_factory=dict)
    opened: int = 0


def _open(state: _State, frame: Frame) -> dict[str, Any]:
    module, _, attribute = frame.header["loader"].partition(":")
    make = (
        OrtRunner if module == __name__ or not module else getattr(importlib.import_module(module), attribute)
    )
    start = time.perf_counter()
    state.runners[state.opened] = make(frame)
    state.opened += 1
    return {"id": state.opened - 1, "seconds": time.perf_counter() - start}


def _close(state: _State, frame: Frame) -> dict[str, Any]:
    wanted = frame.header["id"]
    state.calls = {key: call for key, call in state.calls.items() if key[0] != wanted}
    state.runners.pop(wanted, None)
    return {}


def _feeds(state: _State, frame: Frame) -> dict[str, Any]:
    aliases = frame.header.get("aliases", {})
    state.feeds[frame.header["case"]] = {
        **frame.arrays,
        **{alias: frame.arrays[name] for alias, name in aliases.items()},
    }
    state.calls = {key: call for key, call in state.calls.items() if key[1] != frame.header["case"]}
    return {}


def _clock(cpu: bool) -> Callable[[], float]:
    """CPU time of this thread where it is asked for and fine enough, else wall time."""
    fine = cpu and time.get_clock_info("thread_time").resolution < 1e-6
    return time.thread_time if fine else time.perf_counter


def _time(state: _State, frame: Frame) -> dict[str, Any]:
    asked = frame.header
    key = (asked["id"], asked["case"], bool(asked["bound"]))
    if key not in state.calls:
        state.calls[key] = state.runners[key[0]].prepare(state.feeds[key[1]], key[2])
    call = state.calls[key]
    for _ in range(asked["warm"]):
        call()
    samples: list[float] = []
    clock = _clock(asked["cpu"])
    end = time.perf_counter() + asked["seconds"]
    while len(samples) < asked["least"] or (time.perf_counter() < end and len(samples) < asked["most"]):
        start = clock()
        call()
        samples.append(clock() - start)
    return {"samples": samples}


def _kernels(state: _State, frame: Frame) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        frame.header["profile"] = os.path.join(folder, "profile")
        runner = OrtRunner(frame)
        call = runner.prepare(state.feeds[frame.header["case"]], True)
        warm, runs = 2, frame.header["runs"]
        for _ in range(warm + runs):
            call()
        events = json.loads(Path(runner.session.end_profiling()).read_text())
    durations: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            key = (event["args"]["op_name"], event["name"])
            durations.setdefault(key, []).append(event["dur"] * 1e-6)
    seconds: dict[str, float] = {}
    for (kind, _), found in durations.items():
        each = len(found) // (warm + runs)  # nodes may share a name
        seconds[kind] = seconds.get(kind, 0.0) + median(found[warm * each :]) * each
    return {"kernels": seconds}


def _memory(state: _State, frame: Frame) -> dict[str, Any]:
    import onnxruntime  # noqa: F401  part of the baseline, not of what the model needs

    base = _high_water(reset=True)
    made = _open(state, frame)
    state.runners[made["id"]].prepare(frame.arrays, False)()
    return {"bytes": max(0, _high_water() - base)}


def _high_water(*, reset: bool = False) -> int:
    # trap: ru_maxrss survives exec: a child of a large process starts at its parent's mark. VmHWM does not.
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    if reset:
        # where this fails the mark stays at the peak of importing: a little less is counted
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    for line in status.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


_COMMANDS: dict[str, Callable[[_State, Frame], dict[str, Any]]] = {
    "open": _open,
    "close": _close,
    "feeds": _feeds,
    "time": _time,
    "kernels": _kernels,
    "memory": _memory,
}


def main() -> None:
    """Answer frames until stdin ends."""
    # Whatever the runtime prints must not land between frames: descriptor 1 becomes stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    gc.disable()
    state = _State()
    while (frame := read_frame(requests)) is not None:
        try:
            reply = _COMMANDS[frame.header["do"]](state, frame)
        except MemoryError:
            reply = {"error": "out of memory", "where": None}
        except Exception as error:  # everything goes back to the parent, which raises it
            text, place = _session.explain(error)
            reply = {"error": text or type(error).__name__, "where": place}
        write_frame(answers, Frame(reply))


if __name__ == "__main__":
    main()
