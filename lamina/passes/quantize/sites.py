"""Where quantization applies: weighted operators, embeddings, and what carries int8 between them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.passes.pass_ import Refusal, Site
from lamina.passes.quantize.graph import FLOAT, constant_array, constant_tensor, dims_of, is_op
from lamina.passes.quantize.linear import bias_add_after, read_linear

NAME = "quantize"
CARRIERS = ("add", "pool", "mean", "concat", "pad")

_RECURRENT = ("LSTM", "GRU", "RNN")
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather", *_RECURRENT)
# Operators that only move elements: their output takes values of their input (zeros included).
_MOVES = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "MaxPool", "Expand")
# A smaller table is not worth an extra operator.
_MINIMUM_TABLE = 1024


def find_sites(program: Program, minimum_reduction: int) -> Iterator[Site | Refusal]:
    """Every site and near-miss of ``program``, in the order of the graph; linear in nodes and edges."""
    main = program.graph
    carried: set[ir.Value] = set()  # values that can be int8: made by convolutions and what carries them
    for node in main:
        if is_op(node, *_WEIGHTED):
            found = _weighted(node, minimum_reduction)
            if isinstance(found, Site) and found.kind == "conv":
                carried.update(_end(node).outputs)
            if found is not None:
                yield found
        elif (carrier := _carrier(node, carried)) is not None:
            carried.update(_end(node).outputs if node.op_type == "Add" else node.outputs)
            yield carrier
        elif moves_elements(node) and node.inputs[0] in carried:
            carried.update(node.outputs)
    for node in program.model.graph.all_nodes():
        if node.graph is not main and is_op(node, *_WEIGHTED) and _has_weight(node):
            yield _refuse(node, "it is in a subgraph")


def _weighted(node: ir.Node, minimum_reduction: int) -> Site | Refusal | None:
    if node.op_type == "Gather":
        return _embedding(node)
    if node.op_type in _RECURRENT:
        return _recurrent(node)
    if node.op_type in ("Conv", "ConvTranspose"):
        reason = _conv_problem(node)
        turned = node.op_type == "ConvTranspose"
        reduction = _size(node.inputs[1], slice(None) if turned else slice(1, None))
        if turned and reason is None:  # [in, out / group, *window]
            reduction //= dims_of(node.inputs[1].const_value)[1]  # type: ignore[union-attr, arg-type]
    else:
        if node.op_type == "MatMul" and not _has_weight(node):
            return _overridable(node) or _product(node)
        add = bias_add_after(node) if node.op_type == "MatMul" else None
        product = read_linear(node, add)
        if isinstance(product, str):
            problem = _weight_problem(node.inputs[1], (2,)) if node.op_type == "Gemm" else None
            return _refuse(node, problem or product)
        reason = _weight_problem(product.weight, (2,))
        reduction = 0 if reason else product.depth
    if reason is None and reduction < minimum_reduction:
        reason = f"it sums only {reduction} products an output; at least {minimum_reduction} are asked for"
    return _refuse(node, reason) if reason else _site(node)


def _site(node: ir.Node) -> Site:
    nodes = [node]
    follower = bias_add_after(node) if node.op_type == "MatMul" else None
    if node.op_type == "Conv":
        follower = activation_after(node)
    if follower is not None:
        nodes.append(follower)
    read = [v for n in nodes for v in n.inputs if v is not None and v is not node.outputs[0]]
    weights = tuple(v.name or "" for v in read if constant_tensor(v) is not None)
    inputs = tuple(v.name or "" for v in read if constant_tensor(v) is None)
    return Site(
        NAME,
        node.name or "",
        node.op_type.lower(),
        tuple(n.name or "" for n in nodes),
        inputs,
        (nodes[-1].outputs[0].name or "",),
        weights,
    )


def _product(node: ir.Node) -> Site | None:
    """A product of two activations, as attention has two of."""
    inputs = [v for v in node.inputs if v is not None and constant_tensor(v) is None]
    if len(inputs) != 2 or any(v.dtype not in (None, FLOAT) for v in inputs):
        return None
    names, name = tuple(v.name or "" for v in inputs), node.name or ""
    return Site(NAME, name, "product", (name,), names, (node.outputs[0].name or "",))


def _recurrent(node: ir.Node) -> Site | Refusal:
    """LSTM, GRU or RNN: its input and recurrence weights are one choice."""
    for weight in node.inputs[1:3]:
        reason = _weight_problem(weight, (3,))
        if reason is not None:
            return _refuse(node, reason)
    name = node.name or ""
    read = [v for v in node.inputs if v is not None and (v.name or constant_tensor(v) is not None)]
    return Site(
        NAME,
        name,
        "recurrent",
        (name,),
        tuple(v.name or "" for v in read if constant_tensor(v) is None),
        tuple(v.name or "" for v in node.outputs if v.uses() or v.is_graph_output()),
        tuple(v.name or "" for v in read if constant_tensor(v) is not None),
    )


def _conv_problem(node: ir.Node) -> str | None:
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_tensor(bias) is None:
        return "the bias is not constant"
    if node.inputs[0] is None or node.inputs[0].dtype not in (None, FLOAT):
        return "the input is not float32"
    return _weight_problem(node.inputs[1], (3, 4, 5))


def _weight_problem(weight: ir.Value | None, ranks: tuple[int, ...]) -> str | None:
    if weight is None:
        return "the weight is missing"
    if weight.is_graph_input():
        return f"weight '{weight.name}' is an input of the model: a caller may replace it"
    tensor = constant_tensor(weight)
    if tensor is None:
        return f"weight '{weight.name}' is not constant"
    if weight.is_graph_output():
        return f"weight '{weight.name}' is an output of the model"
    if tensor.dtype != FLOAT:
        return f"weight '{weight.name}' is {tensor.dtype.name.lower()}, not float32"
    if len(tensor.shape) not in ranks:
        return f"weight '{weight.name}' has rank {len(tensor.shape)}"
    if not np.isfinite(tensor.numpy()).all():
        return f"weight '{weight.name}' holds values that are not finite"
    return None


def _embedding(node: ir.Node) -> Site | Refusal | None:
    table = constant_tensor(node.inputs[0])
    if (
        table is None
        or not table.dtype.is_floating_point()
        or len(table.shape) < 2
        or table.size < _MINIMUM_TABLE
    ):
        return None  # shape arithmetic and small tables are no near-misses
    reason = _weight_problem(node.inputs[0], (2,))
    if reason is None and node.attributes.get_int("axis", 0) != 0:
        reason = "it gathers along another axis than 0"
    if reason is None and constant_tensor(node.inputs[1]) is not None:
        reason = "its indices are constant"
    if reason is not None:
        return _refuse(node, reason)
    table_name, rows, output = (v.name or "" if v else "" for v in (*node.inputs[:2], node.outputs[0]))
    name = node.name or ""
    return Site(NAME, name, "embedding", (name,), (rows,), (output,), (table_name,))


def _has_weight(node: ir.Node) -> bool:
    tensors = (constant_tensor(v) for v in node.inputs)
    return any(t is not None and t.dtype.is_floating_point() for t in tensors)


def _overridable(node: ir.Node) -> Refusal | None:
    for value in node.inputs:
        if value is not None and value.is_graph_input() and value.const_value is not None:
            return _refuse(node, f"weight '{value.name}' is an input of the model: a caller may replace it")
    return None


def _size(value: ir.Value | None, part: slice) -> int:
    tensor = constant_tensor(value)
    return 0 if tensor is None else math.prod(dims_of(tensor)[part])


def _refuse(node: ir.Node, reason: str) -> Refusal:
    return Refusal(NAME, node.name or "", reason)


# -- what follows a convolution, and what carries int8 -------------------------------------------------


def activation_after(node: ir.Node) -> ir.Node | None:
    """The Relu, or Clip with constant bounds, that is the only reader of ``node``'s output."""
    value = node.outputs[0]
    uses = tuple(value.uses())
    if value.is_graph_output() or len(uses) != 1:
        return None
    reader = uses[0].node
    if reader.graph is not node.graph or uses[0].idx != 0:
        return None
    bounded = is_op(reader, "Clip") and all(
        v is None or constant_tensor(v) is not None for v in reader.inputs[1:]
    )
    return reader if bounded or is_op(reader, "Relu") else None


