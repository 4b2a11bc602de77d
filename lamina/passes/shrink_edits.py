"""What operators say of sizes (groups, heads, bounds, targets), brought in line with cut axes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from lamina.analysis.coupling_layout import pads_before, slice_ranges
from lamina.analysis.coupling_relation import constant, int_attribute
from lamina.ir.rewriter import Rewriter

_FAR = np.iinfo(np.int64).max


class Edits:
    """Edits one node at a time, before its constants are cut.

    Args:
        rewriter: Of the program that is shrunk.
        shapes: Tensor name -> shape before.
        removed: (name, axis) -> indices that go, ascending.
    """

    def __init__(
        self,
        rewriter: Rewriter,
        shapes: Mapping[str, tuple[int, ...]],
        removed: Mapping[tuple[str, int], np.ndarray],
    ) -> None:
        self._rewriter, self._shapes, self._removed = rewriter, shapes, removed
        self._next = dict(itertools.pairwise(rewriter.graph))

    def apply(self, node: ir.Node) -> None:
        """Change what ``node`` says of sizes where an axis of it is cut."""
        edit = _EDITS.get(node.op_type)
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if edit is not None and any(self._cut(v) for v in values):
            edit(self, node)

    # -- look-ups -----------------------------------------------------------------------------------

    def _cut(self, value: ir.Value | None) -> dict[int, np.ndarray]:
        """Axis -> indices of a value that go."""
        if value is None or not value.name:
            return {}
        rank = len(self._shapes.get(value.name, ()))
        keys = ((value.name, axis) for axis in range(rank))
        return {key[1]: self._removed[key] for key in keys if key in self._removed}

    def _old(self, value: ir.Value | None, axis: int) -> int:
        return self._shapes[value.name or "" if value is not None else ""][axis]

    def _new(self, value: ir.Value | None, axis: int) -> int:
        gone = self._cut(value).get(axis % len(self._shapes[value.name or ""]) if value is not None else 0)
        return self._old(value, axis) - (0 if gone is None else len(gone))

    def _kept(self, value: ir.Value, axis: int) -> np.ndarray:
        """Old index -> new index, -1 where it goes."""
        size = self._old(value, axis)
        stays = np.ones(size, dtype=bool)
        stays[self._cut(value).get(axis, np.zeros(0, dtype=np.int64))] = False
        return np.where(stays, np.cumsum(stays) - 1, -1)

    def _set(self, node: ir.Node, index: int, array: np.ndarray, name: str) -> None:
        value = self._rewriter.constant(np.asarray(array, dtype=np.int64), f"{node.name}_{name}")
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    # -- edits --------------------------------------------------------------------------------------

    def conv(self, node: ir.Node) -> None:
        """The group count: input channels over those of one group."""
        weight = 3 if node.op_type == "QLinearConv" else 1
        _put(node, "group", self._new(node.inputs[0], 1) // self._new(node.inputs[weight], 1))

    def conv_transpose(self, node: ir.Node) -> None:
        """The group count: output channels over those of one group."""
        _put(node, "group", self._new(node.outputs[0], 1) // self._new(node.inputs[1], 1))

    def group_normalization(self, node: ir.Node) -> None:
        """The group count, where whole groups go."""
        x = node.inputs[0]
        gone = self._cut(x).get(1)
        groups = int_attribute(node, "num_groups", 1)
        width = self._old(x, 1) // groups
        if gone is not None:
            full = np.bincount(gone // width, minlength=groups)
            if set(full.tolist()) <= {0, width}:
                _put(node, "num_groups", groups - int((full == width).sum()))

    def recurrent(self, node: ir.Node) -> None:
        """The hidden width."""
        _put(node, "hidden_size", self._new(node.inputs[2], 2))

    def attention(self, node: ir.Node) -> None:
        """The counts of heads; the width of a head stays."""
        for name, place in (("q_num_heads", 0), ("num_heads", 0), ("kv_num_heads", 1)):
            heads = int_attribute(node, name)
            value = node.inputs[place]
            if heads and value is not None:
                _put(node, name, heads * self._new(value, -1) // self._old(value, -1))

    def target(self, node: ir.Node) -> None:
        """A shape that is asked for: entries of cut axes shrink; -1 and 0 (Reshape), 1 (Expand) stay."""
        place = {"ConstantOfShape": 0, "Resize": 3}.get(node.op_type, 1)
        out = node.outputs[0]
        asked = node.inputs[place] if place < len(node.inputs) else None
        cut = self._cut(out)
        if asked is None or not cut:
            return
        rank = len(self._shapes[out.name or ""])
        length = self._shapes.get(asked.name or "", (rank,))[0]
        old, new = np.ones(length, dtype=np.int64), np.ones(length, dtype=np.int64)
        for axis in cut:
            # Expand and Resize may leave leading axes out
            entry = axis - (rank - length)
            if entry >= 0:
                old[entry], new[entry] = self._old(out, axis), self._new(out, axis)
        given = constant(asked)
        if given is not None:
            self._set(node, place, np.where(given <= 1, given, given * new // old), "target")
            return
        rewriter = self._rewriter.at(node)
        parts = [rewriter.constant(a, f"{node.name}_{n}") for n, a in (("new", new), ("old", old))]
        scaled = rewriter.op("Mul", [asked, parts[0]], dtype=ir.DataType.INT64)
        scaled = rewriter.op("Div", [scaled, parts[1]], dtype=ir.DataType.INT64)
        one = rewriter.constant(np.array(1, dtype=np.int64), f"{node.name}_one")
        keeps = rewriter.op("LessOrEqual", [asked, one], dtype=ir.DataType.BOOL)
        node.replace_input_with(
            place, rewriter.op("Where", [keeps, asked, scaled], dtype=ir.DataType.INT64, shape=asked.shape)
        )

    def shape(self, node: ir.Node) -> None:
        """What Shape says stays what it was: everything computed from it is scaled where it is used."""
        x, out = node.inputs[0], node.outputs[0]
        cut = self._cut(x)
        rank = len(self._shapes[x.name or ""]) if x is not None else 0
        old, new = np.ones(rank, dtype=np.int64), np.ones(rank, dtype=np.int64)
        for axis in cut:
            old[axis], new[axis] = self._old(x, axis), self._new(x, axis)
        start, end = int_attribute(node, "start"), int_attribute(node, "end", rank)
        old, new = old[start:end], new[start:end]
        if (old == new).all():
            return
        rewriter = self._rewriter.at(self._next.get(node))
        parts = [rewriter.constant(a, f"{node.name}_{n}") for n, a in (("old", old), ("new", new))]
        scaled = rewriter.op("Mul", [out, parts[0]], dtype=ir.DataType.INT64, shape=out.shape)
        restored = rewriter.op("Div", [scaled, parts[1]], dtype=ir.DataType.INT64, shape=out.shape)
        keep = [n for n in (scaled.producer(),) if n is not None]
        rewriter.replace_uses(out, restored, keep=keep)

    def split(self, node: ir.Node) -> None:
        """The sizes of the parts."""
        axis = int_attribute(node, "axis") % len(self._shapes[node.outputs[0].name or ""])
        if axis not in self._cut(node.inputs[0]):
            return
        node.attributes.pop("num_outputs", None)
        self._set(node, 1, np.array([self._new(v, axis) for v in node.outputs]), "sizes")

    def slice(self, node: ir.Node) -> None:
        """The bounds: what stays of the range, counted anew."""
        x = node.inputs[0]
        ranges = slice_ranges(node, self._shapes[x.name or ""]) if x is not None else None
        if x is None or not ranges or not set(ranges) & set(self._cut(x)):
            return
        bounds = []
        for axis, taken in ranges.items():
            if taken is None:
                return
            new = self._kept(x, axis)[taken]
            new = new[new >= 0]
            steps = np.unique(np.diff(new)) if len(new) > 1 else np.array([1])
            if len(steps) > 1:  # no longer a stride: look the rest up, and slice nothing
                index = self._rewriter.constant(new, f"{node.name}_index")
                data = self._rewriter.at(node).op(
                    "Gather", [node.inputs[0], index], {"axis": axis}, dtype=x.dtype
                )
                node.replace_input_with(0, data)
                bounds.append((0, _FAR, axis, 1))
            else:
                step = int(steps[0])
                first, last = (int(new[0]), int(new[-1]) + step) if len(new) else (0, 0)
                bounds.append((first, last if last >= 0 else -_FAR, axis, step))
        for place, column in enumerate(zip(*bounds, strict=True), 1):
            self._set(node, place, np.array(column), ("", "starts", "ends", "axes", "steps")[place])

    def gather(self, node: ir.Node) -> None:
        """Constant indices into a cut axis: those that stay, counted anew."""
        x, taken = node.inputs[0], constant(node.inputs[1])
        if x is None or taken is None:
            return
        axis = int_attribute(node, "axis") % len(self._shapes[x.name or ""])
        if axis in self._cut(x):
            new = self._kept(x, axis)[taken]
            self._set(node, 1, new[new >= 0] if new.ndim else new, "indices")

    def pad(self, node: ir.Node) -> None:
        """The pads: what stays of the padded channels."""
        x, out = node.inputs[0], node.outputs[0]
        rank = len(self._shapes[out.name or ""])
        before = pads_before(node, rank)
        if x is None or before is None:
            return
        starts, ends = [], []
        for axis in range(rank):
            size, made = self._old(x, axis), self._old(out, axis)
            stays = self._kept(out, axis) >= 0
            if before[axis] < 0 or before[axis] + size > made:  # crops, and is not cut
                starts.append(before[axis])
                ends.append(made - size - before[axis])
            else:
                starts.append(int(stays[: before[axis]].sum()))
                ends.append(int(stays[before[axis] + size :].sum()))
        self._set(node, 1, np.array(starts + ends), "pads")
        if len(node.inputs) > 3:
            node.replace_input_with(3, None)


def _put(node: ir.Node, name: str, value: int) -> None:
    node.attributes[name] = ir.AttrInt64(name, int(value))


_EDITS: dict[str, Callable[[Edits, ir.Node], None]] = {
    "Conv": Edits.conv,
    "ConvInteger": Edits.conv,
    "QLinearConv": Edits.conv,
    "ConvTranspose": Edits.conv_transpose,
    "GroupNormalization": Edits.group_normalization,
    "LSTM": Edits.recurrent,
    "GRU": Edits.recurrent,
    "RNN": Edits.recurrent,
    "Attention": Edits.attention,
    "MultiHeadAttention": Edits.attention,
    "GroupQueryAttention": Edits.attention,
    "Reshape": Edits.target,
    "Expand": Edits.target,
    "ConstantOfShape": Edits.target,
    "Resize": Edits.target,
    "Shape": Edits.shape,
    "Split": Edits.split,
    "Slice": Edits.slice,
    "Gather": Edits.gather,
    "Pad": Edits.pad,
}
