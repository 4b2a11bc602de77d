"""Weights rotated within blocks until they look Gaussian, then rounded to the best grid for a Gaussian."""

from __future__ import annotations

import functools
import math

import numpy as np

from lamina.passes.quantize.weights import QuantizedWeight, halves

_SEED = 20241126  # of the signs: part of the format, never drawn anew


@functools.cache
def gaussian_levels(bits: int) -> np.ndarray:
    """The ``2^bits`` levels of least mean squared error for a standard Gaussian, float32, ascending.

    Lloyd's iteration to its fixed point: each level is the mean of the numbers nearest to it. Errors are
    those of Max 1960, table 1: 0.1175, 0.03454 and 0.009497 at 2, 3 and 4 bits.
    """
    count = 2**bits
    levels = np.linspace(-1, 1, count) * (1 + bits / 2)
    for _ in range(20_000):
        middles = (levels[1:] + levels[:-1]) / 2
        edges = np.concatenate([[-np.inf], middles, [np.inf]])
        mass = np.diff([0.5 * (1 + math.erf(e / math.sqrt(2))) for e in edges])
        density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
        moved = -np.diff(density) / mass
        if np.abs(moved - levels).max() < 1e-9:
            break
        levels = moved
    symmetric = (levels - levels[::-1]) / 2
    return symmetric.astype(np.float32)


@functools.cache
def rotation(block: int) -> np.ndarray:
    """An orthogonal matrix ``[block, block]`` of equal magnitudes: Hadamard's, with random signs of columns.

    float32; ``rotated = rows @ rotation.T``, ``rows = rotated @ rotation``. ``block`` is a power of two.
    """
    matrix = np.ones((1, 1))
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    signs = np.where(np.random.default_rng(_SEED).random(block) < 0.5, -1.0, 1.0)
    return np.asarray(matrix * signs / math.sqrt(block), np.float32)


def quantize_rotated(rows: np.ndarray, *, block: int, bits: int) -> QuantizedWeight:
    """Codes into :func:`gaussian_levels` of the rotated blocks of rows ``[n, k]``, a scale a block.

    ``w = (levels[codes] * scale) @ rotation``. The scale begins at the block's root mean square and is then
    projected, ``<y, l> / <l, l>``; it is kept as a number of float16 where it fits.

    Returns:
        uint8 codes ``[n, k]``; float32 scales ``[n, k / block]``.

    Source: Malinovskii et al. 2024, arXiv:2411.17525 (HIGGS, algorithm 1). Deviates: the grid is of one
    dimension (the paper's best have two to four), the scale is projected after rounding.
    """
    levels, count = gaussian_levels(bits), rows.shape[1] // block
    turned = rows.reshape(-1, block) @ rotation(block).T
    scale = np.sqrt(np.square(turned).mean(axis=1))
    scale = np.where(scale > 0, scale, scale.max(initial=1.0)).astype(np.float32)
    edges = (levels[1:] + levels[:-1]) / 2
    found = levels[np.searchsorted(edges, turned / scale[:, None])]
    inner, norm = (np.einsum("ij,ij->i", a, found) for a in (turned, found))
    scale = halves(np.where(inner > 0, inner / norm, scale).astype(np.float32))
    codes = np.searchsorted(edges, turned / scale[:, None]).astype(np.uint8)
    return QuantizedWeight(codes.reshape(rows.shape), scale.reshape(len(rows), count))
