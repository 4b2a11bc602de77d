"""Scan as opset 8 had it, with a batch axis: one Scan over the batch around one over the sequence."""

from __future__ import annotations

import onnx_ir as ir

from lamina.ir.opset_adapters import Adapter, Builder, refusal


def _check_scan(node: ir.Node) -> None:
    if node.inputs[0] is not None:
        raise refusal(node, "version 8 had a length for each sequence")


def _scan_over_batch(node: ir.Node, builder: Builder) -> None:
    """Version 8 ran its body over each row of the batch; the first input, the lengths, is left out."""
    data = [v for v in node.inputs[1:] if v is not None]
    rows = [ir.Value(name=builder.fresh(f"{v.name}_row"), type=v.type) for v in data]
    attributes = {name: node.attributes.pop(name) for name in ("body", "num_scan_inputs")}
    directions = node.attributes.pop("directions", None)
    if directions is not None:
        name = "scan_input_directions"
        attributes[name] = ir.AttrInt64s(name, list(directions.as_ints()))
    inner = ir.Node(
        "",
        "Scan",
        rows,
        attributes.values(),
        num_outputs=len(node.outputs),
        name=builder.fresh(f"{node.name}_sequence"),
    )
    for value, made in zip(node.outputs, inner.outputs, strict=True):
        made.name, made.type = builder.fresh(f"{value.name}_row"), value.type
    over_batch = ir.Graph(rows, inner.outputs, nodes=[inner], name=f"{node.name}_batch")
    node.attributes["body"] = ir.AttrGraph("body", over_batch)
    node.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", len(data))
    for i, value in enumerate(data):
        node.replace_input_with(i, value)
    node.resize_inputs(len(data))


SCAN_ADAPTER = Adapter(_scan_over_batch, _check_scan)
