"""How much each token counts when weights are rounded: by the attention it receives (rsq)."""

from __future__ import annotations

import numpy as np

from lamina.analysis.instrument import feeds_of
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program


def attention_received(
    program: Program, data: Dataset, *, least: float = 0.05, threads: int | None = None
) -> np.ndarray:
    """Weight of each token, ``least`` to 1 within a sample; what :attr:`Rounding.weights` names.

    Attention maps are outputs of Softmax ``[b, heads, t, t]``, rows summing to 1 over keys. A token's score
    is the sum of its column, averaged over heads and maps; scores of a sample are stretched to
    ``least .. 1``. Padding gets 0.

    Args:
        program: A model with attention; left unchanged.
        data: Samples of one length.
        least: Weight of the token that receives least.
        threads: Threads of a run.

    Returns:
        float32 ``[n, t]``.

    Raises:
        DataError: The program makes no attention maps, or none of one shape on all of the data.
        BackendError: ONNX Runtime refuses the program.

    Source: Sung et al. 2025, arXiv:2503.01820 (RSQ, attention concentration). Deviates: one score
    from all layers instead of each layer's own.
    """
    names = [n.outputs[0].name or "" for n in program.graph if n.op_type == "Softmax"]
    batches = list(data.batches())
    feeds = [feeds_of(program, b, f"batch {i}") for i, b in enumerate(batches)]
    found = []
    for batch, values in zip(batches, Stream(feeds, threads=threads).run(program, names, names), strict=True):
        maps = [
            a for a in values.values() if a.ndim == 4 and a.shape[2] == a.shape[3] and len(a) == len(batch)
        ]
        if not maps or len({a.shape[3] for a in maps}) > 1:
            raise DataError("the model makes no attention maps over tokens", advice="round without weights")
        received = np.mean([a.sum(axis=2).mean(axis=1) for a in maps], axis=0)
        mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
        kept = np.ones(received.shape, bool) if mask is None else np.asarray(mask) != 0
        found.append(_stretched(received, kept, least))
    return np.concatenate(found)


def _stretched(received: np.ndarray, kept: np.ndarray, least: float) -> np.ndarray:
    """Scores of each row brought to ``least .. 1``; a row of equal ones gets 1."""
    low = np.where(kept, received, np.inf).min(axis=1, keepdims=True)
    high = np.where(kept, received, -np.inf).max(axis=1, keepdims=True)
    spread = high - low
    share = np.divide(received - low, spread, out=np.ones_like(received), where=spread > 0)
    return np.where(kept, least + (1 - least) * share, 0).astype(np.float32)
