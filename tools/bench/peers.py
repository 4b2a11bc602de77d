"""ONNX Runtime's own uniform quantizations, as its documentation recommends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx


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
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            count = len(samples[names[0]])
            starts = range(0, min(count, 128), batch)
            self.batches = iter([{n: samples[n][i : i + batch] for n in names} for i in starts])

        def get_next(self) -> Any:
            return next(self.batches, None)

    path = folder / "ort_static.onnx"
    quantize_static(
        model,
        path,
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **options,
    )
    return path
