"""Uniform quantizations of other tools: ONNX Runtime as its documentation recommends; all with no options."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tools.bench.cases import Case
from tools.bench.quantize_tool import BLOCK_TOOLS, TOOLS

CALIBRATION_ROWS = 128
TIMEOUT_S = 600


def one_file(model: Path, folder: Path) -> Path:
    """The model with its weights in one file: the runtime's pre-processing cannot load several."""
    path = folder / f"{model.stem}.whole.onnx"
    if not path.exists():
        onnx.save(onnx.load(model), path)
    return path


def preprocessed(model: Path, folder: Path) -> Path:
    """After ONNX Runtime's own shape inference and optimization; as it is where that fails."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = folder / f"{model.stem}.pre.onnx"
    try:
        quant_pre_process(model, path, skip_symbolic_shape=True)
    except Exception as error:  # the peer's failure is a finding, the benchmark goes on with the plain file
        print(f"  quant_pre_process failed: {type(error).__name__}: {str(error)[:100]}")
        return model
    return path


def dynamic(model: Path, folder: Path, **options: Any) -> Path:
    """Dynamic int8, per channel; ``options`` go to the quantizer."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = folder / "ort_dynamic.onnx"
    quantize_dynamic(model, path, per_channel=True, weight_type=QuantType.QInt8, **options)
    return path


def static(
    model: Path,
    folder: Path,
    samples: dict[str, np.ndarray],
    names: list[str],
    batch: int,
    **options: Any,
) -> Path:
    """Static QDQ int8, per channel, min-max ranges over the calibration samples; ``options`` as above."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    path = folder / "ort_static.onnx"
    quantize_static(
        model,
        path,
        _reader(samples, names, batch),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **options,
    )
    return path


def default_dynamic(model: Path, folder: Path) -> Path:
    """Dynamic int8 as the tool does it with no options given."""
    from onnxruntime.quantization import quantize_dynamic

    path = folder / "ort_dynamic_default.onnx"
    quantize_dynamic(model, path)
    return path


def default_static(
    model: Path, folder: Path, samples: dict[str, np.ndarray], names: list[str], batch: int
) -> Path:
    """Static int8 as the tool does it with no options given."""
    from onnxruntime.quantization import quantize_static

    path = folder / "ort_static_default.onnx"
    quantize_static(model, path, _reader(samples, names, batch))
    return path


def write_samples(path: Path, parts: dict[str, dict[str, np.ndarray]], metric: str, batch: int) -> Path:
    """Samples as ``quantize_tool.py`` reads them: rows of the parts by name, beside the metric."""
    arrays = {f"{part}.{name}": rows for part, found in parts.items() for name, rows in found.items()}
    np.savez(path, metric=np.array(metric), batch=np.array(batch), **arrays)  # type: ignore[arg-type]
    return path


def benchmark_samples(path: Path, case: Case, data: dict[str, dict[str, np.ndarray]]) -> Path:
    """What the case's calibration and selection parts are to other tools: 128 rows, and all of them."""
    calibration = {k: v[:CALIBRATION_ROWS] for k, v in data["calibration"].items() if k != "labels"}
    parts = {"calibration": calibration, "selection": data["selection"]}
    return write_samples(path, parts, case.metric, case.batch_size)


def python_with(tool: str, pythons: Sequence[str]) -> str | None:
    """The first of these Pythons, this one before all, that has the tool's distribution; None: none has."""
    distribution = {**TOOLS, **BLOCK_TOOLS}[tool][0]
    code = f"import importlib.metadata as m; m.version({distribution!r})"
    for python in (sys.executable, *pythons):
        if not subprocess.run([python, "-c", code], capture_output=True, check=False).returncode:
            return python
    return None


def by_tool(tool: str, python: str, model: Path, samples: Path, output: Path) -> Path:
    """One other tool on one model, in a process of its own.

    Raises:
        RuntimeError: The tool failed or took too long; the first line of its error.
    """
    script = Path(__file__).with_name("quantize_tool.py")
    command = [python, str(script), tool, *(str(p.resolve()) for p in (model, samples, output))]
    ours = python == sys.executable  # another Python must not find this one's packages
    environment = {k: v for k, v in os.environ.items() if ours or k != "PYTHONPATH"}
    with tempfile.TemporaryDirectory() as folder:  # some leave files where they run
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
                cwd=folder,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {TIMEOUT_S} s") from None
    if not done.returncode and not output.exists():
        raise RuntimeError("ended without a model")  # as it is where nothing kept the metric
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1][:200])
    return output


def _batches(samples: dict[str, np.ndarray], names: list[str], batch: int) -> list[dict[str, np.ndarray]]:
    """Up to 128 calibration samples."""
    starts = range(0, min(len(samples[names[0]]), CALIBRATION_ROWS), batch)
    return [{n: samples[n][i : i + batch] for n in names} for i in starts]


def _reader(samples: dict[str, np.ndarray], names: list[str], batch: int) -> Any:
    """Up to 128 calibration samples, as the tool wants to be given them."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(_batches(samples, names, batch))

        def get_next(self) -> Any:
            return next(self.batches, None)

    return Reader()
