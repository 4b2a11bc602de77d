"""Replace a residual branch by a linear map of its skip, fitted in closed form (direct matching)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.analysis.matching import Match, MatchProbe, collect_matches
from lamina.analysis.moments import RIDGES, Correction, Moments, ridge_correction
from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.drop_branch import DropBranch
from lamina.passes.fold_replacement import fold_replacement
from lamina.passes.pass_ import Need, Option, Refusal, Site, Transform
from lamina.passes.repair import packed, unpacked

_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# A dearer map must leave this much less error than the cheaper ones before it.
_WORTH = 0.98
# Share of the squared error that is rounding.
_ROUNDING = 1e-11


@dataclass(frozen=True)
class ReplaceBranch(Transform):
    """Replace ``x + f(x)`` by ``x + A x + b``, with A and b from ridge regression on calibration tokens.

    Options, cheapest first: ``bias`` (A = 0), ``diagonal``, ``rank-r`` (reduced-rank regression: the leading
    directions of what A x explains) and ``full``. The map is fitted on the branch's own input and sum, never
    on a task loss; held-out tokens choose the ridge, and an option that leaves no less error on them than a
    cheaper one is not offered. A bias or diagonal that follows a linear operator, a normalization or a
    residual sum nobody else reads is folded into it in :meth:`finish`, exactly, and costs nothing to run.

    Fires: branches that :class:`lamina.passes.drop_branch.DropBranch` can drop, whose vectors lie on the last
        axis (tokens) or, of convolutions, on axis 1 of ``[b, c, *space]``.
    Refuses: fused normalizations, vectors of unknown width, other dtypes than float16, 32 and 64.
    Effect: Lossy.
    Cost: d^2 multiply-adds a token for ``full``, 2 d r for ``rank-r``, d or none for the others.
    Source: Balogh and Jelasity, "How not to stitch representations to measure similarity" (direct matching);
        the regression is derived. Deviates: ridge; A is applied to the skip, so it shares its identity.
    """

    paper: ClassVar[str] = "direct matching"
    axes: ClassVar[tuple[str, ...]] = ("latency", "size", "memory", "flops")
    needs: ClassVar[frozenset[Need]] = frozenset(("branches", "matches"))
    name: ClassVar[str] = "direct-matching"
    removes_site: ClassVar[bool] = True

    rank_shares: tuple[float, ...] = (1 / 16, 1 / 4)
    ridges: tuple[float, ...] = RIDGES

    def __post_init__(self) -> None:
        if any(not 0 < share < 1 for share in self.rank_shares) or any(r <= 0 for r in self.ridges):
            raise PassError("rank shares lie between 0 and 1, ridges are positive", where=self.name)

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Every replaceable branch, in execution order, and why the other branches are left alone."""
        values = {v.name: v for n in program.graph for v in n.outputs}
        values |= {v.name: v for v in program.graph.inputs}
        for site in DropBranch().sites(program):
            if isinstance(site, Refusal):
                yield Refusal(self.name, site.where, site.reason)
                continue
            reason = _refusal(site, values)
            if reason is not None:
                yield Refusal(self.name, site.name, reason)
                continue
            yield Site(self.name, site.name, site.kind, site.nodes, site.inputs, site.outputs, site.weights)

    def probes(self, program: Program) -> tuple[MatchProbe, ...]:
        """What :func:`lamina.analysis.matching.collect_matches` has to look at."""
        return tuple(
            MatchProbe(s.name, s.inputs[0], s.outputs[0], _axis(s))
            for s in self.sites(program)
            if isinstance(s, Site)
        )

    def collect(self, program: Program, dataset: Dataset, statistics: Any) -> Any:
        """The statistics with every branch's moments; unchanged where data does not do to check a fit."""
        try:
            return replace(statistics, matches=collect_matches(program, dataset, self.probes(program)))
        except DataError:
            return statistics

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """Maps worth their cost, cheapest first; none where the branch's moments were not collected."""
        match = statistics.matches.get(site.name)
        if match is None:
            return ()
        (drop,) = DropBranch().options(site, program, statistics, target)
        kind = _skip(program, site).dtype
        best, found, own = _error(match), [], max(1, _weight_elements(program, site))
        for name, fitted in _maps(match, self.rank_shares, self.ridges):
            if fitted is None or fitted[-1].after > _WORTH * best or best <= _ROUNDING * _error(match):
                continue
            best = fitted[-1].after
            arrays = {**fitted[0], "bias": fitted[1].offset}
            facts = {
                "axis": _axis(site),
                "residual": best / max(_error(match), 1e-300),
                "flops_share": sum(a.size for a in arrays.values() if a.ndim > 1) / own,
            }
            stored = {k: packed(a.astype(_numpy(kind))) for k, a in arrays.items()}
            found.append(Option(name, {**drop.parameters, **facts, **stored}))
        return tuple(found)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        """The map of the skip as the sum reads it now."""
        (skip,) = DropBranch().emit(site, option, rewriter, nodes)
        arrays = {k: unpacked(v) for k, v in option.parameters.items() if isinstance(v, Mapping)}
        images, rank = option.parameters["axis"] == 1, _rank(skip, site)
        total = nodes[site.nodes[-1]].outputs[0]
        label = f"{nodes[site.nodes[-1]].name}_matched"

        def op(kind: str, *inputs: ir.Value, part: str) -> ir.Value:
            return rewriter.op(kind, inputs, name=f"{label}_{part}", dtype=skip.dtype)

        def weight(name: str) -> ir.Value:
            array = arrays[name]
            if images and array.ndim == 1:
                array = array.reshape(-1, *(1,) * (rank - 2))
            return rewriter.constant(array, f"{label}_{name}_weight")

        def linear(x: ir.Value, name: str) -> ir.Value:
            matrix = arrays[name]
            if not images:
                return op("MatMul", x, weight(name), part=name)
            kernel = np.ascontiguousarray(matrix.T).reshape(*matrix.shape[::-1], *(1,) * (rank - 2))
            return op("Conv", x, rewriter.constant(kernel, f"{label}_{name}_weight"), part=name)

        if "scale" in arrays:
            made = op("Mul", skip, weight("scale"), part="scale")
        elif "down" in arrays:
            made = op("Add", skip, linear(linear(skip, "down"), "up"), part="sum")
        elif "matrix" in arrays:
            made = linear(skip, "matrix")
        else:
            made = skip
        made = op("Add", made, weight("bias"), part="bias")
        made.shape = total.shape
        return [made]

    def sum_after(self, site: Site, names: Collection[str]) -> str | None:
        """What the map gives; the skip where it was folded into the weights in front."""
        made = f"{site.nodes[-1]}_matched_bias_out"
        return made if made in names else site.inputs[0]

    def finish(self, site: Site, rewriter: Rewriter) -> None:
        """Take the branch out as a drop does, and fold what of the map folds exactly."""
        DropBranch().finish(site, rewriter)
        label = f"{site.nodes[-1]}_matched"
        for part in ("scale", "bias"):
            if rewriter.has_node(f"{label}_{part}"):
                fold_replacement(rewriter.node(f"{label}_{part}"), rewriter)


