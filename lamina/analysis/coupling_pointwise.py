"""Coupling rules of operators that keep channels apart: elementwise, normalizations, pooling, reductions."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lamina.analysis.coupling_relation import Relation, Role, constant, int_attribute, ints_attribute

_ROLES: dict[str, Role] = {"Add": "bias", "Sub": "bias", "Mul": "scale", "Div": "scale"}
_COUNTED = "the mean or spread over channels changes when fewer are left"
_WINDOW = "neighbouring channels are mixed"


def broadcast(relation: Relation, inputs: Sequence[ir.Value | None], out: ir.Value | None) -> list[int]:
    """Tie inputs to an output as numpy broadcasts them; the atoms of the output's axes."""
    shape = relation.shape(out) or ()
    atoms = [relation.atom(size) for size in shape]
    for axis, atom in enumerate(atoms):
        relation.tie(out, axis, atom)
    for value in inputs:
        align(relation, value, atoms, _ROLES.get(relation.node.op_type, "channelwise"))
    return atoms


def align(relation: Relation, value: ir.Value | None, atoms: Sequence[int], role: Role) -> None:
    """Tie a value's axes to the last of ``atoms``."""
    rank = len(relation.shape(value) or ())
    for axis, atom in enumerate(atoms[len(atoms) - rank :] if rank else ()):
        relation.tie(value, axis, atom, role=role)


def elementwise(relation: Relation) -> None:
    """Every output broadcasts every input."""
    atoms = broadcast(relation, relation.node.inputs, relation.output(0))
    for value in relation.node.outputs[1:]:
        align(relation, value, atoms, "channelwise")


def first_only(relation: Relation) -> None:
    """Elementwise in the first input; the others are scalars (Clip, Dropout) or a type to cast to."""
    relation.aside(*relation.node.inputs[1:])
    atoms = broadcast(relation, relation.node.inputs[:1], relation.output(0))
    for value in relation.node.outputs[1:]:
        align(relation, value, atoms, "channelwise")


def quantize(relation: Relation) -> None:
    """QuantizeLinear, DequantizeLinear: scale and zero point are scalars or lie along one axis."""
    if int_attribute(relation.node, "block_size"):
        relation.freeze_all("weights are quantized in blocks")
        return
    atoms = broadcast(relation, relation.node.inputs[:1], relation.output(0))
    axis = int_attribute(relation.node, "axis", 1)
    for value in relation.node.inputs[1:]:
        if len(relation.shape(value) or ()) == 1:
            relation.tie(value, 0, atoms[axis], role="scale")


def dynamic_quantize(relation: Relation) -> None:
    """DynamicQuantizeLinear: one range for the whole tensor."""
    broadcast(relation, relation.node.inputs[:1], relation.output(0))
    for axis in range(len(relation.shape(relation.input(0)) or ())):
        relation.note(relation.input(0), axis, "the range of all channels sets the scale")


def softmax(relation: Relation) -> None:
    """Softmax and LogSoftmax: tied all over; a zeroed entry still takes its share."""
    atoms = broadcast(relation, relation.node.inputs[:1], relation.output(0))
    axis = int_attribute(relation.node, "axis", -1)
    if atoms:
        relation.note(relation.input(0), axis, "a zeroed entry still takes its share")


def lp_normalization(relation: Relation) -> None:
    """LpNormalization: a zero adds nothing to the norm."""
    broadcast(relation, relation.node.inputs[:1], relation.output(0))
    relation.contract(relation.input(0), int_attribute(relation.node, "axis", -1))


def along(relation: Relation) -> None:
    """CumSum, Hardmax, TopK, ArgMax, ArgMin: what happens along their axis depends on its order or place."""
    node, x, out = relation.node, relation.input(0), relation.output(0)
    relation.aside(*node.inputs[1:])
    default = 0 if node.op_type in ("ArgMax", "ArgMin") else -1
    given = constant(relation.input(1)) if node.op_type == "CumSum" else None
    if node.op_type == "CumSum" and given is None:
        relation.freeze_all("the axis is computed")
        return
    rank = len(relation.shape(x) or ())
    axis = (int(given) if given is not None else int_attribute(node, "axis", default)) % max(1, rank)
    dropped = node.op_type in ("ArgMax", "ArgMin") and not int_attribute(node, "keepdims", 1)
    for i, size in enumerate(relation.shape(x) or ()):
        if i == axis:
            relation.freeze(x, i, "results depend on places along this axis")
            continue
        atom = relation.atom(size)
        relation.tie(x, i, atom)
        for value in node.outputs:
            relation.tie(value, i - (dropped and i > axis), atom)
    if not dropped:
        for value in node.outputs:
            if relation.shape(value):
                relation.freeze(value, axis, "results depend on places along this axis")
    relation.aside(out if not relation.shape(out) else None)


