"""Drop rules as plain functions: sets of branches to drop from a program, and what they go by, from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import islice

import numpy as np

from lamina.analysis.single_site import SingleSite, damages
from lamina.analysis.statistics import Statistics
from lamina.data import Dataset
from lamina.errors import DataError, LaminaError
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.planner.drop_evidence import (
    DropEvidence,
    DropSet,
    Measure,
    droppable,
    layers_of,
    rule_statistics,
    span_angles,
)
from lamina.planner.drop_rules import Rule, get_rule
from lamina.quality import Metric, get_metric
from lamina.quality.outputs import gives_logits


def drop_sets(
    program: Program,
    rule: str | Rule,
    data: Dataset | None = None,
    *,
    metric: Metric | None = None,
    saving: Mapping[str, float] | None = None,
    most: int | None = None,
    threads: int | None = None,
) -> list[DropSet]:
    """Sets of branches to drop, by a rule, from one that changes little to more.

    ``apply_drops(program, sets[k])`` makes the program without the k-th. A greedy rule measures each step, so
    ``most`` bounds its work.

    Args:
        program: The program; never changed.
        rule: A name of :data:`lamina.planner.drop_rules.RULES`, or a rule of your own.
        data: Calibration samples; ``balanced-skip`` reads none.
        metric: Divergence that outputs are compared by; None: what suits them.
        saving: Branch -> what goes with it, any unit, for ``additive-unet-drop``; None: parameters.
        most: Sets to make; all when omitted.
        threads: Threads of the runs.

    Raises:
        BudgetError: There is no such rule.
        DataError: The rule needs data, and there is none or it does not fit.
        PassError: The rule needs a task loss, and neither tokens nor labels give one.
        BackendError: ONNX Runtime refuses a program.
    """
    chosen = get_rule(rule) if isinstance(rule, str) else rule
    if chosen.need is not None and data is None:
        raise DataError(
            f"rule '{chosen.name}' needs calibration samples",
            advice="give data, or use balanced-skip, which reads none",
        )
    found = drop_evidence(program, data, metric=metric, saving=saving, threads=threads)
    return list(islice(chosen.sets(found), most))


def drop_evidence(
    program: Program,
    data: Dataset | None,
    *,
    metric: Metric | None = None,
    saving: Mapping[str, float] | None = None,
    threads: int | None = None,
) -> DropEvidence:
    """What rules go by; each measurement is made when a rule first asks for it.

    Args:
        program: The program.
        data: Calibration samples; None: only structure is known.
        metric: Divergence of outputs; None: what suits them.
        saving: Branch -> what goes with it; None: its parameters.
        threads: Threads of the runs.
    """
    branches = droppable(program, saving)
    layers = layers_of(program, branches)
    if data is None:
        return DropEvidence(branches, layers)
    samples = data
    divergence = metric or get_metric(None, program)

    @cache
    def statistics() -> Statistics:
        return rule_statistics(program, samples, layers, threads=threads)

    def angles(first: int, last: int) -> float:
        return span_angles(program, statistics(), layers)(first, last)

    def apart(sets: Sequence[DropSet]) -> list[float]:
        variants = {str(i): apply_drops(program, s) for i, s in enumerate(sets)}
        found = damages(program, variants, samples, divergence, threads=threads)
        return [found[str(i)].mean for i in range(len(sets))]

    @cache
    def single() -> Mapping[str, float]:
        names = [b.name for b in branches]
        return dict(zip(names, apart([(n,) for n in names]), strict=True))

    loss = task_loss(program, samples)
    return DropEvidence(
        branches,
        layers,
        statistics,
        angles,
        single,
        apart,
        None if loss is None else _losses(program, samples, loss, threads),
    )


def task_loss(program: Program, data: Dataset) -> Metric | None:
    """Cross-entropy of next tokens or labels, where model and data have them."""
    if not gives_logits(program):
        return None
    try:
        loss = get_metric("cross-entropy", program)
        loss.check(data)
    except LaminaError:
        return None
    return loss


def _losses(program: Program, data: Dataset, loss: Metric, threads: int | None) -> Measure:
    """Cross-entropy of each changed program; of each only what the change reaches is run."""

    def measure(sets: Sequence[DropSet]) -> list[float]:
        variants = {str(i): apply_drops(program, s) for i, s in enumerate(sets)}
        features: dict[str, list[np.ndarray]] = {name: [] for name in variants}
        for _, batch, _, changed in SingleSite(program, variants, threads=threads).run(data):
            for name, outputs in changed:
                features[name].append(loss.features(outputs, batch))
        return [loss.score(np.concatenate(features[str(i)])) for i in range(len(sets))]

    return measure
