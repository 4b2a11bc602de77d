"""FX forms of elementwise operators: arithmetic, comparison, logic, bits, activations.

Each function takes an operator's inputs by position and its attributes by name; what it does not name is
refused at conversion.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.ir.fx_values import widened


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Quotient; integers are truncated toward zero, as in C."""
    return a / b if a.dtype.is_floating_point else torch.div(a, b, rounding_mode="trunc")


def modulo(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainder with the divisor's sign, or with ``fmod`` the dividend's."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def power(a: Tensor, b: Tensor) -> Tensor:
    """``a`` to the ``b``, in the type of ``a``."""
    if a.dtype == b.dtype and a.dtype.is_floating_point:
        return torch.pow(a, b)
    if not b.dtype.is_floating_point and a.dtype.is_floating_point:
        return torch.pow(a, b).to(a.dtype)
    if not a.dtype.is_floating_point and not b.dtype.is_floating_point and not bool((b < 0).any()):
        return torch.pow(a.long(), b.long()).to(a.dtype)
    return torch.pow(a.double(), b.double()).to(a.dtype)


def total(*xs: Tensor) -> Tensor:
    """Sum of any number of tensors."""
    return reduce(torch.add, xs)


def mean(*xs: Tensor) -> Tensor:
    """Mean of any number of tensors."""
    return reduce(torch.add, xs) / len(xs)


def maximum(*xs: Tensor) -> Tensor:
    """Largest of any number of tensors."""
    return reduce(torch.maximum, xs)


def minimum(*xs: Tensor) -> Tensor:
    """Smallest of any number of tensors."""
    return reduce(torch.minimum, xs)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Bounded; where the bounds cross, the upper one wins."""
    if low is not None:
        x = torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def where(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``a`` where the condition holds, else ``b``."""
    return torch.where(condition, a, b)


def is_infinite(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where ``x`` is one of the infinities asked for."""
    found = torch.isinf(x)
    if not detect_negative:
        found = found & (x > 0)
    return found if detect_positive else found & (x < 0)


def shift_bits(a: Tensor, b: Tensor, *, direction: str) -> Tensor:
    """Bits moved left or right."""
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return torch.relu(x)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    """x, or alpha x where negative."""
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    """x, or slope x where negative; the slope broadcasts."""
    return torch.where(x < 0, slope * x, x)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """x, or alpha (exp x - 1) where negative."""
    return F.elu(x, alpha)


def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """max(0, x) + min(0, alpha (exp(x / alpha) - 1))."""
    return F.celu(x, alpha)


def selu(
    x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232
) -> Tensor:
    """Gamma times ELU."""
    return gamma * F.elu(x, alpha)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``x`` Phi(x), or its tanh approximation."""
    return F.gelu(x, approximate=approximate)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """``alpha`` x + beta, cut to 0..1."""
    return torch.clamp(alpha * x + beta, 0, 1)


def hard_swish(x: Tensor) -> Tensor:
    """``x`` times HardSigmoid(x; 1/6, 1/2)."""
    return x * hard_sigmoid(x, alpha=1 / 6, beta=0.5)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def swiglu(a: Tensor, b: Tensor, *, alpha: float = 1.0) -> Tensor:
    """Swish of ``a`` times ``b``."""
    return swish(a, alpha=alpha) * b


def mish(x: Tensor) -> Tensor:
    """``x`` tanh(softplus(x))."""
    return x * torch.tanh(softplus(x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp x), without overflow and without torch's threshold, past which it returns x itself."""
    return torch.logaddexp(x, torch.zeros_like(x)) if x.dtype.is_floating_point else F.softplus(x)


def softsign(x: Tensor) -> Tensor:
    """``x`` / (1 + abs x)."""
    return x / (1 + torch.abs(x))


def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """Toward zero by ``bias`` outside [-lambd, lambd], zero inside."""
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))
    return moved.to(x.dtype)


def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    """``x`` where above ``alpha``, else zero."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def cast(x: Tensor, *, to: torch.dtype, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """To another type; ``saturate`` and ``round_mode`` speak of 8-bit floats only, which are not covered."""
    return x.to(to)


def cast_like(x: Tensor, like: Tensor, *, saturate: int = 1, round_mode: str = "up") -> Tensor:
    """To the type of another tensor."""
    return x.to(like.dtype)


def dropout(x: Tensor, ratio: Any = None, training: Any = None, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inference: the input, and a mask that is true everywhere."""
    return x, torch.ones_like(x, dtype=torch.bool)


def identity(x: Tensor) -> Tensor:
    """The input itself."""
    return x


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Softmax along one axis; half precision is accumulated in float32."""
    return torch.softmax(widened(x), axis).to(x.dtype)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """Logarithm of the softmax along one axis."""
    return torch.log_softmax(widened(x), axis).to(x.dtype)


def hardmax(x: Tensor, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along one axis, else 0."""
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, keepdim=True), 1.0)


def erf(x: Tensor) -> Tensor:
    """The error function."""
    return torch.erf(x)


def blackman_window(
    size: Tensor, *, output_datatype: torch.dtype = torch.float32, periodic: int = 1
) -> Tensor:
    """0.42 - 0.5 cos + 0.08 cos of the double angle."""
    angle = _angles(size, periodic)
    return (0.42 - 0.5 * torch.cos(angle) + 0.08 * torch.cos(2 * angle)).to(output_datatype)


def hann_window(size: Tensor, *, output_datatype: torch.dtype = torch.float32, periodic: int = 1) -> Tensor:
    """0.5 - 0.5 cos."""
    return (0.5 - 0.5 * torch.cos(_angles(size, periodic))).to(output_datatype)


def hamming_window(
    size: Tensor, *, output_datatype: torch.dtype = torch.float32, periodic: int = 1
) -> Tensor:
    """25/46 - 21/46 cos."""
    return (25 / 46 - 21 / 46 * torch.cos(_angles(size, periodic))).to(output_datatype)


def _angles(size: Tensor, periodic: int) -> Tensor:
    count = int(size)
    positions = torch.arange(count, dtype=torch.float64, device=size.device)
    return 2 * math.pi * positions / (count if periodic else max(count - 1, 1))
