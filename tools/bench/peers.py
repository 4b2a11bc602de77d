"""Uniform quantizations of other tools: ONNX Runtime as its documentation recommends; all with no options."""

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


def nncf_default(
    model: Path, folder: Path, samples: dict[str, np.ndarray], names: list[str], batch: int
) -> Path:
    """NNCF's post-training quantization as it is with no options given; needs ``pip install nncf``."""
    import nncf

    path = folder / "nncf.onnx"
    data = nncf.Dataset(_batches(samples, names, batch))
    onnx.save(nncf.quantize(onnx.load(model), data), path)
    return path


def onnxsim_default(
    model: Path, folder: Path, samples: dict[str, np.ndarray], names: list[str], batch: int
) -> Path:
    """The static quantizer of onnxsim with no options but the samples; needs ``pip install onnxsim``."""
    import onnxsim

    path = folder / "onnxsim.onnx"
    onnx.save(onnxsim.quantize_static(str(model), _batches(samples, names, batch)), path)
    return path


def _batches(samples: dict[str, np.ndarray], names: list[str], batch: int) -> list[dict[str, np.ndarray]]:
    """Up to 128 calibration samples."""
    starts = range(0, min(len(samples[names[0]]), 128), batch)
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
