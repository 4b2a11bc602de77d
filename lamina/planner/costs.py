"""The additive cost model: what each option changes, and what conversions at its borders cost.

Totals are sums of measured prices, so they are predictions; the driver measures finished models. Latency is
in units of the original's latency on the workload (1.0: as slow as it), size in bytes, flops in FLOPs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lamina.budget import FOOTPRINT
from lamina.planner.space import Genome, Space

AXES = ("latency", "size", "flops")


@dataclass(frozen=True)
class Border:
    """One tensor that may be int8: who writes it, who reads it, and what converting costs (latency units).

    Attributes:
        value: Name of the tensor.
        producer: Choice that makes it, or None.
        consumers: Choices that read it.
        other_readers: Whether anything that no choice covers reads it.
        quantize: Price of float -> int8.
        dequantize: Price of int8 -> float.
    """

    value: str
    producer: int | None
    consumers: tuple[int, ...]
    other_readers: bool
    quantize: float
    dequantize: float


@dataclass(frozen=True)
class Loan:
    """Weights that some options read from another site: in the file for as long as one of those is taken.

    Attributes:
        nbytes: What the owner's options count as gone.
        owners: Options, as (choice, gene), that take the weights from the site they belong to.
        borrowers: Options that read them from elsewhere.
    """

    nbytes: float
    owners: tuple[tuple[int, int], ...]
    borrowers: tuple[tuple[int, int], ...]


@dataclass
class Costs:
    """Deltas of every option on every axis, against leaving the choice alone.

    Attributes:
        space: The choices.
        base: Axis -> value of the program with nothing changed.
        delta: Axis -> one list a choice, one entry an option (gene 1 first).
        share: Per choice, latency of its float nodes (what dropping it can save at most).
        borders: Tensors whose conversions cost time.
        loans: Weights that one site lends to another.
        scale: Correction of latency deltas by (transform, kind, option), fitted on whole-model measurements.
        joint_bytes: What a conversion that falls away between two int8 neighbours changes in the file, fitted
            on the files of whole models.
    """

    space: Space
    base: Mapping[str, float]
    delta: Mapping[str, Sequence[Sequence[float]]]
    share: Sequence[float] = ()
    borders: Sequence[Border] = ()
    loans: Sequence[Loan] = ()
    scale: dict[tuple[str, str, str], float] = field(default_factory=dict)
    joint_bytes: float = 0.0

    def group(self, index: int, gene: int) -> tuple[str, str, str]:
        """The group a move's correction belongs to."""
        choice = self.space.choices[index]
        return choice.transform.name, choice.site.kind, choice.options[gene - 1].name

    def latency_delta(self, index: int, gene: int) -> float:
        """Corrected latency change of one option, without borders."""
        return self.delta["latency"][index][gene - 1] * self.scale.get(self.group(index, gene), 1.0)

    def reads_int8(self, index: int, gene: int) -> bool:
        """Whether the option's nodes read int8."""
        return gene > 0 and self.space.choices[index].options[gene - 1].input_form == "int8"

    def writes_int8(self, index: int, gene: int) -> bool:
        """Whether the option's nodes write int8."""
        return gene > 0 and self.space.choices[index].options[gene - 1].output_form == "int8"

    def restrict(self, axes: Collection[str]) -> Costs:
        """The same costs without options that help on none of ``axes``.

        An int8 option stays unless it loses more than its conversions could ever give back: it may pay
        by keeping a neighbour in int8.
        """
        kept = [
            [k for k in range(len(c.options)) if self._useful(i, k + 1, axes)]
            for i, c in enumerate(self.space.choices)
        ]
        stay = [i for i, options in enumerate(kept) if options]
        position: dict[int | None, int] = {old: new for new, old in enumerate(stay)}
        choices = tuple(
            replace(
                self.space.choices[i],
                options=tuple(self.space.choices[i].options[k] for k in kept[i]),
                parent=position.get(self._parent_among(i, position)),
            )
            for i in stay
        )
        delta = {axis: [[rows[i][k] for k in kept[i]] for i in stay] for axis, rows in self.delta.items()}
        borders = [
            replace(
                b,
                producer=None if b.producer is None else position.get(b.producer),
                consumers=tuple(position[c] for c in b.consumers if c in position),
                other_readers=b.other_readers or any(c not in position for c in b.consumers),
            )
            for b in self.borders
        ]
        share = [self.share[i] for i in stay]
        genes = {(i, k + 1): (position[i], new + 1) for i in stay for new, k in enumerate(kept[i])}
        loans = [_renumbered(loan, genes) for loan in self.loans]
        loans = [loan for loan in loans if loan.owners and loan.borrowers]
        return Costs(replace(self.space, choices=choices), self.base, delta, share, borders, loans)

    def _parent_among(self, index: int, stay: Collection[int | None]) -> int | None:
        """The innermost choice of ``stay`` that holds this one; those between hold nothing any more."""
        parent = self.space.choices[index].parent
        while parent is not None and parent not in stay:
            parent = self.space.choices[parent].parent
        return parent

    def _useful(self, index: int, gene: int, axes: Collection[str]) -> bool:
        choice = self.space.choices[index]
        if choice.options[gene - 1].name == "drop":
            return True
        if not np.isfinite(self.delta["latency"][index][gene - 1]):
            return False  # the target refuses this option here
        if {"size", "memory"} & set(axes) and self.delta["size"][index][gene - 1] < 0:
            return True
        slack = -0.0003 * self.base["latency"]  # gains below that are timing noise
        if self.reads_int8(index, gene) or self.writes_int8(index, gene):
            near = [b for b in self.borders if index == b.producer or index in b.consumers]
            slack = sum(b.quantize + b.dequantize for b in near)
        return self.latency_delta(index, gene) < slack

    def predict(self, genome: Genome) -> dict[str, float]:
        """Predicted totals of a canonical genome on every axis, and the sum of latency and size ratio."""
        totals = dict(self.base)
        for i, gene in enumerate(genome):
            if gene:
                totals["latency"] += self.latency_delta(i, gene)
                totals["size"] += self.delta["size"][i][gene - 1]
                totals["flops"] += self.delta["flops"][i][gene - 1]
        totals["latency"] += self.conversions(genome)
        totals["size"] += self.lent(genome)
        if self.joint_bytes:
            totals["size"] += self.joint_bytes * self.joints(genome)
        totals[FOOTPRINT] = totals["latency"] + totals["size"] / max(self.base["size"], 1.0)
        return totals

    def lent(self, genome: Genome) -> float:
        """Bytes that stay in the file only because another site reads them."""
        taken = {(i, gene) for i, gene in enumerate(genome) if gene}
        kept = [n for n in self.loans if taken.intersection(n.owners) and taken.intersection(n.borrowers)]
        return sum(loan.nbytes for loan in kept)

    def joints(self, genome: Genome) -> int:
        """How often int8 passes from one choice to another without a conversion."""
        total = 0
        for border in self.borders:
            if border.producer is not None and self.writes_int8(border.producer, genome[border.producer]):
                alive = [c for c in border.consumers if not self.space.dropped(genome, c)]
                total += sum(self.reads_int8(c, genome[c]) for c in alive)
        return total

    def conversions(self, genome: Genome) -> float:
        """Latency of all conversions between float and int8 that the genome needs."""
        total = 0.0
        for border in self.borders:
            made = border.producer is not None and self.writes_int8(border.producer, genome[border.producer])
            alive = [c for c in border.consumers if not self.space.dropped(genome, c)]
            readers = [self.reads_int8(c, genome[c]) for c in alive]
            if any(readers) and not made:
                total += border.quantize
            if made and (border.other_readers or not all(readers)):
                total += border.dequantize
        return total


