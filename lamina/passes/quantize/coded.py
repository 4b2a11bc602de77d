"""Weights in integer codes, row by row: computed to the nearest, or carried by a plan.

Rows are output channels (of an embedding: entries), columns the reduction, whatever layout a form writes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.passes.quantize.bits import pack_bits, unpack_bits
from lamina.passes.quantize.graph import constant_array, quantized
from lamina.passes.quantize.higgs import gaussian_levels, quantize_rotated, rotation
from lamina.passes.quantize.weights import (
    halves,
    quantize_blocks,
    quantize_channels,
    quantize_offset,
)
from lamina.passes.repair import packed, unpacked


@dataclass(frozen=True)
class Coded:
    """A weight as ``(codes - zero) * scale``.

    Attributes:
        codes: int8 or uint8 ``[channels, k]``.
        scale: float32 ``[channels, groups]``; a group is ``block`` neighbours of a row.
        zero: float32, of the shape of ``scale`` or ``[1, 1]``.
        block: Elements of a group.
        low: Least code.
        high: Largest code.
        form: Names everything the content depends on besides the weight.
        levels: float32 ``[2^bits]`` of codes that number levels, in rotated blocks (higgs); else None.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    block: int
    low: int
    high: int
    form: str = ""
    levels: np.ndarray | None = None

    def rows(self) -> np.ndarray:
        """The values, float32 ``[channels, k]``."""
        if self.levels is not None:
            turned = (self.levels[self.codes] * self.spread(self.scale)).reshape(-1, self.block)
            return np.asarray((turned @ rotation(self.block)).reshape(self.codes.shape), np.float32)
        real = (self.codes.astype(np.float32) - self.spread(self.zero)) * self.spread(self.scale)
        return np.asarray(real, np.float32)

    def spread(self, groups: np.ndarray) -> np.ndarray:
        """A number a group as a number an element."""
        width = self.codes.shape[1]
        return groups if groups.size == 1 else np.repeat(groups, self.block, axis=1)[:, :width]


def to_rows(array: np.ndarray, axis: int) -> np.ndarray:
    """A weight as ``[channels, k]``; ``axis`` numbers its channels."""
    moved = np.moveaxis(array, axis, 0)
    return np.ascontiguousarray(moved.reshape(moved.shape[0], -1))


