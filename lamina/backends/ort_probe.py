"""What ONNX Runtime on this CPU really has kernels for: found by compiling tiny models, once a process."""

from __future__ import annotations

import functools
import platform
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Target
from lamina.errors import BackendError, LaminaError

STATIC = frozenset(
    {
        *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat"),
        *(
            "QLinearAdd",
            "QLinearConcat",
            "QLinearAveragePool",
            "QLinearGlobalAveragePool",
            "QLinearReduceMean",
        ),
    }
)
DYNAMIC = frozenset({"DynamicQuantizeMatMul", "MatMulIntegerToFloat", "MatMulInteger", "ConvInteger"})
BLOCKS = frozenset({"MatMulNBits", "GatherBlockQuantized"})

# option name (or how it starts) -> kernels that carry it out; anything else is a fallback
KERNELS: tuple[tuple[str, frozenset[str]], ...] = (
    ("w8a8-static", STATIC),
    ("w8a8-dynamic", DYNAMIC),
    ("w8", BLOCKS),
    ("w4", BLOCKS),
    ("w2", BLOCKS),
)

_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "asimdhp", "bf16", "sve", "sve2"),
)
_NEWEST_OPSET = 30


def kernels_of(option: str) -> frozenset[str] | None:
    """Kernels an option should become; None where the option asks for no special kernel."""
    for start, kernels in KERNELS:
        if option == start or option.startswith(f"{start}-"):
            return kernels
    return None


@functools.lru_cache(maxsize=8)
def probe(level: str = "all") -> Mapping[str, Any]:
    """Capabilities at one optimization level.

    Returns:
        ``device`` (CPU and the flags that matter), ``flags``, ``forms`` (option name -> operator types that
        have kernels for it; empty ones left out), ``saturates`` (products of uint8 and int8 are summed in
        16 bits, so that large weights overflow: x86 without VNNI), ``float16_kernels`` (operator types
        computed in float16 as asked, not in float32 behind conversions), ``opset`` (newest default opset it
        loads), ``versions``, ``operator_prices`` (True: single operators can be timed).
    """
    import onnxruntime as ort

    model, flags = cpu()
    forms = {name: ops for name, _ in KERNELS if (ops := _probe_form(name, level))}
    halves = tuple(op for op in ("MatMul", "Gemm", "Conv") if _keeps_float16(op, level))
    if halves:
        forms["float16"] = halves
    return MappingProxyType(
        {
            "device": f"{model} ({' '.join(flags)})" if flags else model,
            "flags": flags,
            "forms": MappingProxyType(forms),
            "float16_kernels": halves,
            "opset": _newest_opset(level),
            "versions": {"onnxruntime": ort.__version__},
            "operator_prices": True,
            "saturates": _saturates(level),
        }
    )


@functools.lru_cache(maxsize=1)
def cpu() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and which of the instruction sets that matter it has."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip().lower(), value.strip())
    except OSError:
        fields = {}
    have = set(f"{fields.get('flags', '')} {fields.get('features', '')}".split())
    name = fields.get("model name") or _named_by_system() or platform.processor() or platform.machine()
    return name or "unknown CPU", tuple(flag for flag in _FLAGS if flag in have)


