"""EoRA: a low-rank path beside an operator whose own weight cannot be refitted without losing its form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.analysis.moments import Moments, ridge_correction
from lamina.data import Dataset
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Refusal
from lamina.passes.repair import add_behind, packed, unpacked
from lamina.passes.repair_fit import WORTH, Compensation, Sums
from lamina.passes.repair_sites import RepairSite
from lamina.passes.repair_walk import Walk
from lamina.quality import Metric

NAME = "eora"


@dataclass(frozen=True)
class LowRankPath:
    """``up (down x)``, added to what a node gives.

    Attributes:
        node: Name of the node in the program the plan's moves and repairs leave.
        reads: Name of x.
        down: :func:`~lamina.passes.repair.packed` weights ``[in, rank]``, of images ``[rank, in, *window]``.
        up: Packed weights ``[rank, out]``, of images ``[out, rank, 1...]``.
        window: ``strides``, ``pads`` and ``dilations`` of a path over images; else empty.
    """

    node: str
    reads: str
    down: Mapping[str, Any]
    up: Mapping[str, Any]
    window: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class FittedPath:
    """How one path came about.

    Attributes:
        path: It.
        weight_bytes: What it adds to the file, but for names.
        before: Mean squared error of the operator against the original, held-out calibration tokens.
        after: With the path.
        full: With the full-rank map it was cut from.
        gain: What the outputs' divergence on held-out calibration data fell by when it was added (paths that
            were added together have equal parts of it).
    """

    path: LowRankPath
    weight_bytes: int
    before: float
    after: float
    full: float
    gain: float


@dataclass(frozen=True)
class Pathed:
    """A program with paths."""

    program: Program
    fitted: tuple[FittedPath, ...]
    refusals: tuple[Refusal, ...]

    @property
    def paths(self) -> tuple[LowRankPath, ...]:
        """What a plan carries."""
        return tuple(f.path for f in self.fitted)


def add_paths(
    original: Program,
    changed: Program,
    dataset: Dataset,
    *,
    rank: int = 16,
    stands_for: Mapping[str, str] | None = None,
    how: Compensation | None = None,
    divergence: Metric | None = None,
    threads: int | None = None,
    seconds: float = float("inf"),
) -> Pathed:
    """Put paths beside quantized operators where they bring the outputs nearer to the original's.

    With C = E[xx'] = Q L Q' and S = Q L^(1/2), the path is the truncated SVD of M S times S^-1, M being the
    ridge regression of what the operator's output is short of on what it reads: of all maps of that rank the
    one that leaves least error on the calibration data. For weights alone in few bits, M is W - W^, which is
    EoRA. Here the output is compared behind all that was changed before it (two streams), so a path also
    makes up for what reaches it.

    Fires: MatMul, Gemm, ungrouped Conv with a weight that is dequantized, cast or scaled from constants;
    MatMulInteger on an activation that is quantized at run time.
    Refuses: grouped convolutions; operators whose output has no counterpart in the original (an activation
    between them and the next known value).
    Cost: two operators and an addition a path, ``rank (in * window + out)`` weights.
    Source: EoRA, arXiv:2410.21271. Deviates: two streams; a ridge, chosen on held-out tokens; kept only
    where the outputs' divergence falls.

    Args:
        original: What the change was made to.
        changed: The program after it, with the same inputs; left unchanged.
        dataset: Calibration samples; neither selection nor report data.
        rank: Of every path, or as many as an operator has inputs or outputs.
        stands_for: As for :func:`lamina.passes.repair_sites.repair_sites`.
        how: Rows, tokens and ridges.
        divergence: Says how far outputs are from the original's; chosen by the outputs when None.
        threads: Threads of a run; all available cores when None.
        seconds: As for :func:`lamina.passes.compensate.compensate`.

    Raises:
        PassError: ``rank`` is not positive.
        DataError: Fewer than two batches, or data that does not fit.
        BackendError: ONNX Runtime refuses a program.
    """
    if rank < 1:
        raise PassError(f"a path of rank {rank} is none", advice="give a rank of at least 1")
    how = how or Compensation()
    refused: list[Refusal] = []

    def wanted(site: RepairSite) -> bool:
        if not site.fixed or site.operator is None:
            return False
        if site.operator.group > 1:
            refused.append(Refusal(NAME, site.node, f"it is a convolution in {site.operator.group} groups"))
        return site.operator.group == 1

    walk = Walk(
        original,
        changed,
        dataset,
        how,
        stands_for=stands_for,
        wanted=wanted,
        fits=lambda site: True,
        divergence=divergence,
        threads=threads,
        seconds=seconds,
    )
    kept: list[FittedPath] = []
    for wave, sums in walk:
        made = [f for site in wave if (f := _fit(site, sums, rank, how)) is not None]
        if not made:
            continue
        candidate, before = apply_paths(walk.current, [f.path for f in made]), walk.trial.best
        walk.trial.begin(candidate, {})
        if walk.trial.better():
            walk.current = candidate
            gain = (before - walk.trial.best) / len(made)
            kept += [replace(f, gain=gain) for f in made]
    return Pathed(walk.current, tuple(kept), (*walk.refusals, *refused))


def low_rank(moments: Moments, ridge: float, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Down ``[in, r]`` and up ``[r, out]``: of rank r, the least ``sum L2(y - up' down' x)^2`` and penalty.

    Args:
        moments: Sums over tokens of x and of what is missing, y.
        ridge: Penalty of the full map, relative to the mean square of x.
        rank: r, at most.
    """
    values, turn = np.linalg.eigh(moments.xx)
    values = values.clip(0) + max(ridge * float(values.clip(0).mean()), np.finfo(np.float64).tiny)
    roots = np.sqrt(values)
    left, sizes, right = np.linalg.svd((turn.T @ moments.xy) / roots[:, None], full_matrices=False)
    split = np.sqrt(sizes[:rank])
    return (turn / roots) @ left[:, :rank] * split, split[:, None] * right[:rank]


def _fit(site: RepairSite, sums: Sums, rank: int, how: Compensation) -> FittedPath | None:
    fitted, held = (first + others for first, others in sums[site.node])
    found = ridge_correction(fitted, held, offset=False, ridges=how.ridges)
    if found is None or site.operator is None:
        return None
    down, up = low_rank(fitted, found.ridge, rank)
    after = held.error((down @ up).T, np.zeros_like(held.y))
    if after > WORTH * found.before:
        return None
    window: dict[str, list[int]] = {}
    if site.operator.kind == "conv":
        kernel = site.operator.kernel
        down = down.T.reshape(down.shape[1], -1, *kernel)
        up = up.T.reshape(*up.T.shape, *(1 for _ in kernel))
        window = {k: list(getattr(site.operator, k)) for k in ("strides", "pads", "dilations")}
    kind = np.dtype(site.dtype)
    arrays = down.astype(kind), up.astype(kind)
    path = LowRankPath(site.node, site.read, packed(arrays[0]), packed(arrays[1]), window)
    return FittedPath(path, sum(a.nbytes for a in arrays), found.before, after, found.after, 0.0)


def apply_paths(program: Program, paths: Sequence[LowRankPath]) -> Program:
    """The program with paths, on a clone.

    Raises:
        PassError: A node or a value is missing.
    """
    if not paths:
        return program
    clone = program.clone()
    rewriter = Rewriter(clone.model)
    for path in paths:
        _add(path, rewriter)
    return clone


def _add(path: LowRankPath, rewriter: Rewriter) -> None:
    node, graph = rewriter.node(path.node), rewriter.graph
    given = {v.name: v for v in graph.inputs} | {v.name: v for n in graph for v in n.outputs}
    if path.reads not in given:
        raise PassError(f"nothing gives '{path.reads}'", advice="the plan was made for another model")
    read, label = given[path.reads], f"{path.node}_path"
    down = rewriter.constant(unpacked(path.down), f"{label}_down")
    up = rewriter.constant(unpacked(path.up), f"{label}_up")
    kind = node.outputs[0].dtype

    def build() -> ir.Value:
        op_type = "Conv" if path.window else "MatMul"
        flags = {k: list(v) for k, v in path.window.items()}
        inner = rewriter.op(op_type, [read, down], flags, name=f"{label}_in", dtype=kind)
        return rewriter.op(op_type, [inner, up], name=f"{label}_out", dtype=kind)

    add_behind(node, build, rewriter, f"{label}_added")
