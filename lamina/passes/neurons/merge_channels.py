"""Merge hidden channels: weights that make them are averaged, weights that read them are summed.

What both ways of choosing what to merge share: sites, options by width, and the code that writes the
narrower operators.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.inference import infer_shapes
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import remove_unused_initializers, sweep
from lamina.passes.neurons.channel_map import ChannelMap
from lamina.passes.neurons.hidden import Hidden, HiddenGroup
from lamina.passes.neurons.hidden_sites import hidden_sites
from lamina.passes.pass_ import Option, Refusal, Site, Transform

# What a narrowed operator is called until the one it replaces is gone.
_LABEL = "merged"


@dataclass(frozen=True)
class MergeChannels(Transform):
    """Base of the transforms that make hidden widths smaller; ``maps`` says what is merged.

    Fires: hidden widths of :func:`.hidden_sites.hidden_sites`: one operator sums over channels
        that Conv, Gemm or MatMul make and operators between compute each by itself. Widths that share an
        operator are one site and shrink by the same share.
    Refuses: channels of the residual stream or the interface; heads and other units of several channels;
        grouped convolutions, normalizations and other operators between that mix or count channels; channels
        that several operators read.
    Effect: Lossy; merging channels with equal weights in front is Rounding.
    Interplay: the narrower operators keep their names. In one search a site is merged or its operators are
        quantized, not both; a plan may hold both, and the narrower weights are then what is quantized.
    Cost: sites as :func:`lamina.analysis.coupling.coupled_groups`; one emission k d (in + out) multiply-adds.

    Attributes:
        keeps: Shares of the width that are offered.
        align: Widths are multiples of it.
    """

    axes: ClassVar[tuple[str, ...]] = ("latency", "size", "memory", "flops")
    removes_site: ClassVar[bool] = True

    keeps: tuple[float, ...] = (0.875, 0.75, 0.5)
    align: int = 4

    def __post_init__(self) -> None:
        if not self.keeps or any(not 0 < share < 1 for share in self.keeps) or self.align < 1:
            raise PassError("widths to keep lie between 0 and 1, and align is at least 1", where=self.name)

    def maps(
        self, hidden: Hidden, program: Program, statistics: Any, widths: Sequence[int]
    ) -> Sequence[ChannelMap] | None:
        """What becomes of each group's channels in so many; None where that cannot or should not be."""
        raise NotImplementedError

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every site in execution order, and why other channels are left alone."""
        found, refused = hidden_sites(program)
        for hidden in found:
            yield Site(
                self.name,
                hidden.name,
                hidden.kind,
                hidden.nodes,
                hidden.inputs,
                (hidden.output,),
                hidden.weights,
            )
        for where, reason in refused:
            yield Refusal(self.name, where, reason)

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """One option a width, the widest first."""
        hidden = hidden_at(program, site.name)
        made = []
        for share in sorted(self.keeps, reverse=True):
            widths = [self.width(g.units, share) for g in hidden.groups]
            if all(w == g.units for w, g in zip(widths, hidden.groups, strict=True)):
                continue
            maps = self.maps(hidden, program, statistics, widths)
            if maps is not None:
                made.append(Option(f"keep-{round(100 * share)}", option_parameters(hidden, program, maps)))
        return tuple(made)

    def width(self, units: int, share: float) -> int:
        """Channels kept of ``units``."""
        return min(units, max(1, round(units * share / self.align) * self.align))

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The site's nodes with narrower weights."""
        return [_emit(site.nodes, option.parameters, rewriter, nodes)]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take the wide nodes out; the narrow ones get their names."""
        _finish(site.nodes, site.outputs[0], rewriter)


def merge_channels(program: Program, maps: Mapping[str, Sequence[ChannelMap]]) -> Program:
    """Merge hidden channels on a clone.

    Args:
        program: Left unchanged.
        maps: Site name (:func:`.hidden_sites.hidden_sites`) -> a map for each of its groups.

    Raises:
        PassError: There is no such site; a map is not of its group's width.
    """
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    chosen = [(hidden_at(program, name), found) for name, found in maps.items()]
    for hidden, found in chosen:
        nodes = {name: rewriter.node(name) for name in hidden.nodes}
        last = nodes[hidden.nodes[-1]]
        parameters = option_parameters(hidden, program, found)
        made = _emit(hidden.nodes, parameters, rewriter.at(last), nodes)
        rewriter.at(None)
        rewriter.replace_uses(last.outputs[0], made)
    for hidden, _ in chosen:
        _finish(hidden.nodes, hidden.output, rewriter)
    unused = frozenset(n for n, v in program.graph.initializers.items() if not v.uses())
    remove_unused_initializers(clone.model, keep=unused)
    infer_shapes(clone.model)
    return clone


def hidden_at(program: Program, name: str) -> Hidden:
    """The site called ``name``.

    Raises:
        PassError: There is none.
    """
    for hidden in hidden_sites(program)[0]:
        if hidden.name == name:
            return hidden
    raise PassError(f"no hidden channels of '{name}' can be merged", advice="take names from hidden_sites()")


def option_parameters(hidden: Hidden, program: Program, maps: Sequence[ChannelMap]) -> dict[str, Any]:
    """What an option's emission needs: how the nodes are wired, and each group's map.

    Raises:
        PassError: A map is not of its group's width.
    """
    groups: list[dict[str, Any]] = []
    kept: dict[tuple[int, int], float] = {}
    arrays = hidden.arrays(program)
    for group, found in zip(hidden.groups, maps, strict=True):
        if len(found.targets) != group.units:
            raise PassError(f"group '{group.name}' has {group.units} channels, its map {len(found.targets)}")
        for operand in group.operands:
            key = operand.node, operand.place
            kept[key] = kept.get(key, 1.0) * found.width / group.units
        groups.append({**_facts(group), **found.parameters()})
    elements = {key: arrays[key].size for key in kept if arrays[key].ndim > 1}
    left = sum(kept[key] * size for key, size in elements.items()) / max(1, sum(elements.values()))
    return {"wiring": [list(row) for row in hidden.wiring], "groups": groups, "flops_share": left}


def _facts(group: HiddenGroup) -> dict[str, Any]:
    return {
        "axis": group.axis,
        "makes": list(group.makes),
        "operands": [[o.node, o.place, o.axis, o.side] for o in group.operands],
    }


def _emit(
    names: Sequence[str], parameters: Mapping[str, Any], rewriter: Rewriter, nodes: Mapping[str, ir.Node]
) -> ir.Value:
    # Wiring goes by place, not by what nodes read now: in the supergraph other moves have rewired them.
    cuts: dict[tuple[int, int], list[tuple[int, str, ChannelMap]]] = {}
    made_by: dict[int, tuple[int, int]] = {}
    for group in parameters["groups"]:
        found = ChannelMap.read(group)
        for node, place, axis, side in group["operands"]:
            cuts.setdefault((node, place), []).append((axis, side, found))
        made_by.update(dict.fromkeys(group["makes"], (group["axis"], found.width)))
    made: list[ir.Value] = []
    for i, (name, wires) in enumerate(zip(names, parameters["wiring"], strict=True)):
        node = nodes[name]
        inputs: list[ir.Value | None] = []
        for k, value in enumerate(node.inputs):
            if wires[k] >= 0:
                inputs.append(made[wires[k]])
            elif (i, k) in cuts:
                inputs.append(_narrowed(value, cuts[i, k], rewriter))
            else:
                inputs.append(value)
        out = node.outputs[0]
        shape = _shape(out.shape, made_by.get(i))
        made.append(
            rewriter.op(
                node.op_type,
                inputs,
                dict(node.attributes),
                domain=node.domain,
                name=f"{name}_{_LABEL}",
                dtype=out.dtype,
                shape=shape,
            )
        )
    return made[-1]


def _narrowed(
    value: ir.Value | None, cuts: Sequence[tuple[int, str, ChannelMap]], rewriter: Rewriter
) -> ir.Value:
    if value is None or value.const_value is None:
        raise PassError(
            f"weight '{value.name if value else ''}' is no constant", advice="the plan is for another model"
        )
    array = value.const_value.numpy()
    for axis, side, found in cuts:
        array = found.narrowed(array, axis, summed=side == "read")
    return rewriter.constant(array, f"{value.name}_{_LABEL}")


def _shape(shape: ir.Shape | None, width: tuple[int, int] | None) -> ir.Shape | None:
    if shape is None or width is None:
        return shape
    sizes = list(shape)
    sizes[width[0]] = width[1]
    return ir.Shape(sizes)


def _finish(names: Sequence[str], output: str, rewriter: Rewriter) -> None:
    sweep(rewriter, [rewriter.node(name) for name in reversed(names) if rewriter.has_node(name)])
    for name in names:
        label = f"{name}_{_LABEL}"
        if rewriter.has_node(label) and not rewriter.has_node(name):
            rewriter.rename(rewriter.node(label), name)
    if rewriter.has_node(names[-1]):
        last = rewriter.node(names[-1]).outputs[0]
        if not last.is_graph_output():
            last.name = output
