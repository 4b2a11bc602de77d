"""Ways to make a model small: ours, form by form and rounding by rounding, and other tools' quantizers."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.low_rank_path import add_paths
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize import Quantize
from lamina.passes.quantize.rounding import Rounding, round_options
from lamina.passes.quantize.token_weights import attention_received
from lamina.planner.apply import apply_moves
from lamina.planner.mend import standing
from lamina.planner.plan import Move
from lamina.quality import get_metric
from tools.bench import peers
from tools.bench.quantize_tool import BLOCK_TOOLS

RECEIVED = "attention_received"
Scheme = Callable[[Program, Dataset], onnx.ModelProto]


def ours(
    form: str,
    method: str,
    *,
    clipping: str = "mse",
    rounding: str = "nearest",
    block: int = 32,
    rank: int = 0,
    head: str = "",
    metric: str = "",
    **how: Any,
) -> Scheme:
    """Every Conv, Gemm and MatMul in one form; ``method`` of :class:`Rounding`. Tables stay float.

    With a rank, low-rank paths (eora) beside the rounded operators as well. ``head`` is the form of operators
    whose result is an output of the model, where it is another. ``metric`` is one whose loss ``output`` looks
    at too.
    """

    def make(program: Program, data: Dataset) -> onnx.ModelProto:
        quantize = Quantize(forms=(form,), clipping=clipping, rounding=rounding, block=block)  # type: ignore[arg-type]
        special = replace(quantize, forms=(head,)) if head else quantize
        outputs = {v.producer().name for v in program.graph.outputs if v.producer() is not None}
        chosen: list[tuple[Site, Option]] = []
        for site in quantize.sites(program):
            if isinstance(site, Site) and site.kind != "embedding":
                by = special if outputs.intersection(site.nodes) else quantize
                chosen += [(site, o) for o in by.options(site, program, None, None)]
        task = get_metric(metric, program) if metric else None
        options = round_options(program, chosen, data, Rounding(method, **how), metric=task, threads=1)
        moves = [Move(site, option) for (site, _), option in zip(chosen, options, strict=True)]
        made = apply_moves(program, moves)
        if rank:
            stands_for = standing(moves, made)
            made = add_paths(program, made, data, rank=rank, stands_for=stands_for, threads=1).program
        return ir.to_proto(made.model)

    return make


def by_attention(scheme: Scheme) -> Scheme:
    """``scheme`` on data that says how much attention each token receives (rsq)."""

    def make(program: Program, data: Dataset) -> onnx.ModelProto:
        received = attention_received(program, data, threads=1)
        return scheme(program, replace(data, extras={**data.extras, RECEIVED: received}))

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


def by_tool(tool: str, pythons: Sequence[str]) -> Scheme:
    """Another tool's 4-bit weight-only quantizer, in a process of its own."""

    def make(program: Program, data: Dataset) -> onnx.ModelProto:
        python = peers.python_with(tool, pythons)
        if python is None:
            raise RuntimeError(f"no Python given has {BLOCK_TOOLS[tool][0]}")
        rows: dict[str, list[np.ndarray]] = {}
        for batch in data.batches():
            for name, values in batch.inputs.items():
                rows.setdefault(name, []).append(values)
        calibration = {name: np.concatenate(parts) for name, parts in rows.items()}
        with tempfile.TemporaryDirectory() as folder:
            path, output = Path(folder) / "model.onnx", Path(folder) / "made.onnx"
            onnx.save(ir.to_proto(program.model), path)
            samples = peers.write_samples(
                Path(folder) / "samples.npz", {"calibration": calibration}, "", data.batch_size
            )
            made = onnx.load(peers.by_tool(tool, python, path, samples, output))
        return _with_outputs(made, [value.name or "" for value in program.graph.outputs])

    return make


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with its outputs named so: Olive names one after the operator that it put there."""
    for value, name in zip(model.graph.output, names, strict=True):
        if value.name != name:
            model.graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
            value.name = name
    return model


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
    "blocks-w4 descent+rsq": (4, "lamina", by_attention(ours("w4", "descent", weights=RECEIVED))),
    "blocks-w4 gptq": (4, "lamina", ours("w4", "gptq", propagate=0.0)),
    "blocks-w4 gptq+rsq": (4, "lamina", by_attention(ours("w4", "gptq", propagate=0.0, weights=RECEIVED))),
    "blocks-w4 output": (4, "lamina", ours("w4", "output")),
}
for _bits in (4, 3, 2):
    _form = f"stored-w{_bits}"
    SCHEMES[f"{_form} minmax"] = (_bits, "peer", ours(_form, "nearest", clipping="minmax"))
    SCHEMES[f"{_form} nearest"] = (_bits, "lamina", ours(_form, "nearest"))
    SCHEMES[f"{_form} higgs"] = (_bits, "lamina", ours(_form, "nearest", rounding="higgs"))
    SCHEMES[f"{_form} gptq"] = (_bits, "lamina", ours(_form, "gptq", propagate=0.0))
    SCHEMES[f"{_form} gptq+qep"] = (_bits, "lamina", ours(_form, "gptq"))
    SCHEMES[f"{_form} descent"] = (_bits, "lamina", ours(_form, "descent"))
    SCHEMES[f"{_form} output"] = (_bits, "lamina", ours(_form, "output"))
SCHEMES |= {
    f"stored-w4 x16 {method}": (4, "lamina", ours("stored-w4", method, block=16))
    for method in ("nearest", "descent", "output")
}
SCHEMES["stored-w4 x16 output, longer"] = (
    4,
    "lamina",
    ours("stored-w4", "output", block=16, vectors=32768, passes=24, rounds=24),
)
SCHEMES |= {
    f"stored-w4{name} output, own loss": (
        4,
        "lamina",
        ours("stored-w4", "output", block=block, metric="cross-entropy"),
    )
    for name, block in (("", 32), (" x16", 16))
}
SCHEMES |= {
    f"stored-w4{name} {method}, head in 8": (
        4,
        "lamina",
        ours("stored-w4", method, block=block, head="stored-w8"),
    )
    for name, block in (("", 32), (" x16", 16))
    for method in ("descent", "output")
}
for _bits, _method, _rank in ((4, "nearest", 16), (4, "descent", 4), (4, "descent", 16), (2, "descent", 16)):
    SCHEMES[f"stored-w{_bits} {_method}+eora-{_rank}"] = (
        _bits,
        "lamina",
        ours(f"stored-w{_bits}", _method, rank=_rank),
    )
SCHEMES |= {
    f"onnxruntime {name}": (4, "peer", onnxruntime_blocks(name))
    for name in ("default", "k_quant", "hqq", "gptq")
}
