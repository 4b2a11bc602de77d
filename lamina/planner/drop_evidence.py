"""What drop rules go by: the branches that may go, the layers they make up, and what was measured of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from lamina.analysis.depths import depths_of
from lamina.analysis.needs import Need
from lamina.analysis.residual import BranchProbe
from lamina.analysis.statistics import Statistics, collect
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.branches import Branch, BranchesResult, find_branches
from lamina.ir.program import Program
from lamina.passes.drop_branch import DropBranch
from lamina.passes.pass_ import Site

DropSet = tuple[str, ...]
# Candidate sets of branches -> how much worse the model is without each.
Measure = Callable[[Sequence[DropSet]], Sequence[float]]
# Steps back from a branch within which the branch before it must lie to be in the same stream.
_REACH = 64
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "MatMul", "Gemm", "LSTM", "GRU", "RNN"))
_LAYER, _ENTRY, _END = "layer ", "entry of layer ", "end of layer "


@dataclass(frozen=True)
class Droppable:
    """A branch that may go.

    Attributes:
        name: The branch.
        kind: ``attention``, ``mlp``, ``conv``, ...
        parent: The droppable branch it is nested in: where that goes, so does this.
        saving: What goes with it: seconds, FLOPs or parameters; any one unit for all branches.
    """

    name: str
    kind: str
    parent: str | None = None
    saving: float = 1.0


@dataclass(frozen=True)
class Layer:
    """A transformer layer, a ResNet block: branches that rules about whole layers drop together.

    Attributes:
        name: The block.
        branches: Its branches, in execution order.
        stream: Number of the residual stream it writes to: an encoder's and a decoder's differ.
        enters: Value its first branch starts from.
        leaves: The sum its last branch makes.
        whole: Whether all its branches may go; else rules about layers leave it alone.
    """

    name: str
    branches: tuple[str, ...]
    stream: int
    enters: str
    leaves: str
    whole: bool = True


@dataclass(frozen=True)
class DropEvidence:
    """All that a rule may read. What costs runs is a callable, asked only by the rules that need it.

    Attributes:
        branches: What may go, in execution order.
        layers: Runs of top-level branches, in execution order.
        statistics: Of the branches, and of each layer as ``layer <name>``; lengths and angles.
        angles: First and last layer of a span -> angular distance of what enters and leaves it; NaN where
            they cannot be compared.
        damages: Branch -> output divergence with only it gone.
        divergence: Sets -> output divergence without them.
        loss: Sets -> task loss (cross-entropy) without them; None where the task has none.
    """

    branches: tuple[Droppable, ...]
    layers: tuple[Layer, ...] = ()
    statistics: Callable[[], Statistics] = field(default=lambda: Statistics(0))
    angles: Callable[[int, int], float] = field(default=lambda first, last: float("nan"))
    damages: Callable[[], Mapping[str, float]] = dict
    divergence: Measure | None = None
    loss: Measure | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the branches that may go."""
        return tuple(b.name for b in self.branches)


def droppable(program: Program, saving: Mapping[str, float] | None = None) -> tuple[Droppable, ...]:
    """The branches of a program that may go, in execution order.

    Args:
        program: The program.
        saving: Branch -> what goes with it; its parameters where omitted.
    """
    may = {s.name for s in DropBranch().sites(program) if isinstance(s, Site)}
    found = find_branches(program)
    parents = {b.name: b.parent for b in found.branches}

    def outer(name: str) -> str | None:
        parent = parents[name]
        while parent is not None and parent not in may:
            parent = parents[parent]
        return parent

    return tuple(
        Droppable(
            b.name,
            b.kind,
            outer(b.name),
            float(b.parameters) if saving is None else saving.get(b.name, 0.0),
        )
        for b in found.branches
        if b.name in may
    )


def layers_of(program: Program, branches: Sequence[Droppable] = ()) -> tuple[Layer, ...]:
    """The layers of a program: its blocks of top-level branches, each with its residual stream."""
    found = find_branches(program)
    by_name = {b.name: b for b in found.branches}
    may = {b.name for b in branches} if branches else {b.name for b in droppable(program)}
    stream = _streams(program, found)
    layers = []
    for block in found.blocks:
        members = [by_name[n] for n in block.branches]
        if any(b.parent is not None for b in members):
            continue
        layers.append(
            Layer(
                block.name,
                block.branches,
                stream[members[0].name],
                _entry(members[0]),
                members[-1].output,
                all(b.name in may for b in members),
            )
        )
    order = {b.name: i for i, b in enumerate(found.branches)}
    return tuple(sorted(layers, key=lambda layer: order[layer.branches[0]]))


def _entry(branch: Branch) -> str:
    return branch.skip if branch.shortcut == "identity" else branch.source


