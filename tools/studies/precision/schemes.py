"""Ways to make a model small: ours, form by form and rounding by rounding, and ONNX Runtime's quantizers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize import Quantize
from lamina.passes.quantize.rounding import Rounding, round_options
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move

Scheme = Callable[[Program, Dataset], onnx.ModelProto]


def ours(form: str, method: str, *, clipping: str = "mse", rounding: str = "nearest", **how: Any) -> Scheme:
    """Every Conv, Gemm and MatMul in one form; ``method`` of :class:`Rounding`. Tables stay float."""

    def make(program: Program, data: Dataset) -> onnx.ModelProto:
        quantize = Quantize(forms=(form,), clipping=clipping, rounding=rounding)  # type: ignore[arg-type]
        chosen: list[tuple[Site, Option]] = []
        for site in quantize.sites(program):
            if isinstance(site, Site) and site.kind != "embedding":
                chosen += [(site, o) for o in quantize.options(site, program, None, None)]
        options = round_options(program, chosen, data, Rounding(method, **how), threads=1)
        moves = [Move(site, option) for (site, _), option in zip(chosen, options, strict=True)]
        return ir.to_proto(apply_moves(program, moves).model)

    return make


def onnxruntime_blocks(algorithm: str, bits: int = 4, block: int = 32) -> Scheme:
    """ONNX Runtime's MatMulNBits quantizer: ``default`` (nearest), ``k_quant``, ``hqq`` or ``gptq``."""

    def make(program: Program, data: Dataset) -> onnx.ModelProto:
        from onnxruntime.quantization import matmul_nbits_quantizer as tool

        logging.getLogger(tool.__name__).setLevel(logging.ERROR)
        config = {
            "default": lambda: tool.DefaultWeightOnlyQuantConfig(block_size=block, bits=bits),
            "k_quant": lambda: tool.KQuantWeightOnlyQuantConfig(),
            "hqq": lambda: tool.HQQWeightOnlyQuantConfig(block_size=block, bits=bits),
            "gptq": lambda: tool.GPTQWeightOnlyQuantConfig(_reader(data), block_size=block, actorder=True),
        }[algorithm]()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(ir.to_proto(program.model), path)
            made = tool.MatMulNBitsQuantizer(str(path), bits=bits, block_size=block, algo_config=config)
            made.process()
            model = made.model
            return getattr(model, "model", model)

    return make


def _reader(data: Dataset) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: list[Mapping[str, np.ndarray]] = [dict(b.inputs) for b in data.batches()]

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return self.batches.pop(0) if self.batches else None

    return Reader()


# name -> (bits of a weight, whose it is, how)
SCHEMES: dict[str, tuple[int, str, Scheme]] = {
    "stored-w8 nearest": (8, "lamina", ours("stored-w8", "nearest")),
    "stored-w8 descent": (8, "lamina", ours("stored-w8", "descent")),
    "stored-f8 nearest": (8, "lamina", ours("stored-f8", "nearest")),
    "stored-mxf8 nearest": (8, "lamina", ours("stored-mxf8", "nearest")),
    "blocks-w4 nearest": (4, "lamina", ours("w4", "nearest")),
    "blocks-w4 descent": (4, "lamina", ours("w4", "descent")),
}
for _bits in (4, 3, 2):
    _form = f"stored-w{_bits}"
    SCHEMES[f"{_form} minmax"] = (_bits, "peer", ours(_form, "nearest", clipping="minmax"))
    SCHEMES[f"{_form} nearest"] = (_bits, "lamina", ours(_form, "nearest"))
    SCHEMES[f"{_form} higgs"] = (_bits, "lamina", ours(_form, "nearest", rounding="higgs"))
    SCHEMES[f"{_form} gptq"] = (_bits, "lamina", ours(_form, "gptq", propagate=0.0))
    SCHEMES[f"{_form} gptq+qep"] = (_bits, "lamina", ours(_form, "gptq"))
    SCHEMES[f"{_form} descent"] = (_bits, "lamina", ours(_form, "descent"))
SCHEMES |= {
    f"onnxruntime {name}": (4, "peer", onnxruntime_blocks(name))
    for name in ("default", "k_quant", "hqq", "gptq")
}
