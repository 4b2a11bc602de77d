"""Measured damage of dropping each branch by itself."""

from __future__ import annotations

from collections.abc import Callable

from lamina.analysis.single_site import Damage, damages
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes.drop_branch import DropBranch, apply_drops
from lamina.passes.pass_ import Site
from lamina.quality.metric import Metric


def drop_variants(program: Program) -> dict[str, Program]:
    """Branch -> the program without it, for every branch that can be dropped; weights are shared."""
    names = [site.name for site in DropBranch().sites(program) if isinstance(site, Site)]
    return {name: apply_drops(program, [name]) for name in names}


def drop_damages(
    program: Program,
    dataset: Dataset,
    metric: Metric,
    *,
    threads: int | None = None,
    most_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Damage]:
    """Divergence of the outputs when one branch goes, for each that can; only what follows it is run.

    Args:
        program: The original.
        dataset: Samples.
        metric: A divergence.
        threads: Threads of a run.
        most_bytes: As for :class:`lamina.analysis.single_site.SingleSite`.
        progress: As for :func:`lamina.analysis.single_site.damages`.

    Raises:
        DataError: The data does not fit.
        BackendError: ONNX Runtime refuses a program.
    """
    variants = drop_variants(program)
    return damages(
        program, variants, dataset, metric, threads=threads, most_bytes=most_bytes, progress=progress
    )
