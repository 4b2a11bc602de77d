"""One instrumented run over the calibration data feeds every statistic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from lamina.analysis.arena import share_arena
from lamina.analysis.attention import AttentionStatistics
from lamina.analysis.collector import OF_OPERATORS, Collector
from lamina.analysis.depths import DepthStatistics
from lamina.analysis.inputs import InputStatistics
from lamina.analysis.instrument import (
    InstrumentedSession,
    available_threads,
    feeds_of,
    fixed_batch,
    require_finite,
)
from lamina.analysis.matching import Match
from lamina.analysis.moments import Moments
from lamina.analysis.needs import DEFAULT_MASK, Looks, Need
from lamina.analysis.operators import WeightedOperator
from lamina.analysis.residual import BranchProbe, BranchStatistics
from lamina.analysis.sampling import BatchView
from lamina.analysis.streaming import RangeAccumulator, RangeStatistics
from lamina.analysis.views import Invariance
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program

__all__ = ["BranchProbe", "BranchStatistics", "RangeStatistics", "Statistics", "collect", "collect_phases"]


@dataclass(frozen=True)
class Statistics:
    """What the calibration run collected.

    Attributes:
        samples: Rows that were run.
        ranges: Value name -> its distribution.
        branches: Branch name -> what it does to its skip.
        skipped: Value, branch, depth or operator name -> why it has no statistics: not floating, nothing
            finite, a skip that is reshaped on its way.
        depths: The residual stream at each depth.
        views: Depth -> how well two halves of a sample's tokens find each other.
        attention: Branch name -> ranks of its attention maps.
        inputs: Operator name -> what it reads.
        operators: Operator name -> its weight and how it reads.
        examples: Branch name -> float32 ``[n]``: mean L2 of its sum's vectors, of each example kept.
        example_rows: int64 ``[n]``: which rows of the data those are.
        damages: Site -> measured damage of changing it; like ``skips`` and ``pairs`` not of :func:`collect`
            but put in with ``dataclasses.replace`` (:mod:`lamina.analysis.single_site` measures them).
        skips: Branch -> later depth -> effect of skipping the branch.
        pairs: ``"a | b"`` -> damage of changing both sites less that of each.
        matches: Branch -> moments of what enters it and what it adds; like ``damages`` put in
            (:func:`lamina.analysis.matching.collect_matches`).
        channels: Value -> second moments of its vectors (:func:`lamina.analysis.channels.collect_channels`).
        losses: float64 ``[rows]``: loss of each row of the data in low bits, or of another change.
    """

    samples: int
    ranges: Mapping[str, RangeStatistics] = field(default_factory=dict)
    branches: Mapping[str, BranchStatistics] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    depths: DepthStatistics = field(default_factory=DepthStatistics)
    attention: Mapping[str, AttentionStatistics] = field(default_factory=dict)
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    operators: Mapping[str, WeightedOperator] = field(default_factory=dict)
    examples: Mapping[str, np.ndarray] = field(default_factory=dict)
    example_rows: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    damages: Mapping[str, float] = field(default_factory=dict)
    skips: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    pairs: Mapping[str, float] = field(default_factory=dict)
    matches: Mapping[str, Match] = field(default_factory=dict)
    channels: Mapping[str, Moments] = field(default_factory=dict)
    losses: np.ndarray = field(default_factory=lambda: np.zeros(0))
    views: Mapping[str, Invariance] = field(default_factory=dict)


def collect(
    program: Program,
    dataset: Dataset,
    *,
    ranges: Collection[str] = (),
    branches: Sequence[BranchProbe] = (),
    needs: Collection[Need] = (Need.LENGTHS,),
    looks: Looks | None = None,
    mask: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run the data once through an instrumented clone and reduce what flows by.

    Reductions over vectors, and the selection of the tokens and samples that the costly statistics look at,
    are nodes of the clone: activations stay in the runtime, but for values whose ranges are asked for.
    Memory is bounded by model, statistics and one batch, however many samples there are. A model whose inputs
    have a constant batch size gets batches of that size; an incomplete last one is left out.

    Args:
        program: Left unchanged.
        dataset: Calibration samples, in the batches it prescribes.
        ranges: Names of floating values (activations, inputs, outputs) to take ranges of.
        branches: Residual branches to compare with their skips; they also say what the depths are.
        needs: What to collect of branches, depths and operators; the union over the metrics wanted
            (:func:`lamina.analysis.needs.union`).
        looks: How much of the data the costly statistics look at.
        mask: Input or extra ``[b, t]`` that is zero where a token is padding; ``attention_mask`` is found by
            itself. Padded tokens of values whose places are ``[b, t]`` are left out everywhere.
        threads: Threads to use; all available cores when None.
        progress: Called after each batch with rows done and rows in all.

    Raises:
        DataError: The data is empty or does not fit; an input or output of the model is NaN or infinite; a
            requested value does not exist or is a weight.
        BackendError: ONNX Runtime refuses the program.
    """
    batches = _batching(program, dataset)
    threads = threads or available_threads()
    mask = _mask_name(dataset, mask)
    look = looks or Looks()
    observed = frozenset(needs) if branches or OF_OPERATORS & set(needs) else frozenset()
    first = next(iter(batches.batches()))
    taken = Collector.of(program, first, branches, observed, look)
    range_sums = {name: RangeAccumulator() for name in dict.fromkeys(ranges)}
    outputs = [port.name for port in program.outputs]
    wanted = _wanted(program, range_sums)
    tapped = program if taken is None else taken.program
    session = InstrumentedSession(
        tapped, wanted, threads=threads, configure=_session_options, own=taken is not None
    )
    always = list(dict.fromkeys([*wanted, *outputs, *(() if taken is None else taken.outputs)]))
    done, run, total, count = 0, 0, len(batches), _count(program, batches)
    # images are looked at in some batches only; what nobody needs is not run
    idle = taken is not None and not range_sums and not taken.outputs
    with ThreadPoolExecutor(threads) as pool:
        for number, batch in enumerate(batches.batches()):
            if number == count:
                break
            where = f"batch {number} (rows {done} to {done + len(batch) - 1})"
            view = BatchView(len(batch), done, number, count, _mask_of(batch, mask), look)
            if idle and not view.looked:
                done += len(batch)
                continue
            feeds = feeds_of(program, batch, where)
            index = {} if taken is None else view.feeds(taken.index_inputs)
            names = always if taken is None or not view.looked else [*always, *taken.looks]
            values = dict(zip(names, session.run(names, {**feeds, **index}, where=where), strict=True))
            for name in outputs:
                require_finite(f"output '{name}'", values[name], where)
            values.update({k: v for k, v in feeds.items() if k not in values})
            _reduce(pool, values, view.mask, range_sums)
            if taken is not None:
                taken.add(values, view)
            del values, feeds
            done, run = done + len(batch), run + len(batch)
            if progress is not None:
                progress(done, total)
    found = Statistics(run) if taken is None else Statistics(run, **taken.results())
    skipped = {n: t.problem or "no finite element" for n, t in range_sums.items() if not t.count}
    seen = {name: total.result() for name, total in range_sums.items() if total.count}
    return replace(found, ranges=seen, skipped={**skipped, **found.skipped})


