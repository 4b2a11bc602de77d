"""Compute several residual bodies of the same structure as one, with their widths side by side.

Bodies are walked together from what they read to what they make. Where all of them have the same value there
is one; where they differ the values lie one behind another along an axis: hidden neurons along the last,
heads along theirs, channels along the second. The last projection reads all of them at once: it adds them up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.rewriter import Rewriter
from lamina.ir.semantics import why_fenced
from lamina.passes.fold.graph import attribute, constant

Array = np.ndarray[Any, Any]
# Bodies with more operators than this in a row are left alone: the walk is recursive.
_DEEPEST = 150
# Constants up to this size (axes, shapes, an epsilon) are told apart by what is in them.
_SMALL = 16


class Unlike(PassError):
    """The bodies cannot be computed side by side; says why."""


@dataclass(frozen=True)
class Body:
    """What a residual branch adds.

    Attributes:
        source: The value of the stream it reads.
        result: What it makes of it.
        nodes: Those that may lie between.
    """

    source: ir.Value
    result: ir.Value
    nodes: frozenset[ir.Node]


@dataclass(frozen=True)
class Same:
    """One value that all bodies have."""

    value: ir.Value


@dataclass(frozen=True)
class Constants:
    """A constant of each body.

    Attributes:
        values: As the program has them.
        arrays: What is in them.
        equal: Whether they are the same.
    """

    values: tuple[ir.Value, ...]
    arrays: tuple[Array, ...]
    equal: bool


@dataclass(frozen=True)
class Affine:
    """A normalized value all bodies share, before the gain g and shift h of each: ``base * g + h``.

    Attributes:
        base: The value.
        gains: float64 ``[d]`` or scalar, one a body.
        shifts: Likewise.
    """

    base: ir.Value
    gains: tuple[Array, ...]
    shifts: tuple[Array, ...]


@dataclass(frozen=True)
class Wide:
    """The bodies' values one behind another.

    Attributes:
        value: All of them.
        axis: Along which, counted from the front.
        rank: Of the value.
        sizes: Each body's share of the axis.
        offsets: float64 ``[size]`` to be added along the axis, one a body: shifts of a normalization that
            went through a projection; None where there are none.
        raised: Whether the axis, of size one a body, was put in at place 1 for attention of one head.
    """

    value: ir.Value
    axis: int
    rank: int
    sizes: tuple[int, ...]
    offsets: tuple[Array, ...] | None = None
    raised: bool = False

    @property
    def size(self) -> int:
        """The size of one body.

        Raises:
            Unlike: They differ.
        """
        if len(set(self.sizes)) > 1:
            raise Unlike("their widths differ")
        return self.sizes[0]


@dataclass(frozen=True)
class Total:
    """The sum of the bodies' values."""

    value: ir.Value


State = Same | Constants | Affine | Wide | Total | None


