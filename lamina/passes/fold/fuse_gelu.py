"""Recognize a decomposed GELU, either form, and write the standard operator."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import LocalFold, is_op, other_input, rank_of, scalar, sole_consumer, substitute
from lamina.passes.pass_ import Effect, Rounding

_RATIO = 2e-6  # two roundings of a float32 constant; a different constant is a different function
_ERF = (0.0, math.sqrt(0.5), 0.0, 0.0)
_TANH = (0.0, math.sqrt(2 / math.pi), 0.0, 0.044715 * math.sqrt(2 / math.pi))
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Neg")
_DEPTH = 8


@dataclass(frozen=True)
class _Match:
    x: ir.Value
    result: ir.Value
    approximate: str


@dataclass(frozen=True)
class FuseGelu(LocalFold):
    """Replace 0.5 x (1 + erf(x / sqrt 2)) or its tanh approximation by ``Gelu``.

    The arguments of Erf and Tanh are read as polynomials in x, and what multiplies 1 + erf as a product, so
    any order and association of the multiplications, Div for Mul and Pow for repeated Mul are the same to it.

    Fires: float32; scalar constants within two roundings; one reader of each value from Erf or Tanh
    to the result.
    Refuses: other constants; another data type; an intermediate value read elsewhere.
    Effect: Rounding, a few ulps of max|y|.
    Cost: O(Erf + Tanh nodes).
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)
    minimum_opset: ClassVar[int] = 20
    anchors: ClassVar[tuple[str, ...]] = ("Erf", "Tanh")

    def match(self, node: ir.Node) -> _Match | str | None:
        """The GELU around an Erf or Tanh."""
        gate = sole_consumer(node.outputs[0])
        if not is_op(gate, "Add") or gate is None:
            return None
        if scalar(other_input(gate, node.outputs[0]), rank_of(node.outputs[0])) != 1.0:
            return None
        argument = node.inputs[0]
        expected, label = (_ERF, "none") if node.op_type == "Erf" else (_TANH, "tanh")
        x = None if argument is None else _variable(argument, expected)
        if x is None:
            return "its argument is not the one of GELU"
        result = _halved_product(gate.outputs[0], x)
        if result is None:
            return "1 + its output is read elsewhere, or is not multiplied to x / 2"
        if ir.DataType.FLOAT not in (x.dtype, result.dtype):
            return "it is not known to be float32"
        return _Match(x, result, label)

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write the operator in place of the last multiplication."""
        where = match.result.producer().name
        substitute(rewriter, match.result, "Gelu", [match.x], {"approximate": match.approximate})
        form = "tanh approximation" if match.approximate == "tanh" else "erf form"
        rewriter.record(self.name, where, f"decomposed GELU, {form}")


def _variable(argument: ir.Value, expected: tuple[float, ...]) -> ir.Value | None:
    """The x of which ``argument`` is the ``expected`` polynomial, searched from near to far."""
    seen, frontier = {argument}, [argument]
    for _ in range(_DEPTH):
        ahead: list[ir.Value] = []
        for value in frontier:
            producer = value.producer()
            if is_op(producer, *_ARITHMETIC) and producer is not None:
                ahead += [v for v in producer.inputs if v is not None and v.const_value is None]
        frontier = [v for v in dict.fromkeys(ahead) if v not in seen]
        seen.update(frontier)
        for x in frontier:
            found = polynomial(argument, x)
            if found is not None and np.allclose(found, expected, rtol=_RATIO, atol=1e-12):
                return x
        if len(seen) > 4 * _DEPTH:
            break
    return None


def polynomial(value: ir.Value | None, x: ir.Value, depth: int = _DEPTH) -> np.ndarray[Any, Any] | None:
    """The coefficients (degree 0 to 3) of ``value`` as a polynomial in ``x``, or None where it is not one."""
    if value is None or depth == 0:
        return None
    if value is x:
        return np.array([0.0, 1.0, 0.0, 0.0])
    number = scalar(value, rank_of(x))
    if number is not None:
        return np.array([number, 0.0, 0.0, 0.0])
    node = value.producer()
    if node is None or not is_op(node, *_ARITHMETIC):
        return None
    terms = [polynomial(v, x, depth - 1) for v in node.inputs]
    if any(t is None for t in terms):
        return None
    return _combined(node.op_type, [t for t in terms if t is not None])


def _combined(op_type: str, terms: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any] | None:
    if op_type == "Neg":
        return -terms[0]
    a, b = terms
    if op_type in ("Add", "Sub"):
        return a + b if op_type == "Add" else a - b
    if op_type == "Mul":
        product = np.convolve(a, b)
        return None if product[4:].any() else product[:4]
    if b[1:].any() or b[0] == 0:  # Div and Pow by a constant only
        return None
    if op_type == "Div":
        return a / b[0]
    power = np.array([1.0])
    if b[0] not in (2.0, 3.0):
        return None
    for _ in range(int(b[0])):
        power = np.convolve(power, a)
    return None if power[4:].any() else power[:4]


def _halved_product(gate: ir.Value, x: ir.Value) -> ir.Value | None:
    """The value that is ``gate`` times x / 2, following its only readers."""
    value, factor, has_x = gate, 1.0, False
    for _ in range(3):
        node = sole_consumer(value)
        if node is None or not is_op(node, "Mul", "Div"):
            return None
        other = other_input(node, value)
        terms = polynomial(other, x)
        if terms is None or (node.op_type == "Div" and (node.inputs[0] is not value or terms[1:].any())):
            return None
        if terms[2:].any() or (terms[0] and terms[1]) or (terms[1] and has_x) or not terms.any():
            return None
        has_x = has_x or bool(terms[1])
        step = float(terms[1] or terms[0])
        factor = factor / step if node.op_type == "Div" else factor * step
        value = node.outputs[0]
        if has_x and math.isclose(factor, 0.5, rel_tol=_RATIO):
            return value
    return None
