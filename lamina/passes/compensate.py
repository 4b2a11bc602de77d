"""Closed-form compensation: fit the operators behind a change so that the program does what it did before.

Runs after any plan. Operators are visited in execution order; each is fitted on what it reads in the program
as changed *and repaired so far* and on what the original had in its place (two streams).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from lamina.analysis.instrument import feeds_of, fixed_batch
from lamina.analysis.matching import in_batches, is_held, places_of
from lamina.analysis.moments import RIDGES, Correction, Moments, ridge_correction
from lamina.analysis.needs import DEFAULT_MASK
from lamina.analysis.operators import constant, evenly, patches
from lamina.analysis.stream import Stream
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.shapes import observed_shapes
from lamina.passes.pass_ import Refusal
from lamina.passes.repair import BEHIND, Repair, apply_repairs, packed
from lamina.passes.repair_sites import NAME, RepairSite, repair_sites
from lamina.quality import Metric, get_metric

ROLES = ("norm", "writer", "reader")
# Squared error that is rounding: nothing to repair.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Compensation:
    """How to compensate.

    Attributes:
        roles: Which operators: ``norm`` (gain and shift of normalizations), ``writer`` (operators whose
            output ends in a residual sum), ``reader`` (the other linear operators).
        weights: Whether matrices, kernels and gains are fitted too, or biases alone (mean-to-bias).
        add_biases: Whether operators without a bias get one, which costs bytes and perhaps time.
        rows: Calibration rows looked at.
        tokens: Input vectors or windows of each operator, over all rows.
        ridges: Penalties to choose from, relative to the mean variance of what an operator reads.
        shares: How much of a correction is made, to choose from (qep's alpha).
        leads: Shares of the weight that a sequence's first token gets, to choose from; None: as every other.
            Of a class token alone the output may be made.
    """

    roles: tuple[str, ...] = ROLES
    weights: bool = True
    add_biases: bool = False
    rows: int = 256
    tokens: int = 8192
    ridges: tuple[float, ...] = RIDGES
    shares: tuple[float, ...] = (1.0, 0.5)
    leads: tuple[float | None, ...] = (None, 0.5)

    def __post_init__(self) -> None:
        unknown = [role for role in self.roles if role not in ROLES]
        if unknown or not self.roles:
            what = f"no operator has the role '{unknown[0]}'" if unknown else "no role is given"
            raise PassError(what, advice=f"choose from {', '.join(ROLES)}")
        if self.rows < 2 or self.tokens < 2 or any(r <= 0 for r in self.ridges):
            raise PassError("rows and tokens must be at least 2, ridges positive", where=NAME)


@dataclass(frozen=True)
class Fitted:
    """One operator that was fitted anew.

    Attributes:
        site: Which.
        before: Mean squared error against the original per token, held-out calibration data.
        after: With the correction fitted on the other calibration data.
        ridge: Penalty chosen; inf: only the bias changed.
    """

    site: RepairSite
    before: float
    after: float
    ridge: float


@dataclass(frozen=True)
class Compensated:
    """A repaired program and how it came about."""

    program: Program
    repairs: tuple[Repair, ...]
    fitted: tuple[Fitted, ...]
    refusals: tuple[Refusal, ...]


def compensate(
    original: Program,
    changed: Program,
    dataset: Dataset,
    *,
    stands_for: Mapping[str, str] | None = None,
    how: Compensation | None = None,
    divergence: Metric | None = None,
    threads: int | None = None,
    seconds: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> Compensated:
    """Refit what follows a change so that its outputs match the original's on calibration data.

    Mean-to-bias: the mean of what is missing goes into the operator's bias. Least squares: its weight is
    fitted by ridge regression, pulled towards the one it has. Held-out calibration batches choose the ridge,
    and whether the outputs come nearer to the original's: what does not help them is left alone. Names,
    shapes and dtypes stay; without ``add_biases`` so do bytes and time.

    Args:
        original: What the change was made to.
        changed: The program after it, with the same inputs; left unchanged.
        dataset: Calibration samples; neither selection nor report data.
        stands_for: As for :func:`lamina.passes.repair_sites.repair_sites`.
        how: Options.
        divergence: Says how far outputs are from the original's; chosen by the outputs when None.
        threads: Threads of a run; all available cores when None.
        seconds: Time after which no further operator is visited; what was repaired by then stays.
        progress: Called with operators done and operators in all.

    Raises:
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses a program.
    """
    how = how or Compensation()
    data = in_batches(changed, dataset, how.rows)
    first = next(data.batches())
    shapes, before = (observed_shapes(p, feeds_of(p, first)) for p in (changed, original))
    found = list(repair_sites(original, changed, shapes, before, stands_for))
    sites = [s for s in found if isinstance(s, RepairSite) and _usable(s, how)]
    repairs: list[Repair] = []
    fitted: list[Fitted] = []
    done, current = 0, changed
    batches = [b for b in data.batches() if fixed_batch(changed) in (None, len(b))]
    feeds = [feeds_of(changed, b, f"batch {i}") for i, b in enumerate(batches)]
    streams = Stream(feeds, threads=threads), Stream(feeds, threads=threads)
    entries = {n.name: [v.name or "" for v in n.inputs if v is not None] for n in changed.graph}
    trial = _Trial(original, batches, streams, divergence or get_metric(None, original))
    trial.better(changed)
    start = time.perf_counter()
    for wave in _waves(changed, sites):
        if time.perf_counter() - start > seconds:
            break
        names = [s.target for s in wave]
        targets = streams[0].run(original, names, names)
        values = dict.fromkeys(v for s in wave for v in (s.read, s.value))
        settled = [name for s in wave for name in entries[s.node]]
        pairs = zip(batches, targets, streams[1].run(current, values, settled), strict=True)
        sums = _moments(wave, pairs, how)
        best: list[tuple[RepairSite, Correction]] = []
        for lead, share in product(how.leads, how.shares):
            made = [(s, c.times(share)) for s, c in _corrections(wave, sums, lead, how)]
            fresh = [r for s, c in made for r in _repairs(s, c, current)]
            repaired = apply_repairs(current, fresh)
            if fresh and trial.better(repaired):
                best, chosen, accepted = made, repaired, fresh
        if best:
            current = chosen
            repairs += accepted
            fitted += [Fitted(s, c.before, c.after, c.ridge) for s, c in best]
        done += len(wave)
        if progress is not None:
            progress(done, len(sites))
    refusals = tuple(r for r in found if isinstance(r, Refusal))
    return Compensated(current, tuple(repairs), tuple(fitted), refusals)


def _usable(site: RepairSite, how: Compensation) -> bool:
    shifts = site.bias is not None or (how.add_biases and site.addable)
    return site.role in how.roles and (how.weights or shifts)


def _waves(program: Program, sites: Sequence[RepairSite]) -> Iterator[list[RepairSite]]:
    """Sites in execution order, in runs of which none lies behind another."""
    place = {s.node: i for i, s in enumerate(sites)}
    behind: dict[ir.Value, int] = {}
    ends: dict[str, int] = {}
    for node in program.graph:
        seen = 0
        for value in node.inputs:
            seen |= behind.get(value, 0) if value is not None else 0
        if (index := place.get(node.name or "")) is not None:
            seen |= 1 << index
        for value in node.outputs:
            behind[value] = seen
            ends[value.name or ""] = seen
    wave: list[RepairSite] = []
    held = 0
    for site in sites:
        own = 1 << place[site.node]
        # trap: two writers of one sum would both make up for all that is missing
        if (ends.get(site.read, 0) | ends.get(site.value, 0)) & held & ~own:
            yield wave
            wave, held = [], 0
        wave.append(site)
        held |= own
    if wave:
        yield wave


Values = Mapping[str, np.ndarray]


class _Trial:
    """Says whether a repair brings the outputs nearer to the original's, on held-out batches."""

    def __init__(
        self, original: Program, batches: Sequence[Dataset], streams: tuple[Stream, Stream], metric: Metric
    ) -> None:
        self._metric, self._stream, self._batches = metric, streams[1], batches
        self._numbers = [i for i in range(len(batches)) if is_held(i)]
        self._outputs = [port.name for port in original.outputs]
        self._reference = list(streams[0].finish(original, self._outputs, self._numbers))
        self._best = float("inf")

    def score(self, program: Program) -> float:
        """Divergence of the program's outputs, run from where the stream is."""
        runs = self._stream.finish(program, self._outputs, self._numbers)
        features = [
            self._metric.features(outputs, self._batches[number], reference)
            for number, outputs, reference in zip(self._numbers, runs, self._reference, strict=True)
        ]
        return self._metric.score(np.concatenate(features))

    def better(self, program: Program) -> bool:
        """Whether it diverges less than everything before."""
        found = self.score(program)
        if not found < self._best:
            return False
        self._best = found
        return True


# Site -> moments of (fitted, held-out) tokens, of (first, other) tokens of a sequence each.
Sums = dict[str, tuple[tuple[Moments, Moments], tuple[Moments, Moments]]]


def _moments(
    wave: Sequence[RepairSite], batches: Iterable[tuple[Dataset, Values, Values]], how: Compensation
) -> Sums:
    """Moments of sites that do not depend on each other, from one pass over the data.

    ``batches``: each with the original's values and the changed program's.
    """
    sums: Sums = {}
    for number, (batch, targets, values) in enumerate(batches):
        mask = batch.inputs.get(DEFAULT_MASK, batch.extras.get(DEFAULT_MASK))
        count = max(2, how.tokens * len(batch) // how.rows)
        for site in wave:
            missing = targets[site.target].astype(np.float64) - values[site.value]
            x, y, first = _tokens(site, values[site.read], missing, mask, count, how.weights)
            if site.node not in sums:
                shape, diagonal = (x.shape[1], y.shape[1]), site.role == "norm"
                a, b, c, d = (Moments.empty(*shape, diagonal=diagonal) for _ in range(4))
                sums[site.node] = (a, b), (c, d)
            part = sums[site.node][is_held(number)]
            part[0].add(x[first], y[first])
            part[1].add(x[~first], y[~first])
    return sums


def _corrections(
    wave: Sequence[RepairSite], sums: Sums, lead: float | None, how: Compensation
) -> list[tuple[RepairSite, Correction]]:
    """The best correction of each site that has one; ``lead``: weight of first tokens."""
    made = []
    for site in wave:
        parts = []
        for first, others in sums[site.node]:
            if lead is None:
                parts.append(first + others)
            elif first.count and others.count:
                total = first.count + others.count
                parts.append(first.weighed(lead * total) + others.weighed((1 - lead) * total))
        if len(parts) < 2 or float(parts[1].yy.sum()) <= _ROUNDING * parts[1].count:
            continue
        offset = site.bias is not None or (how.add_biases and site.addable)
        fits = parts[0].x.size > 0 and how.weights
        found = ridge_correction(parts[0], parts[1], offset=offset, matrix=fits, ridges=how.ridges)
        if found is not None:
            made.append((site, found))
    return made


def _tokens(
    site: RepairSite,
    read: np.ndarray,
    missing: np.ndarray,
    mask: np.ndarray | None,
    count: int,
    weights: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``[n, in]``, ``[n, out]``, and which are a sequence's first: evenly spaced tokens, no padding.

    At most ``count``, and the first tokens. Where only biases are fitted, and for grouped convolutions,
    ``in`` is 0.
    """
    if site.operator is not None and site.operator.kind == "conv":
        y = np.moveaxis(missing, 1, -1).reshape(-1, missing.shape[1])
        y = y[evenly(count, len(y))]
        if not weights or site.operator.group > 1:
            return np.zeros((len(y), 0)), y, np.zeros(len(y), bool)
        x = patches(read, site.operator, count)
        return x.reshape(len(x), -1), y, np.zeros(len(y), bool)
    x, y = read.reshape(-1, read.shape[-1]), missing.reshape(-1, missing.shape[-1])
    length = missing.shape[-2] if missing.ndim > 2 else 0
    places = places_of(missing.shape, mask, len(y), len(y))
    first = places[places % length == 0] if length > 1 else places[:0]
    places = np.union1d(first, places[evenly(count, len(places))])
    leads = np.isin(places, first)
    if not weights:
        return np.zeros((len(places), len(y[0]) if site.role == "norm" else 0)), y[places], leads
    return x[places], y[places], leads


def _repairs(site: RepairSite, found: Correction, program: Program) -> Iterator[Repair]:
    """The site's weight and bias with the correction added, in the dtypes they are stored in."""
    nodes = {n.name: n for n in program.graph}
    node = nodes[site.node]
    weight = constant(node.inputs[site.weight])
    if weight is None:
        raise PassError(f"the weight of '{site.node}' is gone", advice="this is a bug in compensate")
    matrix = found.matrix
    if np.any(matrix):
        if site.operator is None:
            old = weight.astype(np.float64)
            # the gain scales what the norm made; the correction, what gain and shift made of it
            yield Repair(site.node, site.weight, packed(((1 + matrix) * old).astype(weight.dtype)))
        else:
            change = matrix.T if site.operator.flipped else matrix
            fresh = weight.astype(np.float64) + change.reshape(weight.shape)
            yield Repair(site.node, site.weight, packed(fresh.astype(weight.dtype)))
    if not np.any(found.offset) and (site.operator is not None or not np.any(matrix)):
        return
    if site.bias is None:
        operand = BEHIND if node.op_type == "MatMul" else 2
        yield Repair(site.node, operand, packed(found.offset.astype(weight.dtype)))
        return
    bias = constant(nodes[site.bias[0]].inputs[site.bias[1]])
    if bias is None:
        raise PassError(f"the bias of '{site.node}' is gone", advice="this is a bug in compensate")
    scaled = bias.astype(np.float64)
    if site.operator is None:
        scaled = scaled * (1 + matrix)
    fresh = scaled + found.offset.reshape(bias.shape)
    yield Repair(*site.bias, packed(fresh.astype(bias.dtype)))
