"""Made-up samples for when there is no data: right in shape, dtype and range, without meaning."""

from __future__ import annotations

import numpy as np

from lamina.data.dataset import Dataset
from lamina.data.fitting import fit
from lamina.data.interface import is_mask, named_shape, resolve_shape
from lamina.errors import DataError
from lamina.ir.program import Port, Program

_UNKNOWN_DIM = 8


def synthetic(program: Program, n: int, seed: int = 0, *, batch_size: int | None = None) -> Dataset:
    """``n`` random samples shaped like the program's example; a report on them must say so.

    Integers are drawn from the range the example spans, floats with its mean and spread, masks stay as
    they are.

    Raises:
        DataError: ``n`` is not positive.
    """
    if n < 1:
        raise DataError(f"{n} synthetic samples were asked for", advice="ask for at least 1")
    rng = np.random.default_rng(seed)
    sizes = example_sizes(program)
    free = any(p.shape and isinstance(named_shape(p)[0], str) for p in program.inputs)
    arrays = {}
    for port in program.inputs:
        shape = list(resolve_shape(port, sizes, _UNKNOWN_DIM))
        if shape and isinstance(named_shape(port)[0], str):
            shape[0] = n
        elif shape and not free:
            shape[0] *= n
        arrays[port.name] = draw(port, tuple(shape), program.example.get(port.name), rng)
    return fit(arrays, program, batch_size=batch_size, where="synthetic samples")


def example_sizes(program: Program) -> dict[str, int]:
    """Sizes of the dynamic dims in the program's example inputs."""
    sizes: dict[str, int] = {}
    for port in program.inputs:
        array = program.example.get(port.name)
        if array is not None and array.ndim == len(port.shape):
            for dim, size in zip(named_shape(port), array.shape, strict=True):
                if isinstance(dim, str):
                    sizes.setdefault(dim, size)
    return sizes


def draw(
    port: Port, shape: tuple[int, ...], example: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """One random array for ``port``, distributed like ``example`` where there is one."""
    dtype = port.numpy_dtype
    if example is not None and example.size and (example == example.flat[0]).all() and example.size > 1:
        return np.full(shape, example.flat[0], dtype=dtype)
    if dtype.kind == "O":
        return np.full(shape, "" if example is None or not example.size else example.flat[0], dtype=object)
    if dtype.kind == "b" or (is_mask(port.name) and dtype.kind in "iu"):
        return np.ones(shape, dtype=dtype)
    if dtype.kind in "iu":
        low, high = (
            (0, 1) if example is None or not example.size else (int(example.min()), int(example.max()))
        )
        return rng.integers(low, high, size=shape, endpoint=True).astype(dtype)
    mean, spread = 0.0, 1.0
    if example is not None and example.size > 1:
        mean, spread = float(example.astype(np.float64).mean()), float(example.astype(np.float64).std())
    return (mean + spread * rng.standard_normal(shape)).astype(dtype)
