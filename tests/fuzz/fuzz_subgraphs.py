"""Pieces with subgraphs, which read values of the graph around them, and with sequences."""

from __future__ import annotations

from typing import Any

import numpy as np
from graphs import BOOL, FLOAT, Builder, Val
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

_UNARY = ("Relu", "Neg", "Sigmoid", "Abs", "Identity")


def _body(b: Builder, x: Val, label: str, output: str) -> tuple[list[NodeProto], list[TensorProto]]:
    """A few operators on ``x``, which the graph around makes; node names repeat on purpose."""
    name, nodes, weights = x.name, [], []
    for i in range(b.one_of(0, 1, 2)):
        made = f"{label}_{i}"
        nodes.append(helper.make_node(b.one_of(*_UNARY), [name], [made], "inner"))
        name = made
    if b.chance(0.5):
        table = np.array(b.one_of(2.0, -0.5), np.float32)
        weights.append(numpy_helper.from_array(table, f"{label}_w"))
        nodes.append(helper.make_node("Mul", [name, f"{label}_w"], [f"{label}_m"], "inner"))
        name = f"{label}_m"
    elif b.chance(0.5):
        other = b.one_of(*[v for v in b.values if v.dtype == FLOAT and v.shape == x.shape])
        nodes.append(helper.make_node("Add", [name, other.name], [f"{label}_a"]))
        name = f"{label}_a"
    nodes.append(helper.make_node("Identity", [name], [output]))
    return nodes, weights


def _branch(b: Builder, x: Val, label: str, *, bare: bool) -> GraphProto:
    nodes, weights = _body(b, x, label, f"{label}_out")
    if not bare and b.chance(0.2) and b.opset >= 9:
        inner = helper.make_node(
            "Constant", [], [f"{label}_t"], value=numpy_helper.from_array(np.array(True))
        )
        deeper = [_branch(b, x, f"{label}_{side}", bare=True) for side in ("then", "else")]
        nodes[-1].output[0] = f"{label}_flat"
        nodes += [
            inner,
            helper.make_node(
                "If", [f"{label}_t"], [f"{label}_if"], then_branch=deeper[0], else_branch=deeper[1]
            ),
            helper.make_node("Add", [f"{label}_flat", f"{label}_if"], [f"{label}_out"]),
        ]
    output = helper.make_tensor_value_info(f"{label}_out", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, label, [], [output], weights)


def choice(b: Builder) -> None:
    """If, on an input or on a constant; both branches read values around them."""
    x = b.floats()
    condition: Any = np.array(b.chance(0.5), bool)
    if b.chance(0.7):
        condition = b.pick(lambda v: v.dtype == BOOL and v.rank == 0, lambda: b.input(BOOL, ()))
    label = b.fresh("g")
    graphs = [_branch(b, x, f"{label}_{side}", bare=False) for side in ("t", "e")]
    b.op("If", [condition], x.shape, then_branch=graphs[0], else_branch=graphs[1])


def loop(b: Builder) -> None:
    """A few rounds that carry a value and gather another."""
    if b.opset < 11:
        return
    x = b.floats()
    label = b.fresh("g")
    nodes, weights = _body(b, x, label, f"{label}_step")
    carried = f"{label}_in"
    nodes += [
        helper.make_node("Add", [carried, f"{label}_step"], [f"{label}_out"]),
        helper.make_node("Identity", [f"{label}_cond"], [f"{label}_go"]),
    ]
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        nodes,
        label,
        [
            info(f"{label}_i", TensorProto.INT64, []),
            info(f"{label}_cond", TensorProto.BOOL, []),
            info(carried, TensorProto.FLOAT, None),
        ],
        [info(f"{label}_go", TensorProto.BOOL, []), info(f"{label}_out", TensorProto.FLOAT, None)],
        weights,
    )
    rounds = np.array(b.one_of(0, 1, 2, 3), np.int64)
    b.op("Loop", [rounds, np.array(True) if b.chance(0.5) else None, x], x.shape, body=body)


def scan(b: Builder) -> None:
    """A running sum over the batch."""
    x = b.pick(
        lambda v: v.dtype == FLOAT and v.rank == 2 and isinstance(v.shape[1], int),
        lambda: b.input(FLOAT, b.default_shape(2)),
    )
    if b.opset < 11:
        return
    label = b.fresh("g")
    info = helper.make_tensor_value_info
    width = [int(x.shape[1])]
    body = helper.make_graph(
        [
            helper.make_node("Add", [f"{label}_sum", f"{label}_row"], [f"{label}_new"], "inner"),
            helper.make_node("Identity", [f"{label}_new"], [f"{label}_each"], "inner"),
        ],
        label,
        [info(f"{label}_sum", TensorProto.FLOAT, width), info(f"{label}_row", TensorProto.FLOAT, width)],
        [info(f"{label}_new", TensorProto.FLOAT, width), info(f"{label}_each", TensorProto.FLOAT, width)],
    )
    b.ops(
        "Scan", [b.weight(*width), x], [(x.shape[1:], FLOAT), (x.shape, FLOAT)], num_scan_inputs=1, body=body
    )


def sequence(b: Builder) -> None:
    """A sequence made and taken apart again inside the graph."""
    if b.opset < 11:
        return
    x = b.tokens()
    made = b.fresh("seq")
    b.nodes.append(helper.make_node("SequenceConstruct", [x.name, x.name], [made]))
    if b.chance(0.5):
        shape = (*x.shape[:2], 2 * int(x.shape[2]))
        b.op("ConcatFromSequence", [made], shape, exact=x.exact, axis=2)
    else:
        b.op("SequenceAt", [made, np.array(1, np.int64)], x.shape, exact=x.exact)
