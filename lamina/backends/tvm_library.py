"""From a prepared model to a library that was compared with ONNX Runtime, and tuned where that paid."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lamina.backends.backend import Case, Feeds, Target
from lamina.backends.measure import IsolatedTimer, Ratio
from lamina.backends.reference import compile_reference
from lamina.backends.tvm_batches import fixed_rows, run_in_pieces
from lamina.backends.tvm_import import Prepared, check_feeds
from lamina.backends.tvm_process import Report, TvmProcess, environment, versions
from lamina.errors import BackendError, LaminaError, VerificationError
from lamina.ir.examples import synthesize
from lamina.ir.io import save_model, write_atomic

LOADER = "lamina.backends.tvm_worker:TvmRunner"
TOLERANCE = 1e-4
_KEPT = 6
_WORTH = 0.98  # a tuned library must take less than this share of the untuned one's time


@dataclass(frozen=True)
class Library:
    """A compiled model that matches its reference.

    Attributes:
        path: The shared library; its interface lies beside it.
        prepared: What it was compiled from.
        kernels: Generated function or runtime routine -> calls.
        lowered: Hash of the lowered program (weights not included).
        cpu: The CPU it is machine code for, by LLVM's name.
        error: Worst relative error seen against the reference.
        tuning: What tuning did, or None where none was asked.
    """

    path: Path
    prepared: Prepared
    kernels: Mapping[str, int]
    lowered: str
    cpu: str
    error: float
    tuning: Mapping[str, Any] | None = None


class TvmExecutable:
    """A loaded library in a process of its own.

    Attributes:
        input_names: Names of the inputs, in order.
        output_names: Names of the outputs, in order.
        library: What it runs.
    """

    def __init__(self, path: Path, prepared: Prepared, threads: int, library: Library | None = None) -> None:
        self.input_names = tuple(port.name for port in prepared.inputs)
        self.output_names = prepared.outputs
        self.library = library
        self._prepared = prepared
        self._rows = fixed_rows(prepared)
        self._process = TvmProcess(threads, prepared.where)
        self._process.ask({"do": "load", "library": str(path), "threads": threads})

    def run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        """Run; arrays keyed by output name. Another number of rows than compiled for takes several runs.

        Raises:
            DataError: The feeds do not fit.
            BackendError: The library failed or its process died.
        """
        rows = self._rows
        counts = {array.shape[0] for array in feeds.values() if array.ndim}
        if rows is not None and len(counts) == 1 and counts not in ({rows}, {0}):
            return run_in_pieces(self._run, feeds, rows)
        return self._run(feeds)

    def _run(self, feeds: Feeds) -> dict[str, np.ndarray]:
        check_feeds(self._prepared.inputs, feeds, self._prepared.limit)
        return dict(self._process.ask({"do": "run"}, feeds).arrays)

    def close(self) -> None:
        """End the process."""
        self._process.close()

    def __enter__(self) -> TvmExecutable:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Store:
    """Libraries built in this process, the latest few, by model and target; files go when it does."""

    def __init__(self) -> None:
        self._built: OrderedDict[str, tuple[Library, Any]] = OrderedDict()

    def get(
        self, prepared: Prepared, target: Target, cases: Sequence[Feeds] = (), report: Report | None = None
    ) -> Library:
        """The library of a model for a target, built and checked when it is not there yet.

        Raises:
            LaminaError: See :func:`build`.
        """
        folder = tempfile.TemporaryDirectory(prefix="lamina-tvm-")
        files = save_model(prepared.model, Path(folder.name) / "model.onnx")
        key = _key(files, str(target))
        if key in self._built:
            folder.cleanup()
            self._built.move_to_end(key)
            library = self._built[key][0]
            if cases:
                check(library.path, library.prepared, target, _named(cases))
            return library
        library = build(prepared, target, Path(folder.name), cases, report)
        self._built[key] = (library, folder)
        while len(self._built) > _KEPT:
            self._built.popitem(last=False)[1][1].cleanup()
        return library


def _named(cases: Sequence[Feeds]) -> dict[str, Feeds]:
    return {f"case {number}": feeds for number, feeds in enumerate(cases)}


def build(
    prepared: Prepared, target: Target, folder: Path, cases: Sequence[Feeds], report: Report | None
) -> Library:
    """Compile ``folder/model.onnx``, compare it with the reference, tune it where asked.

    Raises:
        UnsupportedOperator: TVM's importer gave up.
        BackendError: TVM failed.
        VerificationError: The library computes something else than ONNX Runtime.
    """
    library = _compile(prepared, target, folder, "untuned.so")
    feeds = {**feeds_to_check(prepared), **_named(cases)}
    library = replace(library, error=check(library.path, prepared, target, feeds))
    if float(target.options.get("tune", 0)) <= 0:
        return library
    from lamina.backends.tvm_search import tune_library

    return tune_library(library, target, folder, feeds, report)


def compile_tuned(library: Library, target: Target, folder: Path, database: Path) -> Library:
    """Compile the same model again with recorded schedules."""
    return _compile(library.prepared, target, folder, "tuned.so", database)


def _compile(
    prepared: Prepared, target: Target, folder: Path, name: str, database: Path | None = None
) -> Library:
    path = folder / name
    header = {
        **compile_header(target),
        "do": "build",
        "model": str(folder / "model.onnx"),
        "library": str(path),
        "database": None if database is None else str(database),
    }
    if shutil.which("gcc") is None and shutil.which("clang") is None and shutil.which("cc") is None:
        raise BackendError("TVM needs a C compiler to link a library", advice="install gcc or clang")
    with TvmProcess(target.threads, prepared.where) as process:
        reply = process.ask(header).header
    library = Library(path, prepared, reply["kernels"], reply["lowered"], reply["cpu"], 0.0)
    write_interface(library, target)
    return library


def compile_header(target: Target) -> dict[str, Any]:
    """What the compiling process is told about the target."""
    return {"threads": target.threads, "mcpu": target.options.get("mcpu")}


def write_interface(library: Library, target: Target) -> Path:
    """Write what the loader needs to know beside the library."""
    prepared = library.prepared
    text = {
        "inputs": [
            {"name": p.name, "dtype": str(p.numpy_dtype), "shape": list(p.shape)} for p in prepared.inputs
        ],
        "outputs": list(prepared.outputs),
        "limit": prepared.limit,
        "runtime_only": prepared.runtime_only,
        "threads": target.threads,
        "cpu": library.cpu,
        "kernels": dict(library.kernels),
        "relative_error": library.error,
        "tuning": None if library.tuning is None else dict(library.tuning),
        "versions": versions(),
    }
    path = library.path.with_name(f"{library.path.name}.json")
    write_atomic(path, json.dumps(text, indent=1) + "\n")
    return path


# -- checking ---------------------------------------------------------------------------------------


def feeds_to_check(prepared: Prepared) -> dict[str, Feeds]:
    """Random inputs, zeros, large values; where dims are open, also half their sizes."""
    example = synthesize(prepared.model)
    feeds: dict[str, Feeds] = {
        "random": example,
        "zero": {name: np.zeros_like(array) for name, array in example.items()},
        "large": {name: _large(array) for name, array in example.items()},
    }
    if prepared.dynamic:
        feeds["smaller"] = {p.name: _halved(example[p.name], p.shape) for p in prepared.inputs}
    return feeds


def _large(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f":
        return array * array.dtype.type(100)
    return np.full_like(array, array.max()) if array.size else array


def _halved(array: np.ndarray, shape: Sequence[object]) -> np.ndarray:
    kept = []
    for dim, size in zip(shape, array.shape, strict=True):
        kept.append(slice(None) if isinstance(dim, int) else slice(0, -(-size // 2)))
    return np.array(array[tuple(kept)])


def check(path: Path, prepared: Prepared, target: Target, feeds: Mapping[str, Feeds]) -> float:
    """Compare a library with ONNX Runtime, every optimization off; the worst relative error.

    Made-up edge inputs the reference itself refuses are skipped; the random one is not.

    Raises:
        VerificationError: An output differs; names it, by how much and on which input.
    """
    tolerance = float(target.options.get("tolerance", TOLERANCE))
    reference = compile_reference(prepared.program.model)
    worst = 0.0
    with TvmExecutable(path, prepared, target.threads) as executable:
        for kind, arrays in feeds.items():
            try:
                wanted = reference.run(arrays)
            except LaminaError:
                if kind == "random":
                    raise
                continue
            got = executable.run(arrays)
            for name, array in wanted.items():
                error = relative_error(array, got[name])
                if not error <= tolerance:
                    raise _wrong(prepared, name, kind, error, tolerance)
                worst = max(worst, error)
    return worst


def _wrong(prepared: Prepared, name: str, kind: str, error: float, tolerance: float) -> VerificationError:
    how = "has another type, shape, or other NaNs or integers"
    if np.isfinite(error):
        how = f"is off by {error:.1e} of its largest value, allowed is {tolerance:.0e},"
    return VerificationError(
        f"TVM's output '{name}' {how} on {kind} inputs",
        where=prepared.where,
        advice="use target ort:cpu; where the difference is to be expected, &tolerance=1e-3 allows more",
    )


def relative_error(wanted: np.ndarray, got: np.ndarray) -> float:
    """Largest difference as a share of the largest wanted value; infinite where the arrays are unlike."""
    if wanted.dtype != got.dtype or wanted.shape != got.shape:
        return float("inf")
    if wanted.dtype.kind not in "fc":
        return 0.0 if np.array_equal(wanted, got) else float("inf")
    a, b = wanted.astype(np.float64), got.astype(np.float64)
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    difference = np.abs(a[finite] - b[finite]).max(initial=0.0)
    return float(difference / max(np.abs(a[finite]).max(initial=0.0), 1e-6))


def compare_speed(paths: Sequence[Path], target: Target, feeds: Feeds, seconds: float) -> Ratio:
    """Time of the second library over the first's, alternating, each in a process of its own."""
    workload = (Case("check", feeds),)
    variables = environment(target.threads)
    with IsolatedTimer(target, workload, loader=LOADER, environment=variables) as timer:
        first, second = timer.add_all(paths)
        return timer.time([first, second], None, seconds).ratio(second, first, "check")


def _key(files: Sequence[Path], target: str) -> str:
    digest = hashlib.sha256(target.encode())
    for path in files:
        with path.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
