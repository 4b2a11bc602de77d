"""Run two models on the same inputs and keep count of how far each output is apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.backends.backend import Executable
from lamina.comparison.verdict import OutputDifference
from lamina.data import Dataset
from lamina.errors import LaminaError
from lamina.ir.difference import Difference, difference, epsilon, is_discrete, tolerance_of, unit
from lamina.ir.probe_inputs import Probe

# The first model's own movement under rounded inputs, times this, excuses a difference on an edge input: deep
# networks round at every operator, the test rounds once.
_ROUNDING_FACTOR = 16


@dataclass(frozen=True)
class Trial:
    """One input of a comparison: a probe, and how many samples it stands for."""

    probe: Probe
    rows: int = 1


@dataclass(frozen=True)
class _Seen:
    trial: Trial
    found: Mapping[str, Difference]


@dataclass
class Tally:
    """What has been seen so far.

    Attributes:
        samples: Inputs compared.
        skipped: Inputs the first model does not run on.
        ill_conditioned: Edge inputs that say nothing.
        failures: Inputs only the second model fails on.
        errors: What the first model said about the inputs it does not run on.
        dtypes: Output name -> dtype the first model gives.
        seen: Every input compared with what was found.
    """

    samples: int = 0
    skipped: int = 0
    ill_conditioned: int = 0
    failures: list[str] = field(default_factory=list)
    errors: list[LaminaError] = field(default_factory=list)
    dtypes: dict[str, np.dtype[np.generic]] = field(default_factory=dict)
    seen: list[_Seen] = field(default_factory=list)

    def scale(self, name: str) -> float:
        """Largest magnitude of the first model's output on ordinary inputs."""
        ordinary = (s.found[name].scale for s in self.seen if s.trial.probe.kind == "ordinary")
        return max(ordinary, default=0.0)

    def relative(self, name: str, seen: _Seen) -> float:
        """Difference of one output on one input against its magnitude."""
        found, dtype = seen.found[name], self.dtypes[name]
        if found.max_abs == 0.0:
            return 0.0
        # The smallest normal number: a difference far below it is a matter of denormals.
        least = 1.0 if is_discrete(dtype) else float(unit(0.0, dtype)) / epsilon(dtype)
        return found.max_abs / max(found.scale, self.scale(name), least)

    def worst(self, name: str) -> _Seen | None:
        """The input on which an output differs most; None where it never does."""
        best = max(self.seen, key=lambda s: self.relative(name, s), default=None)
        return None if best is None or self.relative(name, best) == 0.0 else best


def trials(dataset: Dataset | None, generated: Iterable[Probe]) -> Iterator[Trial]:
    """Given data first, batch by batch, then generated inputs."""
    row = 0
    for batch in dataset.batches() if dataset is not None else ():
        said = f"given samples {row} to {row + len(batch) - 1}"
        yield Trial(Probe(said, batch.inputs, "ordinary"), len(batch))
        row += len(batch)
    yield from map(Trial, generated)


def run_both(
    first: Executable,
    second: Executable,
    names: Iterable[str],
    inputs: Iterable[Trial],
    tolerance: float | None,
    pool: Executor | None = None,
) -> Tally:
    """Run both models on every input and count; see :class:`Tally`. With ``pool``, side by side."""
    tally, wanted = Tally(), tuple(names)
    for trial in inputs:
        feeds = dict(trial.probe.feeds)
        known = {k: v for k, v in feeds.items() if k in second.input_names}
        beside = None if pool is None else pool.submit(second.run, known)
        try:
            before = first.run(feeds)
        except LaminaError as error:
            tally.skipped += trial.rows
            tally.errors.append(error)
            continue
        tally.dtypes.update({n: before[n].dtype for n in wanted})
        try:
            after = second.run(known) if beside is None else beside.result()
        except LaminaError as error:
            tally.failures.append(f"{trial.probe.label}: {error.what.splitlines()[0]}")
            continue
        edge = trial.probe.kind != "ordinary"
        found = {n: difference(before[n], after[n], finite_only=edge) for n in wanted}
        seen = _Seen(trial, found)
        if edge and _beyond(tally, seen, tolerance) and _is_chaotic(first, trial.probe, before, found):
            tally.ill_conditioned += trial.rows
            continue
        tally.samples += trial.rows
        tally.seen.append(seen)
    return tally


def summarize(tally: Tally, name: str, tolerance: float | None) -> OutputDifference:
    """One output over all inputs; where both ran on none, it is not equal."""
    rows, dtype = [s.found[name] for s in tally.seen], tally.dtypes[name]
    if not rows:
        rows = [Difference(float("inf"), float("inf"), 0.0, None, None, 0, "no input could be compared")]
    worst, scale = tally.worst(name), tally.scale(name)
    allowed = tolerance_of(dtype, tolerance)
    relative = (0.0 if tally.seen else float("inf")) if worst is None else tally.relative(name, worst)
    count = sum(r.count for r in rows)
    mean = sum(r.mean_abs * r.count for r in rows if r.count) / max(count, 1)
    ulps = [(r.max_ulp, r.mean_ulp, r.count) for r in rows if r.max_ulp is not None]
    floating = bool(ulps) and not is_discrete(dtype)
    reasons = [r.reason for r in rows if r.reason]
    return OutputDifference(
        name=name,
        equal=relative <= allowed,
        tolerance=allowed,
        max_abs=max((r.max_abs for r in rows), default=0.0),
        mean_abs=mean,
        max_rel=relative,
        mean_rel=mean / scale if scale else float(mean > 0),
        max_ulp=max(u for u, _, _ in ulps) if floating else None,
        mean_ulp=sum((m or 0.0) * c for _, m, c in ulps) / max(count, 1) if floating else None,
        scale_ulp=relative / epsilon(dtype) if floating else None,
        worst_input=None if worst is None else worst.trial.probe.label,
        reason=reasons[0] if reasons else None,
    )


def _beyond(tally: Tally, seen: _Seen, tolerance: float | None) -> bool:
    return any(
        tally.relative(name, seen) > tolerance_of(tally.dtypes[name], tolerance) for name in seen.found
    )


def _is_chaotic(
    first: Executable, probe: Probe, before: Mapping[str, np.ndarray], found: Mapping[str, Difference]
) -> bool:
    """Whether rounding its input moves the first model's own output about as far as the two are apart."""
    nudged = _nudged(probe)
    try:
        again = first.run(dict(nudged.feeds))
    except LaminaError:
        return False
    own = {n: difference(before[n], again[n], finite_only=True) for n in found}
    return all(own[n].max_abs * _ROUNDING_FACTOR >= found[n].max_abs for n in found if found[n].max_abs)


def _nudged(probe: Probe) -> Probe:
    """The probe with every float moved by two roundings, up or down."""
    rng = np.random.default_rng(0)
    feeds = {}
    for name, array in probe.feeds.items():
        if is_discrete(array.dtype) or array.dtype.kind == "c":
            feeds[name] = array
            continue
        wide = array.astype(np.float64)
        step = 2 * epsilon(array.dtype) * np.clip(np.abs(wide), 1.0, 1e30)
        signs = rng.choice([-1.0, 1.0], size=array.shape)
        feeds[name] = (wide + np.where(np.isfinite(wide), signs * step, 0.0)).astype(array.dtype)
    return replace(probe, feeds=feeds)
