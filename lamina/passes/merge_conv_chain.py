"""Merge convolutions in a row: the activations between them go, and their kernels become one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import onnx_ir as ir

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.compose_conv import ConvForm, ConvShape
from lamina.passes.conv_chains import ConvChain, chain_of, conv_attributes, conv_chains
from lamina.passes.drop_branch import sweep
from lamina.passes.pass_ import Need, Option, Refusal, Site, Transform

Segments = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Tiling:
    """A way to run convolutions in a row that was planned over their whole chain.

    Attributes:
        convs: Names of their nodes.
        segments: First and last of each part that becomes one convolution; they tile ``convs``.
        without: Convolutions that are dropped beforehand.
    """

    convs: tuple[str, ...]
    segments: Segments
    without: tuple[int, ...] = ()

    @property
    def site(self) -> str:
        """Name of the site it is an option of."""
        return f"{self.convs[0]}..{self.convs[-1]}"

    @property
    def option(self) -> str:
        """Name of that option."""
        label = ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in self.segments)
        return f"merge {label}" + (f" without {','.join(map(str, self.without))}" if self.without else "")


@dataclass(frozen=True)
class MergeConvChain(Transform):
    """Replace Conv, activation, Conv by one Conv that computes both without the activation.

    Fires: runs of convolutions that are read once, with activations and batch normalizations between them
        (:mod:`lamina.passes.conv_chains`); any kernel, stride, dilation, groups, 1 to 3 spatial axes. A long
        run is offered in windows of ``longest``; each way to merge neighbours in a window is one option.
        What was ``planned`` over whole chains is offered beside, in windows of its own.
    Refuses: merges that multiply the window's multiply-adds by more than ``growth``; merges that differ at
        the borders beside the lost activations, where ``edges`` is False; weights that are no constants;
        padding that depends on the input's size.
    Effect: Lossy; with an activation that is the identity on the data it is Rounding, but for borders where
        the option says ``edges`` (:func:`lamina.passes.compose_conv.why_edges`).
    Shapes: W [out, in / group, *k1] and [.., *k2] become [out, in / gcd(groups), *k], k = s1 d2 (k2 - 1) +
        d1 (k1 - 1) + 1, less where all steps share a divisor.
    Cost: sites O(nodes); one emission out * in * k1 * k2 multiply-adds.
    Source: LayerMerge, Kim et al. 2024, arXiv:2406.12837; Fu et al. 2023, arXiv:2301.12187. Deviates: no
        training; padding is not moved to the first convolution.

    Attributes:
        longest: Convolutions a window.
        growth: Most multiply-adds of an option, in those of the window.
        edges: Whether merges are offered that change borders too.
        planned: Ways that are offered whatever the other fields say (:mod:`lamina.planner.chain_plans`).
    """

    longest: int = 3
    growth: float = 1.5
    edges: bool = True
    planned: tuple[Tiling, ...] = ()

    paper: ClassVar[str] = "arXiv:2406.12837"
    axes: ClassVar[tuple[str, ...]] = ("latency", "size", "memory", "flops")
    needs: ClassVar[frozenset[Need]] = frozenset()
    name: ClassVar[str] = "merge-conv-chain"
    removes_site: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.longest < 2 or self.growth <= 0:
            raise PassError("merge-conv-chain needs longest >= 2 and growth > 0")

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every window with a merge that is worth offering, in execution order, and why others are not."""
        chains, refused = conv_chains(program)
        nodes = {n.name: n for n in program.graph}
        for chain in chains:
            planned = self._planned(chain)
            windows = list(self.windows(chain))
            for first, last in windows:
                ways, why = self._ways(chain.part(first, last))
                if ways:
                    planned.add((first, last))
                elif (first, last) not in planned:
                    yield Refusal(self.name, chain.convs[first], why)
            for first, last in sorted(planned):
                yield chain_site(chain.part(first, last), nodes)
        for name, reason in refused.items():
            yield Refusal(self.name, name, reason)

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """One option a way to merge neighbours in the window, and what was planned for it."""
        nodes = {n.name: n for n in program.graph}
        if any(name not in nodes for name in site.nodes):
            raise PassError(
                f"chain '{site.name}' is not in this program",
                advice="take the sites from the program the options are for",
            )
        part = chain_of([nodes[name] for name in site.nodes])
        ways = self._ways(part)[0] if len(part.convs) <= self.longest else []
        found = [chain_option(part, segments) for segments in ways]
        found += [chain_option(part, t.segments, t.without) for t in self.planned if t.convs == part.convs]
        return tuple({option.name: option for option in found}.values())

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The window's convolutions, some of them merged, with the nodes between those that were not."""
        part = chain_of([nodes[name] for name in site.nodes])
        value = nodes[part.convs[0]].inputs[0]
        if value is None:
            raise PassError(f"convolution '{part.convs[0]}' lost its input")
        without = frozenset(option.parameters.get("without", ()))
        for first, last in option.parameters["segments"]:
            made = nodes[part.convs[last]]
            if first < last or first in without:
                form = part.merged(first, last, without)
                value = value if form is None else _merged(form, value, made, rewriter)
            else:
                value = _copied(made, value, rewriter)
            if last < len(part.convs) - 1:
                for name in part.between[last]:
                    value = _copied(nodes[name], value, rewriter)
        return [value]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take out what the merged convolutions replaced."""
        nodes = [rewriter.node(name) for name in site.nodes if rewriter.has_node(name)]
        sweep(rewriter, reversed(nodes))

    # -- what is worth offering ---------------------------------------------------------------------

    def windows(self, chain: ConvChain) -> Iterator[tuple[int, int]]:
        """Windows without overlap that hold every merge that does not grow, as far as they can.

        From the left: each begins at a convolution whose merge with the next is worth offering.
        """
        first, count = 0, len(chain.convs)
        while first < count - 1:
            last = min(first + self.longest, count) - 1
            if self._ways(chain.part(first, last))[0] or first + 2 >= count:
                yield first, last
                first = last + 1
            else:
                first += 1

    def _planned(self, chain: ConvChain) -> set[tuple[int, int]]:
        """First and last convolution of everything planned for a chain."""
        place = {name: i for i, name in enumerate(chain.convs)}
        return {(place[t.convs[0]], place[t.convs[-1]]) for t in self.planned if t.convs[0] in place}

    def _ways(self, part: ConvChain) -> tuple[list[Segments], str]:
        """The ways to cut a window that are worth offering; why the others are not."""
        found, why = [], "no two of its convolutions can be merged"
        for segments in partitions(len(part.convs)):
            if len(segments) == len(part.convs):
                continue
            share, edges = _effects(part, segments)
            if share > self.growth:
                why = f"the merged kernels take {share:.1f} times the multiply-adds"
            elif edges and not self.edges:
                why = "the merged kernels differ at the borders, where the second convolution pads"
            else:
                found.append(segments)
        return found, why


def partitions(count: int) -> Iterator[Segments]:
    """Every way to cut ``count`` convolutions in a row into segments (first, last)."""
    for bits in range(1 << (count - 1)):
        starts = [0, *(i for i in range(1, count) if bits >> (i - 1) & 1)]
        yield tuple(zip(starts, [*(s - 1 for s in starts[1:]), count - 1], strict=True))


def chain_option(part: ConvChain, segments: Segments, without: Sequence[int] = ()) -> Option:
    """The option that runs a chain, or a part of one, in segments.

    Args:
        part: The chain.
        segments: First and last convolution of each; they tile it.
        without: Convolutions that are dropped.
    """
    share, edges = _effects(part, segments, without)
    parameters: dict[str, Any] = {
        "segments": [list(s) for s in segments],
        "flops_share": share,
        "edges": edges,
    }
    if without:
        parameters["without"] = list(without)
    return Option(Tiling(part.convs, segments, tuple(without)).option, parameters)


def _effects(part: ConvChain, segments: Segments, without: Sequence[int] = ()) -> tuple[float, bool]:
    """Share of multiply-adds that is left, and whether borders change beside the lost activations."""
    shapes = [part.shape(a, b, without) for a, b in segments]
    each = [(i, i) for i in range(len(part.convs))]
    now = _macs(part, each, [f.shape for f in part.forms])
    edges = any(shape is not None and shape.edges for shape in shapes)
    return _macs(part, segments, shapes) / max(now, 1e-300), edges


def _macs(part: ConvChain, segments: Sequence[tuple[int, int]], shapes: Sequence[ConvShape | None]) -> float:
    """Multiply-adds of all segments for one position of the chain's output; None makes none."""
    total = 0.0
    for (_, last), shape in zip(segments, shapes, strict=True):
        later = prod(s for other in part.forms[last + 1 :] for s in other.shape.strides)
        total += 0.0 if shape is None else float(shape.taps * later)
    return total


