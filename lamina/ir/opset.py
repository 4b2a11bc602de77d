"""Raise a model's opset without changing what it computes, its names or its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import onnx
import onnx_ir as ir

from lamina.errors import UnsupportedOperator
from lamina.ir.names import subgraphs
from lamina.ir.opset_adapters import ADAPTERS, Adapter, Builder, refusal
from lamina.ir.opset_legacy import LEGACY_ADAPTERS
from lamina.ir.opset_scan import SCAN_ADAPTER

OLDEST, NEWEST = 1, 25
_ALL_ADAPTERS = {**LEGACY_ADAPTERS, **ADAPTERS, ("Scan", 9): SCAN_ADAPTER}
_HINT = "consumed_inputs"  # until opset 6: which inputs' memory may be reused; it says nothing about values


def raise_opset(model: ir.Model, version: int) -> None:
    """Convert ``model``, which the caller owns, to default opset ``version`` in place.

    Operators whose definition changed are adapted one by one; of the others the schemas say that what the
    model uses still means the same. Names and metadata stay. Nothing is changed when this raises.

    Args:
        model: A normalized model (no functions).
        version: 13 to 25; a version the model already has or exceeds changes nothing.

    Raises:
        UnsupportedOperator: An operator cannot be expressed in that opset; names it.
    """
    have = model.opset_imports.get("", 1)
    if have >= version:
        return
    if not 13 <= version <= NEWEST or have < OLDEST:
        raise UnsupportedOperator(
            f"opset {have} cannot be raised to {version}", advice=f"lamina raises opsets {OLDEST} to {NEWEST}"
        )
    nodes = [node for node in _nodes(model.graph) if node.domain == ""]
    work = [(node, adapter) for node in nodes for adapter in _adapters(node, have, version)]
    for node, adapter in work:
        adapter.check(node)
    builder = Builder(model)
    for node in nodes:
        node.attributes.pop(_HINT, None)
    for node, adapter in work:
        adapter.change(node, builder)
    model.opset_imports[""] = version
    needed = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", version)])
    model.ir_version = max(model.ir_version, needed)


def _nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    for node in tuple(graph):
        yield node
        for inner in subgraphs(node):
            yield from _nodes(inner)


def _adapters(node: ir.Node, have: int, version: int) -> Iterator[Adapter]:
    """What must be done to ``node`` on the way, oldest step first."""
    adapted = False
    for old, new in pairwise(_definitions(node.op_type, have, version)):
        adapter = _ALL_ADAPTERS.get((node.op_type, new))
        if adapter is not None:
            yield adapter
            adapted = True
            if adapter.final:
                return
        elif _schema(node.op_type, new).deprecated:
            raise refusal(node, f"version {new} does away with it")
        else:
            pinned = _check_attributes(node, old, new)
            if pinned:
                yield Adapter(partial(_pin, pinned))
            if not adapted:  # an adapter leaves the node with the inputs the newer definition wants
                _check_arity(node, new)


def _definitions(op_type: str, have: int, version: int) -> list[int]:
    """The versions of the operator's definition that are in force from opset ``have`` to ``version``."""
    found = {s.since_version for s in _all_schemas().get(op_type, ())}
    first = max((v for v in found if v <= have), default=have)
    return sorted({first} | {v for v in found if have < v <= version})


_SCHEMAS: dict[str, list[onnx.defs.OpSchema]] = {}


def _all_schemas() -> dict[str, list[onnx.defs.OpSchema]]:
    if not _SCHEMAS:
        for schema in onnx.defs.get_all_schemas_with_history():
            if schema.domain == "":
                _SCHEMAS.setdefault(schema.name, []).append(schema)
    return _SCHEMAS


def _schema(op_type: str, version: int) -> onnx.defs.OpSchema:
    return next(s for s in _all_schemas()[op_type] if s.since_version == version)


def _check_attributes(node: ir.Node, old: int, new: int) -> list[onnx.AttributeProto]:
    """Whether the newer schema has the attributes the node sets; the defaults it changes, as they were."""
    before, after = _schema(node.op_type, old), _schema(node.op_type, new)
    for name in node.attributes:
        if name in before.attributes and name not in after.attributes and name != _HINT:
            raise refusal(node, f"attribute '{name}' is gone in version {new}")
    changed = []
    for name, attribute in after.attributes.items():
        if name in node.attributes:
            continue
        known = before.attributes.get(name)
        if attribute.required:
            if known is None or not known.required:  # else it is there, or an adapter puts it there
                raise refusal(node, f"version {new} needs attribute '{name}'")
            continue
        if known is None or known.default_value == attribute.default_value:
            continue
        if not known.default_value.type or known.type != attribute.type:
            raise refusal(node, f"the default of attribute '{name}' changed in version {new}")
        changed.append(known.default_value)
    return changed


def _pin(defaults: list[onnx.AttributeProto], node: ir.Node, builder: Builder) -> None:
    for default in defaults:
        attribute = ir.serde.deserialize_attribute(default)
        node.attributes.setdefault(attribute.name, attribute)


def _check_arity(node: ir.Node, new: int) -> None:
    after = _schema(node.op_type, new)
    if not after.min_input <= len(node.inputs) <= after.max_input:
        raise refusal(node, f"version {new} takes {after.min_input} to {after.max_input} inputs")
    if not after.min_output <= len(node.outputs) <= after.max_output:
        raise refusal(node, f"version {new} has {after.min_output} to {after.max_output} outputs")
