"""A process that compiles for TVM, or runs what was compiled: ``python -m lamina.backends.tvm_worker``.

TVM reads its thread count when it is imported, and a bad graph or index can take the process down with it, so
lamina never imports TVM itself. Requests and answers are frames (:mod:`._frames`) over stdin and stdout.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lamina.backends._frames import Frame, read_frame, write_frame
from lamina.backends._worker import _high_water
from lamina.backends.tvm_loader import Library, configure, read_interface

Reply = Frame | dict[str, Any]


class ImportFailed(Exception):
    """TVM's importer gave up; ``where`` is the node it was at."""

    def __init__(self, text: str, where: str | None) -> None:
        super().__init__(text)
        self.where = where


class TvmRunner:
    """One compiled library for :mod:`._worker`; makes timed calls of it."""

    def __init__(self, frame: Frame) -> None:
        self.library = Library(frame.header["path"], frame.header["threads"])
        self.input_names = self.library.input_names

    def prepare(self, feeds: Mapping[str, np.ndarray], bound: bool) -> Callable[[], Any]:
        """A call without arguments that runs once; ``bound`` leaves copies of inputs and outputs out."""
        library = self.library
        own = {name: feeds[name] for name in self.input_names}
        library.check(own)
        if not bound:
            return lambda: library.run(own)
        tensors = library.tensors(own)
        return lambda: library.call(tensors)


# -- compiling --------------------------------------------------------------------------------------


def make_target(header: Mapping[str, Any]) -> Any:
    """TVM's target; MetaSchedule needs the number of cores in it."""
    import tvm
    from tvm.target.codegen import llvm_get_system_cpu

    cpu = header.get("mcpu") or llvm_get_system_cpu()
    return tvm.target.Target({"kind": "llvm", "mcpu": cpu, "num-cores": header["threads"]})


def lower(path: str, target: Any) -> Any:
    """Import a model and lower it to fused loop nests; the lowered module."""
    import onnx
    import tvm
    from tvm import relax
    from tvm.relax.backend import cpu_generic
    from tvm.relax.frontend.onnx import from_onnx, onnx_frontend

    at: list[str] = []
    importer = onnx_frontend.ONNXGraphImporter
    convert = importer._convert_operator

    def traced(self: Any, op_name: str, inputs: Any, attrs: Any, opset: Any) -> Any:
        at[:] = [f"node '{attrs['tvm_custom']['name']}' ({op_name})"]
        return convert(self, op_name, inputs, attrs, opset)

    importer._convert_operator = traced
    try:
        module = from_onnx(onnx.load(path))
    except Exception as error:
        raise ImportFailed(_brief(error), at[0] if at else None) from error
    finally:
        importer._convert_operator = convert
    module = relax.transform.DecomposeOpsForInference()(module)
    passes = cpu_generic.library_dispatch_passes(target) + cpu_generic.legalize_passes(target)
    with target:
        return tvm.transform.Sequential(passes)(module)


def kernels(module: Any) -> dict[str, int]:
    """How often the lowered program calls each generated function or runtime routine."""
    from tvm import relax
    from tvm.ir import GlobalVar, Op

    counts: Counter[str] = Counter()

    def visit(node: Any) -> None:
        if not isinstance(node, relax.Call):
            return
        name = node.op.name if isinstance(node.op, Op) else ""
        if name.startswith("relax.call_tir") or name == "relax.call_dps_packed":
            callee = node.args[0]
            counts[callee.name_hint if isinstance(callee, GlobalVar) else str(callee.global_symbol)] += 1
        elif name and name not in ("relax.shape_to_tensor", "relax.null_value"):
            counts[name.removeprefix("relax.")] += 1

    relax.analysis.post_order_visit(module["main"].body, visit)
    return dict(counts)


