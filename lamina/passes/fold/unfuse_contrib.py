"""ONNX Runtime's fused element-wise, product and normalization operators in plain ones.

A rule inserts nodes at the rewriter's anchor and returns one value an output, or, before it inserts any, the
reason why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.graph import attribute, rank_of, sole_consumer

_Values = list[ir.Value | None]


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """An input that may be left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def needed(node: ir.Node, index: int) -> ir.Value:
    """An input that must be there."""
    value = operand(node, index)
    assert value is not None, f"{node.op_type} '{node.name}' lacks input {index}"
    return value


def is_read(node: ir.Node, index: int) -> bool:
    """Whether anybody reads an output."""
    if index >= len(node.outputs):
        return False
    value = node.outputs[index]
    return bool(value.uses()) or value.is_graph_output()


def number(rewriter: Rewriter, value: float, like: ir.Value) -> ir.Value:
    """A scalar constant of the type of ``like`` (float32 where that is unknown)."""
    dtype = like.dtype or ir.DataType.FLOAT
    return rewriter.constant(np.array(value, dtype.numpy()), "lamina_number", dtype=dtype)


class Chain:
    """Writes nodes named after the fused one."""

    def __init__(self, node: ir.Node, rewriter: Rewriter) -> None:
        self.node, self.rewriter = node, rewriter

    def op(self, op_type: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        """One node; its output has the type of the fused node's first one."""
        name = f"{self.node.name}_{op_type}"
        return self.rewriter.op(
            op_type, list(inputs), attributes, name=name, dtype=self.node.outputs[0].dtype
        )

    def number(self, value: float) -> ir.Value:
        """A scalar constant of the fused node's type."""
        return number(self.rewriter, value, self.node.outputs[0])

    def integers(self, *values: int) -> ir.Value:
        """A vector of int64."""
        return self.rewriter.constant(np.array(values, np.int64), f"{self.node.name}_numbers")


def _erf_gelu(chain: Chain, x: ir.Value) -> ir.Value:
    scaled = chain.op("Div", x, chain.number(math.sqrt(2)))
    gate = chain.op("Add", chain.op("Erf", scaled), chain.number(1))
    return chain.op("Mul", chain.op("Mul", x, gate), chain.number(0.5))


def gelu(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """Half of x times 1 + erf(x / sqrt 2)."""
    return [_erf_gelu(Chain(node, rewriter), needed(node, 0))]


def bias_gelu(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """GELU of x + bias."""
    chain = Chain(node, rewriter)
    return [_erf_gelu(chain, chain.op("Add", needed(node, 0), needed(node, 1)))]


def fast_gelu(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """Half of x times 1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)), of x + bias where there is one."""
    chain, x, bias = Chain(node, rewriter), needed(node, 0), operand(node, 1)
    if bias is not None:
        x = chain.op("Add", x, bias)
    cube = chain.op("Mul", chain.op("Mul", chain.op("Mul", x, x), x), chain.number(0.044715))
    argument = chain.op("Mul", chain.op("Add", x, cube), chain.number(math.sqrt(2 / math.pi)))
    gate = chain.op("Add", chain.op("Tanh", argument), chain.number(1))
    return [chain.op("Mul", chain.op("Mul", x, gate), chain.number(0.5))]


def quick_gelu(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """The product of x and sigmoid(alpha x)."""
    chain, x = Chain(node, rewriter), needed(node, 0)
    alpha = float(attribute(node, "alpha", 1.702))
    scaled = x if alpha == 1 else chain.op("Mul", x, chain.number(alpha))
    return [chain.op("Mul", x, chain.op("Sigmoid", scaled))]


# -- products ---------------------------------------------------------------------------------------


def fused_matmul(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """The product of alpha, A and B, either transposed first."""
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        return "it transposes batches"
    ranks = [rank_of(needed(node, i)) for i in (0, 1)]
    turned = [bool(attribute(node, name, 0)) for name in ("transA", "transB")]
    if any(t and (r is None or r < 2) for t, r in zip(turned, ranks, strict=True)):
        return "the rank of what it transposes is unknown"
    chain, factors = Chain(node, rewriter), []
    for index, (turn, rank) in enumerate(zip(turned, ranks, strict=True)):
        value = needed(node, index)
        if turn and rank is not None:
            value = chain.op("Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        factors.append(value)
    product = chain.op("MatMul", *factors)
    alpha = float(attribute(node, "alpha", 1.0))
    return [product if alpha == 1 else chain.op("Mul", product, chain.number(alpha))]


def fused_gemm(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """Gemm, then the activation."""
    names = ("activation_alpha", "activation_beta", "activation_gamma")
    given = [attribute(node, n, None) for n in names]
    activation = _activation(node, [p for p in given if p is not None])
    if isinstance(activation, str):
        return activation
    chain = Chain(node, rewriter)
    kept = {k: v.value for k, v in node.attributes.items() if not k.startswith("activation")}
    return [activation(chain, chain.op("Gemm", *node.inputs, **kept))]


def fused_conv(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """Conv, then the sum with Z where there is one, then the activation."""
    activation = _activation(node, list(attribute(node, "activation_params", [])))
    if isinstance(activation, str):
        return activation
    chain = Chain(node, rewriter)
    kept = {k: v.value for k, v in node.attributes.items() if not k.startswith("activation")}
    other = operand(node, 3)
    inputs = [v for v in node.inputs[:3] if v is not None]
    product = chain.op("Conv", *inputs, **kept)
    if other is not None:
        product = chain.op("Add", product, other)
    return [activation(chain, product)]


_PLAIN = frozenset({"Relu", "Sigmoid", "Tanh", "Softplus", "Softsign"})
_WITH_ALPHA = frozenset({"LeakyRelu", "Elu", "ThresholdedRelu"})


def _activation(node: ir.Node, numbers: Sequence[float]) -> Callable[[Chain, ir.Value], ir.Value] | str:
    """What applies the activation a fused node names."""
    name = attribute(node, "activation", "")
    name = name.decode() if isinstance(name, bytes) else name
    if not name:
        return lambda _, x: x
    if name in _PLAIN:
        return lambda chain, x: chain.op(name, x)
    if name in _WITH_ALPHA:
        known = {} if not numbers else {"alpha": float(numbers[0])}
        return lambda chain, x: chain.op(name, x, **known)
    if name == "HardSigmoid" and len(numbers) == 2:
        alpha, beta = map(float, numbers)
        return lambda chain, x: chain.op(name, x, alpha=alpha, beta=beta)
    if name == "Clip" and len(numbers) == 2:
        low, high = map(float, numbers)
        return lambda chain, x: chain.op(name, x, chain.number(low), chain.number(high))
    return f"its activation '{name}' is unknown"


# -- normalizations ---------------------------------------------------------------------------------


def _skip_sum(node: ir.Node, chain: Chain, bias: ir.Value | None) -> ir.Value:
    """Input + skip + bias, the bias given to the operand nothing else reads: the body of the branch."""
    first, second = needed(node, 0), needed(node, 1)
    if bias is None:
        return chain.op("Add", first, second)
    if sole_consumer(first) is None and sole_consumer(second) is node:
        return chain.op("Add", first, chain.op("Add", second, bias))
    return chain.op("Add", chain.op("Add", first, bias), second)


def _shapes_agree(node: ir.Node) -> bool:
    """Whether plain addition broadcasts the skip as the fused operator does."""
    ranks = [rank_of(needed(node, i)) for i in (0, 1)]
    return ranks[0] is not None and ranks[1] is not None and ranks[1] <= ranks[0]


def skip_layer_normalization(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """LayerNormalization of input + skip + bias, and that sum."""
    if is_read(node, 1) or is_read(node, 2):
        return "its mean or deviation is read"
    if not _shapes_agree(node):
        return "the ranks of its inputs are unknown"
    chain = Chain(node, rewriter)
    total = _skip_sum(node, chain, operand(node, 4))
    epsilon = float(attribute(node, "epsilon", 1e-12))
    inputs = [total, needed(node, 2), *([v] if (v := operand(node, 3)) is not None else [])]
    result = chain.op("LayerNormalization", *inputs, axis=-1, epsilon=epsilon)
    return [result, None, None, total if is_read(node, 3) else None]


def skip_simplified_layer_normalization(node: ir.Node, rewriter: Rewriter) -> _Values | str:
    """RMS normalization of input + skip + bias, and that sum."""
    if is_read(node, 1) or is_read(node, 2):
        return "its mean or deviation is read"
    if not _shapes_agree(node):
        return "the ranks of its inputs are unknown"
    chain = Chain(node, rewriter)
    total = _skip_sum(node, chain, operand(node, 3))
    epsilon = chain.number(float(attribute(node, "epsilon", 1e-12)))
    square = chain.op("Mul", total, total)
    if rewriter.model.opset_imports.get("", 1) < 18:
        mean = chain.op("ReduceMean", square, axes=[-1], keepdims=1)
    else:
        mean = chain.op("ReduceMean", square, chain.integers(-1), keepdims=1)
    root = chain.op("Sqrt", chain.op("Add", mean, epsilon))
    result = chain.op("Mul", chain.op("Div", total, root), needed(node, 2))
    return [result, None, None, total if is_read(node, 3) else None]
