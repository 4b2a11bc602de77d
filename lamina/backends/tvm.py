"""TVM, whole programs: ``tvm:llvm?threads=N[&shapes=in:1x3][&tune=SECONDS][&trials=N]``; see docs/tvm.md."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from lamina.backends import tvm_loader
from lamina.backends.backend import Audit, Case, Feeds, Latency, Target, Workload
from lamina.backends.ort_probe import cpu, kernels_of
from lamina.backends.tvm_import import parse_shapes, prepare
from lamina.backends.tvm_library import LOADER, Library, Store, TvmExecutable, write_interface
from lamina.backends.tvm_operators import ALLOWED, NEWEST_OPSET, plain_kernel
from lamina.backends.tvm_process import Report, TvmProcess, environment, require_tvm, versions
from lamina.errors import BackendError, BudgetError

if TYPE_CHECKING:
    from lamina.backends.measure import IsolatedTimer

_COMPUTING = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})
_VIEWS = frozenset({"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Identity"})
_EXAMPLE = "tvm:llvm?threads=2&shapes=tokens:1x128&tune=60&trials=16"
_STORE = Store()


class Tvm:
    """The backend ``tvm``: compiles through Relax for this CPU, in processes of its own.

    Args:
        report: Told ``(candidates measured, at most, note)`` while tuning.
    """

    name = "tvm"

    def __init__(self, report: Report | None = None) -> None:
        self._report = report

    def check(self, target: Target) -> None:
        """Raise unless ``target`` has a device and options this backend knows, and TVM is installed.

        Raises:
            BudgetError: Unknown device, option or option value.
            BackendError: TVM is not installed.
        """
        if target.device not in ("llvm", "cpu"):
            raise BudgetError(
                f"target '{target}': backend tvm has no device '{target.device}'",
                advice="write it like tvm:llvm?threads=2",
            )
        for key, value in target.options.items():
            if key not in _OPTIONS:
                known = ", ".join(sorted(_OPTIONS))
                raise BudgetError(
                    f"target '{target}': backend tvm does not know '{key}'", advice=f"known: {known}"
                )
            if not _OPTIONS[key](value):
                raise BudgetError(
                    f"target '{target}': {key}={value} is not understood", advice=f"like {_EXAMPLE}"
                )
        require_tvm()

    def capabilities(self, target: Target) -> Mapping[str, Any]:
        """What TVM can do here: no option has kernels of its own, so ``forms`` is empty.

        Returns:
            ``device``, ``forms``, ``refused`` (options whose operators it cannot import), ``opset``,
            ``operators`` (how many it may be given), ``operator_prices`` (False), ``versions``, ``tuning``
            (None, or why it does not work).
        """
        self.check(target)
        return _describe(target.threads, target.options.get("mcpu"))

    def compile(
        self, model: ir.Model | Path, target: Target, *, cases: Sequence[Feeds] = ()
    ) -> TvmExecutable:
        """Compile, compare with ONNX Runtime, tune where asked; the program runs in a process of its own.

        Args:
            model: The model or its file.
            target: Where; ``shapes`` fixes input shapes, ``tune`` asks for tuning.
            cases: Further inputs the outputs must match on, besides random, zero and large ones.

        Raises:
            UnsupportedOperator: TVM cannot import an operator; names node and operator.
            BackendError: TVM is not installed, or failed.
            VerificationError: The compiled program computes something else than ONNX Runtime.
        """
        library = self._library(model, target, cases)
        return TvmExecutable(library.path, library.prepared, target.threads, library)

    def measure(
        self, models: Sequence[Path], target: Target, workload: Workload, *, seconds: float
    ) -> list[list[Latency]]:
        """Latency of each model on each case, in alternation, each model in a process of its own.

        Raises:
            LaminaError: A model cannot be compiled, is wrong on a case, or its process died.
        """
        from lamina.backends.measure import IsolatedTimer

        feeds = [case.feeds for case in workload]
        paths = [self._library(model, target, feeds).path for model in models]
        variables = environment(target.threads)
        with IsolatedTimer(target, workload, loader=LOADER, environment=variables) as timer:
            numbers = timer.add_all(paths)
            timings = timer.time(numbers, None, seconds)
        return [[timings.latency(number, case.name) for case in workload] for number in numbers]

    def timer(self, target: Target, workload: Workload, *, seed: int = 0) -> IsolatedTimer:
        """A timer that compiles what it is given, compares it with ONNX Runtime, and times the libraries.

        Raises:
            LaminaError: See :meth:`compile`.
        """
        from lamina.backends.tvm_timer import CompilingTimer

        self.check(target)
        feeds = [case.feeds for case in workload]
        return CompilingTimer(
            lambda path: self._library(path, target, feeds).path, target, workload, seed=seed
        )

    def draft(self, target: Target) -> Target:
        """``target`` without tuning: candidates are compared untuned, the original and the result tuned."""
        kept = {k: v for k, v in target.options.items() if k not in ("tune", "trials")}
        return replace(target, options=kept)

    def peak_memory(self, model: Path, target: Target, case: Case) -> int:
        """Peak resident bytes a fresh process adds, on top of TVM's runtime, to load and run ``model``."""
        library = self._library(model, target, [case.feeds])
        with TvmProcess(target.threads, str(model)) as process:
            header = {"do": "memory", "library": str(library.path), "threads": target.threads}
            return int(process.ask(header, case.feeds).header["bytes"])

    def audit(self, model: ir.Model, target: Target, planned: Mapping[str, str] | None = None) -> Audit:
        """Compile, then count the generated functions by name; whatever was quantized fell back to float.

        Args:
            model: The model as it would be deployed.
            target: Where.
            planned: Name of a weighted node -> name of the option it was given.
        """
        library = self._library(model, target)
        counts: dict[str, int] = {}
        for name, count in sorted(library.kernels.items()):
            counts[plain_kernel(name)] = counts.get(plain_kernel(name), 0) + count
        fallen = dict.fromkeys(_quantized(model))
        fallen.update(dict.fromkeys(node for node, option in (planned or {}).items() if kernels_of(option)))
        return Audit(counts, tuple(fallen))

    def package(self, model: ir.Model, target: Target, directory: Path) -> list[Path]:
        """Write ``model.so``, ``model.so.json`` and ``run_tvm.py``, which needs TVM's runtime only."""
        library = self._library(model, target)
        path, loader = directory / "model.so", directory / "run_tvm.py"
        _copy(library.path, path)
        _copy(Path(tvm_loader.__file__), loader)
        moved = replace(library, path=path)
        return [path, write_interface(moved, target), loader]

    def _library(self, model: ir.Model | Path, target: Target, cases: Sequence[Feeds] = ()) -> Library:
        self.check(target)
        shapes = parse_shapes(target.options.get("shapes", ""))
        bound = target.options.get("bound")
        prepared = prepare(model, shapes, None if bound is None else int(bound))
        return _STORE.get(prepared, target, cases, self._report)