def reduce(relation: Relation) -> None:
    """Reductions: axes that stay are tied; a reduced one ends here."""
    node, x, out = relation.node, relation.input(0), relation.output(0)
    shape = relation.shape(x) or ()
    relation.aside(*node.inputs[1:])
    axes = ints_attribute(node, "axes")
    if axes is None and relation.input(1) is not None:
        given = constant(relation.input(1))
        if given is None:
            relation.freeze_all("the reduced axes are computed")
            return
        axes = [int(a) for a in given.reshape(-1)]
    if not axes:
        axes = [] if int_attribute(node, "noop_with_empty_axes") else list(range(len(shape)))
    reduced = {a % len(shape) for a in axes} if shape else set()
    keep, place = bool(int_attribute(node, "keepdims", 1)), 0
    for axis, size in enumerate(shape):
        if axis in reduced:
            relation.free(x, axis)
            _ends(relation, x, axis)
        else:
            atom = relation.atom(size)
            relation.tie(x, axis, atom)
            relation.tie(out, place, atom)
        place += keep or axis not in reduced


def _ends(relation: Relation, x: ir.Value | None, axis: int) -> None:
    if relation.node.op_type in ("ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare"):
        relation.contract(x, axis)
    else:
        relation.note(x, axis, _COUNTED)


def pool(relation: Relation) -> None:
    """Pooling, GridSample: samples and channels are tied, positions stay."""
    x, out = relation.input(0), relation.output(0)
    shape = relation.shape(x) or ()
    if relation.output(1) is not None:
        relation.freeze_all("it says places of maxima, channels counted in")
        return
    for axis in range(min(2, len(shape))):
        atom = relation.atom(shape[axis])
        relation.tie(x, axis, atom)
        relation.tie(out, axis, atom)
        if axis == 0 and relation.node.op_type == "GridSample":
            relation.tie(relation.input(1), 0, atom)


def batch_normalization(relation: Relation) -> None:
    """BatchNormalization, InstanceNormalization: channels on axis 1, each for itself."""
    atoms = broadcast(relation, relation.node.inputs[:1], relation.output(0))
    for value in relation.node.inputs[1:]:
        relation.tie(value, 0, atoms[1], role="scale")


def layer_normalization(relation: Relation) -> None:
    """LayerNormalization, RMSNormalization and their forms with a residual sum (Skip...)."""
    node = relation.node
    skip = node.op_type.startswith("Skip")
    streams = node.inputs[:2] if skip else node.inputs[:1]
    atoms = broadcast(relation, streams, relation.output(0))
    for value in node.inputs[len(streams) :]:
        align(relation, value, atoms, "scale")
    rank = len(atoms)
    first = rank - 1 if skip else int_attribute(node, "axis", -1) % max(1, rank)
    for axis in range(first, rank):
        relation.note(relation.input(0), axis, _COUNTED)
    for place, value in enumerate(node.outputs[1:], 1):
        leading = rank if skip and place == 3 else first
        for axis in range(min(leading, len(relation.shape(value) or ()))):
            relation.tie(value, axis, atoms[axis])


def group_normalization(relation: Relation) -> None:
    """GroupNormalization: channels are (group, channel inside it); scale and bias by channel or by group."""
    x, out = relation.input(0), relation.output(0)
    shape = relation.shape(x) or ()
    groups = int_attribute(relation.node, "num_groups", 1)
    parts = relation.atom(groups), relation.atom(shape[1] // groups)
    for value in (x, out):
        relation.split(value, 1, parts)
    for axis in (0, *range(2, len(shape))):
        atom = relation.atom(shape[axis])
        relation.tie(x, axis, atom)
        relation.tie(out, axis, atom)
        relation.note(x, axis, _COUNTED)
    for value in relation.node.inputs[1:]:
        if (relation.shape(value) or (0,))[0] == shape[1]:
            relation.split(value, 0, parts, "scale")
        else:
            relation.tie(value, 0, parts[0], role="scale")
    relation.note(x, 1, _COUNTED)


def local_response(relation: Relation) -> None:
    """LRN: a window over channels."""
    broadcast(relation, relation.node.inputs[:1], relation.output(0))
    relation.freeze(relation.input(0), 1, _WINDOW)


def mean_variance(relation: Relation) -> None:
    """MeanVarianceNormalization: over axes 0, 2, 3 unless it says otherwise."""
    atoms = broadcast(relation, relation.node.inputs[:1], relation.output(0))
    for axis in ints_attribute(relation.node, "axes") or [0, 2, 3]:
        if axis < len(atoms):
            relation.note(relation.input(0), axis, _COUNTED)
