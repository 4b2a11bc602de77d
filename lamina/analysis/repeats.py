"""Repeating runs of operators outside residual branches: the blocks of networks that have no skips."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from lamina.analysis.flops import Tensors
from lamina.ir.branch_kinds import repeating_runs, scope_path
from lamina.ir.branch_view import GraphView
from lamina.ir.branches import BranchesResult

_Unit = list[int]  # positions of nodes
_INPUTS = -1


@dataclass(frozen=True)
class Repeat:
    """One turn of a run.

    Attributes:
        name: The module path its weighted operators share, or ``repeat.<k>``.
        nodes: Names, in execution order.
        run: Turns of the same run have the same structure.
        index: Place in the run.
    """

    name: str
    nodes: tuple[str, ...]
    run: int
    index: int


def repeated_operators(graph: ir.Graph, found: BranchesResult, tensors: Tensors) -> tuple[Repeat, ...]:
    """Find what repeats among the operators that are in no residual branch.

    An operator dominates another if everything the other computes from the inputs passes through it. The
    longest line of dominators is the trunk; heads that read a value of the trunk hang beside it. Between two
    operators of the trunk lies a cell: an operator of a plain chain, parallel paths up to their join. A cell
    with a weighted operator and the cells without that follow at the same shape (its activation, its norm)
    are a unit, others (pooling, a reshape) are units of their own. Units are equal when they have the same
    operators in the same order, with kernels of one size and depthwise or not; widths and strides may differ.
    Runs of up to 8 units that repeat and hold a weighted operator are blocks.

    What every layer reads besides (a mask) leaves no trunk: such networks have residual branches, and
    :func:`lamina.ir.branches.find_branches` their blocks. Repetition beside the trunk is not looked for;
    where values of the trunk meet again far behind its end (a feature pyramid) the last turn may be missed.

    Cost: O(edges log nodes).

    Args:
        graph: The main graph.
        found: Its branches: their operators and sums are left out.
        tensors: Shape of every tensor; where a shape is missing, units are shorter.
    """
    view = GraphView(graph)
    taken = {n for b in found.branches for n in (*b.nodes, b.add)}
    repeats: list[Repeat] = []
    names: set[str] = set()
    run = 0
    for stretch in _stretches(view, taken):
        units = _units(view, stretch, tensors)
        for start, period, turns in repeating_runs([_signature(view, unit) for unit in units]):
            whole = [units[start + t * period : start + (t + 1) * period] for t in range(turns)]
            positions = [[p for unit in turn for p in unit] for turn in whole]
            if turns < 2 or not any(view.is_weighted(p) for p in positions[0]):
                continue
            paths = [scope_path(view, members) for members in positions]
            told_apart = len(set(paths)) == len(paths) and all(paths)
            for index, (members, path) in enumerate(zip(positions, paths, strict=True)):
                name = path if told_apart and path not in names else f"repeat.{len(repeats)}"
                names.add(name)
                nodes = tuple(view.nodes[p].name or "" for p in members)
                repeats.append(Repeat(name, nodes, run, index))
            run += 1
    return tuple(repeats)


def _stretches(view: GraphView, taken: set[str]) -> Iterator[list[_Unit]]:
    """Runs of neighbouring cells without a node of ``taken``."""
    stretch: list[_Unit] = []
    for cell in _cells(view):
        if any(view.nodes[p].name in taken for p in cell):
            yield stretch
            stretch = []
        else:
            stretch.append(cell)
    yield stretch


def _cells(view: GraphView) -> Iterator[_Unit]:
    """The trunk's operators in order, each with what lies between it and the one before."""
    sources: dict[int, list[int]] = {}  # node that computes data -> nodes it gets data from
    tree = _Dominators()
    for position, node in enumerate(view.nodes):
        if any(view.is_data(v) for v in node.outputs):
            data = [v for v in dict.fromkeys(view.reads[position]) if view.is_data(v)]
            sources[position] = [view.producer.get(v, _INPUTS) for v in data]
            tree.add(position, sources[position])
    trunk = tree.longest()
    for before, last in itertools.pairwise([_INPUTS, *trunk]):
        cell, pending = {last}, [last]
        while pending:
            for source in sources[pending.pop()]:
                if source not in (before, _INPUTS) and source not in cell:
                    cell.add(source)
                    pending.append(source)
        yield sorted(cell)


class _Dominators:
    """Tree of dominators of a graph whose nodes come in order; the inputs are its root.

    A node's dominator is the last common ancestor of its sources. Beside its parent a node keeps a jump to an
    ancestor, so that going up takes O(log depth) steps (Myers 1983, "An applicative random-access stack").

    Attributes:
        parent: Node -> its closest dominator.
    """

    def __init__(self) -> None:
        self.parent = {_INPUTS: _INPUTS}
        self._jump = {_INPUTS: _INPUTS}
        self._depth = {_INPUTS: 0}

    def add(self, node: int, sources: Iterable[int]) -> None:
        """Add a node; its sources are in the tree."""
        parent = functools.reduce(self._common, sources)
        jump, depth = self._jump, self._depth
        far = jump[parent]
        even = depth[parent] - depth[far] == depth[far] - depth[jump[far]]
        self.parent[node], self._depth[node] = parent, depth[parent] + 1
        jump[node] = jump[far] if even else parent

    def longest(self) -> list[int]:
        """The longest line from the root, without it."""
        node = max(self._depth, key=lambda n: (self._depth[n], n))  # a join comes after what it joins
        line = []
        while node != _INPUTS:
            line.append(node)
            node = self.parent[node]
        return line[::-1]

    def _common(self, a: int, b: int) -> int:
        jump, parent, depth = self._jump, self.parent, self._depth
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            up = jump if jump[a] != jump[b] else parent
            a, b = up[a], up[b]
        return a


def _units(view: GraphView, cells: Sequence[_Unit], tensors: Tensors) -> list[_Unit]:
    units: list[_Unit] = []
    grows = False
    for cell in cells:
        weighted = any(view.is_weighted(p) for p in cell)
        if grows and not weighted and _keeps_shape(view, cell, tensors):
            units[-1].extend(cell)
            continue
        units.append(list(cell))
        grows = weighted
    return units


def _keeps_shape(view: GraphView, cell: _Unit, tensors: Tensors) -> bool:
    """Whether what leaves a cell has the shape of what enters it."""
    first, last = view.nodes[cell[0]], view.nodes[cell[-1]]
    made = tensors.get(last.outputs[0].name or "")
    given = [tensors.get(v.name or "") for v in first.inputs if v is not None and view.is_data(v)]
    return made is not None and any(known is not None and known[0] == made[0] for known in given)


def _signature(view: GraphView, unit: _Unit) -> tuple[object, ...]:
    return tuple(_kind(view.nodes[p]) for p in unit)


def _kind(node: ir.Node) -> tuple[object, ...]:
    """Operator and, of a convolution, the size of its kernel and how its channels are grouped."""
    if node.op_type not in ("Conv", "ConvTranspose"):
        return node.domain, node.op_type
    weight = node.inputs[1]
    shape = () if weight is None or weight.shape is None else tuple(weight.shape)
    groups = node.attributes.get_int("group", 1)
    depthwise = groups > 1 and len(shape) > 1 and shape[1] == 1
    grouping = "depthwise" if depthwise else "grouped" if groups > 1 else "full"
    return node.domain, node.op_type, grouping, shape[2:]
