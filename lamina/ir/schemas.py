"""What the ONNX schema of an operator allows: existence in an opset, arity, and types that fit each other."""

from __future__ import annotations

from functools import lru_cache

import onnx
import onnx_ir as ir

# Domains whose schemas the onnx wheel carries.
KNOWN_DOMAINS = frozenset({"", "ai.onnx.ml", "ai.onnx.preview.training"})

Types = tuple[str | None, ...]


@lru_cache(maxsize=4096)
def fault_of_operator(
    domain: str, op_type: str, version: int, inputs: int, outputs: int
) -> tuple[str, str] | None:
    """What is wrong: (``existence`` or ``arity``, text); None when nothing is."""
    schema = _schema(domain, op_type, version)
    name = f"{domain}.{op_type}" if domain else op_type
    if schema is None:
        return "existence", f"opset {version} has no operator '{name}'"
    if schema.deprecated:
        return "existence", f"opset {version} has withdrawn the operator '{name}'"
    fits = schema.min_input <= inputs <= schema.max_input and (
        schema.min_output <= outputs <= schema.max_output
    )
    if fits:
        return None
    expected = f"{schema.min_input} to {schema.max_input} and {schema.min_output} to {schema.max_output}"
    return "arity", f"has {inputs} inputs and {outputs} outputs, expected {expected}"


@lru_cache(maxsize=65536)
def fault_of_types(domain: str, op_type: str, version: int, inputs: Types, outputs: Types) -> str | None:
    """Why types do not fit the operator or each other; None where they do, or are not known.

    Args:
        domain: Of the operator.
        op_type: Its name.
        version: Of its domain.
        inputs: A type string an input as :func:`type_text` gives it; None where omitted or unknown.
        outputs: Likewise.
    """
    schema = _schema(domain, op_type, version)
    if schema is None:
        return None
    bound: dict[str, tuple[str, str]] = {}
    for what, formals, types in (("input", schema.inputs, inputs), ("output", schema.outputs, outputs)):
        for index, text in enumerate(types):
            if text is None or not formals:
                continue
            formal = formals[min(index, len(formals) - 1)]
            place = f"{what} {index}"
            if text not in formal.types:
                return f"{place} ('{formal.name}') is {text}, which {op_type} does not take"
            variadic = formal.option == onnx.defs.OpSchema.FormalParameterOption.Variadic
            if variadic and not formal.is_homogeneous:
                continue
            first, where = bound.setdefault(formal.type_str, (text, place))
            if first != text:
                return f"{place} is {text} but {where} is {first}"
    return None


def type_text(value: ir.Value | None) -> str | None:
    """The type in ONNX's own notation, ``tensor(float)``; None where it is not known."""
    if value is None or value.type is None:
        return None
    if type(value.type) is ir.TensorType:
        return _tensor_text(value.type.dtype)
    return _text(value.type)


@lru_cache
def _tensor_text(dtype: ir.DataType) -> str | None:
    return None if dtype == ir.DataType.UNDEFINED else f"tensor({dtype.name.lower()})"


def _text(kind: ir.TypeProtocol) -> str | None:
    if isinstance(kind, ir.SequenceType):
        inner = _text(kind.elem_type)
        return None if inner is None else f"seq({inner})"
    if isinstance(kind, ir.OptionalType):
        inner = _text(kind.elem_type)
        return None if inner is None else f"optional({inner})"
    return _tensor_text(kind.dtype) if isinstance(kind, ir.TensorType) else None


@lru_cache(maxsize=4096)
def _schema(domain: str, op_type: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, version, domain)
    except onnx.defs.SchemaError:
        return None
