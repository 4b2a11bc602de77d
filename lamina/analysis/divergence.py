"""How far a model's outputs moved from the original's, sample by sample, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from lamina.errors import DataError, PassError
from lamina.ir.program import Program

Outputs = Mapping[str, np.ndarray]


def kl(original: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """KL(original || candidate) in nats along the last axis, mean over positions of each sample.

    Rows that are distributions already (not negative, sum 1) are taken as they are, others as logits.
    """
    p, q = original.astype(np.float64), candidate.astype(np.float64)
    if _are_distributions(original) and _are_distributions(candidate):
        with np.errstate(divide="ignore"):
            log_p, log_q = np.log(p), np.log(q)
    else:
        log_p, log_q = _log_softmax(p), _log_softmax(q)
    with np.errstate(invalid="ignore"):
        # A class the original rules out adds nothing, whatever the candidate thinks of it.
        terms = np.where(log_p > -np.inf, np.exp(log_p) * (log_p - log_q), 0.0)
    # Rounding can leave a sum of terms just below zero.
    return _sample_means(np.maximum(terms.sum(axis=-1), 0.0))


def cosine(original: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """``1 - cos`` of each sample's flattened output; two zero outputs are 0 apart."""
    a, b = _flat(original), _flat(candidate)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("nd,nd->n", a, b)
    cosines = np.divide(dots, lengths, out=np.zeros_like(dots), where=lengths > 0)
    return np.where((a == b).all(axis=1), 0.0, np.maximum(1.0 - cosines, 0.0))


def relative_l2(original: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """``||candidate - original||^2 / ||original||^2`` of each sample; infinite if only the original is 0."""
    a, b = _flat(original), _flat(candidate)
    difference = np.einsum("nd,nd->n", b - a, b - a)
    length = np.einsum("nd,nd->n", a, a)
    worst = np.where(difference > 0, np.inf, 0.0)
    return np.divide(difference, length, out=worst, where=length > 0)


DIVERGENCES: tuple[tuple[str, Callable[[np.ndarray, np.ndarray], np.ndarray]], ...] = (
    ("kl", kl),
    ("cosine", cosine),
    ("relative-l2", relative_l2),
)


def divergence(original: Outputs, candidate: Outputs, kind: str) -> np.ndarray:
    """Divergence of each sample, mean over the floating outputs.

    Args:
        original: The original's outputs, samples along axis 0.
        candidate: The candidate's outputs by the same names.
        kind: A name in :data:`DIVERGENCES`.

    Raises:
        PassError: ``kind`` is unknown.
        DataError: An output is missing, of another shape, or none is floating.
    """
    measure = dict(DIVERGENCES).get(kind)
    if measure is None:
        names = ", ".join(n for n, _ in DIVERGENCES)
        raise PassError(f"divergence '{kind}' is unknown", advice=f"choose one of {names}")
    per_output = []
    for name, a in original.items():
        if a.dtype.kind != "f":
            continue
        if name not in candidate:
            raise DataError(f"the candidate has no output '{name}'")
        b = candidate[name]
        if a.shape != b.shape:
            raise DataError(f"output '{name}' has shape {list(b.shape)}, the original's has {list(a.shape)}")
        per_output.append(measure(a, b))
    if not per_output:
        raise DataError("no output is floating, so there is nothing to compare")
    mean: np.ndarray = np.mean(per_output, axis=0)
    return mean


def default_divergence(program: Program) -> str:
    """``kl`` when the program's one answer is a distribution over classes, else ``relative-l2``.

    The rule is the quality room's (:func:`lamina.quality.outputs.gives_logits`): an output named like logits,
    probabilities or scores, one that comes from a Softmax, or class scores from a final Gemm or MatMul.
    """
    from lamina.quality.outputs import gives_logits

    return "kl" if gives_logits(program) else "relative-l2"


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _are_distributions(values: np.ndarray) -> bool:
    if not values.size or values.min() < 0:
        return False
    # A float16 row of many classes sums to 1 only this closely.
    tolerance = 1e-2 if values.dtype == np.float16 else 1e-3
    return bool(np.abs(values.sum(axis=-1, dtype=np.float64) - 1.0).max() < tolerance)


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).astype(np.float64)


def _sample_means(values: np.ndarray) -> np.ndarray:
    return np.asarray(values.reshape(len(values), -1).mean(axis=1))
