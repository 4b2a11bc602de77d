"""What the FX bridge can take: the signature of each form, and every reason why a node has none."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx_ir as ir

from lamina.ir.fx_table import OPERATORS
from lamina.ir.fx_values import DTYPES
from lamina.ir.program import Program
from lamina.ir.semantics import why_fenced

# Integer attributes that name an element type.
TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "softmax_precision", "precision"}
)
_TYPE = "is of type {}, which the FX bridge does not compute with"
_ATTRIBUTE_TYPES = (
    ir.AttributeType.INT,
    ir.AttributeType.INTS,
    ir.AttributeType.FLOAT,
    ir.AttributeType.FLOATS,
    ir.AttributeType.STRING,
    ir.AttributeType.STRINGS,
)


@dataclass(frozen=True)
class Form:
    """What a function of the table asks for.

    Attributes:
        literal: Positions of inputs read on the host.
        attributes: Names it takes; None where it takes any.
        has_outputs: Whether it wants the number of outputs.
        has_opset: Whether it wants the opset.
        several: Whether it returns a tuple.
    """

    literal: frozenset[int] = frozenset()
    attributes: frozenset[str] | None = frozenset()
    has_outputs: bool = False
    has_opset: bool = False
    several: bool = False


@cache
def form(op_type: str) -> Form:
    """The signature of an operator's function; torch's own take inputs only."""
    function: Any = OPERATORS[op_type]
    if not inspect.isfunction(function):
        return Form()
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    literal = frozenset(i for i, p in enumerate(parameters) if str(p.annotation) in ("Ints", "Floats"))
    any_attribute = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = frozenset(p.name for p in parameters if p.kind is not p.VAR_POSITIONAL)
    own = frozenset({"outputs", "opset"})
    return Form(
        literal,
        None if any_attribute else names - own,
        "outputs" in names,
        "opset" in names,
        str(signature.return_annotation).startswith("tuple"),
    )


def faults(program: Program) -> tuple[str, ...]:
    """One line for each input, output or node without an FX form."""
    found = [(node, _fault(node)) for node in program.graph]
    lines = [f"{_name(node)} '{node.name}': {why}" for node, why in found if why is not None]
    return (*_strange_ports(program), *lines)


def _strange_ports(program: Program) -> list[str]:
    ports = dict.fromkeys((*program.inputs, *program.outputs))
    found = [f"'{p.name}': is a {p.kind}, not a tensor" for p in ports if p.kind != "tensor"]
    return found + [
        f"'{p.name}': {_TYPE.format(p.dtype.name.lower())}"
        for p in ports
        if p.kind == "tensor" and p.dtype not in DTYPES
    ]


def _name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _fault(node: ir.Node) -> str | None:
    if node.domain:
        return "is of a domain of its own"
    fence = why_fenced(node)
    if fence is not None:
        return fence
    if node.op_type not in OPERATORS:
        return "has no FX form"
    return next(_type_faults(node), None) or next(_attribute_faults(node), None)


def _type_faults(node: ir.Node) -> Iterator[str]:
    for value in (*node.inputs, *node.outputs):
        if value is None or (not value.name and not value.uses()):
            continue
        if isinstance(value.type, (ir.SequenceType, ir.OptionalType, ir.SparseTensorType)):
            yield f"'{value.name}' is not a tensor"
        elif value.dtype not in (None, ir.DataType.UNDEFINED) and value.dtype not in DTYPES:
            yield f"'{value.name}' {_TYPE.format(value.dtype.name.lower())}"


def _attribute_faults(node: ir.Node) -> Iterator[str]:
    takes = form(node.op_type).attributes
    for name, attribute in node.attributes.items():
        if takes is not None and name not in takes:
            yield f"the attribute '{name}' has no FX form"
        elif name in TYPE_ATTRIBUTES:
            if attribute.as_int() and ir.DataType(attribute.as_int()) not in DTYPES:
                kind = ir.DataType(attribute.as_int()).name.lower()
                yield f"'{name}' {_TYPE.format(kind)}"
        elif attribute.type == ir.AttributeType.TENSOR:
            if node.op_type != "ConstantOfShape" or attribute.as_tensor().dtype not in DTYPES:
                yield f"the attribute '{name}' has no FX form"
        elif attribute.type not in _ATTRIBUTE_TYPES:
            yield f"the attribute '{name}' has no FX form"
    yield from _limits(node)


def _limits(node: ir.Node) -> Iterator[str]:
    """What a covered operator still does not do."""
    rank = None if not node.inputs or node.inputs[0] is None else node.inputs[0].shape
    spatial = None if rank is None else len(rank) - 2
    if node.op_type in ("Conv", "ConvTranspose", "MaxPool", "ConvInteger", "QLinearConv"):
        if spatial is not None and spatial not in (1, 2, 3):
            yield f"has {spatial} spatial axes, torch convolves and pools over 1 to 3"
    elif node.op_type == "GridSample":
        mode = node.attributes.get("mode")
        if spatial == 3 and mode is not None and mode.as_string() in ("cubic", "bicubic"):
            yield "samples volumes cubically, which torch does not"
    elif node.op_type == "DeformConv" and spatial != 2:
        yield "has other than 2 spatial axes"
