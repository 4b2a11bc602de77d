"""Key and value caches in 8 bits: the scales of each, by which feeds and outputs are converted.

Keys have channels that are larger than others (arXiv:2402.02750 gives each its own scale); a constant scale a
head leaves that to the 8 bits, and the cache is one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program
from lamina.passes.quantize.cache_places import CachePlace, cache_places

CODES = ir.DataType.INT8
_LIMIT = 127
# Later tokens reach farther than the samples' did, and clipping costs more than coarse steps: on stories260k
# the samples' reach and a tenth costs 4 to 15 % more divergence, a tenth less 17 %, a fifth less 680 %.
_MARGIN = 1.1


@dataclass(frozen=True)
class CacheCodes:
    """How one cache is stored.

    Attributes:
        past: Name of the interface input.
        present: Name of the interface output.
        axis: The axis that scales are numbered along (heads, where the cache has them); None: one scale.
        scale: What a code of 1 stands for, float32 numbers, one an index of ``axis``.
    """

    past: str
    present: str
    axis: int | None
    scale: tuple[float, ...]

    def encode(self, array: np.ndarray) -> np.ndarray:
        """Float values as codes, int8; as QuantizeLinear rounds: half to even, within -128 and 127."""
        codes = np.rint(array / self._spread(array.ndim))
        return np.asarray(np.clip(codes, -_LIMIT - 1, _LIMIT).astype(np.int8))

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """What codes stand for, float32."""
        return np.asarray(codes.astype(np.float32) * self._spread(codes.ndim))

    def _spread(self, rank: int) -> np.ndarray:
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = -1
        return np.asarray(self.scale, np.float32).reshape(shape)


def calibrate_caches(program: Program, samples: Dataset) -> tuple[CacheCodes, ...]:
    """Scales of every cache: codes reach a tenth beyond the largest magnitude that samples bring to a head.

    Args:
        program: With its caches in float; it is run.
        samples: Past and new tokens both count: what is handed out.

    Raises:
        PassError: As :func:`.cache_places`.
        DataError: A cache stays empty, or is not finite.
    """
    from lamina.backends import get_backend

    places, reach = cache_places(program), dict[str, np.ndarray]()
    target = Target.parse("ort:cpu")
    executable = get_backend(target).compile(program.model, target)
    for batch in samples.batches():
        outputs = executable.run(batch.inputs)
        for place in places:
            name = place.present.name or ""
            array = np.abs(outputs[name])
            rest = tuple(a for a in range(array.ndim) if a != place.axis)
            largest = np.atleast_1d(array.max(axis=rest, initial=0.0))
            reach[name] = np.maximum(reach.get(name, largest), largest)
    return tuple(_codes(place, reach[place.present.name or ""]) for place in places)


def _codes(place: CachePlace, reach: np.ndarray) -> CacheCodes:
    past, present = place.past.name or "", place.present.name or ""
    if not np.isfinite(reach).all() or not reach.any():
        raise DataError(
            f"the calibration samples leave cache '{present}' {'empty' if not reach.any() else 'not finite'}",
            advice="give samples whose steps write keys and values",
        )
    # a head that stayed at zero takes the others' scale: what it holds one day is of their kind
    reach = np.where(reach > 0, reach, reach.max()).astype(np.float32)
    scale = np.maximum(reach * np.float32(_MARGIN / _LIMIT), np.finfo(np.float32).tiny)
    return CacheCodes(past, present, place.axis, tuple(float(s) for s in scale))


def coded_feeds(
    program: Program, feeds: Mapping[str, np.ndarray], caches: Sequence[CacheCodes]
) -> dict[str, np.ndarray]:
    """Feeds of the original for a program whose caches may be codes; ports it lacks are left out."""
    known = {cache.past: cache for cache in caches}
    found = {}
    for port in program.inputs:
        if port.name in feeds:
            array = feeds[port.name]
            coded = port.name in known and port.dtype == CODES and array.dtype != np.int8
            found[port.name] = known[port.name].encode(array) if coded else array
    return found


def decoded_outputs(outputs: Mapping[str, np.ndarray], caches: Sequence[CacheCodes]) -> dict[str, np.ndarray]:
    """Outputs with every cache in float."""
    known = {cache.present: cache for cache in caches}
    return {
        name: known[name].decode(array) if name in known and array.dtype == np.int8 else array
        for name, array in outputs.items()
    }
