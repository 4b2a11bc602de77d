"""The search for residual sums: which operand is the skip, which region makes the other one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from lamina.ir.branch_view import Flow, GraphView, OutOfSteps, Region, words

Shortcut = Literal["identity", "projection"]
_FUSED = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_COPIES = frozenset(("Identity", "Dropout", "Cast"))
# What a shortcut may consist of: at most one weighted operator, nothing that mixes two activations.
_LINEAR = words(
    "Identity Cast Dropout Conv BatchNormalization InstanceNormalization GroupNormalization "
    "LayerNormalization AveragePool GlobalAveragePool MaxPool Slice Pad Concat Reshape Transpose Squeeze "
    "Unsqueeze Flatten MatMul Gemm Add Sub Mul Div Resize Upsample Gather QuantizeLinear DequantizeLinear "
    "Expand Split Einsum SpaceToDepth DepthToSpace Neg"
)
_MAX_LINK = 64  # weight-free nodes shared by several branches between the skip and what a region reads
_MAX_EXPLAIN = 256
_MAX_TERMS = 64


@dataclass(frozen=True)
class NearMiss:
    """A sum that nearly was a residual branch."""

    where: str
    reason: str


@dataclass(frozen=True)
class Found:
    """A residual branch in terms of positions and values."""

    add: int
    skip: ir.Value
    body: ir.Value
    region: Region
    source: ir.Value
    shortcut: Shortcut
    joint: int | None = None


def operands_of(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """The two summed values of an Add, a two-operand Sum or a fused Add and normalization, or None."""
    plain = node.op_type in ("Add", "Sum") and node.domain in ("", "ai.onnx") and len(node.inputs) == 2
    fused = node.op_type in _FUSED and len(node.inputs) >= 2
    if not plain and not fused:
        return None
    first, second = node.inputs[0], node.inputs[1]
    return None if first is None or second is None or first is second else (first, second)


class Search:
    """Examines every sum of a graph once, in execution order."""

    def __init__(self, view: GraphView) -> None:
        self.view = view
        self.near_misses: list[NearMiss] = []
        self._sums: set[int] = set()  # residual sums found so far
        self._regions: dict[ir.Value, Region] = {}  # of the sum being examined

    def run(self) -> list[Found]:
        """Every branch, each once."""
        found: dict[tuple[int, ir.Value], Found] = {}
        for position, node in enumerate(self.view.nodes):
            operands = operands_of(node)
            if operands is None or not all(self.view.is_data(v) for v in operands):
                continue
            self._regions.clear()
            try:
                branches = self._examine(position, *operands)
            except OutOfSteps:
                reason = "what it sums is too entangled to examine in linear time"
                self.near_misses.append(NearMiss(node.name or "", reason))
                continue
            for branch in branches:
                found.setdefault((branch.add, branch.body), branch)
                self._sums.add(branch.add)
            if branches:
                self._sums.add(position)
        return list(found.values())

    def _examine(self, add: int, first: ir.Value, second: ir.Value) -> list[Found]:
        reasons: list[str] = []
        for skip, body in ((first, second), (second, first)):
            branches = self._identity(add, skip, body, reasons)
            if branches:
                return branches
        projection = self._projection(add, first, second, reasons)
        if projection is not None:
            return [projection]
        where = self.view.nodes[add].name or ""
        self.near_misses.extend(NearMiss(where, r) for r in reasons)
        return []

    def _region(self, value: ir.Value, add: int) -> Region:
        if value not in self._regions:
            self._regions[value] = self.view.region(value, add)
        return self._regions[value]

    # -- identity shortcuts ---------------------------------------------------------------------------

    def _identity(self, add: int, skip: ir.Value, body: ir.Value, reasons: list[str]) -> list[Found]:
        anchors = self._anchors(skip)
        if not self._forks(anchors):
            return []
        if not self.view.only_reader(body, add):
            self._explain(add, anchors, body, reasons)
            return []
        whole = self._fed(add, skip, body, anchors)
        if whole is None:
            if not self._linked(self._region(body, add), anchors)[0]:
                self._explain(add, anchors, body, reasons)
            return []
        if _shapes_differ(skip, self.view.nodes[add].outputs[0]):
            reasons.append(f"the skip '{skip.name}' has another shape than the sum")
            return []
        return self._terms(whole, anchors) or [whole]

    def _forks(self, anchors: Sequence[ir.Value]) -> bool:
        """Whether the body can read an anchor at all: it has two readers, or a fused sum gives it twice."""
        for value in anchors:
            if len(self.view.readers.get(value, ())) > 1:
                return True
            node = self.view.maker(value)
            if node is not None and node.op_type in _FUSED and value is not node.outputs[0]:
                return True
        return False

    def _fed(self, add: int, skip: ir.Value, body: ir.Value, anchors: Sequence[ir.Value]) -> Found | None:
        """The branch from the anchors to ``body``, if weights lie on the way."""
        region = self._region(body, add)
        linked, source = self._linked(region, anchors)
        if source is None or not self._weighs(region, linked):
            return None
        return Found(add, skip, body, region, source, "identity")

    def _anchors(self, skip: ir.Value) -> list[ir.Value]:
        """The skip and what it is a copy of, or the sum of: a body that reads those reads the skip's past."""
        anchors: dict[ir.Value, None] = {}
        pending = [skip]
        while pending and len(anchors) < _MAX_TERMS:
            value = pending.pop()
            anchors[value] = None
            node = self.view.maker(value)
            if node is None:
                continue
            if node.op_type in _COPIES:
                pending.extend(v for v in node.inputs[:1] if v is not None)
            elif node.op_type in _FUSED and value is not node.outputs[0]:
                anchors[node.outputs[0]] = None
            elif len(self.view.readers.get(value, ())) == 1 and node.op_type not in _FUSED:
                pending.extend(v for v in operands_of(node) or () if self.view.is_data(v))
        return list(anchors)

    def _linked(self, region: Region, anchors: Sequence[ir.Value]) -> tuple[set[ir.Value], ir.Value | None]:
        """What the region reads that comes from an anchor through weight-free nodes, and that anchor."""
        targets = set(anchors)
        floor = min(self.view.producer.get(v, -1) for v in anchors)
        linked: set[ir.Value] = set()
        source: ir.Value | None = None
        dead: set[ir.Value] = set()
        steps = 0
        for read in region.reads if region.members else ():
            pending, visited = [read], set()
            while pending and steps < _MAX_LINK:
                value = pending.pop()
                if value in targets:
                    linked.add(read)
                    source = source or value
                    break
                position = self.view.producer.get(value, -1)
                known = value in dead or value in visited or not self.view.is_data(value)
                if known or position < max(floor, 0) or position in self._sums:
                    continue
                visited.add(value)
                steps += 1
                if not self.view.is_weighted(position):
                    pending.extend(self.view.reads[position])
            else:
                dead |= visited
        return linked, source

    def _weighs(self, region: Region, linked: set[ir.Value]) -> bool:
        """Whether a weighted operator of the region computes on what is linked to the skip."""
        fed: set[ir.Value] = set(linked)
        for position in sorted(region.members):
            node = self.view.nodes[position]
            reads_fed = any(v in fed for v in self.view.reads[position])
            if not reads_fed or not any(self.view.flow[v] is Flow.DATA for v in node.outputs):
                continue
            if self.view.is_weighted(position):
                return True
            fed.update(node.outputs)
        return False

    # -- parallel branches ----------------------------------------------------------------------------

    def _terms(self, whole: Found, anchors: Sequence[ir.Value]) -> list[Found]:
        """Branches added to each other before the skip is; empty where the sum is inside one branch."""
        terms = list(self._summands(whole.body, whole.region))
        if len(terms) < 2:
            return []
        branches = []
        shared = set(whole.region.members)
        for term, add, other in terms:
            branch = self._fed(add, other, term, anchors)
            if branch is None:
                return []
            branches.append(replace(branch, joint=whole.add))
            shared -= branch.region.members
        if any(self.view.is_weighted(p) for p in shared):
            return []  # what they share is more than a norm: the sum belongs to the body
        return branches

    def _summands(self, body: ir.Value, region: Region) -> Iterator[tuple[ir.Value, int, ir.Value]]:
        pending: list[tuple[ir.Value, int, ir.Value]] = []
        found = 0
        self._unfold(body, region, pending)
        while pending and found < _MAX_TERMS:
            term = pending.pop(0)
            if not self._unfold(term[0], region, pending):
                found += 1
                yield term

    def _unfold(self, value: ir.Value, region: Region, to: list[tuple[ir.Value, int, ir.Value]]) -> bool:
        position = self.view.producer.get(value)
        if position is None or position not in region.members or position in self._sums:
            return False
        operands = operands_of(self.view.nodes[position])
        plain = operands is not None and self.view.nodes[position].op_type not in _FUSED
        if operands is None or not plain or not all(self.view.is_data(v) for v in operands):
            return False
        if not all(self.view.only_reader(v, position) for v in operands):
            return False
        first, second = operands
        to.extend(((first, position, second), (second, position, first)))
        return True

    # -- projection shortcuts -------------------------------------------------------------------------

    def _projection(self, add: int, first: ir.Value, second: ir.Value, reasons: list[str]) -> Found | None:
        view = self.view
        if not view.only_reader(first, add) or not view.only_reader(second, add):
            return None
        if first not in view.producer or second not in view.producer:
            return None
        regions = self._region(first, add), self._region(second, add)
        common = {v for v in regions[0].reads if view.is_data(v)} & set(regions[1].reads)
        if not common or not all(r.members for r in regions):
            return None
        candidates = []
        for (skip, path), (body, region) in (
            ((first, regions[0]), (second, regions[1])),
            ((second, regions[1]), (first, regions[0])),
        ):
            fork = self._fork(path, common)
            if fork is not None and self._is_body(region, path, fork):
                weights = self._weighted_count(region) - self._weighted_count(path)
                candidates.append((weights, Found(add, skip, body, region, fork, "projection")))
        if not candidates or (len(candidates) == 2 and candidates[0][0] == candidates[1][0]):
            return None
        best = max(candidates, key=lambda c: c[0])[1]
        if _shapes_differ(best.skip, view.nodes[add].outputs[0]):
            reasons.append(f"the shortcut '{best.skip.name}' has another shape than the sum")
            return None
        return best

    def _fork(self, path: Region, common: set[ir.Value]) -> ir.Value | None:
        """The one value a linear path starts from, or None where the path is no shortcut."""
        data = [v for v in path.reads if self.view.is_data(v)]
        if len(data) != 1 or data[0] not in common or self._weighted_count(path) > 1:
            return None
        return data[0] if self._is_linear(path) else None

    def _is_linear(self, region: Region) -> bool:
        for position in region.members:
            node = self.view.nodes[position]
            if not any(self.view.flow[v] is Flow.DATA for v in node.outputs):
                continue
            if node.op_type not in _LINEAR or sum(self.view.is_data(v) for v in node.inputs) > 1:
                return False
        return True

    def _is_body(self, region: Region, path: Region, fork: ir.Value) -> bool:
        """A body has weights on its way; beside a weighted shortcut also something that is not linear."""
        if not self._weighs(region, {fork}):
            return False
        return self._weighted_count(path) == 0 or not self._is_linear(region)

    def _weighted_count(self, region: Region) -> int:
        return sum(self.view.is_weighted(p) for p in region.members)

    # -- reasons --------------------------------------------------------------------------------------

    def _explain(self, add: int, anchors: Sequence[ir.Value], body: ir.Value, reasons: list[str]) -> None:
        """Say which value escapes, where the body does come from the skip through weights."""
        targets, view = set(anchors), self.view
        floor = min(view.producer.get(v, -1) for v in anchors)
        if _shapes_differ(anchors[0], view.nodes[add].outputs[0]):
            return
        pending, visited, weighted, reached = [body], set[int](), False, False
        while pending and len(visited) < _MAX_EXPLAIN:
            value = pending.pop()
            reached = reached or value in targets
            position = view.producer.get(value, -1)
            if value in targets or position <= floor or position in visited or position in self._sums:
                continue
            if view.is_data(value):
                visited.add(position)
                weighted = weighted or view.is_weighted(position)
                pending.extend(view.reads[position])
        if reached and weighted:
            reasons.append(self._escape(add, visited, body))

    def _escape(self, add: int, visited: set[int], body: ir.Value) -> str:
        view = self.view
        for position in sorted(visited, reverse=True):
            for value in view.nodes[position].outputs:
                if value in view.outputs:
                    return f"value '{value.name}' escapes the branch: it is an output of the model"
                for reader in view.readers.get(value, ()):
                    if reader not in visited and reader != add:
                        label = view.nodes[reader].name
                        return f"value '{value.name}' escapes the branch: '{label}' reads it too"
        return f"'{body.name}' does not depend on the skip through values of its own"


def _shapes_differ(skip: ir.Value, result: ir.Value) -> bool:
    """Whether the known parts of two shapes contradict each other (1 against a name is broadcasting)."""
    if skip.shape is None or result.shape is None:
        return False
    if len(skip.shape) != len(result.shape):
        return True
    for a, b in zip(skip.shape, result.shape, strict=True):
        both = isinstance(a, int) and isinstance(b, int)
        if both and a != b:
            return True
        if not both and isinstance(a, int) and a == 1 and not isinstance(b, int) and b.value is not None:
            return True
    return False