@functools.lru_cache(maxsize=8)
def _describe(threads: int, mcpu: str | None) -> Mapping[str, Any]:
    from lamina.backends.tvm_search import tuning_trouble

    with TvmProcess(threads, "the description of TVM") as process:
        header = {"do": "describe", "threads": threads, "mcpu": mcpu}
        reply = process.ask(header, timeout=180.0).header
    if not reply["llvm"]:
        raise BackendError("this TVM was built without LLVM", advice="install the wheel docs/tvm.md names")
    model, flags = cpu()
    found = {
        "device": f"{model} as {reply['cpu']}",
        "flags": flags,
        "forms": MappingProxyType({}),
        "refused": ("stored-w4", "stored-w3", "stored-w2", "stored-f8", "stored-mxf8"),
        "float16_kernels": (),
        "opset": NEWEST_OPSET,
        "operators": len(ALLOWED),
        "operator_prices": False,
        "tuning": tuning_trouble(),
        "versions": versions(),
    }
    return MappingProxyType(found)


def _quantized(model: ir.Model) -> Iterator[str]:
    """Operators that read integers: TVM computes them in float32, or int32 for MatMulInteger."""
    for node in model.graph.all_nodes():
        if node.op_type == "MatMulInteger" or (
            node.op_type in _COMPUTING and any(_dequantized(v) for v in node.inputs)
        ):
            yield node.name or ""


def _dequantized(value: ir.Value | None) -> bool:
    while value is not None and (maker := value.producer()) is not None:
        if maker.op_type == "DequantizeLinear":
            return True
        if maker.op_type not in _VIEWS:
            return False
        value = maker.inputs[0]
    return False


def _copy(source: Path, target: Path) -> None:
    partial = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, partial)
    partial.replace(target)


def _is_number(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _is_count(text: str) -> bool:
    return text.isdigit() and int(text) > 0


_OPTIONS: dict[str, Callable[[str], bool]] = {
    "tune": _is_number,
    "trials": _is_count,
    "tolerance": _is_number,
    "bound": _is_count,
    "mcpu": bool,
    "shapes": lambda text: bool(parse_shapes(text)),
}