def from_rows(rows: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """The inverse of :func:`to_rows` for a weight of ``shape``."""
    rest = [n for i, n in enumerate(shape) if i != axis]
    return np.ascontiguousarray(np.moveaxis(rows.reshape(shape[axis], *rest), 0, axis))


def coded(weight: ir.Value, parameters: Mapping[str, Any], axis: int) -> Coded:
    """The codes an option's parameters give a weight: those they carry, else the nearest ones.

    Args:
        weight: A constant.
        parameters: Of the option.
        axis: The weight's axis that numbers channels.

    Raises:
        PassError: The codes carried do not fit the weight.
    """
    if "codes" not in parameters:
        name = form_name(parameters, axis)
        made: Coded = quantized(weight, name, lambda array: nearest(array, parameters, axis, name))
        return made
    given = parameters["codes"]
    # trap: a plan that was read has its keys in another order
    told = f"{form_name(parameters, axis)} {given['base64']} {given['scale']['base64']}"
    # short: it is in the names of what is written
    name = hashlib.sha256(told.encode()).hexdigest()[:8]
    found: Coded = quantized(weight, name, lambda array: _carried(array, parameters, axis, name))
    return found


def form_name(parameters: Mapping[str, Any], axis: int) -> str:
    """Names what nearest codes depend on besides the weight."""
    bits, clipping = parameters["weight_bits"], parameters["clipping"]
    kind = "int" if "block" not in parameters else parameters.get("grid", "blocks")
    block = f"x{parameters['block']}" if "block" in parameters else ""
    balance = parameters.get("balance", "none")
    return f"{kind}{bits}{block}.axis{axis}.{clipping}" + (f".{balance}" if balance != "none" else "")


def nearest(array: np.ndarray, parameters: Mapping[str, Any], axis: int, form: str = "") -> Coded:
    """The nearest codes, on the grid that the parameters ask for."""
    bits, clipping = int(parameters["weight_bits"]), parameters["clipping"]
    if "block" not in parameters:
        balance = parameters.get("balance", "none")
        made = quantize_channels(array, axis, bits=bits, clipping=clipping, balance=balance)
        rows, limit = to_rows(made.codes, axis), 2 ** (bits - 1) - 1
        none = np.zeros((1, 1), np.float32)
        return Coded(rows, made.scale[:, None], none, rows.shape[1], -limit, limit, form)
    block, rows = int(parameters["block"]), to_rows(array, axis)
    if parameters.get("grid") == "higgs":
        made, none = quantize_rotated(rows, block=block, bits=bits), np.zeros((1, 1), np.float32)
        levels = gaussian_levels(bits)
        return Coded(made.codes, made.scale, none, block, 0, 2**bits - 1, form, levels)
    if parameters.get("grid") == "offset":
        made = quantize_offset(rows, block=block, bits=bits, clipping=clipping)
        assert made.zero_point is not None
        return Coded(made.codes, made.scale, made.zero_point, block, 0, 2**bits - 1, form)
    made = quantize_blocks(rows.T, block=block, bits=bits, clipping=clipping)
    scale = np.ascontiguousarray(made.scale.T)
    if made.zero_point is None:
        limit = 2 ** (bits - 1) - 1
        codes = np.ascontiguousarray(made.codes.T)
        return Coded(codes, scale, np.zeros((1, 1), np.float32), block, -limit, limit, form)
    codes = np.ascontiguousarray(made.codes.T.astype(np.uint8))
    zero = np.ascontiguousarray(made.zero_point.T.astype(np.float32))
    if parameters.get("grid") == "affine":
        scale = halves(scale)
        found = Coded(codes, scale, zero, block, 0, 2**bits - 1, form)
        exact = rows / found.spread(scale) + found.spread(zero)
        return replace(found, codes=np.clip(np.rint(exact), 0, found.high).astype(np.uint8))
    return Coded(codes, scale, zero, block, 0, 2**bits - 1, form)


def payload(made: Coded) -> dict[str, Any]:
    """Codes as JSON values, for the parameters of an option: ``bits`` bits a code, and what they scale."""
    bits = (made.high - made.low).bit_length()
    raw = pack_bits((made.codes.astype(np.int16) - made.low).astype(np.uint8).reshape(-1), bits)
    return {
        "base64": base64.b64encode(raw.tobytes()).decode("ascii"),
        "scale": packed(made.scale),
        "zero": packed(made.zero),
    }


def _carried(array: np.ndarray, parameters: Mapping[str, Any], axis: int, form: str) -> Coded:
    """The codes in ``parameters["codes"]``, for a weight like ``array``."""
    bits, given = int(parameters["weight_bits"]), parameters["codes"]
    channels, width = array.shape[axis], array.size // array.shape[axis]
    signed = "block" not in parameters or (parameters.get("grid") != "offset" and bits == 8)
    limit = 2 ** (bits - 1) - 1
    low, high = (-limit, limit) if signed else (0, 2**bits - 1)
    block = int(parameters.get("block", width))
    try:
        raw = np.frombuffer(base64.b64decode(given["base64"], validate=True), np.uint8)
        flat = unpack_bits(raw, bits, channels * width).astype(np.int16) + low
        scale, zero = unpacked(given["scale"]), unpacked(given["zero"])
        fits = scale.shape == (channels, -(-width // block)) and zero.shape in ((1, 1), scale.shape)
    except (KeyError, TypeError, ValueError) as error:
        raise PassError(f"codes cannot be read: {error}", advice="the plan is damaged") from error
    if not fits:
        raise PassError(
            f"codes have {list(scale.shape)} scales, the weight is {channels} rows of {width}",
            advice="the plan was made for another model",
        )
    kind = np.int8 if signed else np.uint8
    return Coded(flat.astype(kind).reshape(channels, width), scale, zero, block, low, high, form)


def weight_rows(weight: ir.Value, axis: int) -> np.ndarray:
    """The float32 weight as rows."""
    array = constant_array(weight)
    assert array is not None
    return to_rows(array, axis)
