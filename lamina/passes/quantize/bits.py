"""Codes of a few bits in whole words: two layouts, and standard operators that undo the one in models.

A plan packs planes of 4, 2 and 1 bits, each 8 / width codes a byte. A model holds words that BitShift and Mod
take apart: those exist from opset 13 on, in every runtime tried, while the 2-bit types of opset 25 do
not; and a runtime computes them once, while loading.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.quantize.graph import FLOAT, common, shared

_UINT = {1: ir.DataType.UINT8, 8: ir.DataType.UINT64}


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
    """Codes of 2 or 3 bits as float32 of ``shape``, unpacked by operators on constants."""
    name, flat = short_name(weight), codes.reshape(-1)
    words, per = pack_words(flat, bits)
    kind, word = _UINT[words.dtype.itemsize], words.dtype.name
    column = shared(rewriter, weight, f"{form}.codes", words.reshape(-1, 1))
    shifts = (np.arange(per) * bits).astype(words.dtype).reshape(1, -1)
    places = common(rewriter, shifts, f"lamina.places{bits}.{word}")
    flags = {"direction": "RIGHT"}
    part = rewriter.op("BitShift", [column, places], flags, name=f"{name}.shift", dtype=kind)
    base = common(rewriter, np.array(2**bits, words.dtype), f"lamina.base{bits}.{word}")
    part = rewriter.op("Mod", [part, base], name=f"{name}.low", dtype=kind)
    if words.size * per != flat.size:
        ends = [common(rewriter, np.array([n], np.int64), f"lamina.end{n}") for n in (-1, 0, flat.size)]
        part = rewriter.op("Reshape", [part, ends[0]], name=f"{name}.flat", dtype=kind)
        part = rewriter.op("Slice", [part, *ends[1:]], name=f"{name}.slice", dtype=kind)
    dims = common(rewriter, np.array(shape, np.int64), f"lamina.shape{'x'.join(map(str, shape))}")
    part = rewriter.op("Reshape", [part, dims], name=f"{name}.blocks", dtype=kind)
    return rewriter.op("Cast", [part], {"to": int(FLOAT)}, name=f"{name}.cast", dtype=FLOAT)


def pack_words(codes: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """uint8 codes ``[n]`` as words, the first code in the lowest bits, and how many a word holds.

    Four 2-bit codes fill a byte. Twenty-one 3-bit codes fill a uint64 but for one bit; two planes of bytes
    would waste none, but take seven operators more a weight, which outweighs that below 40,000 weights.
    """
    kind = np.uint8 if 8 % bits == 0 else np.uint64
    per = np.dtype(kind).itemsize * 8 // bits
    filled = np.concatenate([codes, np.zeros(-len(codes) % per, np.uint8)]).astype(kind).reshape(-1, per)
    words: np.ndarray = np.bitwise_or.reduce(filled << (np.arange(per) * bits).astype(kind), axis=1)
    return words, per


def short_name(weight: ir.Value) -> str:
    """For the nodes that make a weight: whole names, four times a node, would outweigh small weights."""
    return f"w{zlib.crc32((weight.name or '').encode()):08x}"
