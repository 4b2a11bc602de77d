"""Compose chains of constant scales and shifts: Mul and Mul, Add and Add, Mul and Add and Mul."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.rewriter import Rewriter
from lamina.passes.fold.affine import Affine, affine_at
from lamina.passes.fold.graph import LocalFold, constant, is_op, sole_consumer, substitute
from lamina.passes.fold.linear import Array, cancels, outgrows, rounded
from lamina.passes.pass_ import Effect, Rounding

_SHIFTS = ("Add", "Sub")
_SCALES = ("Mul", "Div")
_ANCHORS = (*_SCALES, *_SHIFTS, "Neg")


@dataclass(frozen=True)
class _Match:
    chain: tuple[Affine, ...]
    scale: Array | None
    shift: Array | None
    negative: bool


@dataclass(frozen=True)
class ComposeAffine(LocalFold):
    """Write a chain of two or three scales and shifts by constants as one Mul, one Add, or one of each.

    Fires: float Mul, Div, Add, Sub, Neg with one constant operand, each intermediate value read once, where
    fewer operators are left.
    Refuses: composed constants that are larger than those before them, overflow or underflow; shifts that
    nearly cancel (adding one after the other rounds on purpose).
    Effect: Rounding; composed in double precision and rounded once.
    Cost: O(sites + constants).
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)
    anchors: ClassVar[tuple[str, ...]] = _ANCHORS

    def match(self, node: ir.Node) -> _Match | str | None:
        """The chain of two, or else of three, that ends in ``node``."""
        chain: list[Affine] = []
        value = node.outputs[0]
        while len(chain) < 3:
            producer = value.producer()
            affine = affine_at(producer) if is_op(producer, *_ANCHORS) else None
            if affine is None or (chain and producer is not None and producer.graph is not node.graph):
                break
            chain.insert(0, affine)
            value = affine.source
            if sole_consumer(value) is not affine.node:
                break
        if len(chain) < 2:
            return None
        with np.errstate(all="ignore"):  # what is not finite is refused
            short = _composed(tuple(chain[-2:]))
            return _composed(tuple(chain)) if short is None and len(chain) == 3 else short

    def rewrite(self, node: ir.Node, match: Any, rewriter: Rewriter) -> None:
        """Write what is left of the chain."""
        where, result, source = node.name or node.op_type, node.outputs[0], match.chain[0].source
        named = {
            what: None if array is None else rewriter.constant(array, f"{where}_{what}_folded")
            for what, array in (("scale", match.scale), ("shift", match.shift))
        }
        scale, shift = named["scale"], named["shift"]
        if shift is None and scale is None:
            node.replace_input_with(0, source)
            rewriter.remove([match.chain[0].node])
            rewriter.replace_uses(result, source)
            rewriter.remove([node])
        elif shift is None:
            substitute(rewriter, result, "Mul", [source, scale])
        elif scale is None and match.negative:
            substitute(rewriter, result, "Sub", [shift, source])
        elif scale is None:
            substitute(rewriter, result, "Add", [source, shift])
        else:
            inner = match.chain[1].node.outputs[0]
            widened = inner.shape is None or inner.shape != result.shape
            product = substitute(rewriter, inner, "Mul", [source, scale]).outputs[0]
            product.shape = None if widened else product.shape
            substitute(rewriter, result, "Add", [product, shift])
        names = ", ".join(a.node.op_type for a in match.chain)
        rewriter.record(self.name, where, f"{names} by constants composed")


def _composed(chain: tuple[Affine, ...]) -> _Match | str | None:
    """The chain as one scale and one shift, where that takes fewer operators."""
    kinds = [a.node.op_type for a in chain]
    scales, shifts = any(k in _SCALES for k in kinds), any(k in _SHIFTS for k in kinds)
    if not (scales or shifts):
        return _no_op(chain)
    if scales + shifts >= len(chain) or (not scales and "Neg" in kinds):
        return None  # a Neg stays apart from a shift, which may be the bias of a normalization
    scale, shift = np.ones(()), np.zeros(())
    for affine in chain:
        moved = shift * affine.scale
        if affine.shifts and moved.any() and cancels(moved, affine.shift):
            return "its shifts nearly cancel: the order of the additions matters"
        scale, shift = scale * affine.scale, moved + affine.shift
    constants = [v for a in chain for v in a.constants]
    old = [a for a in map(constant, constants) if a is not None]
    dtype, largest = old[0].dtype, max(a.size for a in old)
    new = [rounded(a, dtype) if wanted else None for a, wanted in ((scale, scales), (shift, shifts))]
    if (scales and new[0] is None) or (shifts and new[1] is None):
        return "the composed constants would overflow or underflow"
    if any(a is not None and a.size > largest for a in new):
        return "the composed constants would be larger"
    if outgrows(constants, new):
        return "its constants are shared: a copy would grow the file"
    return _Match(chain, new[0], new[1], negative=bool((scale < 0).any()))


def _no_op(chain: tuple[Affine, ...]) -> _Match | None:
    """Neg after Neg, unless it carries the name of an output that nothing else can take over."""
    source, result = chain[0].source, chain[-1].node.outputs[0]
    producer = source.producer()
    stuck = source.is_graph_output() or producer is None or producer.graph is not chain[0].node.graph
    if len(chain) != 2 or (stuck and result.is_graph_output()):
        return None
    return _Match(chain, None, None, negative=False)
