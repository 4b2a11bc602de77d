"""Turn measured prices into the planner's cost model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from lamina.backends.backend import Workload
from lamina.ir.program import Program
from lamina.passes.pass_ import Option
from lamina.planner.costs import Border, Costs, Loan
from lamina.planner.option_bytes import written_bytes
from lamina.planner.prices import Prices
from lamina.planner.space import Choice, Space

Shapes = Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]]


def build_costs(
    space: Space,
    prices: Prices,
    workload: Workload,
    shapes: Mapping[str, Shapes],
    base: Mapping[str, float],
    original_s: Sequence[float],
    operator_flops: Mapping[str, float],
) -> Costs:
    """The cost model of a space from its prices.

    Args:
        space: The choices to price.
        prices: Where prices are measured and kept.
        workload: The shapes that matter.
        shapes: Case name -> value name -> (shape, dtype) of the folded program.
        base: Totals of the folded program with no move, by axis.
        original_s: Latency of the original on each case, seconds.
        operator_flops: Node name -> FLOPs on the heaviest case.
    """
    requests = [(c.site, c.transform, c.options) for c in space.choices]
    table = prices.price(space.program, requests, workload)
    weights = [case.weight / seconds for case, seconds in zip(workload, original_s, strict=True)]

    def relative(choice: Choice, option: str) -> float:
        transform, site = choice.transform.name, choice.site.name
        return sum(w * table[transform, site, option, c.name] for w, c in zip(weights, workload, strict=True))

    share = [relative(c, "float") for c in space.choices]

    def change(choice: Choice, option: str, now: float) -> float:
        priced = relative(choice, option) - now
        return max(priced, 0.0) if option in choice.transform.storage_only else priced

    latency = [[change(c, o.name, f) for o in c.options] for c, f in zip(space.choices, share, strict=True)]
    delta = {"latency": latency, "size": _size(space), "flops": _flops(space, operator_flops)}
    borders = _borders(space, prices, workload, weights, shapes)
    return Costs(space, dict(base), delta, share, borders, _loans(space))


def shared_costs(space: Space, base: Mapping[str, float], operator_flops: Mapping[str, float]) -> Costs:
    """The cost model where single operators cannot be priced: a site's latency is its share of the FLOPs.

    A guess to begin with, in which an option that keeps its site changes no latency: whole models are
    measured next and correct it (:func:`lamina.planner.costs.fit_scales`); what is returned was measured too.

    Args:
        space: The choices.
        base: Totals of the folded program with no move, by axis.
        operator_flops: Node name -> FLOPs on the heaviest case.
    """
    unit = base["latency"] / max(sum(operator_flops.values()), 1.0)
    flops = _flops(space, operator_flops)
    latency = [[unit * change for change in row] for row in flops]
    share = [unit * sum(operator_flops.get(n, 0.0) for n in c.site.nodes) for c in space.choices]
    delta = {"latency": latency, "size": _size(space), "flops": flops}
    return Costs(space, dict(base), delta, share, loans=_loans(space))


def _size(space: Space) -> list[list[float]]:
    """Bytes every option adds to the file."""
    return [
        [float(written) - _own_weight_bytes(space, c) for written in row]
        for c, row in zip(space.choices, written_bytes(space), strict=True)
    ]


def _flops(space: Space, operator_flops: Mapping[str, float]) -> list[list[float]]:
    """FLOPs every option adds: only what takes the site out changes them."""

    def change(choice: Choice, option: Option) -> float:
        if not choice.transform.removes_site:
            return 0.0
        left = float(option.parameters.get("flops_share", 0.0))
        return (left - 1.0) * sum(operator_flops.get(n, 0.0) for n in choice.site.nodes)

    return [[change(c, o) for o in c.options] for c in space.choices]


def _own_weight_bytes(space: Space, choice: Choice) -> float:
    """Bytes that leave the file with the site; a weight shared with n operators counts 1/n."""
    return sum(_leaving(space, choice, name) for name in choice.site.weights)


def _leaving(space: Space, choice: Choice, weight: str) -> float:
    """Bytes of one weight that leave the file with the site."""
    value = space.program.graph.initializers.get(weight)
    if value is None or value.const_value is None:
        return 0.0
    inside = set(choice.site.nodes)
    uses = [use.node.name in inside for use in value.uses()]
    return value.const_value.nbytes * sum(uses) / max(len(uses), 1)


def _loans(space: Space) -> list[Loan]:
    """What sites lend each other, weights of the same owners and borrowers together."""
    borrowers: dict[str, list[tuple[int, int]]] = {}
    for i, choice in enumerate(space.choices):
        for gene, option in enumerate(choice.options, 1):
            for weight in option.borrows:
                borrowers.setdefault(weight, []).append((i, gene))
    owners: dict[str, list[tuple[int, int]]] = {weight: [] for weight in borrowers}
    nbytes: dict[str, float] = {}
    for i, choice in enumerate(space.choices):
        for weight in owners.keys() & set(choice.site.weights):
            owners[weight] += [(i, gene) for gene in range(1, len(choice.options) + 1)]
            nbytes[weight] = _leaving(space, choice, weight)
    totals: dict[tuple[tuple[tuple[int, int], ...], ...], float] = {}
    for weight, lending in owners.items():
        if lending:
            key = tuple(lending), tuple(borrowers[weight])
            totals[key] = totals.get(key, 0.0) + nbytes[weight]
    return [Loan(total, *key) for key, total in totals.items()]


def _borders(
    space: Space,
    prices: Prices,
    workload: Workload,
    weights: Sequence[float],
    shapes: Mapping[str, Shapes],
) -> list[Border]:
    int8 = [any(o.input_form == "int8" or o.output_form == "int8" for o in c.options) for c in space.choices]
    makers = {v: i for i, c in enumerate(space.choices) if int8[i] for v in c.site.outputs}
    readers: dict[str, list[int]] = {}
    for i, choice in enumerate(space.choices):
        if int8[i]:
            for value in choice.site.inputs:
                readers.setdefault(value, []).append(i)
    uses = _use_counts(space.program)
    borders = []
    for value in sorted(set(makers) | set(readers)):
        if not all(value in shapes[case.name] for case in workload):
            continue
        consumers = tuple(dict.fromkeys(readers.get(value, ())))
        sizes = [shapes[case.name][value][0] for case in workload]
        cost = {
            kind: sum(
                w * prices.border(shape, kind, case.name)
                for w, shape, case in zip(weights, sizes, workload, strict=True)
            )
            for kind in ("quantize", "dequantize")
        }
        others = uses[value] > len(consumers)
        borders.append(
            Border(value, makers.get(value), consumers, others, cost["quantize"], cost["dequantize"])
        )
    return borders


def _use_counts(program: Program) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in program.graph.all_nodes():
        counts.update({v.name for v in node.inputs if v is not None and v.name})
    counts.update(v.name for v in program.graph.outputs if v.name)
    return counts