class Widener:
    """Writes bodies that read one stream.

    Args:
        rewriter: Where nodes go.
        stream: What the bodies read now.
        own: Names of initializers that leave with the bodies: what is still needed of them is stored anew.
        apart: Whether gains of normalizations go into the projections behind even of a single body, so that
            bodies of another structure share the plain normalization.
        made: What was written from the same stream before; nodes that are equal are written once.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        stream: ir.Value,
        own: Iterable[str] = (),
        *,
        apart: bool = False,
        made: dict[Any, Any] | None = None,
    ) -> None:
        self.rewriter, self.stream, self.own, self.apart = rewriter, stream, frozenset(own), apart
        self.made: dict[Any, Any] = {} if made is None else made
        self._bodies: tuple[Body, ...] = ()
        self._known: dict[tuple[ir.Value | None, ...], State] = {}
        self._depth = 0

    @property
    def count(self) -> int:
        """Bodies walked together."""
        return len(self._bodies)

    def total(self, bodies: Sequence[Body]) -> ir.Value:
        """The sum of what the bodies make of the stream.

        Raises:
            Unlike: Their structure differs, or an operator mixes what must stay apart.
        """
        self._bodies, self._known, self._depth = tuple(bodies), {}, 0
        return self._summed(self.walk(tuple(b.result for b in bodies)))

    # -- the walk -----------------------------------------------------------------------------------

    def walk(self, values: tuple[ir.Value | None, ...]) -> State:
        """What is written for one value of each body."""
        if values not in self._known:
            self._depth += 1
            if self._depth > _DEEPEST:
                raise Unlike(f"a body has more than {_DEEPEST} operators in a row")
            self._known[values] = self._found(values)
            self._depth -= 1
        return self._known[values]

    def _found(self, values: tuple[ir.Value | None, ...]) -> State:
        given = [v for v in values if v is not None]
        if len(given) < len(values):
            if given:
                raise Unlike(f"only some of them have '{given[0].name}'")
            return None
        if all(v is b.source for v, b in zip(values, self._bodies, strict=True)):
            return Same(self.stream)
        arrays = [constant(v) for v in given]
        known = [a for a in arrays if a is not None]
        if len(known) == len(arrays):
            return Constants(tuple(given), tuple(known), _equal(given, known))
        nodes = [v.producer() for v in given]
        inside = [n for n, b in zip(nodes, self._bodies, strict=True) if n is not None and n in b.nodes]
        if len(inside) == len(nodes):
            places = {v.index() for v in given}
            if len(places) > 1:
                raise Unlike(f"'{given[0].name}' stands for different outputs")
            results = self._node(inside)
            for i, state in enumerate(results):
                self._known[tuple(n.outputs[i] for n in inside)] = state
            return results[next(iter(places)) or 0]
        if inside or any(v is not given[0] for v in given):
            raise Unlike(f"they read different values beside the stream, '{given[0].name}' among them")
        return Same(given[0])

    def _node(self, nodes: Sequence[ir.Node]) -> list[State]:
        first = nodes[0]
        if any(not _alike(first, other) for other in nodes[1:]):
            raise Unlike(f"'{first.name}' has no counterpart")
        reason = why_fenced(first)
        if reason is not None:
            raise Unlike(f"'{first.name}' {reason}")
        states = [self.walk(tuple(column)) for column in zip(*(n.inputs for n in nodes), strict=True)]
        same = all(s is None or isinstance(s, Same) or (isinstance(s, Constants) and s.equal) for s in states)
        if same and not (self.apart and self._splits(first)):
            return list(self._once(first, states))
        from lamina.passes.joining.widen_rules import rule_of

        rule = rule_of(first)
        if rule is None:
            raise Unlike(f"{first.op_type} '{first.name}' cannot run on bodies side by side")
        return rule(self, first, states)

    def _splits(self, node: ir.Node) -> bool:
        """Whether a node's gain, or its constant factors, go into the projections that alone read it."""
        normal = node.op_type in ("LayerNormalization", "RMSNormalization")
        vector = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        if not normal and (node.op_type not in ("Mul", "Add") or vector is None or vector.ndim != 1):
            return False
        readers = [use for use in node.outputs[0].uses()]
        return all(
            use.idx == 0 and use.node.op_type == "MatMul" and constant(use.node.inputs[1]) is not None
            for use in readers
        )

    def _once(self, node: ir.Node, states: Sequence[State]) -> Sequence[Same]:
        """The node on what all bodies share."""
        inputs = [self.shared(s) for s in states]
        attributes = {k: a.value for k, a in node.attributes.items()}
        key = (node.op_type, node.domain, tuple(inputs), repr(sorted(attributes.items())), len(node.outputs))
        if key not in self.made:
            self.made[key] = self.op(node, inputs, like=node.outputs)
        return [Same(v) for v in self.made[key]]

    # -- writing ------------------------------------------------------------------------------------

    def shared(self, state: State) -> ir.Value | None:
        """The one value of a state that all bodies share."""
        if isinstance(state, Constants):
            return self.keep(state.values[0])
        if state is None or isinstance(state, Same):
            return None if state is None else state.value
        raise Unlike("a value differs where it has to be the same")

    def keep(self, value: ir.Value) -> ir.Value:
        """A constant, stored anew where it leaves with what is replaced; small ones that are equal once."""
        array, tensor = constant(value), value.const_value
        assert array is not None
        small = array.size <= _SMALL
        key = ("constant", array.dtype.str, array.shape, array.tobytes()) if small else ("constant", value)
        if key not in self.made:
            kind = None if tensor is None else tensor.dtype
            stays = value.name not in self.own and value.is_initializer()
            made = value if stays else self.rewriter.constant(array, f"{value.name}_kept", dtype=kind)
            self.made[key] = made
        kept: ir.Value = self.made[key]
        return kept

    def store(self, array: Array, like: ir.Value, dtype: np.dtype[Any] | None = None) -> ir.Value:
        """A new constant named after an old one."""
        kind = like.dtype.numpy() if dtype is None and like.dtype is not None else dtype
        return self.rewriter.constant(array if kind is None else array.astype(kind), f"{like.name}_joined")

    def op(
        self,
        node: ir.Node,
        inputs: Sequence[ir.Value | None],
        changes: Mapping[str, Any] | None = None,
        *,
        like: Sequence[ir.Value] = (),
    ) -> tuple[ir.Value, ...]:
        """A node like an old one on other inputs; its outputs have the dtypes, and of ``like`` the shapes."""
        attributes = {**dict(node.attributes), **(changes or {})}
        first = self.rewriter.op(
            node.op_type,
            inputs,
            attributes,
            domain=node.domain,
            outputs=len(node.outputs),
            name=f"{node.name}_joined",
        )
        made = first.producer()
        assert made is not None
        for new, old in zip(made.outputs, node.outputs, strict=True):
            new.type = old.type
        for new, old in zip(made.outputs, like, strict=False):
            new.shape = None if old.shape is None else old.shape.copy()
        return tuple(made.outputs)

    def extra(
        self, op_type: str, inputs: Sequence[ir.Value], attributes: Mapping[str, Any] | None = None
    ) -> ir.Value:
        """A node that no body has, of the first input's dtype."""
        name = f"{inputs[0].name}_{op_type.lower()}"
        return self.rewriter.op(op_type, inputs, attributes, name=name, dtype=inputs[0].dtype)

    def integers(self, *numbers: int) -> ir.Value:
        """A constant int64 vector."""
        return self.rewriter.constant(np.array(numbers, np.int64), "lamina_joined")

    def number(self, array: Array | float, like: ir.Value) -> ir.Value:
        """A constant of the dtype of an activation."""
        kind = np.float32 if like.dtype is None else like.dtype.numpy()
        return self.rewriter.constant(np.asarray(array).astype(kind), f"{like.name}_constant")

    def solid(self, state: Wide) -> Wide:
        """The state with what is still to be added."""
        if state.offsets is None:
            return state
        offset = np.concatenate(state.offsets)
        if np.any(offset):
            along = offset.reshape(-1, *(1,) * (state.rank - 1 - state.axis))
            value = self.extra("Add", [state.value, self.number(along, state.value)])
            value.shape = None if state.value.shape is None else state.value.shape.copy()
            return replace(state, value=value, offsets=None)
        return replace(state, offsets=None)

    def spread(self, value: ir.Value, axis: int) -> ir.Value:
        """A value that all bodies share, once for each of them along an axis."""
        return self.extra("Concat", [value] * self.count, {"axis": axis})

    def _summed(self, state: State) -> ir.Value:
        if isinstance(state, Total):
            return state.value
        if isinstance(state, Same):
            if self.count == 1:
                return state.value
            return self.extra("Mul", [state.value, self.number(float(self.count), state.value)])
        if isinstance(state, Affine):
            gain, shift = sum(state.gains), sum(state.shifts)
            value = self.extra("Mul", [state.base, self.number(np.asarray(gain), state.base)])
            return (
                self.extra("Add", [value, self.number(np.asarray(shift), value)]) if np.any(shift) else value
            )
        if isinstance(state, Wide):
            wide = self.solid(state)
            if wide.raised:
                return self.extra("ReduceSum", [wide.value, self.integers(1)], {"keepdims": 0})
            parts = [self.count, wide.size]
            shape = self.integers(*(0,) * wide.axis, *parts, *_rest(wide))
            split = self.extra("Reshape", [wide.value, shape])
            return self.extra("ReduceSum", [split, self.integers(wide.axis)], {"keepdims": 0})
        raise Unlike("they make nothing of the stream")


