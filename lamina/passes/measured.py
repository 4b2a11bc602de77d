"""Everything that metrics need and only changed programs show, measured in one call."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from lamina.analysis.gradient_operators import weighted_operators
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import damages, interactions, skip_effect, suspicious_pairs
from lamina.analysis.statistics import Statistics
from lamina.analysis.weight_error import round_to_nearest
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.passes.single_drops import drop_variants
from lamina.quality.choose import get_metric
from lamina.quality.metric import Metric

_ROUNDED = "lamina_rounded"


def measured(
    program: Program,
    dataset: Dataset,
    statistics: Statistics,
    metric: Metric | None = None,
    *,
    pairs: int = 8,
    bits: int = 4,
    threads: int | None = None,
) -> Statistics:
    """Put into ``statistics`` what only changed programs show.

    ``output-kl``, ``skip-effect``, ``hessian-interlayer``, ``residual-norm-risk`` and the third term of
    ``lieq-diagnostics`` read it. Each branch is dropped by itself, the most suspicious pairs together, and
    all weights are rounded once; of each changed program only what the change reaches is run. About
    ``1.2 L + pairs`` plain runs.

    Args:
        program: Left unchanged.
        dataset: The samples that ``statistics`` was collected on.
        statistics: What :func:`lamina.analysis.statistics.collect` found; its other fields stay.
        metric: The divergence of damages and losses; None: ``kl`` for logits, else what suits the outputs.
        pairs: Pairs of branches to drop together.
        bits: Width that all weights are rounded to for the losses of single examples.
        threads: Threads of a run.

    Returns:
        The statistics with ``damages``, ``skips``, ``pairs`` and ``losses``.

    Raises:
        DataError: The data does not fit; the metric is no divergence.
        BackendError: ONNX Runtime refuses a program.
    """
    chosen = metric or get_metric(None, program)
    variants = drop_variants(program)
    low = {_ROUNDED: rounded(program, bits)}
    found = damages(program, {**variants, **low}, dataset, chosen, threads=threads)
    losses = np.repeat(found.pop(_ROUNDED).samples, dataset.group)
    singles = {name: damage.mean for name, damage in found.items()}
    probes = [BranchProbe.of(branch) for branch in find_branches(program).branches]
    skips = skip_effect(program, variants, dataset, probes, threads=threads)
    chosen_pairs = suspicious_pairs(singles, pairs)
    both = interactions(
        program,
        lambda names: apply_drops(program, list(names)),
        singles,
        chosen_pairs,
        dataset,
        chosen,
        threads=threads,
    )
    named = {f"{a} | {b}": value for (a, b), value in both.items()}
    return replace(statistics, damages=singles, skips=skips, pairs=named, losses=losses)


def rounded(program: Program, bits: int) -> Program:
    """The program with every weight of an operator rounded, symmetric, one scale an output channel.

    Stored in its own floating type again: it says what the width costs in quality, not in time.
    """
    changed = program.clone()
    for operator in weighted_operators(changed):
        value = changed.graph.initializers[operator.weight]
        assert value.const_value is not None
        array = value.const_value.numpy()
        axis = operator.channel_axis
        wide = array.astype(np.float64)
        rows = (
            wide.reshape(1, -1) if axis is None else np.moveaxis(wide, axis, 0).reshape(wide.shape[axis], -1)
        )
        made = round_to_nearest(bits)(rows)
        if axis is None:
            made = made.reshape(wide.shape)
        else:
            rest = np.delete(wide.shape, axis)
            made = np.moveaxis(made.reshape(wide.shape[axis], *rest), 0, axis)
        value.const_value = ir.Tensor(np.ascontiguousarray(made.astype(array.dtype)), name=value.name)
    return changed
