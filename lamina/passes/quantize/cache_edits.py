"""Write caches in 8 bits into a program, and its interface.

A cache becomes one int8 tensor whose scales are constants of the model: only new tokens are rounded, codes
that came in go out as they came. The form is standard operators, so any runtime has it; arithmetic stays in
float.

Two steps, so that everything between them can be run on the original's inputs: :func:`quantize_caches` writes
the int8 Concat between a QuantizeLinear and a DequantizeLinear and leaves the interface in float;
:func:`expose_caches` takes these two off. Rounding what a code stands for gives the code again, so both
compute the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.opset import raise_opset
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.ir.verify import verify_structure
from lamina.passes.quantize.cache_places import MEASURES, NAME, PAST, CachePlace, cache_places
from lamina.passes.quantize.caches import CODES, CacheCodes
from lamina.passes.quantize.graph import FLOAT, is_op


def quantize_caches(program: Program, caches: Sequence[CacheCodes]) -> Program:
    """A clone whose caches hold codes between conversions at an interface that stays float.

    Fires: every cache of ``caches``; those whose attention is gone are left out.
    Refuses: see :mod:`.cache_places`.
    Effect: Lossy: a new key or value moves by at most half a scale, and is clipped beyond what was
        calibrated.
    Cost: O(nodes); a run converts the cache to float once more than before.

    Raises:
        PassError: A cache of the program has another form; names the node.
    """
    if not caches:
        return program
    clone = program.clone()
    raise_opset(clone.model, max(13, clone.opset))
    known = {cache.present: cache for cache in caches}
    rewriter = Rewriter(clone.model)
    for place in cache_places(clone):
        cache = known.get(place.present.name or "")
        if cache is None:
            raise PassError(
                f"the plan has no scales for cache '{place.present.name}'",
                where=NAME,
                advice="the plan was made for another model",
            )
        _emit(place, cache, rewriter)
    verify_structure(clone, NAME)
    return clone


def expose_caches(program: Program, caches: Sequence[CacheCodes]) -> Program:
    """A clone that takes and gives codes: conversions of :func:`quantize_caches` at the interface are gone.

    Raises:
        PassError: The program has a cache but not its conversions.
    """
    if not caches:
        return program
    clone = program.clone()
    rewriter, graph = Rewriter(clone.model), clone.model.graph
    inputs = {v.name: i for i, v in enumerate(graph.inputs)}
    outputs = {v.name: i for i, v in enumerate(graph.outputs)}
    for cache in caches:
        if cache.past in inputs and cache.present in outputs:
            _expose_input(cache, inputs[cache.past], rewriter)
            _expose_output(cache, outputs[cache.present], rewriter)
    verify_structure(clone, NAME)
    return clone


def _emit(place: CachePlace, cache: CacheCodes, rewriter: Rewriter) -> None:
    node, past, made = place.node, place.past, place.made
    rewriter.at(node)
    form = _Conversions(cache, rewriter)
    old = form.quantize(past, "past")
    if is_op(node, "Concat"):
        fresh = [v for v in node.inputs if v is not past]
        assert fresh[0] is not None
        new = form.quantize(fresh[0], "new")
        both = [old if v is past else new for v in node.inputs]
        joined = node.attributes.get_int("axis", 0)
    else:
        new = _emit_attention(place, old, form, rewriter)
        both, joined = [old, new], 2
    codes = rewriter.op(
        "Concat", both, {"axis": joined}, name=f"{cache.present}.join", dtype=CODES, shape=made.shape
    )
    real = form.dequantize(codes, "present")
    rewriter.replace_uses(made, real)
    rewriter.at(None)
    if is_op(node, "Concat"):
        rewriter.remove([node])
    rewriter.record(NAME, node.name or "", f"{cache.past} and {cache.present} in 8 bits")


def _emit_attention(place: CachePlace, old: ir.Value, form: _Conversions, rewriter: Rewriter) -> ir.Value:
    """Codes of the new tokens ``[batch, heads, tokens, size]``; the node reads what codes stand for.

    The node keeps its past: without one, causal masks would begin at another token.
    """
    node = place.node
    index = next(i for i in PAST if node.inputs[i] is place.past)
    fresh = node.inputs[index - 3]
    assert fresh is not None
    assert fresh.shape is not None
    flat = len(fresh.shape) == 3
    if flat:
        heads = node.attributes.get_int("kv_num_heads", 0)
        split = rewriter.constant(np.array([0, 0, heads, -1], np.int64), f"{form.cache.past}.split")
        fresh = rewriter.op("Reshape", [fresh, split], name=f"{form.cache.past}.heads", dtype=FLOAT)
        fresh = rewriter.op("Transpose", [fresh], {"perm": [0, 2, 1, 3]}, name=form.cache.past, dtype=FLOAT)
    codes = form.quantize(fresh, "new")
    real = form.dequantize(codes, "new")
    if flat:
        real = rewriter.op("Transpose", [real], {"perm": [0, 2, 1, 3]}, name=form.cache.past, dtype=FLOAT)
        merge = rewriter.constant(np.array([0, 0, -1], np.int64), f"{form.cache.past}.merge")
        real = rewriter.op("Reshape", [real, merge], name=f"{form.cache.past}.merged", dtype=FLOAT)
    node.replace_input_with(index - 3, real)
    node.replace_input_with(index, form.dequantize(old, "past"))
    return codes


class _Conversions:
    """QuantizeLinear and DequantizeLinear of one cache, which share their constants."""

    def __init__(self, cache: CacheCodes, rewriter: Rewriter) -> None:
        self.cache, self._rewriter = cache, rewriter
        shape = () if cache.axis is None else (len(cache.scale),)
        scale, zero = np.asarray(cache.scale, np.float32).reshape(shape), np.zeros(shape, np.int8)
        self._constants = [
            rewriter.constant(scale, f"{cache.past}.scale"),
            rewriter.constant(zero, f"{cache.past}.zero_point"),
        ]
        self._flags = {} if cache.axis is None else {"axis": cache.axis}

    def quantize(self, value: ir.Value, what: str) -> ir.Value:
        return self._convert("QuantizeLinear", value, f"{self.cache.past}.{what}.quantize", CODES)

    def dequantize(self, value: ir.Value, what: str) -> ir.Value:
        return self._convert("DequantizeLinear", value, f"{self.cache.past}.{what}.dequantize", FLOAT)

    def _convert(self, op_type: str, value: ir.Value, name: str, kind: ir.DataType) -> ir.Value:
        return self._rewriter.op(
            op_type, [value, *self._constants], self._flags, name=name, dtype=kind, shape=value.shape
        )


def _expose_input(cache: CacheCodes, index: int, rewriter: Rewriter) -> None:
    past = rewriter.graph.inputs[index]
    readers = [use.node for use in past.uses() if not is_op(use.node, *MEASURES)]
    if not readers or not all(is_op(node, "QuantizeLinear") for node in readers):
        raise _lost(cache.past)
    past.type = ir.TensorType(CODES)
    for node in readers:
        rewriter.replace_uses(node.outputs[0], past)
    rewriter.remove(readers)


def _expose_output(cache: CacheCodes, index: int, rewriter: Rewriter) -> None:
    graph = rewriter.graph
    real, end = graph.outputs[index], graph.outputs[index].producer()
    while is_op(end, "Identity"):
        assert end is not None
        assert end.inputs[0] is not None
        end = end.inputs[0].producer()
    if end is None or not is_op(end, "DequantizeLinear"):
        raise _lost(cache.present)
    codes = end.inputs[0]
    assert codes is not None
    maker = real.producer()
    if codes.is_graph_input() or codes.is_graph_output():
        codes = rewriter.op("Identity", [codes], name=f"{cache.present}.codes", dtype=CODES)
    real.name = rewriter.fresh(f"{cache.present}.real")
    codes.name, codes.shape, codes.type = cache.present, real.shape, ir.TensorType(CODES)
    graph.outputs[index] = codes
    # what only served the float output goes
    while maker is not None and not any(v.uses() or v.is_graph_output() for v in maker.outputs):
        before = maker.inputs[0]
        rewriter.remove([maker])
        maker = before.producer() if before is not None and is_op(maker, "Identity") else None


def _lost(name: str) -> PassError:
    return PassError(
        f"the conversion of cache '{name}' is not where it was written",
        where=NAME,
        advice="this is a bug in lamina: report it",
    )