def _build(frame: Frame) -> Reply:
    import tvm
    from tvm import relax

    asked, start = frame.header, time.perf_counter()
    target = make_target(asked)
    module = lower(asked["model"], target)
    reply: dict[str, Any] = {"kernels": kernels(module), "import_s": time.perf_counter() - start}
    reply["lowered"] = hashlib.sha256(module.script(show_meta=False).encode()).hexdigest()
    reply["cpu"] = str(target.attrs["mcpu"])
    if asked.get("database"):
        from lamina.backends.tvm_tune import apply_database

        module = apply_database(module, target, asked["database"])
    start = time.perf_counter()
    executable = tvm.compile(module, target=target, relax_pipeline=relax.get_default_pipeline(target))
    executable.export_library(asked["library"])
    return {**reply, "compile_s": time.perf_counter() - start}


def _tune(frame: Frame) -> Reply:
    from lamina.backends.tvm_tune import tune

    asked = frame.header
    target = make_target(asked)
    return tune(lower(asked["model"], target), target, asked, _report)


def _health(frame: Frame) -> Reply:
    """Everything tuning needs, tried on the smallest thing there is; a broken FFI crashes here, not later."""
    import tvm

    for name in ("cloudpickle", "psutil", "xgboost", "tornado"):
        importlib.import_module(name)
    tvm.ir.load_json(tvm.ir.save_json(tvm.tirx.IntImm("int32", 3)))
    from lamina.backends import tvm_intrinsics

    tvm_intrinsics.load()
    importlib.import_module("tvm.s_tir.meta_schedule")
    return {}


def _describe(frame: Frame) -> Reply:
    import tvm

    target = make_target(frame.header)
    enabled = bool(tvm.runtime.enabled("llvm"))
    return {"cpu": str(target.attrs["mcpu"]), "llvm": enabled, "version": tvm.__version__}


# -- running ----------------------------------------------------------------------------------------

_open: dict[str, Library] = {}


def _load(frame: Frame) -> Reply:
    _open["library"] = Library(frame.header["library"], frame.header["threads"])
    return {}


def _run(frame: Frame) -> Reply:
    return Frame({}, _open["library"].run(frame.arrays))


def _memory(frame: Frame) -> Reply:
    configure(read_interface(frame.header["library"]))
    import tvm.runtime
    import tvm.runtime.vm  # noqa: F401  the runtime is part of the baseline, as ONNX Runtime is of its own

    base = _high_water(reset=True)
    Library(frame.header["library"], frame.header["threads"]).run(frame.arrays)
    return {"bytes": max(0, _high_water() - base)}


# -- answering --------------------------------------------------------------------------------------

_COMMANDS: dict[str, Callable[[Frame], Reply]] = {
    "build": _build,
    "tune": _tune,
    "health": _health,
    "describe": _describe,
    "load": _load,
    "run": _run,
    "memory": _memory,
}
_answers: list[Any] = []


def _report(done: int, total: int, note: str) -> None:
    write_frame(_answers[0], Frame({"progress": [done, total, note]}))


def _brief(error: BaseException) -> str:
    """The telling line of an error: TVM's end in one, after pages of stack."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if "Error" in line or "Check failed" in line or "expected" in line.lower()]
    text = (told or lines or [type(error).__name__])[-1]
    return f"{type(error).__name__}: {text[:400]}"


def main() -> None:
    """Answer frames until stdin ends."""
    # Whatever TVM, LLVM or the linker print must not land between frames, and must not read them either.
    _answers.append(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)
    requests = os.fdopen(os.dup(0), "rb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    while (frame := read_frame(requests)) is not None:
        try:
            reply = _COMMANDS[frame.header["do"]](frame)
        except ImportFailed as error:
            reply = {"error": str(error), "kind": "import", "where": error.where}
        except MemoryError:
            reply = {"error": "out of memory", "kind": "memory"}
        except Exception as error:  # everything goes back to the parent, which raises it
            reply = {"error": _brief(error), "kind": type(error).__name__}
        write_frame(_answers[0], reply if isinstance(reply, Frame) else Frame(reply))


if __name__ == "__main__":
    main()
