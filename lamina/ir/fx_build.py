"""Build the ``torch.fx`` graph of a program, node by node."""

from __future__ import annotations

import keyword
import operator
import re
from typing import Any

import onnx_ir as ir
import torch

from lamina.errors import UnsupportedOperator
from lamina.ir.fx import INITIALIZERS
from lamina.ir.fx_cover import TYPE_ATTRIBUTES, faults, form
from lamina.ir.fx_names import attribute_names, is_weight, literal
from lamina.ir.fx_table import OPERATORS
from lamina.ir.fx_values import DTYPES, to_tensor
from lamina.ir.program import Program

_SHOWN = 20  # uncovered nodes an error lists by name


def build(program: Program, precision: torch.dtype | None) -> torch.fx.GraphModule:
    """What :func:`lamina.ir.fx.to_fx` promises."""
    _require_covered(program)
    return _Builder(program, precision).module()


def _require_covered(program: Program) -> None:
    lines = faults(program)
    if not lines:
        return
    more = len(lines) - _SHOWN
    listed = list(lines[:_SHOWN]) + ([f"and {more} more"] if more > 0 else [])
    raise UnsupportedOperator(
        f"the program has no FX form: {len(lines)} of its parts are not covered\n    "
        + "\n    ".join(listed),
        where=program.source,
        advice="fold the model (lamina.fold) so that constant control flow goes away, export it with "
        "standard operators, or add a line to OPERATORS in lamina/ir/fx_table.py; docs/fx.md lists what "
        "is covered",
    )


class _Builder:
    def __init__(self, program: Program, precision: torch.dtype | None) -> None:
        self._program = program
        self._precision = precision
        self._graph = torch.fx.Graph()
        self._values: dict[ir.Value, torch.fx.Node] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        initializers = program.graph.initializers
        self._paths = attribute_names(initializers)
        self._names: dict[str, str] = {}

    def module(self) -> torch.fx.GraphModule:
        graph = self._program.graph
        for value in graph.inputs:
            if value.name not in graph.initializers:
                node = self._graph.create_node("placeholder", _identifier(value.name or "input"))
                node.meta["onnx_name"] = value.name
                self._values[value] = node
        for node in graph:
            self._add(node)
        self._graph.output(tuple(self._value(v) for v in graph.outputs))
        module = torch.fx.GraphModule(self._tensors, self._graph, class_name="LaminaProgram")
        module.meta[INITIALIZERS] = dict(self._names)
        module.eval()
        return module

    def _add(self, node: ir.Node) -> None:
        shape = form(node.op_type)
        inputs = list(node.inputs)
        while inputs and inputs[-1] is None:
            inputs.pop()
        arguments = tuple(self._argument(v, i in shape.literal) for i, v in enumerate(inputs))
        options = {name: self._option(name, a) for name, a in node.attributes.items()}
        options = {name: option for name, option in options.items() if option is not None}
        count = max((i + 1 for i, v in enumerate(node.outputs) if v.name), default=0)
        if shape.has_outputs:
            options["outputs"] = count
        if shape.has_opset:
            options["opset"] = self._program.opset
        name = _identifier(node.name or node.op_type)
        made = self._graph.create_node(
            "call_function", OPERATORS[node.op_type], arguments, options, name=name
        )
        made.meta.update(onnx_name=node.name, op_type=node.op_type)
        if not shape.several:
            self._values[node.outputs[0]] = made
            return
        for i, value in enumerate(node.outputs):
            if not value.name:
                continue
            item = self._graph.create_node(
                "call_function", operator.getitem, (made, i), name=_identifier(f"{node.name}_{i}")
            )
            item.meta.update(onnx_name=node.name, op_type=node.op_type)
            self._values[value] = item

    def _argument(self, value: ir.Value | None, is_literal: bool) -> Any:
        if value is None:
            return None
        if is_literal and value.is_initializer() and value.const_value is not None:
            return literal(value.const_value)
        return self._value(value)

    def _value(self, value: ir.Value) -> torch.fx.Node:
        if value not in self._values:
            self._values[value] = self._initializer(value)
        return self._values[value]

    def _initializer(self, value: ir.Value) -> torch.fx.Node:
        name, constant = value.name or "", value.const_value
        if constant is None:
            raise UnsupportedOperator(
                f"the initializer '{name}' has no data",
                where=self._program.source,
                advice="save the model again",
            )
        path = self._paths[name]
        tensor = to_tensor(constant)
        if self._precision is not None and tensor.dtype.is_floating_point:
            tensor = tensor.to(self._precision)
        self._tensors[path] = torch.nn.Parameter(tensor) if is_weight(value) else tensor
        self._names[path] = name
        node = self._graph.create_node("get_attr", path, name=_identifier(path))
        node.meta["onnx_name"] = name
        return node

    def _option(self, name: str, attribute: ir.Attr) -> Any:
        """An attribute as Python has it; None where it says that there is none."""
        if name in TYPE_ATTRIBUTES:
            kind = attribute.as_int()
            return self._dtype(ir.DataType(kind)) if kind else None
        if attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            return tensor.numpy().flatten()[0].item(), self._dtype(tensor.dtype)
        value = attribute.value
        if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS):
            return [_plain(v) for v in value]
        return _plain(value)

    def _dtype(self, kind: ir.DataType) -> torch.dtype:
        dtype = DTYPES[kind]
        return self._precision if self._precision is not None and dtype.is_floating_point else dtype


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _identifier(name: str) -> str:
    """A name fit for a variable; FX adds a number where it is taken."""
    text = re.sub(r"\W+", "_", name, flags=re.ASCII).strip("_") or "value"
    return f"_{text}" if text[0].isdigit() or keyword.iskeyword(text) else text