def _named_by_system() -> str:
    if platform.system() != "Darwin":
        return ""
    command = ["sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


# -- tiny models ------------------------------------------------------------------------------------

_WIDTH = 32
_SHAPES = {
    "MatMul": ((2, _WIDTH), (_WIDTH, _WIDTH), 1),
    "Gemm": ((2, _WIDTH), (_WIDTH, _WIDTH), 1),
    "Conv": ((1, _WIDTH, 4, 4), (_WIDTH, _WIDTH, 3, 3), 0),
}


def _probe_form(form: str, level: str) -> tuple[str, ...]:
    build: dict[str, Builder] = {
        "w8a8-static": _static,
        "w8a8-dynamic": _dynamic,
        "w8": lambda op: _blocks(op, 8),
        "w4": lambda op: _blocks(op, 4),
        "w2": lambda op: _blocks(op, 2),
    }
    wanted = kernels_of(form) or frozenset()
    return tuple(op for op in _SHAPES if _op_types(build[form], op, level) & wanted)


def _keeps_float16(op: str, level: str) -> bool:
    model = _compile(_float16, op, level)
    if model is None:
        return False
    # A runtime without the kernel computes in float32: the weight is widened at load, or on every run.
    weights = [v for v in model.graph.initializers.values() if v.shape is not None and len(v.shape) > 1]
    casts = [n for n in model.graph if n.op_type == "Cast" and n.inputs[0] in weights]
    return bool(weights) and not casts and all(v.dtype == ir.DataType.FLOAT16 for v in weights)


def _saturates(level: str) -> bool:
    """Whether the largest activations and 8-bit weights give another sum than they have."""
    from lamina.backends.onnxruntime import OnnxRuntime

    rows, depth = 4, 64
    body = "a, s, z = DynamicQuantizeLinear(x) b = MatMulInteger(a, w, z, wz) y = Cast<to = 1>(b)"
    arrays = {"w": np.full((depth, 16), 127, np.int8), "wz": np.zeros((), np.int8)}
    model = _model((rows, depth), body, arrays)
    try:
        executable = OnnxRuntime().compile(model, Target("ort", "cpu", 1, {"opt": level}))
        found = executable.run({"x": np.full((rows, depth), 255, np.float32)})["y"]
    except LaminaError:  # without the kernel no option that needs it is offered
        return False
    return not np.array_equal(found, np.full_like(found, 255 * 127 * depth))


Builder = Callable[[str], "ir.Model | None"]


def _op_types(build: Builder, op: str, level: str) -> set[str]:
    model = _compile(build, op, level)
    return set() if model is None else {node.op_type for node in model.graph}


def _compile(build: Builder, op: str, level: str) -> ir.Model | None:
    from lamina.backends.onnxruntime import OnnxRuntime

    model = build(op)
    if model is None:
        return None
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        path = Path(folder) / "optimized.onnx"
        try:
            OnnxRuntime().compile_with(model, Target("ort", "cpu", 1, {"opt": level}), path)
        except BackendError:
            return None
        optimized = ir.load(path)
        return ir.external_data.load_to_model(optimized)


def _newest_opset(level: str) -> int:
    from lamina.backends.onnxruntime import OnnxRuntime

    for version in range(_NEWEST_OPSET, 13, -1):
        header = f'<ir_version: 10, opset_import: ["" : {version}]>'
        text = f"{header} g (float[2] x) => (float[2] y) {{ y = Relu(x) }}"
        try:
            OnnxRuntime().compile(ir.from_onnx_text(text), Target("ort", "cpu", 1, {"opt": level}))
        except BackendError:
            continue
        return version
    return 13


def _static(op: str) -> ir.Model:
    x, w, axis = _SHAPES[op]
    weight = _ints(w, np.int8)
    channels = w[axis]
    body = f"""a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z)
    c = DequantizeLinear<axis = {axis}>(w, ws, wz) d = {op}(b, c)
    e = QuantizeLinear(d, s, z) y = DequantizeLinear(e, s, z)"""
    arrays = {
        "w": weight,
        "ws": np.full(channels, 0.01, np.float32),
        "wz": np.zeros(channels, np.int8),
        "s": np.float32(0.02),
        "z": np.uint8(128),
    }
    return _model(x, body, arrays)


def _dynamic(op: str) -> ir.Model | None:
    x, w, axis = _SHAPES[op]
    if op == "Gemm":
        return None  # written as MatMul
    kernel = "ConvInteger" if op == "Conv" else "MatMulInteger"
    channels = 1 if op == "Conv" else w[axis]
    body = f"""a, s, z = DynamicQuantizeLinear(x) b = {kernel}(a, w, z, wz) c = Cast<to = 1>(b)
    t = Mul(s, ws) y = Mul(c, t)"""
    zero = np.zeros(() if op == "Conv" else channels, np.int8)
    return _model(x, body, {"w": _ints(w, np.int8), "ws": np.full(channels, 0.01, np.float32), "wz": zero})


def _blocks(op: str, bits: int) -> ir.Model:
    x, w, _ = _SHAPES[op]
    block, opset = 16, 25 if bits == 2 else 21
    kind = {8: np.int8, 4: ml_dtypes.int4, 2: ml_dtypes.uint2}[bits]
    weight = _ints(w, np.int8, 2 ** (bits - 1)).astype(kind)
    if bits == 2:
        weight = (_ints(w, np.int8, 2) + 2).astype(kind)
    scales = np.full((w[0] // block, *w[1:]), 0.01, np.float32)
    body = f"c = DequantizeLinear<axis = 0, block_size = {block}>(w, ws) y = {op}(x, c)"
    return _model(x, body, {"w": weight, "ws": scales}, opset)


def _float16(op: str) -> ir.Model:
    x, w, _ = _SHAPES[op]
    body = f"a = Cast<to = 10>(x) b = {op}(a, w) y = Cast<to = 1>(b)"
    return _model(x, body, {"w": np.random.default_rng(0).standard_normal(w).astype(np.float16)})


def _ints(shape: tuple[int, ...], dtype: type, largest: int = 100) -> np.ndarray:
    return np.random.default_rng(0).integers(-largest, largest, shape).astype(dtype)


def _model(shape: tuple[int, ...], body: str, arrays: Mapping[str, Any], opset: int = 21) -> ir.Model:
    """A model with input x and output y around ``body``; it may read the names of ``arrays``."""
    dims = ",".join(map(str, shape))
    unknown = ",".join(f"d{i}" for i in range(len(shape)))
    declared = "".join(f", float {name}" for name in arrays)
    version = 10 if opset < 25 else 13
    text = f"""<ir_version: {version}, opset_import: ["" : {opset}]>
    probe (float[{dims}] x{declared}) => (float[{unknown}] y) {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        assert value.name is not None
        array = np.asarray(arrays[value.name])
        tensor = ir.tensor(array, name=value.name)
        value.const_value, value.type, value.shape = (
            tensor,
            ir.TensorType(tensor.dtype),
            ir.Shape(array.shape),
        )
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    return model
