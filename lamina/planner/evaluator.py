"""Judge candidates on the supergraph: one run of the model on the selection data each, no session built."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lamina.data import Dataset
from lamina.errors import DataError
from lamina.planner.space import Genome
from lamina.planner.supergraph import Supergraph
from lamina.quality import Metric, Outputs, evaluate, standard_error
from lamina.quality.divergence import Divergence


@dataclass(frozen=True)
class Score:
    """Measured quality of a candidate on the first ``samples`` selection samples.

    Attributes:
        value: The metric.
        damage: How much worse than the original on the same samples, in the budget's unit.
        error: Standard error of ``damage`` (paired over samples).
        samples: How many samples were used.
    """

    value: float
    damage: float
    error: float
    samples: int

    def bound(self, caution: float) -> float:
        """Damage plus ``caution`` standard errors."""
        return self.damage + caution * self.error


class Evaluator:
    """Scores genomes; remembers every score, and the features of the samples already run.

    Args:
        supergraph: Compiled.
        selection: Samples candidates are judged on.
        metric: The user's metric, or a divergence.
    """

    def __init__(self, supergraph: Supergraph, selection: Dataset, metric: Metric) -> None:
        self.supergraph, self.selection, self.metric = supergraph, selection, metric
        self.space = supergraph.space
        self.batches = list(selection.batches())
        self.runs = 0
        self.run_seconds = 0.0
        self._features: dict[Genome, list[np.ndarray]] = {}
        self._reference: dict[int, Outputs] = {}

    def score(self, genome: Genome, batches: int | None = None) -> Score:
        """Score on the first ``batches`` batches (all of them when omitted).

        Raises:
            DataError: The candidate's outputs are not finite.
        """
        genome = self.space.canonical(genome)
        every = batches is None or self.metric.whole
        wanted = len(self.batches) if every or batches is None else min(batches, len(self.batches))
        original = self._collect(self.space.nothing, wanted)
        if not np.isfinite(original).all():
            raise DataError(
                f"the original's {self.metric.name} is not finite on the selection data",
                advice="check the data and the model before compressing it",
            )
        candidate = original if genome == self.space.nothing else self._collect(genome, wanted)
        if not np.isfinite(candidate).all():
            return Score(float("nan"), float("inf"), 0.0, len(candidate))
        base, value = self.metric.score(original), self.metric.score(candidate)
        damage = self.metric.damage(base, value)
        return Score(value, damage, standard_error(self.metric, original, candidate), len(candidate))

    def _collect(self, genome: Genome, wanted: int) -> np.ndarray:
        if self.metric.whole:  # a metric that must see all samples at once cannot be staged
            return self._whole(genome)
        known = self._features.setdefault(genome, [])
        for index in range(len(known), wanted):
            batch = self.batches[index]
            outputs = self._run(genome, batch)
            known.append(self.metric.features(outputs, batch, self._reference_outputs(index)))
        return np.concatenate(known[:wanted])

    def _whole(self, genome: Genome) -> np.ndarray:
        known = self._features.setdefault(genome, [])
        if not known:
            known.append(evaluate(lambda x: self.supergraph.run(genome, x), self.selection, self.metric))
        return known[0]

    def _run(self, genome: Genome, batch: Dataset) -> Outputs:
        start = time.perf_counter()
        outputs = self.supergraph.run(genome, batch.inputs)
        self.run_seconds += time.perf_counter() - start
        self.runs += 1
        return outputs

    def _reference_outputs(self, index: int) -> Outputs | None:
        """The original's outputs on a batch, when the metric compares with them; kept up to 256 MB."""
        if self.metric.kind != "divergence":
            return None
        if index not in self._reference:
            outputs = self._run(self.space.nothing, self.batches[index])
            if sum(v.nbytes for o in self._reference.values() for v in o.values()) > 256 << 20:
                return outputs
            self._reference[index] = outputs
        return self._reference[index]

    def single_divergences(
        self, probe: Dataset, divergence: Divergence, genomes: Sequence[Genome], on_done: object = None
    ) -> list[float]:
        """Mean output divergence of each genome from the original on ``probe``; inf where not finite."""
        batches = list(probe.batches())
        reference = [self._run(self.space.nothing, b) for b in batches]
        for index, outputs in enumerate(reference):
            for name, array in outputs.items():
                if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
                    advice = "check the data and the model before compressing it"
                    raise DataError(
                        f"output '{name}' of the original model is not finite",
                        where=f"batch {index}",
                        advice=advice,
                    )
        found = []
        for done, genome in enumerate(genomes):
            features = [
                divergence.features(self._run(genome, batch), batch, before)
                for batch, before in zip(batches, reference, strict=True)
            ]
            mean = divergence.score(np.concatenate(features))
            found.append(mean if np.isfinite(mean) else float("inf"))
            if callable(on_done):
                on_done(done + 1, len(genomes))
        return found

    def single_scores(self, probe: Dataset, metric: Metric, genomes: Sequence[Genome]) -> list[float]:
        """A task metric of each genome on ``probe``; NaN where its outputs are not finite."""
        batches = list(probe.batches())
        found = []
        for genome in genomes:
            outputs = ((self._run(genome, batch), batch) for batch in batches)
            features = np.concatenate([metric.features(made, batch) for made, batch in outputs])
            found.append(metric.score(features) if np.isfinite(features).all() else float("nan"))
        return found
