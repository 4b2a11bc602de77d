"""Coupling rules of operators that mix channels: products, convolutions, recurrent cells, attention."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from lamina.analysis.coupling_pointwise import align
from lamina.analysis.coupling_relation import Relation, int_attribute, text_attribute

_ZERO_POINT = "a removed integer is not a zero: its zero point counts"


def matmul(relation: Relation) -> None:
    """MatMul and its integer forms: batch axes broadcast, [m, k] x [k, n]."""
    node = relation.node
    right, zeros = (3, range(0)) if node.op_type == "QLinearMatMul" else (1, range(2, 4))
    a, b, out = relation.input(0), relation.input(right), relation.output(0)
    left, other, made = (relation.shape(v) or () for v in (a, b, out))
    inner = relation.atom(left[-1])
    rows = relation.atom(left[-2]) if len(left) > 1 else None
    columns = relation.atom(other[-1]) if len(other) > 1 else None
    batch = len(made) - (rows is not None) - (columns is not None)
    atoms = [relation.atom(size) for size in made[:batch]]
    relation.tie(a, -1, inner, role="in")
    relation.tie(b, -2 if columns is not None else 0, inner, role="in")
    if rows is not None:
        relation.tie(a, -2, rows, role="out")
        relation.tie(out, batch, rows)
    if columns is not None:
        relation.tie(b, -1, columns, role="out")
        relation.tie(out, -1, columns)
    for axis, atom in enumerate(atoms):
        relation.tie(out, axis, atom)
    for value, shape in ((a, left), (b, other)):
        for axis in range(len(shape) - 2):
            relation.tie(value, axis, atoms[batch - (len(shape) - 2) + axis], role="channelwise")
    relation.contract(a, -1)
    if node.op_type != "MatMul":
        relation.note(a, -1, _ZERO_POINT)
        _scales(relation, [(z, columns if z == 3 else None) for z in zeros])
        if node.op_type == "QLinearMatMul":
            _scales(relation, ((1, rows), (2, rows), (4, columns), (5, columns), (6, None), (7, None)))


def _scales(relation: Relation, places: Sequence[tuple[int, int | None]]) -> None:
    """Scales and zero points: scalars, or one an output channel."""
    for place, atom in places:
        value = relation.input(place)
        if len(relation.shape(value) or ()) == 1 and atom is not None:
            relation.tie(value, 0, atom, role="scale")


def gemm(relation: Relation) -> None:
    """Gemm: [m, k] x [k, n] + a bias that broadcasts."""
    a, b, out = relation.input(0), relation.input(1), relation.output(0)
    left, right = int_attribute(relation.node, "transA"), int_attribute(relation.node, "transB")
    rows, columns = relation.shape(out) or (1, 1)
    m, n, k = (
        relation.atom(rows),
        relation.atom(columns),
        relation.atom((relation.shape(a) or (1, 1))[1 - left]),
    )
    relation.tie(a, left, m, role="out")
    relation.tie(a, 1 - left, k, role="in")
    relation.tie(b, right, k, role="in")
    relation.tie(b, 1 - right, n, role="out")
    relation.tie(out, 0, m)
    relation.tie(out, 1, n)
    align(relation, relation.input(2), (m, n), "bias")
    relation.contract(a, 1 - left)


def conv(relation: Relation) -> None:
    """Conv and its integer forms: x [N, (G, I), ...], w [(G, O), I, ...], bias [(G, O)]."""
    kind = relation.node.op_type
    weight, bias = {"QLinearConv": (3, 8), "ConvInteger": (1, -1)}.get(kind, (1, 2))
    x, w, out = relation.input(0), relation.input(weight), relation.output(0)
    groups = int_attribute(relation.node, "group", 1)
    shape = relation.shape(w) or (1, 1)
    g, i, o = relation.atom(groups), relation.atom(shape[1]), relation.atom(shape[0] // groups)
    _samples(relation, x, out)
    relation.split(x, 1, (g, i))
    relation.split(w, 0, (g, o), "out")
    relation.tie(w, 1, i, role="in")
    relation.split(out, 1, (g, o))
    if bias > 0:
        relation.split(relation.input(bias), 0, (g, o), "bias")
    relation.contract(x, 1)
    for place in {"QLinearConv": (4, 5), "ConvInteger": (3,)}.get(kind, ()):
        if (relation.shape(relation.input(place)) or (0,))[0] == shape[0]:
            relation.split(relation.input(place), 0, (g, o), "scale")
    if kind != "Conv":
        relation.note(x, 1, _ZERO_POINT)


def conv_transpose(relation: Relation) -> None:
    """ConvTranspose: x [N, (G, I), ...], w [(G, I), O, ...], bias [(G, O)]."""
    x, w, out = relation.input(0), relation.input(1), relation.output(0)
    groups = int_attribute(relation.node, "group", 1)
    shape = relation.shape(w) or (1, 1)
    g, i, o = relation.atom(groups), relation.atom(shape[0] // groups), relation.atom(shape[1])
    _samples(relation, x, out)
    relation.split(x, 1, (g, i))
    relation.split(w, 0, (g, i), "in")
    relation.tie(w, 1, o, role="out")
    relation.split(out, 1, (g, o))
    relation.split(relation.input(2), 0, (g, o), "bias")
    relation.contract(x, 1)


def _samples(relation: Relation, x: ir.Value | None, out: ir.Value | None) -> None:
    atom = relation.atom((relation.shape(x) or (1,))[0])
    relation.tie(x, 0, atom)
    relation.tie(out, 0, atom)


def einsum(relation: Relation) -> None:
    """Einsum: one atom a letter."""
    equation = text_attribute(relation.node, "equation", "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    if "." in equation or not arrow:
        relation.freeze_all("the equation has an ellipsis or no result")
        return
    atoms: dict[str, int] = {}
    operands = list(zip(terms.split(","), relation.node.inputs, strict=True))
    for letters, value in operands:
        for letter, size in zip(letters, relation.shape(value) or (), strict=True):
            atoms.setdefault(letter, relation.atom(size))
    for letters, value in operands:
        for axis, letter in enumerate(letters):
            relation.tie(value, axis, atoms[letter], role="out" if letter in result else "in")
    for axis, letter in enumerate(result):
        relation.tie(relation.output(0), axis, atoms[letter])
    for letter in set(atoms) - set(result):
        letters, value = next((t, v) for t, v in operands if letter in t)
        relation.contract(value, letters.index(letter))


def recurrent(relation: Relation) -> None:
    """LSTM, GRU, RNN: x [T, B, I], W [D, gates*H, I], R [D, gates*H, H]; all gates of a channel go."""
    if int_attribute(relation.node, "layout"):
        relation.freeze_all("batch-first recurrent operators are not analyzed")
        return
    relation.aside(relation.input(4))
    x, w, r = (relation.input(i) for i in range(3))
    time, batch, width = relation.shape(x) or (1, 1, 1)
    hidden = (relation.shape(r) or (1, 1, 1))[2]
    t, b, i, h = (relation.atom(n) for n in (time, batch, width, hidden))
    for axis, atom in enumerate((t, b, i)):
        relation.tie(x, axis, atom)
    relation.tie(w, 2, i, role="in")
    relation.tie(r, 2, h, role="in")
    for value in (w, r, relation.input(3), relation.input(7)):
        gates = relation.atom((relation.shape(value) or (1, hidden))[1] // hidden)
        relation.split(value, 1, (gates, h), "out", cut=(h,))
    for value in (relation.input(5), relation.input(6), *relation.node.outputs[1:]):
        relation.tie(value, 1, b)
        relation.tie(value, 2, h)
    y = relation.output(0)
    for axis, atom in ((0, t), (2, b), (3, h)):
        relation.tie(y, axis, atom)
    relation.contract(x, 2)
    relation.contract(r, 2)


def attention(relation: Relation) -> None:
    """Attention of ONNX, MultiHeadAttention, GroupQueryAttention: whole heads, queries grouped by key head.

    q is (key head, query head of it, width), k and v are (key head, width), packed in the last axis or apart.
    Caches, masks and biases are tied on the axis of heads where they have it in full.
    """
    node = relation.node
    packed = len(relation.shape(relation.input(0)) or ()) == 3
    queries, keys = _heads(relation, packed)
    q, k, v = (relation.shape(relation.input(i)) for i in range(3))
    scores = relation.output(3) or (relation.input(3) if node.op_type == "MultiHeadAttention" else None)
    if (
        not q
        or not k
        or not v
        or not queries
        or queries % keys
        or len({len(q), len(k), len(v)}) > 1
        or scores
    ):
        relation.freeze_all("this form of attention is not analyzed")
        return
    group, member, batch = relation.atom(keys), relation.atom(queries // keys), relation.atom(q[0])
    made = relation.shape(relation.output(0)) or q
    for value, shape, heads in (
        (relation.input(0), q, (group, member)),
        (relation.input(1), k, (group,)),
        (relation.input(2), v, (group,)),
        (relation.output(0), made, (group, member)),
    ):
        count = queries if len(heads) > 1 else keys
        _heads_of(relation, value, heads, shape[-1] // count if packed else None)
        relation.tie(value, 0, batch)
    past, mask = _ATTENTION_INPUTS[node.op_type]
    for value in (relation.input(past), relation.input(past + 1), *node.outputs[1:3]):
        relation.tie(value, 0, batch)
        relation.tie(value, 1, group)
    if mask is not None and len(relation.shape(relation.input(mask)) or ()) == 4:
        relation.tie(relation.input(mask), 0, batch)
        relation.split(relation.input(mask), 1, (group, member))


_ATTENTION_INPUTS: dict[str, tuple[int, int | None]] = {
    "Attention": (4, 3),
    "MultiHeadAttention": (6, 5),
    "GroupQueryAttention": (3, None),
}


def _heads(relation: Relation, packed: bool) -> tuple[int, int]:
    node = relation.node
    if not packed:
        shapes = [relation.shape(relation.input(i)) or () for i in range(2)]
        return (shapes[0][1], shapes[1][1]) if all(len(s) == 4 for s in shapes) else (0, 0)
    queries = int_attribute(node, "q_num_heads") or int_attribute(node, "num_heads")
    return queries, int_attribute(node, "kv_num_heads") or queries


def _heads_of(relation: Relation, value: ir.Value | None, heads: Sequence[int], width: int | None) -> None:
    """Tie the axis of heads; the width of a head stays: it sets the scale of the scores."""
    if width is None:
        relation.split(value, 1, heads)
    else:
        last = len(relation.shape(value) or (1,)) - 1
        relation.split(value, last, (*heads, relation.atom(width)), cut=heads)