def shaped(wide: Wide, old: ir.Value) -> Wide:
    """The state, its value with the shape that one body's ``old`` has, but for the axis they lie along."""
    dims = None if old.shape is None else list(old.shape)
    if dims is not None and wide.raised:
        dims.insert(1, len(wide.sizes))
    if dims is not None and len(dims) == wide.rank:
        dims[wide.axis] = sum(wide.sizes)
        wide.value.shape = ir.Shape(dims)
    return wide


def _rest(wide: Wide) -> list[int]:
    """Dimensions behind the axis, for a Reshape."""
    behind = [] if wide.value.shape is None else list(wide.value.shape)[wide.axis + 1 :]
    if len(behind) != wide.rank - 1 - wide.axis or sum(not isinstance(d, int) for d in behind) > 1:
        raise Unlike("the shape of what they make is not known")
    return [d if isinstance(d, int) else -1 for d in behind]


def _equal(values: Sequence[ir.Value], arrays: Sequence[Array]) -> bool:
    first = arrays[0]
    return all(
        v is values[0] or (a.dtype == first.dtype and np.array_equal(a, first))
        for v, a in zip(values, arrays, strict=True)
    )


def _alike(first: ir.Node, other: ir.Node) -> bool:
    """Whether two nodes do the same, up to weights."""
    if (first.op_type, first.domain, len(first.outputs)) != (other.op_type, other.domain, len(other.outputs)):
        return False
    if len(first.inputs) != len(other.inputs) or set(first.attributes) != set(other.attributes):
        return False
    return all(attribute(first, name, None) == attribute(other, name, None) for name in first.attributes)
