"""What changing one site does to the outputs: every change by itself, each run only from where it begins.

The original runs once a batch and hands out its values where the changes begin; of each changed program only
the nodes that the change reaches are run. For the L branches of a model that is half of L runs instead of L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lamina.analysis.arena import share_arena
from lamina.analysis.depths import depths_of
from lamina.analysis.instrument import InstrumentedSession, feeds_of, fixed_batch
from lamina.analysis.residual import BranchProbe
from lamina.analysis.suffix import Suffix, cut
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.fingerprint import value_digests
from lamina.ir.program import Program
from lamina.quality.metric import Metric

Outputs = Mapping[str, np.ndarray]
# Sessions of changed programs that live at a time hold at most so many bytes of weights, or twice the model.
LEAST_BYTES = 1 << 28


@dataclass(frozen=True)
class Damage:
    """How far one changed program's outputs are from the original's.

    Attributes:
        mean: The metric over all samples (for ``kl``: mean over positions, nats).
        tail: Its 95 % quantile over samples.
        samples: float64 ``[n]``: the metric of each sample.
    """

    mean: float
    tail: float
    samples: np.ndarray


class SingleSite:
    """Runs changed versions of a program on a data set, reusing what the change does not reach.

    Args:
        program: The original.
        variants: Name -> the changed program, with the original's interface.
        observe: Values of the original, by name, to compare beside the outputs; a changed program that lacks
            one is compared without it.
        stand_ins: Variant -> value of the original -> the changed program's value to compare with it.
        threads: Threads of a run.
        most_bytes: Weights that sessions of changed programs may hold at a time; None: twice the model's, at
            least 256 MB. Where they do not all fit, the data is run once for each part of them.
    """

    def __init__(
        self,
        program: Program,
        variants: Mapping[str, Program],
        *,
        observe: Sequence[str] = (),
        stand_ins: Mapping[str, Mapping[str, str]] | None = None,
        threads: int | None = None,
        most_bytes: int | None = None,
    ) -> None:
        self._program, self._threads = program, threads
        self.wanted = list(dict.fromkeys([*(p.name for p in program.outputs), *observe]))
        digests = value_digests([program.model, *(v.model for v in variants.values())])
        weights = set(program.graph.initializers.values())
        known = {d: v.name or "" for v, d in digests[0].items() if v not in weights and v.name}
        named = stand_ins or {}
        labels = {v: {n: named.get(v, {}).get(n, n) for n in self.wanted} for v in variants}
        self._suffixes: dict[str, Suffix] = {
            name: cut(variant, digest, known, labels[name])
            for (name, variant), digest in zip(variants.items(), digests[1:], strict=True)
        }
        size = sum(v.const_value.nbytes for v in weights if v.const_value is not None)
        self._parts = _parts(self._suffixes, most_bytes or max(LEAST_BYTES, 2 * size))

    def run(self, dataset: Dataset) -> Iterator[tuple[int, Dataset, Outputs, Iterator[tuple[str, Outputs]]]]:
        """Batch by batch: its number, the batch, the original's outputs, and each variant's, made on demand.

        One variant's outputs are alive at a time. With several parts (see ``most_bytes``) each batch comes
        once a part.

        Raises:
            DataError: The data does not fit the program.
            BackendError: ONNX Runtime refuses a program.
        """
        for names in self._parts:
            suffixes = {name: self._suffixes[name] for name in names}
            needed = dict.fromkeys(self.wanted)
            fed = {port.name for port in self._program.inputs}
            for suffix in suffixes.values():
                needed |= dict.fromkeys([*suffix.reads.values(), *suffix.keeps.values()])
            fetched = [name for name in needed if name not in fed]
            options: dict[str, Any] = {"threads": self._threads, "configure": share_arena}
            base = InstrumentedSession(self._program, fetched, **options)
            sessions = {
                name: InstrumentedSession(s.open(), own=True, **options)
                for name, s in suffixes.items()
                if s.makes
            }
            for number, batch in enumerate(_full_batches(self._program, dataset)):
                where = f"batch {number}"
                feeds = feeds_of(self._program, batch, where)
                values = dict(zip(fetched, base.run(fetched, feeds, where=where), strict=True)) | feeds
                original = {name: values[name] for name in self.wanted}
                for name in (n for n in self.wanted if n not in fed):
                    # so that a metric may keep what it makes of them from one variant to the next
                    values[name].flags.writeable = False
                yield number, batch, original, _changed(suffixes, sessions, values, where)
            del base, sessions


def damages(
    program: Program,
    variants: Mapping[str, Program],
    dataset: Dataset,
    metric: Metric,
    *,
    threads: int | None = None,
    most_bytes: int | None = None,
) -> dict[str, Damage]:
    """Output divergence of each changed program (``output-kl`` with the metric ``kl``).

    Kept of each sample are the metric's features, a few numbers.

    Args:
        program: The original.
        variants: Name -> changed program.
        dataset: Samples.
        metric: A divergence (:func:`lamina.quality.choose.get_metric` with None chooses one).
        threads: Threads of a run.
        most_bytes: As for :class:`SingleSite`.

    Returns:
        Variant -> damage; higher = more harm.

    Raises:
        DataError: The data does not fit; the metric compares with nothing.
        BackendError: ONNX Runtime refuses a program.
    """
    if metric.kind != "divergence":
        raise DataError(
            f"metric '{metric.name}' scores one model by itself",
            advice="give a divergence: kl, cosine or relative-l2",
        )
    features: dict[str, list[np.ndarray]] = {name: [] for name in variants}
    runs = SingleSite(program, variants, threads=threads, most_bytes=most_bytes)
    for _, batch, original, changed in runs.run(dataset):
        for name, outputs in changed:
            features[name].append(metric.features(outputs, batch, original))
    return {name: _damage(metric, np.concatenate(parts)) for name, parts in features.items()}


def skip_effect(
    program: Program,
    variants: Mapping[str, Program],
    dataset: Dataset,
    probes: Sequence[BranchProbe],
    *,
    threads: int | None = None,
) -> dict[str, dict[str, float]]:
    """Effect of skipping each branch on every later depth: ``E_t L2(x'_m - x_m) / L2(x_m)``.

    x_m ``[tokens, width]`` before, x'_m after the change; tokens whose x_m is zero are left out. Range 0
    upwards; higher = more important. Csordas et al. 2025, arXiv:2505.13898 (norm ratio derived).

    Args:
        program: The original.
        variants: Branch -> program without it.
        dataset: Samples.
        probes: The branches in order; they say what the depths are. Vectors lie on axis 1 of rank 4, else
            the last.
        threads: Threads of a run.

    Returns:
        Variant -> depth it reaches -> effect.
    """
    labels = {depth.value: depth.name for depth in depths_of(probes)}
    # behind a skipped branch its skip stands where its sum was
    skips = {p.name: {p.output: p.skip} for p in probes if p.output in labels}
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in variants}
    runs = SingleSite(program, variants, observe=tuple(labels), stand_ins=skips, threads=threads)
    for _, _, original, changed in runs.run(dataset):
        for name, outputs in changed:
            for value, depth in labels.items():
                if value in outputs and outputs[value] is not original[value]:
                    total = sums[name].setdefault(depth, [0.0, 0.0])
                    ratio, count = _relative_change(original[value], outputs[value])
                    total[0], total[1] = total[0] + ratio, total[1] + count
    return {
        name: {depth: total / max(count, 1.0) for depth, (total, count) in found.items()}
        for name, found in sums.items()
    }


def interactions(
    program: Program,
    change: Callable[[Sequence[str]], Program],
    singles: Mapping[str, float],
    pairs: Sequence[tuple[str, str]],
    dataset: Dataset,
    metric: Metric,
    *,
    threads: int | None = None,
) -> dict[tuple[str, str], float]:
    """The pairwise term ``loss(l and m) - loss(l) - loss(m)`` of hessian-interlayer.

    0: damages add up. Above: changing both is worse than the sum says. Any sign; higher = more sensitive.
    Augmenting Hessians with inter-layer dependencies, arXiv:2306.04879 (term derived).

    Args:
        program: The original.
        change: Makes the program with the named sites changed.
        singles: Site -> mean damage alone (:func:`damages`).
        pairs: The pairs to look at (:func:`suspicious_pairs`).
        dataset: Samples.
        metric: The divergence that ``singles`` were measured with.
        threads: Threads of a run.
    """
    variants = {f"{a} | {b}": change([a, b]) for a, b in pairs}
    both = damages(program, variants, dataset, metric, threads=threads)
    return {(a, b): both[f"{a} | {b}"].mean - singles[a] - singles[b] for a, b in pairs}


def suspicious_pairs(singles: Mapping[str, float], count: int) -> list[tuple[str, str]]:
    """The pairs most likely to interact: neighbours first by the product of their damages, then any two.

    Sites stand in the program's order; a change disturbs its neighbour's input most, and damages that are
    nothing have nothing to multiply.
    """
    names = list(singles)
    pairs = [(i, j) for i in range(len(names)) for j in range(i + 1, len(names))]

    def suspicion(pair: tuple[int, int]) -> float:
        first, second = (max(0.0, singles[names[i]]) for i in pair)
        return float(np.sqrt(first * second)) / (pair[1] - pair[0])

    pairs.sort(key=suspicion, reverse=True)
    return [(names[i], names[j]) for i, j in pairs[:count]]


def _changed(
    suffixes: Mapping[str, Suffix],
    sessions: Mapping[str, InstrumentedSession],
    values: Mapping[str, np.ndarray],
    where: str,
) -> Iterator[tuple[str, Outputs]]:
    for name, suffix in suffixes.items():
        outputs = {label: values[value] for label, value in suffix.keeps.items()}
        if suffix.makes:
            feeds = {label: values[value] for label, value in suffix.reads.items()}
            made = sessions[name].run(list(suffix.makes.values()), feeds, where=f"{where}, '{name}' changed")
            outputs |= dict(zip(suffix.makes, made, strict=True))
        yield name, outputs


def _parts(suffixes: Mapping[str, Suffix], most: int) -> list[list[str]]:
    parts: list[list[str]] = []
    held = 0
    for name, suffix in suffixes.items():
        if not parts or held + suffix.weight_bytes > most:
            parts.append([])
            held = 0
        parts[-1].append(name)
        held += suffix.weight_bytes
    return parts


def _full_batches(program: Program, dataset: Dataset) -> Iterator[Dataset]:
    size = fixed_batch(program)
    for batch in dataset.batches():
        if size is None or len(batch) == size:
            yield batch


def _damage(metric: Metric, features: np.ndarray) -> Damage:
    each = np.array([metric.score(row[None]) for row in features])
    return Damage(metric.score(features), float(np.nanquantile(each, 0.95)), each)


def _relative_change(before: np.ndarray, after: np.ndarray) -> tuple[float, int]:
    axis = 1 if before.ndim == 4 else -1
    change = np.linalg.norm(after.astype(np.float64) - before, axis=axis)
    length = np.linalg.norm(before.astype(np.float64), axis=axis)
    usable = length > 0
    return float((change[usable] / length[usable]).sum()), int(usable.sum())
