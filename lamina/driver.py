"""The driver: capture, fold, find, analyze, price, plan, apply, verify, measure."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.budget import Budget
from lamina.data import Splits, load_splits
from lamina.errors import BackendError, PassError, UnsupportedOperator, VerificationError
from lamina.ir.branches import cache_ports
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes import default_transforms, get_transform
from lamina.passes.fold.catalog import load
from lamina.planner.affordable import affordable
from lamina.planner.bits.size import at_width
from lamina.planner.blame import describe
from lamina.planner.builder import Builder
from lamina.planner.caches import check_caches, exposed, read_cache_bits, with_caches
from lamina.planner.evidence import Final, evidence, explained, front
from lamina.planner.finish import choose, infeasible
from lamina.planner.forms import Folded, pick_forms
from lamina.planner.goal import make_goal
from lamina.planner.judge import Judge, Verdict
from lamina.planner.plan import Plan
from lamina.planner.prepare import prepare, reprepare, sensitivity
from lamina.planner.realize import reproduce
from lamina.planner.referee import Referee
from lamina.planner.request import Request
from lamina.planner.search import Search
from lamina.planner.selection import few_samples
from lamina.planner.strategy import seeds, strategy_of
from lamina.planner.timing import Stopwatch
from lamina.progress import Progress
from lamina.quality import Metric, evaluate, get_metric
from lamina.result import Result, read_plan
from lamina.workload import parse_workload

# Wall seconds of the last measurement, original and result in alternation.
FINAL_SECONDS = 6.0
# How many plans that last measurement may turn down.
FINAL_TRIES = 3


def optimize(
    model: Any,
    budget: str | Budget | None = None,
    *,
    data: Any = None,
    metric: Any = None,
    target: str | Target = "ort:cpu",
    workload: Any = None,
    transforms: Sequence[str] | None = None,
    minimize: str | None = None,
    strategy: str | Sequence[str] | None = None,
    kv_cache: int | None = None,
    seconds: float = 120.0,
    seed: int = 0,
    batch_size: int = 32,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
    **bounds: Any,
) -> Result:
    """Make a model smaller and faster within a measured budget.

    Args:
        model: A path, ``onnx.ModelProto``, ``onnx_ir.Model``, ``torch.nn.Module`` (with ``example_inputs``),
            ``torch.export.ExportedProgram`` or ``torch.fx.GraphModule``.
        budget: ``"latency<=0.5x, size<=10MB, drop<=1%"``; or keywords: ``latency="0.5x", drop="1%"``.
        data: ``.npz`` path, a directory of them, arrays by input name, or any iterable of samples; or a
            mapping ``{"calibration": ..., "selection": ..., "report": ...}``. None: synthesized inputs.
        metric: ``top1``, ``perplexity``, ``cross-entropy``, ``spearman``, ``cosine``, ``kl``,
            ``module:function`` or a callable ``f(outputs, data) -> float`` (higher is better). None: output
            divergence.
        target: ``ort:cpu?threads=2``, ``tvm:llvm?threads=2``.
        workload: Shapes that matter, ``"1x128@0.2; 1x1@0.8"``. None: batch 1.
        transforms: Names of transforms to use; by default those that need not be named
            (:data:`lamina.passes.ON_REQUEST`).
        minimize: Overrides what is minimized: ``latency``, ``size``, ``flops``, ``memory``, ``footprint``
            (the sum of latency ratio and size ratio) or ``damage``.
        strategy: None or ``"search"``: the plans of every rule, and search from there. One or several names
            of rules and allocators: the best of their plans, which only drop branches
            (``"greedy-output-divergence"``, :mod:`lamina.planner.drop_rules`), only merge convolutions
            (``"conv-merge-two-stage-dp"``, :mod:`lamina.planner.chain_plans`) or only quantize
            (``"bits-ilp"``, :mod:`lamina.planner.bits.allocators`).
        kv_cache: 8: key and value caches at the interface become int8, with constant scales (needs data). The
            one thing that changes an interface; ``evidence["kv_cache"]`` says how.
        seconds: Time for measuring candidates (pricing, statistics and final timing come on top).
        seed: Of data splits and search.
        batch_size: Rows a run gets during evaluation.
        example_inputs: For torch modules: a tensor, tuple or dict.
        dynamic_shapes: For torch modules, as ``torch.export`` takes them.
        progress: Receives progress.
        **bounds: Budget bounds as keywords.

    Returns:
        The result; ``result.save(directory)`` writes it.

    Raises:
        InfeasibleBudget: Nothing found meets the budget; carries the nearest plans.
        LaminaError: Model, data, budget, metric, target or workload is not usable.
    """
    request = make_request(
        model,
        Budget.parse(budget, **bounds),
        data=data,
        metric=metric,
        target=target,
        workload=workload,
        transforms=transforms,
        minimize=minimize,
        strategy=strategy,
        kv_cache=kv_cache,
        seconds=seconds,
        seed=seed,
        batch_size=batch_size,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        progress=progress,
    )
    return run(request)


def make_request(
    model: Any,
    budget: Budget,
    *,
    data: Any = None,
    metric: Any = None,
    target: str | Target = "ort:cpu",
    workload: Any = None,
    transforms: Sequence[str] | None = None,
    minimize: str | None = None,
    strategy: str | Sequence[str] | None = None,
    kv_cache: int | None = None,
    seconds: float = 120.0,
    seed: int = 0,
    batch_size: int = 32,
    example_inputs: Any = None,
    dynamic_shapes: Any = None,
    progress: Progress | None = None,
) -> Request:
    """Understand and check what :func:`optimize` was given, before any long work.

    Raises:
        LaminaError: Model, data, budget, metric, target, workload or strategy is not usable.
    """
    progress = progress or Progress()
    with progress.stage("capture"):
        # What is a moment to check comes first: a typo must not wait for a large model to load.
        objective = budget.objective(minimize)
        aim = Target.parse(target)
        backend = get_backend(aim)
        names = tuple(transforms) if transforms is not None else default_transforms()
        for name in names:
            get_transform(name)
        plans_from = strategy_of(strategy)
        plans_from.check(names)
        cache_bits = read_cache_bits(kv_cache)
        program = capture(model, example_inputs=example_inputs, dynamic_shapes=dynamic_shapes)
        program.require_tensors()
        chosen = get_metric(metric, program)
        splits = load_splits(data, program, seed=seed, batch_size=batch_size)
        check_samples(program, splits, chosen)
        request = Request(
            program=program,
            budget=budget,
            splits=splits,
            synthetic_data=data is None,
            metric=chosen,
            target=aim,
            backend=backend,
            workload=parse_workload(workload, program, splits.selection),
            transforms=names,
            minimize=objective,
            seconds=seconds,
            seed=seed,
            progress=progress,
            strategy=plans_from.name,
            kv_cache=cache_bits,
        )
        check_caches(request)
        return request


def run(request: Request) -> Result:
    """The pipeline, from a request to its result.

    Raises:
        InfeasibleBudget: Nothing found meets the budget; carries the nearest plans.
        LaminaError: A model, a sample or the target failed on the way.
    """
    with tempfile.TemporaryDirectory(prefix="lamina-") as folder:
        return _optimize(request, Path(folder))


def check_samples(program: Program, splits: Splits, metric: Metric) -> None:
    """Say before minutes of work whether the metric can score the original on these samples.

    Raises:
        DataError: The metric misses something, or the original gives NaN or an infinite value.
        UnsupportedOperator: The original does not run because of an operator nobody knows.
    """
    metric.check(splits.selection)
    metric.check(splits.report)
    every_core = Target.parse("ort:cpu")
    try:
        run = get_backend(every_core).compile(program.model, every_core).run
    except BackendError as error:
        raise _unknown_operator(program) or error from error
    few = next(splits.selection.batches())
    evaluate(run, few, metric, reference_run=run if metric.kind == "divergence" else None)


def _unknown_operator(program: Program) -> UnsupportedOperator | None:
    """The error that names the first operator of a custom domain, if there is one."""
    for node in program.graph.all_nodes():
        if node.domain and not node.domain.startswith(("ai.onnx", "com.microsoft")):
            return UnsupportedOperator(
                f"nothing here can run operator '{node.op_type}' of domain '{node.domain}'",
                where=f"node '{node.name}' in {program.source}",
                advice="export it as standard operators or as a model-local function; "
                "'lamina fold' carries such operators through untouched",
            )
    return None


def _optimize(request: Request, folder: Path) -> Result:
    progress = request.progress
    original = request.program.model
    with Stopwatch(
        request.backend, request.draft, request.workload, original, folder, request.seed
    ) as stopwatch:
        with progress.stage("capture"):
            judge = Judge(request)  # before the long work: report data that does not fit is found here
        with progress.stage("fold"):
            referee = Referee(request.program, [few_samples(request)])
            folded, left_out = proven_folds(request, stopwatch, referee)
            referee.caches = cache_ports(folded.program)
            folded = with_caches(request, folded, stopwatch, referee)
        strategy = strategy_of(request.strategy)
        prepared = prepare(request, folded, stopwatch, referee, strategy.programs)
        request = at_width(request, prepared)
        with progress.stage("sensitivity"):
            try:
                evaluator, damage = sensitivity(request, prepared)
            except Exception as error:  # a bug in a transform costs its moves, not the run
                prepared = reprepare(request, prepared, stopwatch, error)
                evaluator, damage = sensitivity(request, prepared)
            prepared.undone[:0] = left_out
            builder = Builder(request, prepared, stopwatch)
            goal = make_goal(request, builder, evaluator.score(prepared.costs.space.nothing).value)
        with progress.stage("search"):
            proposed = seeds(request, prepared, evaluator, damage)
            search = Search(
                prepared.costs,
                damage,
                evaluator,
                goal,
                seconds=request.seconds,
                seed=request.seed,
                report=lambda done, total, note: progress.update("search", int(done), int(total), note),
                seeds=proposed,
                only_seeds=not strategy.search,
            )
            search.run()
        with progress.stage("verify"):
            verdict, final = settle(request, builder, judge, search)
            verdict = explained(verdict, builder, damage)
            candidates = search.ranked()
            found = evidence(request, builder, goal, verdict, final, candidates)
    found["rules"] = proposed.report()
    found["seconds"] = dict(progress.seconds)
    realized = verdict.finalist.realized
    return Result(realized.program, realized.plan, found, front(builder, candidates, goal))


def proven_folds(
    request: Request, stopwatch: Stopwatch, referee: Referee
) -> tuple[Folded, list[dict[str, str]]]:
    """Folds and forms whose result computes what the original does; a pass that does not is left out.

    Returns:
        The folded program, and for ``result.json`` what was left out because it failed.
    """
    banned: dict[str, str] = {}
    while True:
        folded = pick_forms(request.program, stopwatch, request.progress, without=tuple(banned))
        try:
            referee.check(folded.program, "folding", exact=True)
        except VerificationError as error:
            if not folded.names:
                raise
            banned[referee.culprit(folded.names)] = error.what
            continue
        left_out = [(r.pass_name, r.why) for r in folded.records if r.why.startswith("undone")]
        left_out += [(load(name).name, reason) for name, reason in banned.items()]
        unique = dict.fromkeys(left_out)
        return folded, [{"pass": name, "where": "model", "reason": why} for name, why in unique]


def settle(request: Request, builder: Builder, judge: Judge, search: Search) -> tuple[Verdict, Final]:
    """The best plan whose bounds still hold in the last, longest measurement.

    Raises:
        InfeasibleBudget: None does.
    """
    verdict: Verdict | None = None
    for _ in range(FINAL_TRIES):
        chosen = choose(request, builder, judge, search)
        verdict = exposed(chosen)
        try:
            verify_final(builder.prepared.referee, verdict)
        except VerificationError as error:  # never shipped: named in the report, and another one is chosen
            builder.discard(verdict.finalist.candidate.genome, error)
            continue
        final = measure_final(request, builder.stopwatch, verdict)
        if not verdict.finalist.changed:  # one file: two times of it would differ by noise alone
            final = replace(final, after=final.before, relative=verdict.finalist.relative)
        finalist = replace(verdict.finalist, relative=final.relative)
        seconds = sum(c.weight * t.median_s for c, t in zip(request.workload, final.before, strict=True))
        if not verdict.finalist.changed or affordable(
            request, builder, finalist, original_s=seconds, margin=1.0
        ):
            return replace(verdict, finalist=finalist), final
        # what was seen last counts: choose another
        builder.done[finalist.candidate.genome] = replace(chosen.finalist, relative=final.relative)
    raise infeasible(request, builder, search, verdict)


def verify_final(referee: Referee, verdict: Verdict) -> None:
    """Hold what is about to be returned against the original once more, as it is now.

    Raises:
        VerificationError: It may not be returned.
    """
    realized = verdict.finalist.realized
    if verdict.finalist.changed:
        plan = realized.plan
        referee.check(realized.program, describe(plan.moves), exact=plan.exact)


def measure_final(request: Request, stopwatch: Stopwatch, verdict: Verdict) -> Final:
    """Time the result against the original once more, and audit its kernels."""
    program = verdict.finalist.realized.program
    if request.draft == request.target:
        before, after, relative = stopwatch.latencies(program.model, seconds=FINAL_SECONDS)
    else:
        original, folder = request.program.model, stopwatch.folder
        with Stopwatch(
            request.backend, request.target, request.workload, original, folder, request.seed
        ) as last:
            before, after, relative = last.latencies(program.model, seconds=FINAL_SECONDS)
    planned = {m.site.name: m.option.name for m in verdict.finalist.realized.plan.moves}
    audit = request.backend.audit(program.model, request.target, planned)
    return Final(before, after, relative, audit, original_elsewhere(request, stopwatch))


def original_elsewhere(request: Request, stopwatch: Stopwatch) -> float | None:
    """Weighted seconds of the original in ONNX Runtime; None where that is the target."""
    if request.target.backend == "ort":
        return None
    target = Target("ort", "cpu", request.target.threads)
    path = stopwatch.write(request.program.model)
    (times,) = get_backend(target).measure([path], target, request.workload, seconds=1.0)
    return sum(case.weight * time.median_s for case, time in zip(request.workload, times, strict=True))


def apply(model: Any, plan: Plan | str | Path, **capture_options: Any) -> Program:
    """Apply a plan to the model it was made for; reproduces the optimized program bit for bit.

    Args:
        model: What was given to :func:`optimize`.
        plan: A plan, a ``plan.json``, or a result's directory.
        **capture_options: ``example_inputs`` and ``dynamic_shapes`` for torch modules.

    Raises:
        PassError: The plan was made for another model.
        LaminaError: Model or plan cannot be read.
    """
    chosen = read_plan(plan)
    program = capture(model, **capture_options)
    if program.fingerprint != chosen.fingerprint:
        raise PassError(
            "the plan was made for another model",
            where=f"fingerprint {chosen.fingerprint} in the plan, {program.fingerprint} of the model",
            advice="give the model the plan was made from, or optimize this one",
        )
    return reproduce(program, chosen)
