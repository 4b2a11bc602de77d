"""Where caches are: interface inputs that a Concat or a standard Attention extends into an output."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.branch_view import GraphView
from lamina.ir.program import Program
from lamina.passes.quantize.graph import FLOAT, is_op

NAME = "kv-cache"
# Operators that only measure a cache.
MEASURES = ("Shape", "Size")
# A standard Attention's past and present: key, value.
PAST, PRESENT = (4, 5), (1, 2)


@dataclass(frozen=True)
class CachePlace:
    """A cache in a graph: ``node`` extends ``past`` into its output ``made``, handed out as ``present``."""

    past: ir.Value
    present: ir.Value
    node: ir.Node
    made: ir.Value
    axis: int | None


def cache_places(program: Program) -> list[CachePlace]:
    """Every cache of a program that can be stored in codes.

    Raises:
        PassError: There is none, or one has another form; names the node.
    """
    graph = program.graph
    state = GraphView(graph).state_of
    extended = frozenset().union(*state.values())
    found: list[CachePlace] = []
    for value in graph.inputs:
        if value in extended:
            place = _place_of(value)
            if isinstance(place, str):
                raise _unusable(value, place)
            found.append(place)
    covered = {place.present for place in found}
    for output in graph.outputs:
        if output in state and output not in covered:
            maker = output.producer()
            made = "" if maker is None else f", made by {maker.op_type} '{maker.name}',"
            raise _unusable(output, f"output '{output.name}'{made} extends no input of the model")
    if not found:
        raise PassError(
            "the model has no key or value cache at its interface",
            where=program.source,
            advice="export it with past keys and values as inputs and present ones as outputs, or leave "
            "kv_cache out",
        )
    return found


def _unusable(value: ir.Value, reason: str) -> PassError:
    return PassError(
        f"cache '{value.name}' cannot be stored in 8 bits: {reason}",
        where=NAME,
        advice="a cache is a float32 input that one Concat, or a standard Attention, extends into an output; "
        "leave kv_cache out for this model",
    )


def _place_of(past: ir.Value) -> CachePlace | str:
    """The cache that an input is the past of, or why it is none."""
    if past.dtype != FLOAT:
        return f"input '{past.name}' is {past.dtype.name.lower() if past.dtype else 'of unknown type'}"
    readers = [use for use in past.uses() if not is_op(use.node, *MEASURES)]
    if len(readers) != 1:
        names = ", ".join(f"{u.node.op_type} '{u.node.name}'" for u in readers) or "nothing"
        return f"input '{past.name}' is read by {names}"
    node, index = readers[0].node, readers[0].idx
    if is_op(node, "Concat"):
        return _concat_place(past, node)
    if is_op(node, "Attention") and index in PAST:
        return _attention_place(past, node, index)
    return f"input '{past.name}' is read by {node.op_type} '{node.name}'"


def _concat_place(past: ir.Value, node: ir.Node) -> CachePlace | str:
    made = node.outputs[0]
    if len(node.inputs) != 2:
        return f"Concat '{node.name}' joins {len(node.inputs)} values"
    present = _handed_out(made)
    if present is None:
        return f"what Concat '{node.name}' makes is no output of the model"
    rank = None if past.shape is None else len(past.shape)
    joined = node.attributes.get_int("axis", 0)
    return CachePlace(past, present, node, made, None if rank is None else _scale_axis(past, joined % rank))


def _attention_place(past: ir.Value, node: ir.Node, index: int) -> CachePlace | str:
    slot = PRESENT[PAST.index(index)]
    made = node.outputs[slot] if len(node.outputs) > slot else None
    present = None if made is None else _handed_out(made)
    fresh = node.inputs[index - 3]
    if made is None or present is None:
        return f"the present of Attention '{node.name}' is no output of the model"
    if fresh is None or fresh.shape is None or past.shape is None:
        return f"the rank of what Attention '{node.name}' reads is not known"
    return CachePlace(past, present, node, made, _scale_axis(past, 2))


def _handed_out(made: ir.Value) -> ir.Value | None:
    """The interface output that is ``made``, itself or by an Identity."""
    if made.is_graph_output():
        return made
    for use in made.uses():
        if is_op(use.node, "Identity") and use.node.outputs[0].is_graph_output():
            return use.node.outputs[0]
    return None


def _scale_axis(past: ir.Value, joined: int) -> int | None:
    """Heads: the first axis behind the batch whose size is fixed and along which nothing is joined."""
    assert past.shape is not None
    fixed = [a for a, d in enumerate(past.shape) if isinstance(d, int) and a not in (0, joined)]
    return fixed[0] if fixed else None
