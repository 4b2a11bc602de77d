"""Codes of a few bits in whole bytes: the layout, and standard operators that undo it.

A width that does not divide 8 is split into planes of 4, 2 and 1 bits; each plane packs 8 / width codes a
byte, the first in the lowest bits. BitShift and Mod on uint8 exist from opset 13 on, in every runtime that
was tried, while the 2-bit types of opset 25 do not; and a runtime computes them once, while loading.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.quantize.graph import FLOAT, common, shared

_UINT8 = ir.DataType.UINT8


def planes(bits: int) -> Iterator[tuple[int, int]]:
    """(width, shift) of each plane of a code of ``bits`` bits: 3 -> (2, 0), (1, 2)."""
    shift = 0
    for width in (8, 4, 2, 1):
        if bits & width:
            yield width, shift
            shift += width


def pack_bits(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes ``[n]`` below ``2^bits`` as bytes, plane after plane; each plane ends on a whole byte."""
    return np.concatenate([pack_plane(codes, width, shift) for width, shift in planes(bits)])


def pack_plane(codes: np.ndarray, width: int, shift: int) -> np.ndarray:
    """Bits ``shift`` to ``shift + width`` of uint8 codes ``[n]``, as bytes ``[ceil(n * width / 8)]``."""
    per = 8 // width
    part = (codes >> shift) & np.uint8(2**width - 1)
    filled = np.concatenate([part, np.zeros(-len(part) % per, np.uint8)]).reshape(-1, per)
    places = (np.arange(per, dtype=np.uint8) * np.uint8(width)).astype(np.uint8)
    packed: np.ndarray = np.bitwise_or.reduce(filled << places, axis=1)
    return packed


def unpack_bits(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The ``count`` codes that :func:`pack_bits` was given.

    Raises:
        ValueError: ``raw`` has another length.
    """
    codes, start = np.zeros(count, np.uint8), 0
    for width, shift in planes(bits):
        per = 8 // width
        size = -(-count // per)
        places = (np.arange(per, dtype=np.uint8) * np.uint8(width)).astype(np.uint8)
        part = (raw[start : start + size, None] >> places) & np.uint8(2**width - 1)
        codes |= part.reshape(-1)[:count] << np.uint8(shift)
        start += size
    if start != len(raw):
        raise ValueError(f"{len(raw)} bytes for {count} codes of {bits} bits")
    return codes


def emit_codes(
    rewriter: Rewriter, weight: ir.Value, form: str, codes: np.ndarray, bits: int, shape: tuple[int, ...]
) -> ir.Value:
    """Codes as float32 of ``shape``, unpacked by operators on constants."""
    flat, name = codes.reshape(-1), f"{weight.name}.w{bits}"
    dims = rewriter.constant(np.array(shape, np.int64), f"{name}.shape")
    total: ir.Value | None = None
    for width, shift in planes(bits):
        raw = pack_plane(flat, width, shift)
        column = shared(rewriter, weight, f"{form}.codes{shift}", raw.reshape(-1, 1))
        part = _plane(rewriter, column, width, name)
        if len(raw) * 8 // width != len(flat):
            part = _first(rewriter, part, len(flat), name)
        part = rewriter.op("Reshape", [part, dims], name=f"{name}.reshape", dtype=_UINT8)
        part = rewriter.op("Cast", [part], {"to": int(FLOAT)}, name=f"{name}.cast", dtype=FLOAT)
        if shift:
            step = common(rewriter, np.array(2**shift, np.float32), f"lamina.step{shift}")
            part = rewriter.op("Mul", [part, step], name=f"{name}.high", dtype=FLOAT)
        total = part if total is None else rewriter.op("Add", [total, part], name=f"{name}.sum", dtype=FLOAT)
    assert total is not None
    return total


def _plane(rewriter: Rewriter, column: ir.Value, width: int, name: str) -> ir.Value:
    """Bytes ``[n, 1]`` as uint8 codes ``[n, 8 / width]``."""
    places = common(rewriter, np.arange(0, 8, width, dtype=np.uint8).reshape(1, -1), f"lamina.places{width}")
    flags = {"direction": "RIGHT"}
    spread = rewriter.op("BitShift", [column, places], flags, name=f"{name}.shift", dtype=_UINT8)
    base = common(rewriter, np.array(2**width, np.uint8), f"lamina.base{width}")
    return rewriter.op("Mod", [spread, base], name=f"{name}.low", dtype=_UINT8)


def _first(rewriter: Rewriter, value: ir.Value, count: int, name: str) -> ir.Value:
    """The first ``count`` elements, ``[count]``."""
    flat, ends = common(rewriter, np.array([-1], np.int64), "lamina.flat"), []
    for end in (0, count):
        ends.append(common(rewriter, np.array([end], np.int64), f"lamina.end{end}"))
    value = rewriter.op("Reshape", [value, flat], name=f"{name}.flatten", dtype=_UINT8)
    return rewriter.op("Slice", [value, *ends], name=f"{name}.slice", dtype=_UINT8)