def _refusal(site: Site, values: Mapping[str | None, ir.Value]) -> str | None:
    skip, total = values.get(site.inputs[0]), values.get(site.outputs[0]) if site.outputs else None
    if len(site.outputs) != 1 or total is None or skip is None or total.producer() is None:
        return "its sum is fused with a normalization"
    maker = total.producer()
    if maker is None or maker.op_type not in ("Add", "Sum"):
        return "its sum is fused with a normalization"
    if skip.dtype not in _DTYPES:
        return f"the skip is {'of unknown type' if skip.dtype is None else skip.dtype.name}"
    shape = skip.shape
    if shape is None or len(shape) < 2:
        return "the skip holds no vectors"
    if not isinstance(shape[_axis(site)], int):
        return f"the width of '{skip.name}' is unknown"
    return None


def _axis(site: Site) -> int:
    return 1 if site.kind == "conv" else -1


def _skip(program: Program, site: Site) -> ir.Value:
    values = (*program.graph.inputs, *(v for n in program.graph for v in n.outputs))
    return next(v for v in values if v.name == site.inputs[0])


def _weight_elements(program: Program, site: Site) -> int:
    """Elements of the matrices and kernels of a site: multiply-adds a token."""
    values = (program.graph.initializers.get(name) for name in site.weights)
    shapes = [v.const_value.shape.numpy() for v in values if v is not None and v.const_value is not None]
    return sum(int(np.prod(shape)) for shape in shapes if len(shape) > 1)


def _numpy(kind: ir.DataType | None) -> np.dtype[Any]:
    return np.dtype((kind or ir.DataType.FLOAT).numpy())


def _rank(skip: ir.Value, site: Site) -> int:
    if skip.shape is None:
        raise PassError(f"the shape of '{skip.name}' is unknown", where=f"branch '{site.name}'")
    return len(skip.shape)


# -- fitting ------------------------------------------------------------------------------------------

Fit = tuple[dict[str, np.ndarray], Correction]


def _error(match: Match) -> float:
    """Held-out error of dropping: all of what the branch adds."""
    return match.held.error(np.zeros_like(match.held.xy.T), np.zeros_like(match.held.y))


def _maps(
    match: Match, rank_shares: Sequence[float], ridges: Sequence[float]
) -> Iterator[tuple[str, Fit | None]]:
    """Option name -> its arrays and correction, cheapest first."""
    fitted, held = match.fitted, match.held
    mean = ridge_correction(fitted, held, offset=True, matrix=False)
    yield "bias", None if mean is None else ({}, mean)
    scale = ridge_correction(_diagonal(fitted), _diagonal(held), offset=True, ridges=ridges)
    yield "diagonal", None if scale is None else ({"scale": 1 + scale.matrix}, scale)
    full = ridge_correction(fitted, held, offset=True, ridges=ridges)
    if full is None or not np.any(full.matrix):
        return
    width = len(full.matrix)
    for rank in dict.fromkeys(max(1, round(share * width)) for share in rank_shares):
        yield f"rank-{rank}", _reduced(full, fitted, held, rank)
    yield "full", ({"matrix": np.eye(width) + full.matrix.T}, full)


def _diagonal(full: Moments) -> Moments:
    return Moments(full.count, full.x, full.y, np.diag(full.xx).copy(), np.diag(full.xy).copy(), full.yy)


def _reduced(full: Correction, fitted: Moments, held: Moments, rank: int) -> Fit:
    """The best map of a rank: A projected on the leading directions of A x (reduced-rank regression)."""
    mean = fitted.x / fitted.count
    gram, _, _ = fitted.about(mean, fitted.y / fitted.count)
    _, vectors = np.linalg.eigh(full.matrix @ gram @ full.matrix.T)
    up = vectors[:, ::-1][:, :rank]  # [out, r]
    down = up.T @ full.matrix  # [r, in]
    matrix = up @ down
    offset = fitted.y / fitted.count - matrix @ mean
    correction = Correction(matrix, offset, full.ridge, full.before, held.error(matrix, offset))
    return {"down": down.T, "up": up.T}, correction