def fit_joints(costs: Costs, sizes: Mapping[Genome, int]) -> None:
    """Fit what neighbours in int8 spare each other in the file; options are emitted, and priced, one by one.

    Args:
        costs: Changed in place.
        sizes: Genome -> bytes of the finished model's file.
    """
    costs.joint_bytes = 0.0
    pairs = [(costs.joints(genome), real - costs.predict(genome)["size"]) for genome, real in sizes.items()]
    squares = sum(count * count for count, _ in pairs)
    if squares:  # least squares through the origin; conversions that fall away never add to a file
        costs.joint_bytes = min(0.0, sum(count * beyond for count, beyond in pairs) / squares)


def _renumbered(loan: Loan, genes: Mapping[tuple[int, int], tuple[int, int]]) -> Loan:
    owners = tuple(genes[gene] for gene in loan.owners if gene in genes)
    return Loan(loan.nbytes, owners, tuple(genes[gene] for gene in loan.borrowers if gene in genes))


def fit_scales(
    costs: Costs, measured: Mapping[Genome, float], *, limits: tuple[float, float] = (-1.0, 3.0)
) -> None:
    """Fit the correction of each option group so that predictions of whole models match their measurements.

    Ridge regression towards 1: a group that no measured genome uses keeps 1. A negative correction says that
    what looked fast alone is slow inside the model.

    Args:
        costs: Changed in place.
        measured: Genome -> measured latency in units of the original's.
        limits: Smallest and largest correction.
    """
    groups = sorted({costs.group(i, g) for genome in measured for i, g in enumerate(genome) if g})
    if not groups:
        return
    costs.scale.clear()
    rows, targets = [], []
    for genome, latency in measured.items():
        row = np.zeros(len(groups))
        for i, gene in enumerate(genome):
            if gene:
                row[groups.index(costs.group(i, gene))] += costs.latency_delta(i, gene)
        rows.append(row)
        targets.append(latency - costs.base["latency"] - costs.conversions(genome))
    matrix, target = np.asarray(rows), np.asarray(targets)
    # A weak pull to 1 settles groups that only occur together; 2 % of the largest column is noise level.
    pull = 0.02 * max(float(np.abs(matrix).max()), 1e-9)
    system = np.vstack([matrix, pull * np.eye(len(groups))])
    solution, *_ = np.linalg.lstsq(system, np.concatenate([target, np.full(len(groups), pull)]), rcond=None)
    costs.scale.update({g: float(np.clip(v, *limits)) for g, v in zip(groups, solution, strict=True)})
