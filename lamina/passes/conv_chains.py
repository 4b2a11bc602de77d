"""Runs of convolutions with nothing between them but activations and batch normalizations."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.compose_conv import ConvForm, ConvShape, Ints, compose, compose_shapes, form_of, scaled

# Activations whose removal leaves something like the identity behind on part of their domain.
ACTIVATIONS = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Clip", "Elu", "Selu", "Celu"),
        *("HardSwish", "Mish", "Gelu", "Swish", "Identity"),
    )
)
_FLOATS = frozenset((ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16))


@dataclass(frozen=True)
class ConvChain:
    """Convolutions in a row.

    Attributes:
        convs: Their nodes' names.
        between: Names of the nodes between each and the next: activations, batch normalizations.
        affines: Scale and shift a channel of the batch normalizations between each and the next, float64;
            None where there is none.
        forms: Each convolution.
        reads: Value the first one reads.
        makes: Value the last one makes.
    """

    convs: tuple[str, ...]
    between: tuple[tuple[str, ...], ...]
    affines: tuple[tuple[np.ndarray, np.ndarray] | None, ...]
    forms: tuple[ConvForm, ...]
    reads: str
    makes: str

    def skippable(self, index: int) -> bool:
        """Whether a convolution may be dropped: it makes what it reads, in channels and positions."""
        shape = self.forms[index].shape
        pads = [a + b for a, b in zip(shape.begins, shape.ends, strict=True)]
        same = shape.out == shape.width * shape.group
        return same and all(s == 1 for s in shape.strides) and tuple(pads) == shape.reach

    def merged(self, first: int, last: int, without: Collection[int] = ()) -> ConvForm | None:
        """Convolutions ``first`` to ``last`` as one, the activations between them dropped.

        Args:
            first: The first one.
            last: The last one.
            without: Those that are dropped, with the batch normalization behind them.

        Returns:
            The one; None where all are dropped.
        """
        form: ConvForm | None = None
        for index in (i for i in range(first, last + 1) if i not in without):
            form = self.forms[index] if form is None else compose(form, self.forms[index])
            affine = self.affines[index] if index < last else None
            form = form if affine is None else scaled(form, *affine)
        return form

    def shape(self, first: int, last: int, without: Collection[int] = ()) -> ConvShape | None:
        """The shape of :meth:`merged`; costs nothing."""
        shape: ConvShape | None = None
        for index in (i for i in range(first, last + 1) if i not in without):
            own = self.forms[index].shape
            shape = own if shape is None else compose_shapes(shape, own)
            affine = self.affines[index] if index < last else None
            if affine is not None and bool(np.any(affine[1])):
                shape = replace(shape, biased=True)
        return shape

    def part(self, first: int, last: int) -> ConvChain:
        """Some of it as a chain of its own; ``reads`` and ``makes`` are kept where they are its own."""
        return ConvChain(
            self.convs[first : last + 1],
            self.between[first:last],
            self.affines[first:last],
            self.forms[first : last + 1],
            self.reads if first == 0 else "",
            self.makes if last == len(self.convs) - 1 else "",
        )


def conv_chains(program: Program) -> tuple[list[ConvChain], dict[str, str]]:
    """Every maximal run of two convolutions and more, in execution order, and why others ended.

    A run goes on where the value is read once, is no interface output, and only activations of
    :data:`ACTIVATIONS` and batch normalizations with constant statistics follow before the next convolution.

    Returns:
        The chains, and for convolutions that follow another but cannot join it, the reason.
    """
    nodes = [n for n in program.graph if n.op_type == "Conv" and n.domain == ""]
    refused = {n: why for n in nodes if (why := _why_not(n)) is not None}
    following = {node: _next(node) for node in nodes}
    targets = {link[0] for node, link in following.items() if link is not None and node not in refused}
    usable = [n for n in nodes if n not in refused]
    chains = []
    for node in usable:
        if node not in targets:
            run = _grow(node, set(usable), following)
            if len(run) > 1:
                chains.append(chain_of(run))
    linked = {n for n, link in following.items() if link is not None}
    linked |= {link[0] for link in following.values() if link is not None}
    return chains, {n.name or "": why for n, why in refused.items() if n in linked}


def _grow(
    start: ir.Node,
    usable: Collection[ir.Node],
    following: Mapping[ir.Node, tuple[ir.Node, tuple[ir.Node, ...]] | None],
) -> list[ir.Node]:
    nodes, link = [start], following[start]
    while link is not None and link[0] in usable:
        nodes += [*link[1], link[0]]
        link = following[link[0]]
    return nodes


def chain_of(nodes: Sequence[ir.Node]) -> ConvChain:
    """The chain that nodes in a row are: convolutions, and what lies between them.

    Raises:
        PassError: A convolution's weights are no constants any more.
    """
    forms: list[ConvForm] = []
    between: list[list[str]] = []
    affines: list[tuple[np.ndarray, np.ndarray] | None] = []
    for node in nodes:
        if node.op_type == "Conv":
            forms.append(conv_form(node))
            between.append([])
            affines.append(None)
            continue
        between[-1].append(node.name or "")
        if node.op_type == "BatchNormalization":
            scale, shift = _affine(node)
            before = affines[-1]
            affines[-1] = (scale, shift) if before is None else (scale * before[0], scale * before[1] + shift)
    convs = tuple(n.name or "" for n in nodes if n.op_type == "Conv")
    reads, makes = nodes[0].inputs[0], nodes[-1].outputs[0]
    inner = tuple(tuple(names) for names in between[:-1])
    return ConvChain(
        convs,
        inner,
        tuple(affines[:-1]),
        tuple(forms),
        "" if reads is None else reads.name or "",
        makes.name or "",
    )


def _next(node: ir.Node) -> tuple[ir.Node, tuple[ir.Node, ...]] | None:
    """The convolution behind a node and what lies between; None where something else does."""
    between: list[ir.Node] = []
    value = node.outputs[0]
    while True:
        uses = tuple(value.uses())
        if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
            return None
        reader = uses[0].node
        if reader.graph is not node.graph or reader.domain not in ("", "ai.onnx"):
            return None
        if reader.op_type == "Conv":
            return reader, tuple(between)
        constant = all(v is None or v.const_value is not None for v in reader.inputs[1:])
        if reader.op_type == "BatchNormalization":
            if not constant or reader.attributes.get_int("training_mode") or len(reader.outputs) != 1:
                return None
        elif reader.op_type not in ACTIVATIONS or not constant:
            return None
        between.append(reader)
        value = reader.outputs[0]


def _why_not(node: ir.Node) -> str | None:
    """Why a Conv node cannot be one of a chain: weights that are no constants, unknown padding."""
    tensors = [v.const_value if v is not None else None for v in node.inputs[1:3]]
    if tensors[0] is None:
        return "its weight is no constant"
    if len(node.inputs) > 2 and node.inputs[2] is not None and tensors[1] is None:
        return "its bias is no constant"
    if tensors[0].dtype not in _FLOATS:
        return f"its weight is {tensors[0].dtype.name}"
    rank = len(tensors[0].shape) - 2
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER") and any(s != 1 for s in _ints(node, "strides", rank)):
        return f"auto_pad {mode} with a stride depends on the input's size"
    if any(p < 0 for p in node.attributes.get_ints("pads", ()) or ()):
        return "it pads by less than nothing"
    return None


def conv_form(node: ir.Node) -> ConvForm:
    """A Conv node as numbers.

    Raises:
        PassError: It cannot be one of a chain.
    """
    reason = _why_not(node)
    tensors = [v.const_value if v is not None else None for v in node.inputs[1:3]]
    if reason is not None or tensors[0] is None:
        raise PassError(
            f"convolution '{node.name}' cannot be merged: {reason}", advice="was it changed by another move?"
        )
    weight = tensors[0].numpy().astype(np.float64)
    rank = weight.ndim - 2
    bias = np.zeros(len(weight)) if len(tensors) < 2 or tensors[1] is None else tensors[1].numpy()
    strides, dilations = _ints(node, "strides", rank), _ints(node, "dilations", rank)
    pads: Sequence[int] = node.attributes.get_ints("pads", ()) or (0,) * 2 * rank
    mode = node.attributes.get_string("auto_pad", "NOTSET")
    if mode == "VALID":
        pads = (0,) * 2 * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        less, more = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = (*less, *more) if mode == "SAME_UPPER" else (*more, *less)
    group = node.attributes.get_int("group", 1) or 1
    begins, ends = tuple(pads[:rank]), tuple(pads[rank:])
    return form_of(weight, bias.astype(np.float64), strides, dilations, begins, ends, group)


def conv_attributes(shape: ConvShape) -> dict[str, Any]:
    """The attributes of a Conv node of that shape."""
    return {
        "kernel_shape": list(shape.kernel),
        "strides": list(shape.strides),
        "dilations": list(shape.dilations),
        "pads": [*shape.begins, *shape.ends],
        "group": shape.group,
    }


def _ints(node: ir.Node, name: str, rank: int) -> Ints:
    return tuple(node.attributes.get_ints(name, (1,) * rank) or (1,) * rank)


def _affine(node: ir.Node) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift a channel of a BatchNormalization."""
    arrays = []
    for value in node.inputs[1:5]:
        if value is None or value.const_value is None:
            raise PassError(f"a statistic of '{node.name}' is no constant", advice="fold the program first")
        arrays.append(value.const_value.numpy().astype(np.float64))
    gamma, beta, mean, variance = arrays
    scale = gamma / np.sqrt(variance + (node.attributes.get_float("epsilon", 1e-5) or 0.0))
    return scale, beta - mean * scale
