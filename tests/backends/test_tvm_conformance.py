"""Every operator the TVM backend accepts, on onnx's own node tests: it matches, or it was refused by name."""

from __future__ import annotations

import importlib.util
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from lamina.backends.backend import Target
from lamina.backends.tvm_import import prepare
from lamina.backends.tvm_library import Library, relative_error, write_interface
from lamina.backends.tvm_operators import ALLOWED
from lamina.backends.tvm_process import TvmProcess
from lamina.errors import BackendError, LaminaError, UnsupportedOperator

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("tvm") is None, reason="TVM is not installed"),
    pytest.mark.skipif(not os.environ.get("LAMINA_SLOW"), reason="takes minutes: set LAMINA_SLOW=1"),
]
TOLERANCE = {np.dtype(np.float16): 5e-3}
# Loud failures that stay: TVM's importer or compiler raises, nothing wrong comes back.
LOUD = (UnsupportedOperator, BackendError)
# Wrong in TVM and left to the comparison every compile makes; see docs/tvm.md.
KNOWN_WRONG = frozenset(
    {
        "test_averagepool_2d_ceil_last_window_starts_on_pad",
        "test_nonmaxsuppression_iou_threshold_boundary",
    }
)


def _cases() -> list[Any]:
    from onnx.backend.test.case.node import collect_testcases

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = collect_testcases(None)
    wanted = {name for domain, name in ALLOWED if not domain}
    return [
        c
        for c in cases
        if len(c.model.graph.node) == 1
        and c.model.graph.node[0].op_type in wanted
        and not c.model.graph.node[0].domain
        and all(v.type.HasField("tensor_type") for v in [*c.model.graph.input, *c.model.graph.output])
        and c.data_sets
    ]


def _array(value: Any) -> np.ndarray:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def _with_constants(case: Any) -> tuple[ir.Model, dict[str, np.ndarray], list[np.ndarray]]:
    """The case as models have it: what follows the first input is a weight."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    names = [v.name for v in model.graph.input]
    inputs, outputs = case.data_sets[0]
    arrays = dict(zip(names, map(_array, inputs), strict=True))
    for value in list(model.graph.input)[1:]:
        model.graph.initializer.append(numpy_helper.from_array(arrays.pop(value.name), value.name))
        model.graph.input.remove(value)
    return ir.from_proto(model), arrays, [_array(o) for o in outputs]


def test_accepted_means_equal(tmp_path: Path) -> None:
    target = Target.parse("tvm:llvm?threads=1")
    wrong, counts = [], {"equal": 0, "refused": 0, "loud": 0}
    compiler = TvmProcess(1, "conformance")
    runtime = TvmProcess(1, "conformance")
    for case in _cases():
        try:
            model, feeds, wanted = _with_constants(case)
            prepared = prepare(model, {}, None)
        except (LaminaError, ValueError, TypeError):
            counts["refused"] += 1
            continue
        path = tmp_path / f"{case.name}.so"  # trap: a path that was loaded once is not loaded again
        try:
            ir.save(prepared.model, tmp_path / "model.onnx")
            header = {
                "do": "build",
                "model": str(tmp_path / "model.onnx"),
                "library": str(path),
                "threads": 1,
            }
            reply = compiler.ask(header, timeout=120).header
            write_interface(Library(path, prepared, {}, "", reply["cpu"], 0.0), target)
            if not prepared.runtime_only:  # the library is chosen when TVM is imported: a fresh process
                runtime.close()
                runtime = TvmProcess(1, "conformance")
            runtime.ask({"do": "load", "library": str(path), "threads": 1})
            got = runtime.ask({"do": "run"}, feeds).arrays
        except LOUD as error:
            counts["loud"] += 1
            print(f"LOUD {case.name}: {error.what[:160]}")
            if compiler._child._process.poll() is not None:
                compiler = TvmProcess(1, "conformance")
            if runtime._child._process.poll() is not None:
                runtime = TvmProcess(1, "conformance")
            continue
        finally:
            path.unlink(missing_ok=True)
            if not prepared.runtime_only:
                runtime.close()
                runtime = TvmProcess(1, "conformance")
        errors = [relative_error(w, got[n]) for n, w in zip(prepared.outputs, wanted, strict=True)]
        allowed = max(TOLERANCE.get(w.dtype, 1e-4) for w in wanted)
        if max(errors) <= allowed:
            counts["equal"] += 1
        elif case.name not in KNOWN_WRONG:
            wrong.append(f"{case.name}: {max(errors):.2g}")
    compiler.close()
    runtime.close()
    print(counts)
    assert not wrong, "\n".join(wrong)
    assert counts["equal"] > 600