# -- sites and nodes ----------------------------------------------------------------------------------


def chain_site(part: ConvChain, nodes: Mapping[str | None, ir.Node]) -> Site:
    """The site of a chain, or of a part of one; ``nodes`` are the program's, by name."""
    names = [part.convs[0]]
    for between, conv in zip(part.between, part.convs[1:], strict=True):
        names += [*between, conv]
    source, made = nodes[part.convs[0]].inputs[0], nodes[part.convs[-1]].outputs[0]
    weights = [
        v.name or "" for n in names for v in nodes[n].inputs[1:] if v is not None and v.is_initializer()
    ]
    return Site(
        MergeConvChain.name,
        Tiling(part.convs, ()).site,
        f"conv-chain-{len(part.convs)}",
        tuple(names),
        ("" if source is None else source.name or "",),
        (made.name or "",),
        tuple(dict.fromkeys(weights)),
    )


def _merged(form: ConvForm, value: ir.Value, last: ir.Node, rewriter: Rewriter) -> ir.Value:
    old, weight = last.outputs[0], last.inputs[1]
    if weight is None or weight.const_value is None:
        raise PassError(f"the weight of '{last.name}' is no constant")
    kind = weight.const_value.dtype.numpy()
    label = f"{last.name}_merged"
    inputs = [value, rewriter.constant(form.weight.astype(kind), f"{label}_weight")]
    if form.bias.any():
        inputs.append(rewriter.constant(form.bias.astype(kind), f"{label}_bias"))
    return rewriter.op(
        "Conv", inputs, conv_attributes(form.shape), name=label, dtype=old.dtype, shape=old.shape
    )


def _copied(node: ir.Node, value: ir.Value, rewriter: Rewriter) -> ir.Value:
    """A node of the window as it is, on another value; its weights are stored anew, as the old ones leave."""
    inputs: list[ir.Value | None] = [value]
    for old in node.inputs[1:]:
        fresh = old is not None and old.const_value is not None and old.is_initializer()
        if fresh and old is not None and old.const_value is not None:
            inputs.append(rewriter.constant(old.const_value.numpy(), f"{old.name}_kept"))
        else:
            inputs.append(old)
    made, out = dict(node.attributes), node.outputs[0]
    label = f"{node.name}_kept"
    return rewriter.op(
        node.op_type, inputs, made, domain=node.domain, name=label, dtype=out.dtype, shape=out.shape
    )
