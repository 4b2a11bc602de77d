"""Inputs made to tell models apart: ordinary values, edge values and several sizes of every dynamic dim."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lamina.ir.examples import draw_values, evaluate_dim, table_rows
from lamina.ir.program import Program

Kind = Literal["ordinary", "edge", "nonfinite"]
Filler = Callable[[np.random.Generator, tuple[int, ...], float, float], np.ndarray]

_UNKNOWN = 8
_LARGE = 1e3


@dataclass(frozen=True)
class Probe:
    """One set of inputs.

    Attributes:
        label: What it is, for messages: ``large values, batch=3``.
        feeds: One array an input.
        kind: ``ordinary``: any model worth its name handles it. ``edge``: legal, but it may overflow, or blow
            rounding up. ``nonfinite``: holds infinities or NaN.
    """

    label: str
    feeds: Mapping[str, np.ndarray]
    kind: Kind


def probe_inputs(program: Program, samples: int = 16, *, seed: int = 0) -> Iterator[Probe]:
    """Yield ``samples`` probes: ordinary and edge values in turn, over the sizes of :func:`size_variants`.

    Indices stay inside the tables they index, masks are ones or have ones in front. Whether a model accepts
    every size and value is not known here: run it and skip what it refuses. The same arguments give the same
    probes; more samples only add to them.

    Args:
        program: Gives names, dtypes, shapes and the example that sizes and scales are taken from.
        samples: How many probes.
        seed: Of the values.
    """
    variants = size_variants(program)
    for index, (name, kind) in zip(range(samples), _schedule(), strict=False):
        # An ordinary and an edge probe share a size before the next size comes.
        sizes = variants[index // 2 % len(variants)]
        rng = np.random.default_rng([seed, index])
        said = "".join(f", {dim}={size}" for dim, size in sizes.items())
        feeds = {
            v.name or "": _values(program, v, _shape(v, sizes), name, rng)
            for v in program.graph.inputs
            if v.name not in program.graph.initializers
        }
        yield Probe(f"{name} values{said}", feeds, kind)


def size_variants(program: Program) -> tuple[dict[str, int], ...]:
    """Sizes of the free dynamic dims to try: the example's, an odd batch, all odd, all 1, all 2.

    A dim computed from others (``past + 1``) is not free; one without a name is called ``batch`` where it is
    an input's first, else ``<input>.<axis>``.
    """
    example, batch = _example_sizes(program)
    odd = {dim: size + 1 + size % 2 for dim, size in example.items()}
    found = [
        example,
        {dim: odd[dim] if dim in batch else size for dim, size in example.items()},
        dict.fromkeys(example, 1),
        odd,
        dict.fromkeys(example, 2),
        {dim: 1 if dim in batch else size for dim, size in example.items()},
    ]
    return tuple(sizes for i, sizes in enumerate(found) if sizes not in found[:i])


def _example_sizes(program: Program) -> tuple[dict[str, int], set[str]]:
    sizes: dict[str, int] = {}
    batch: set[str] = set()
    for value in program.graph.inputs:
        if value.name in program.graph.initializers:
            continue
        array = program.example.get(value.name or "")
        for axis, dim in enumerate(_dims(value)):
            if isinstance(dim, str) and evaluate_dim(dim, sizes) is None:
                known = array is not None and array.ndim > axis
                sizes[dim] = array.shape[axis] if known and array is not None else _UNKNOWN
                if axis == 0:
                    batch.add(dim)
    return sizes, batch


def _dims(value: ir.Value) -> list[int | str]:
    dims: list[int | str] = []
    for axis, dim in enumerate(value.shape or ()):
        name = "" if isinstance(dim, int) else str(dim.value or "").strip()
        unnamed = "batch" if axis == 0 else f"{value.name}.{axis}"
        dims.append(
            dim if isinstance(dim, int) and dim >= 0 else (name if name not in ("", "?") else unnamed)
        )
    return dims


def _shape(value: ir.Value, sizes: Mapping[str, int]) -> tuple[int, ...]:
    found = (d if isinstance(d, int) else evaluate_dim(d, dict(sizes)) for d in _dims(value))
    return tuple(_UNKNOWN if size is None else size for size in found)


def _schedule() -> Iterator[tuple[str, Kind]]:
    """Ordinary and edge values in turn; when edges are used up, ordinary values with other seeds."""
    ordinary = ["normal", "uniform", "normal", "wide", "normal", "uniform", "normal", "wide"]
    for one, other in zip_longest(ordinary, _EDGES):
        yield one or "normal", "ordinary"
        if other is not None:
            yield other, "nonfinite" if other in ("infinite", "nan") else "edge"
    while True:
        yield "normal", "ordinary"


def _values(
    program: Program, value: ir.Value, shape: tuple[int, ...], name: str, rng: np.random.Generator
) -> np.ndarray:
    dtype = value.dtype or ir.DataType.FLOAT
    mask = "mask" in (value.name or "").lower()
    if mask or dtype == ir.DataType.BOOL:
        return _mask(shape, dtype, name, rng) if len(shape) else draw_values(value, shape, rng)
    example = None if program.example_is_synthetic else program.example.get(value.name or "")
    if dtype.is_integer():
        return _indices(value, shape, name, rng, example)
    if not dtype.is_floating_point():
        return draw_values(value, shape, rng)
    kind = np.dtype(dtype.numpy())
    mean, spread = 0.0, 1.0
    if example is not None and example.size > 1:
        wide = example.astype(np.float64)
        mean, spread = float(wide.mean()), float(wide.std()) or 1.0
    most, least = float(ml_dtypes.finfo(kind).max), float(ml_dtypes.finfo(kind).tiny)
    if name == "denormal":
        return rng.uniform(-least, least, size=shape).astype(kind)
    drawn = _FILLERS[name](rng, shape, mean, spread)
    finite = np.isfinite(drawn)
    return np.where(finite, np.clip(drawn, -most / 4, most / 4), drawn).astype(kind)


def _mask(shape: tuple[int, ...], dtype: ir.DataType, name: str, rng: np.random.Generator) -> np.ndarray:
    """Ones, or ones in front and zeros behind, at least one each row: what attention masks look like."""
    kind = np.dtype(dtype.numpy())
    if name in ("normal", "ones", "zeros"):
        return np.ones(shape, kind)
    lengths = rng.integers(1, max(shape[-1], 1), size=(*shape[:-1], 1), endpoint=True)
    return np.broadcast_to(np.arange(shape[-1]) < lengths, shape).astype(kind)


def _indices(
    value: ir.Value,
    shape: tuple[int, ...],
    name: str,
    rng: np.random.Generator,
    example: np.ndarray | None,
) -> np.ndarray:
    rows = table_rows(value)
    low, high = 0, rows - 1
    if example is not None and example.size:
        low, high = int(example.min()), max(int(example.max()), high)
    most = np.iinfo(np.int32).max if value.dtype is None else _most(value.dtype)
    if name == "zeros":
        return np.full(shape, low, value.dtype.numpy() if value.dtype else np.int64)
    fixed = np.full(shape, min(high, most)) if name == "large" else None
    drawn = rng.integers(low, min(high, most), size=shape, endpoint=True) if fixed is None else fixed
    return drawn.astype(value.dtype.numpy() if value.dtype else np.int64)


def _most(dtype: ir.DataType) -> int:
    return int(ml_dtypes.iinfo(np.dtype(dtype.numpy())).max)


def _mixed(rng: np.random.Generator, shape: tuple[int, ...], mean: float, spread: float) -> np.ndarray:
    corner = np.array([0.0, -0.0, 1.0, -1.0, _LARGE, -_LARGE, 1e-30, -1e-30, 0.5, mean, mean + spread])
    return rng.choice(corner, size=shape)


def _with(constant: float) -> Filler:
    """Ordinary values with about one in sixteen, and at least one, replaced."""

    def fill(rng: np.random.Generator, shape: tuple[int, ...], mean: float, spread: float) -> np.ndarray:
        drawn = np.asarray(mean + spread * rng.standard_normal(shape))
        chosen = rng.integers(0, max(drawn.size, 1), size=-(-drawn.size // 16))
        drawn.flat[chosen] = constant * rng.choice([-1.0, 1.0], size=chosen.shape)
        return drawn

    return fill


_FILLERS: Mapping[str, Filler] = {
    "normal": lambda rng, shape, mean, spread: mean + spread * rng.standard_normal(shape),
    "uniform": lambda rng, shape, mean, spread: rng.uniform(0.0, 1.0, shape),
    "wide": lambda rng, shape, mean, spread: mean + spread * rng.uniform(-5.0, 5.0, shape),
    "zeros": lambda rng, shape, mean, spread: np.zeros(shape),
    "ones": lambda rng, shape, mean, spread: np.ones(shape),
    "negative": lambda rng, shape, mean, spread: -np.abs(rng.standard_normal(shape)) * spread - 0.1,
    "large": lambda rng, shape, mean, spread: (
        rng.choice([-1.0, 1.0], shape) * rng.uniform(0.5 * _LARGE, 2 * _LARGE, shape)
    ),
    "tiny": lambda rng, shape, mean, spread: 1e-30 * rng.standard_normal(shape),
    "mixed": _mixed,
    "infinite": _with(np.inf),
    "nan": _with(np.nan),
}
_EDGES = ("zeros", "large", "negative", "mixed", "ones", "tiny", "denormal", "infinite", "nan")