def _streams(program: Program, found: BranchesResult) -> dict[str, int]:
    """Branch -> number of its stream.

    A branch is in the stream of the latest branch whose sum reaches its start without passing an operator
    with weights: norms, activations, poolings and concatenations do not end a stream, projections do.
    """
    values = {v.name: v for n in program.graph for v in n.outputs}
    made = {b.output: i for i, b in enumerate(found.branches) if b.parent is None}
    constants = set(program.graph.initializers)
    stream: dict[str, int] = {}
    count = 0
    for index, branch in enumerate(found.branches):
        if branch.parent is not None:
            continue
        before = _before(values.get(branch.source), made, constants)
        before = None if before is None or before >= index else before
        if before is None:
            stream[branch.name] = count
            count += 1
        else:
            stream[branch.name] = stream[found.branches[before].name]
    return stream


def _before(start: ir.Value | None, made: Mapping[str, int], constants: set[str]) -> int | None:
    hits: list[int] = []
    seen: set[ir.Value] = set()
    pending = deque([] if start is None else [start])
    while pending and len(seen) < _REACH:
        value = pending.popleft()
        if value in seen:
            continue
        seen.add(value)
        if (value.name or "") in made:
            hits.append(made[value.name or ""])
            continue
        node = value.producer()
        if node is None or _weighted(node, constants):
            continue
        pending.extend(v for v in node.inputs if v is not None)
    return max(hits, default=None)


def _weighted(node: ir.Node, constants: set[str]) -> bool:
    return node.op_type in _WEIGHTED and any(
        v is not None and (v.name or "") in constants for v in node.inputs
    )


# -- statistics ---------------------------------------------------------------------------------------


def rule_statistics(
    program: Program, dataset: Dataset, layers: Sequence[Layer], *, threads: int | None = None
) -> Statistics:
    """One run over the data: lengths and angles of branches, of whole layers and of the ends of streams.

    Args:
        program: The program.
        dataset: Calibration samples.
        layers: :func:`layers_of` it.
        threads: Threads of the run.

    Raises:
        DataError: The data does not fit the program.
        BackendError: ONNX Runtime refuses the program.
    """
    needs = (Need.LENGTHS, Need.ANGLES)
    return collect(program, dataset, branches=_probes(program, layers), needs=needs, threads=threads)


def _probes(program: Program, layers: Sequence[Layer]) -> list[BranchProbe]:
    """The branches, whole layers, and as depths what enters or leaves a layer and is no branch's skip."""
    probes = [BranchProbe.of(b) for b in find_branches(program).branches]
    axes = {p.name: p.axis for p in probes}
    known = {p.skip for p in probes if p.depth}
    for layer in layers:
        axis = axes[layer.branches[0]]
        probes.append(BranchProbe(_LAYER + layer.name, layer.enters, None, layer.leaves, axis, depth=False))
        for label, value in ((_ENTRY, layer.enters), (_END, layer.leaves)):
            if value not in known:
                known.add(value)
                probes.append(BranchProbe(label + layer.name, value, None, value, axis))
    return probes


def layer_similarity(statistics: Statistics, layers: Sequence[Layer]) -> dict[str, float]:
    """Layer -> mean cosine of what enters and leaves it; layers without one (shapes differ) are left out."""
    found = {}
    for layer in layers:
        seen = statistics.branches.get(_LAYER + layer.name)
        if seen is not None and np.isfinite(seen.cosine):
            found[layer.name] = seen.cosine
    return found


def span_angles(
    program: Program, statistics: Statistics, layers: Sequence[Layer]
) -> Callable[[int, int], float]:
    """Angular distance of what enters layer ``first`` and what leaves layer ``last``, by their indices.

    ``D[l, n] = arccos(cos(x_l, x_{l+n})) / pi`` at each sample's last token, mean over samples (Gromov et
    al. 2024, arXiv:2403.17887); NaN where the two differ in width or number, or lie in different streams.
    """
    place = {name: i for i, name in enumerate(statistics.depths.names)}
    at = {d.value: place[d.name] for d in depths_of(_probes(program, layers)) if d.name in place}

    def angle(first: int, last: int) -> float:
        start, end = at.get(layers[first].enters), at.get(layers[last].leaves)
        same = len({layer.stream for layer in layers[first : last + 1]}) == 1
        if start is None or end is None or not same:
            return float("nan")
        return float(statistics.depths.angles[start, end])

    return angle


def require(measure: Measure | None, what: str, rule: str) -> Measure:
    """The measure a rule cannot do without.

    Raises:
        PassError: There is none.
    """
    if measure is None:
        raise PassError(
            f"rule '{rule}' needs {what}, and there is none for this model and data",
            advice="give data with labels or tokens, or choose another rule",
        )
    return measure