def collect_phases(program: Program, phases: Mapping[str, Dataset], **options: Any) -> dict[str, Statistics]:
    """Statistics of several data sets (prefill, decode), kept apart.

    Args:
        program: Left unchanged.
        phases: Phase name -> its samples.
        options: Those of :func:`collect`.

    Raises:
        DataError: As :func:`collect`.
        BackendError: As :func:`collect`.
    """
    return {name: collect(program, dataset, **options) for name, dataset in phases.items()}


def _reduce(
    pool: ThreadPoolExecutor,
    values: dict[str, np.ndarray],
    mask: np.ndarray | None,
    range_sums: Mapping[str, RangeAccumulator],
) -> None:
    def take_range(name: str) -> None:
        array = values[name]
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            range_sums[name].problem = f"{getattr(array, 'dtype', 'a sequence')}, not floating"
        else:
            range_sums[name].add(_without_padding(array, mask))

    # Each accumulator is one task and sees its batches in order: results do not depend on the thread count.
    list(pool.map(take_range, range_sums))


def _session_options(options: Any) -> None:
    share_arena(options)
    # Threads that spin for work would keep the cores from the reductions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")


def _count(program: Program, batches: Dataset) -> int:
    """Batches that will be run."""
    size = max(1, batches.batch_size // batches.group) * batches.group
    return len(batches) // size if fixed_batch(program) else -(-len(batches) // size)


def _wanted(program: Program, ranges: Collection[str]) -> list[str]:
    """Values the session must return: all that is asked for except what is fed."""
    fed = {port.name for port in program.inputs}
    for name in ranges:
        if name in program.graph.initializers:
            raise DataError(f"'{name}' is a weight, not an activation", where=program.source)
    return [name for name in dict.fromkeys(ranges) if name not in fed]


def _batching(program: Program, dataset: Dataset) -> Dataset:
    """The dataset in batches the program can take."""
    if not len(dataset):
        raise DataError("the calibration data is empty", advice="give at least one sample")
    size = fixed_batch(program)
    if size is None:
        return dataset
    if len(dataset) < size:
        raise DataError(
            f"the model takes batches of exactly {size}, the data has {len(dataset)} samples",
            where=program.source,
            advice=f"give at least {size} samples",
        )
    return replace(dataset, batch_size=size)


def _mask_name(dataset: Dataset, name: str | None) -> str | None:
    if name is None:
        found = dataset.inputs.get(DEFAULT_MASK, dataset.extras.get(DEFAULT_MASK))
        return DEFAULT_MASK if found is not None and np.ndim(found) == 2 else None
    if name not in dataset.inputs and name not in dataset.extras:
        raise DataError(
            f"the data has no mask '{name}'", advice="name an input or extra array of shape [n, t]"
        )
    return name


def _mask_of(batch: Dataset, name: str | None) -> np.ndarray | None:
    if name is None:
        return None
    array = batch.inputs[name] if name in batch.inputs else batch.extras[name]
    return np.asarray(array) != 0


def _without_padding(array: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    if mask is None or array.ndim != 3 or array.shape[:2] != mask.shape or mask.all():
        return array
    return array[mask]
