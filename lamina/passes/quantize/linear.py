"""One view of MatMul and Gemm: ``y = alpha * x @ W + beta * b``, whichever side and layout the weight has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lamina.passes.pass_ import Site
from lamina.passes.quantize.graph import constant_array, constant_tensor, dims_of, is_op


@dataclass(frozen=True)
class Linear:
    """A matrix product with a constant weight.

    Attributes:
        node: The MatMul or Gemm.
        activation: What is multiplied.
        weight: The constant matrix.
        transposed: The weight is stored ``[N, K]`` (Gemm with transB).
        left: The product is ``W @ x``: the weight is stored ``[M, K]`` and M is the output dimension.
        alpha: Factor of the product.
        beta: Factor of the bias.
        bias: The constant bias, of the Gemm or of the Add that belongs to the site, or None.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    transposed: bool = False
    left: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    bias: ir.Value | None = None

    @property
    def channel_axis(self) -> int:
        """The weight's axis that numbers output channels."""
        return 0 if self.left or self.transposed else 1

    @property
    def depth(self) -> int:
        """Length of the reduction."""
        tensor = constant_tensor(self.weight)
        assert tensor is not None
        return dims_of(tensor)[1 - self.channel_axis]

    @property
    def channels(self) -> int:
        """Length of the output dimension that the weight makes."""
        tensor = constant_tensor(self.weight)
        assert tensor is not None
        return dims_of(tensor)[self.channel_axis]

    def bias_vector(self) -> np.ndarray | None:
        """``beta * b`` as float32 ``[channels]``."""
        if self.bias is None:
            return None
        array = constant_array(self.bias)
        assert array is not None
        flat = np.broadcast_to(array.reshape(-1), (self.channels,))
        return np.asarray(flat * np.float32(self.beta), np.float32)

    def columns(self) -> np.ndarray:
        """The weight as ``[K, N]``."""
        array = constant_array(self.weight)
        assert array is not None
        return array.T if self.channel_axis == 0 else array


def read_linear(node: ir.Node, add: ir.Node | None = None) -> Linear | str:
    """The product ``node`` (and the bias Add behind it), or the reason it has no such form."""
    if node.op_type == "Gemm":
        return _read_gemm(node)
    first, second = node.inputs[0], node.inputs[1]
    if first is None or second is None:
        return "an input is missing"
    left = constant_tensor(second) is None
    weight, activation = (first, second) if left else (second, first)
    if constant_tensor(weight) is None:
        return "no operand is a constant weight"
    if constant_tensor(activation) is not None:
        return "both operands are constants"
    return Linear(node, activation, weight, left=left, bias=None if add is None else bias_of(add, node))


def _read_gemm(node: ir.Node) -> Linear | str:
    activation, weight = node.inputs[0], node.inputs[1]
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if node.attributes.get_int("transA", 0):
        return "transA=1: the activation is stored transposed"
    if activation is None or weight is None or constant_tensor(weight) is None:
        return "the weight is not constant"
    if constant_tensor(activation) is not None:
        return "both operands are constants"
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
    if alpha == 0:
        return "alpha is 0: the product does not count"
    found = Linear(node, activation, weight, transposed, False, alpha, beta, bias)
    if bias is None:
        return found
    tensor = constant_tensor(bias)
    if tensor is None:
        return "the bias is not constant"
    dims = dims_of(tensor)
    if dims not in ((), (1,), (1, 1)) and (not is_row(dims) or dims[-1] != found.channels):
        return f"the bias has shape {list(dims)}, which is not one number a column"
    return found


def is_row(dims: tuple[int, ...]) -> bool:
    """Whether every dimension but the last is 1."""
    return bool(dims) and all(d == 1 for d in dims[:-1])


def bias_of(add: ir.Node, product: ir.Node) -> ir.Value | None:
    """The operand of ``add`` that is not the output of ``product``."""
    for value in add.inputs:
        if value is not product.outputs[0]:
            return value
    return None


def linear_of(site: Site, nodes: Mapping[str, ir.Node]) -> Linear:
    """The product a site stands for, as its nodes are now."""
    add = nodes[site.nodes[1]] if len(site.nodes) > 1 else None
    found = read_linear(nodes[site.nodes[0]], add)
    assert isinstance(found, Linear), found  # sites() made sure
    return found


def bias_add_after(node: ir.Node) -> ir.Node | None:
    """The Add of a constant bias vector that is the only reader of a MatMul with its weight on the right.

    It belongs to the site: runtimes fuse the pair into a float Gemm when only the product is quantized.
    """
    value = node.outputs[0]
    uses = tuple(value.uses())
    if value.is_graph_output() or len(uses) != 1 or constant_tensor(node.inputs[1]) is None:
        return None
    add = uses[0].node
    if not is_op(add, "Add") or add.graph is not node.graph:
        return None
    bias, weight = constant_tensor(bias_of(add, node)), constant_tensor(node.inputs[1])
    if bias is None or weight is None or bias.dtype != ir.DataType.FLOAT or len(weight.shape) != 2:
        return None
    dims = dims_of(bias)
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    # A bias of higher rank than the product would raise the rank of the result.
    known = len(dims) == 1 or (shape is not None and len(dims) <= len(shape))
    return add if known and is_row(dims) and dims[-1] == dims_of(weight)[1] else None
