"""One instrumented run over the calibration data feeds every statistic."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.analysis.instrument import (
    InstrumentedSession,
    available_threads,
    feeds_of,
    fixed_batch,
    require_finite,
)
from lamina.analysis.residual import BranchAccumulator, BranchProbe, BranchStatistics
from lamina.analysis.streaming import RangeAccumulator, RangeStatistics
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program

__all__ = ["BranchProbe", "BranchStatistics", "RangeStatistics", "Statistics", "collect"]

DEFAULT_MASK = "attention_mask"


@dataclass(frozen=True)
class Statistics:
    """What the calibration run collected.

    Attributes:
        samples: Rows that were run.
        ranges: Value name -> its distribution.
        branches: Branch name -> what it does to its skip.
        skipped: Value or branch name -> why it has no statistics: not floating, nothing finite, a skip that
            is reshaped on its way.
    """

    samples: int
    ranges: Mapping[str, RangeStatistics] = field(default_factory=dict)
    branches: Mapping[str, BranchStatistics] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


def collect(
    program: Program,
    dataset: Dataset,
    *,
    ranges: Collection[str] = (),
    branches: Sequence[BranchProbe] = (),
    mask: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Statistics:
    """Run the data once through an instrumented clone and reduce what flows by.

    Memory is bounded by model, statistics and the values of one batch, however many samples there are. A
    model whose inputs have a constant batch size gets batches of that size; an incomplete last one is left
    out.

    Args:
        program: Left unchanged.
        dataset: Calibration samples, in the batches it prescribes.
        ranges: Names of floating values (activations, inputs, outputs) to take ranges of.
        branches: Residual branches to compare with their skips.
        mask: Input or extra ``[b, t]`` that is zero where a token is padding; ``attention_mask`` is found by
            itself. Padded tokens of ``[b, t, ...]`` branch values and ``[b, t, d]`` range values are left
            out.
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
    range_sums = {name: RangeAccumulator() for name in dict.fromkeys(ranges)}
    branch_sums = [BranchAccumulator(probe) for probe in branches]
    outputs = [port.name for port in program.outputs]
    wanted = _wanted(program, range_sums, branches)
    session = InstrumentedSession(program, wanted, threads=threads)
    names = list(dict.fromkeys([*wanted, *outputs]))
    done, total = 0, len(batches)
    with ThreadPoolExecutor(threads) as pool:
        for number, batch in enumerate(batches.batches()):
            if len(batch) < batches.batch_size and fixed_batch(program):
                break
            where = f"batch {number} (rows {done} to {done + len(batch) - 1})"
            feeds = feeds_of(program, batch, where)
            values = dict(zip(names, session.run(names, feeds, where=where), strict=True))
            for name in outputs:
                require_finite(f"output '{name}'", values[name], where)
            values.update({k: v for k, v in feeds.items() if k not in values})
            _reduce(pool, values, _mask_of(batch, mask), range_sums, branch_sums)
            del values, feeds
            done += len(batch)
            if progress is not None:
                progress(done, total)
    return _statistics(done, range_sums, branch_sums)


def _reduce(
    pool: ThreadPoolExecutor,
    values: dict[str, np.ndarray],
    mask: np.ndarray | None,
    range_sums: Mapping[str, RangeAccumulator],
    branch_sums: Sequence[BranchAccumulator],
) -> None:
    def take_range(name: str) -> None:
        array = values[name]
        if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
            range_sums[name].problem = f"{getattr(array, 'dtype', 'a sequence')}, not floating"
        else:
            range_sums[name].add(_without_padding(array, mask))

    def take_branch(total: BranchAccumulator) -> None:
        probe = total.probe
        body = None if probe.body is None else values[probe.body]
        total.add(values[probe.skip], body, values[probe.output], mask)

    # Each accumulator is one task and sees its batches in order: results do not depend on the thread count.
    list(pool.map(take_range, range_sums))
    list(pool.map(take_branch, branch_sums))


def _statistics(
    samples: int, range_sums: Mapping[str, RangeAccumulator], branch_sums: Sequence[BranchAccumulator]
) -> Statistics:
    skipped = {n: t.problem or "no finite element" for n, t in range_sums.items() if not t.count}
    usable = [b for b in branch_sums if not b.problem and b.tokens]
    skipped |= {b.probe.name: b.problem or "no token is left" for b in branch_sums if b not in usable}
    return Statistics(
        samples,
        {name: total.result() for name, total in range_sums.items() if total.count},
        {b.probe.name: b.result() for b in usable},
        skipped,
    )


def _wanted(program: Program, ranges: Collection[str], branches: Sequence[BranchProbe]) -> list[str]:
    """Values the session must return: all that is asked for except what is fed."""
    fed = {port.name for port in program.inputs}
    names = [*ranges, *(n for b in branches for n in (b.skip, b.body, b.output) if n)]
    for name in names:
        if name in program.graph.initializers:
            raise DataError(f"'{name}' is a weight, not an activation", where=program.source)
    return [name for name in dict.fromkeys(names) if name not in fed]


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
