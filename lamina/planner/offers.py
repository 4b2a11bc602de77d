"""What the planner would consider, site by site, without pricing or searching anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lamina.analysis.operators import evenly
from lamina.analysis.statistics import Statistics, collect
from lamina.backends.backend import Target
from lamina.data import Dataset
from lamina.ir.program import Program
from lamina.passes import default_transforms, get_transform
from lamina.passes.fold import fold
from lamina.passes.pass_ import Refusal, Site
from lamina.planner.space import build_space

# Samples that ranges are taken from. Which forms there are hardly depends on them; the search takes 128, for
# the scales it writes.
_ROWS = 32


@dataclass(frozen=True)
class Offer:
    """The options of one site.

    Attributes:
        transform: Who offers them.
        site: Name of the site.
        kind: What it is.
        nodes: Its nodes, of the folded program; those a fold did not touch have the names they came with.
        options: Names of the options, as a plan has them.
        removes: Whether they take the nodes out.
    """

    transform: str
    site: str
    kind: str
    nodes: tuple[str, ...]
    options: tuple[str, ...]
    removes: bool


@dataclass(frozen=True)
class OffersResult:
    """Every choice of a program.

    Attributes:
        offers: Outer sites before the ones nested in them.
        refusals: Sites that nearly matched, with the reason.
        folds: Exact passes that were applied before, in order.
    """

    offers: tuple[Offer, ...]
    refusals: tuple[Refusal, ...]
    folds: tuple[str, ...]


def offers(
    program: Program,
    dataset: Dataset | None,
    target: Target,
    transforms: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> OffersResult:
    """The sites and options of a search on ``target``, from the same space that the search uses.

    What is not known without measuring is not known here: the search leaves out options that its prices say
    do not pay, and folds in forms that it times.

    Args:
        program: Left unchanged; it is folded as an optimization would.
        dataset: Calibration samples, of which a part gives ranges and fits. Without them there are no static
            quantized forms and no linear maps in place of branches.
        target: Options are offered for it.
        transforms: Names of transforms; None: those a search uses by itself.
        progress: Called after each batch with rows done and in all.

    Raises:
        BudgetError: A transform is unknown.
        DataError: The data does not fit.
        BackendError: ONNX Runtime refuses the program.
    """
    chosen = [get_transform(name) for name in (default_transforms() if transforms is None else transforms)]
    folded, folds, _ = fold(program)
    statistics = Statistics(0)
    if dataset is not None:
        rows = dataset.rows(evenly(_ROWS, dataset.samples))
        sites = [s for t in chosen if not t.removes_site for s in t.sites(folded) if isinstance(s, Site)]
        wanted = sorted({v for s in sites for v in (*s.inputs, *s.outputs)})
        statistics = collect(folded, rows, ranges=wanted, progress=progress)
        for transform in chosen:
            statistics = transform.collect(folded, dataset, statistics)
    space = build_space(folded, chosen, statistics, target)
    found = [
        Offer(
            choice.transform.name,
            choice.site.name,
            choice.site.kind,
            choice.site.nodes,
            tuple(option.name for option in choice.options),
            choice.removes,
        )
        for choice in space.choices
    ]
    return OffersResult(tuple(found), space.refusals, folds)