def _end(node: ir.Node) -> ir.Node:
    """The last node of the site that ``node`` begins."""
    return activation_after(node) or node


def _carrier(node: ir.Node, carried: set[ir.Value]) -> Site | None:
    kind = carrier_kind(node)
    if kind is None or not any(v in carried for v in node.inputs if v is not None):
        return None
    operands = node.inputs if kind in ("add", "concat") else node.inputs[:1]
    if any(v is None or constant_tensor(v) is not None for v in operands):
        return None
    inputs = tuple(v.name or "" for v in operands if v is not None)
    last = _end(node) if kind == "add" else node
    names = tuple(n.name or "" for n in ((node,) if last is node else (node, last)))
    return Site(NAME, node.name or "", kind, names, inputs, (last.outputs[0].name or "",))


def carrier_kind(node: ir.Node) -> str | None:
    """Which carrier ``node`` is, or None."""
    if is_op(node, "Add"):
        return "add"
    if is_op(node, "Concat"):
        return "concat"
    if is_op(node, "GlobalAveragePool", "AveragePool"):
        return "pool"
    if is_op(node, "MaxPool"):
        return "pool" if not any(v.uses() for v in node.outputs[1:]) else None
    if is_op(node, "Pad"):
        return "pad" if pads_zero(node) else None
    return "mean" if is_op(node, "ReduceMean") and averages_space(node) else None


def pads_zero(node: ir.Node) -> bool:
    """Whether a Pad fills with zeros, in place of which the zero point can stand."""
    mode = node.attributes.get_string("mode", "constant")
    fill = node.inputs[2] if len(node.inputs) > 2 else None
    array = constant_array(fill)
    return mode == "constant" and (fill is None or (array is not None and not array.any()))


def averages_space(node: ir.Node) -> bool:
    """Whether a ReduceMean averages exactly the dimensions that GlobalAveragePool does."""
    value = node.inputs[0]
    if value is None or value.shape is None or len(value.shape) < 3:
        return False
    rank = len(value.shape)
    axes = node.attributes.get_ints("axes", ())
    if len(node.inputs) > 1 and node.inputs[1] is not None:
        array = constant_array(node.inputs[1])
        axes = () if array is None else tuple(int(a) for a in array.reshape(-1))
    return sorted(a % rank for a in axes or ()) == list(range(2, rank))


def moves_elements(node: ir.Node) -> bool:
    """Whether the output only holds elements of the first input, and zeros."""
    return is_op(node, *_MOVES) or (is_op(node, "Pad") and pads_zero(node))
