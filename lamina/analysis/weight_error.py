"""How much quantizing an operator changes its output over the calibration distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from lamina.analysis.inputs import InputStatistics
from lamina.analysis.operators import WeightedOperator
from lamina.analysis.statistics import Statistics
from lamina.ir.program import Program

# [group, out, in] -> the values that codes and scales stand for
Quantizer = Callable[[np.ndarray], np.ndarray]
DEFAULT_BITS = (8, 4, 3, 2)


@dataclass(frozen=True)
class QuantizationError:
    """Relative squared errors of one operator under one option; each 0 upwards, higher = more sensitive.

    Attributes:
        weight: ``F(dW)^2 / F(W)^2``: needs no data.
        output: ``tr(dW S dW') / tr(W S W')``, S the sum of x x' over calibration vectors: exactly the squared
            change of the operator's output over its squared size when only the weight is quantized.
        activation: ``sum L2(W (q(x) - x))^2 / sum L2(W x)^2`` over the vectors kept, when only the input is.
    """

    weight: float
    output: float
    activation: float


def round_to_nearest(bits: int) -> Quantizer:
    """Symmetric rounding, one scale an output channel that covers its largest magnitude."""

    def quantize(weights: np.ndarray) -> np.ndarray:
        limit = 2 ** (bits - 1) - 1
        scale = np.abs(weights).max(axis=-1, keepdims=True) / limit
        scale = np.where(scale > 0, scale, 1.0)
        rounded: np.ndarray = np.clip(np.rint(weights / scale), -limit, limit) * scale
        return rounded

    return quantize


def affine_range(bits: int, minimum: float, maximum: float) -> Quantizer:
    """Rounding of activations to ``2^bits`` even steps over one range that includes zero."""
    low, high = min(minimum, 0.0), max(maximum, 0.0)
    scale = (high - low) / (2**bits - 1) or 1.0
    zero = np.rint(-low / scale)

    def quantize(values: np.ndarray) -> np.ndarray:
        rounded: np.ndarray = (np.clip(np.rint(values / scale) + zero, 0, 2**bits - 1) - zero) * scale
        return rounded

    return quantize


def quantization_error(
    operator: WeightedOperator,
    program: Program,
    seen: InputStatistics,
    weights: Quantizer,
    activations: Quantizer | None = None,
) -> QuantizationError:
    """The errors of one operator.

    Args:
        operator: The operator.
        program: Holds its weight.
        seen: What it reads.
        weights: Maps float64 ``[group, out, in]`` to what is stored instead.
        activations: Maps float64 vectors to what is read instead; None: ``activation`` is 0.
    """
    matrix = operator.matrices(program)
    change = weights(matrix) - matrix
    energy = float(np.square(matrix).sum())
    size = _quadratic(matrix, seen.moments)
    return QuantizationError(
        _ratio(float(np.square(change).sum()), energy),
        _ratio(_quadratic(change, seen.moments), size),
        0.0 if activations is None else _activation_error(matrix, seen.kept, activations),
    )


def quantization_errors(
    program: Program, statistics: Statistics, bits: tuple[int, ...] = DEFAULT_BITS
) -> dict[str, dict[int, QuantizationError]]:
    """Operator -> width -> errors, weights and activations both rounded to that width.

    Weights: symmetric, one scale a channel. Activations: one affine range, least to greatest element seen.
    """
    return {
        name: {
            b: quantization_error(
                statistics.operators[name],
                program,
                seen,
                round_to_nearest(b),
                affine_range(b, seen.minimum, seen.maximum),
            )
            for b in bits
        }
        for name, seen in statistics.inputs.items()
    }


def output_error_at(bits: int) -> Callable[[Program, Statistics], Mapping[str, float]]:
    """A metric: :attr:`QuantizationError.output` of every operator at one width.

    ``tr(dW S dW') / tr(W S W')``; W ``[out, in]``, dW its error under :func:`round_to_nearest`, S
    ``[in, in]`` the sum of x x' over calibration vectors. Range 0 upwards; higher = more sensitive.
    Standard definition.
    """

    def rate(program: Program, statistics: Statistics) -> Mapping[str, float]:
        found = {}
        for name, seen in statistics.inputs.items():
            operator = statistics.operators[name]
            found[name] = quantization_error(operator, program, seen, round_to_nearest(bits)).output
        return found

    return rate


def _quadratic(matrix: np.ndarray, moments: np.ndarray) -> float:
    """``tr(M S M')`` summed over groups."""
    return float(max(0.0, np.einsum("gok,gok->", np.matmul(matrix, moments), matrix)))


def _activation_error(matrix: np.ndarray, kept: np.ndarray, quantize: Quantizer) -> float:
    vectors = kept.astype(np.float64).transpose(1, 2, 0)  # [group, k, n]
    change = np.matmul(matrix, quantize(vectors) - vectors)
    return _ratio(float(np.square(change).sum()), float(np.square(np.matmul(matrix, vectors)).sum()))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
