"""Orthogonal matrices of any size that mix all channels, and arrays turned by them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def turned(array: Array, axis: int, seed: int = 0) -> Array:
    """``array`` times the orthogonal Q of ``seed`` along ``axis``: ``x Q`` for every vector x of it.

    For d = 2^k m channels, m odd, ``Q = S (H (x) O)``: S random signs, H Hadamard's matrix of order 2^k over
    ``2^(k/2)``, O a random orthogonal matrix of order m. The result depends on d and the seed alone.

    Args:
        array: float64.
        axis: The channels.
        seed: Of the signs and O.

    Returns:
        float64, of the shape of ``array``.

    Cost: O(log d + m) operations an element.
    """
    moved = np.moveaxis(array, axis, -1)
    signs, small = _parts(moved.shape[-1], seed)
    order = len(signs) // len(small)
    mixed = (moved * signs).reshape(-1, order, len(small)) @ small
    step = 1
    while step < order:
        pairs = mixed.reshape(len(mixed), -1, 2, step, len(small))
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        mixed = np.stack([first + second, first - second], axis=2)
        step *= 2
    result = mixed.reshape(moved.shape) / math.sqrt(order)
    return np.moveaxis(result, -1, axis)


@functools.cache
def _parts(size: int, seed: int) -> tuple[Array, Array]:
    """Signs ``[size]``, and an orthogonal matrix of the odd part of ``size``."""
    rng = np.random.default_rng([seed, size])
    signs = np.where(rng.random(size) < 0.5, -1.0, 1.0)
    odd = size // (size & -size)
    small, upper = np.linalg.qr(rng.normal(size=(odd, odd)))
    # without this the matrices are not evenly spread (Mezzadri 2007, arXiv:math-ph/0609050)
    return signs, small * np.sign(np.diag(upper))
