"""MetaSchedule on a lowered module, inside the worker process; imports TVM when called, never before."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from lamina.backends import tvm_intrinsics

TRIALS_AN_ITERATION = 8
Report = Callable[[int, int, str], None]


def apply_database(module: Any, target: Any, folder: str) -> Any:
    """The module with the best recorded schedule of each function; functions without one stay as they are."""
    tvm_intrinsics.load()
    from tvm import relax
    from tvm.s_tir import meta_schedule as ms

    with target, ms.database.JSONDatabase(work_dir=folder):
        return relax.transform.MetaScheduleApplyDatabase()(module)


def tune(module: Any, target: Any, asked: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Search schedules, the dearest function first; records go to ``asked["database"]`` as they come.

    The caller ends this process when the time is up; what was recorded until then counts. So functions are
    searched one after the other, a few trials each and then the rest: MetaSchedule's own scheduler commits
    nothing before it has gone through all of them once.
    """
    tvm_intrinsics.load()
    from tvm.s_tir import meta_schedule as ms
    from tvm.s_tir.meta_schedule.relax_integration import extract_tasks, extracted_tasks_to_tune_contexts

    folder, trials = asked["database"], int(asked["trials"])
    tasks = sorted(extract_tasks(module, target), key=_dearness, reverse=True)
    if not tasks:
        return {"tasks": 0, "trials": 0}
    # "llvm" and not the target's own rules: those add int8 dot products, which were seen to compute wrong
    # results silently and cannot occur in what the ONNX importer makes (it widens to int32 first).
    contexts, weights = extracted_tasks_to_tune_contexts(
        tasks, folder, space="llvm", strategy=_strategy(ms), num_threads=int(asked["threads"]), seed=0
    )
    first = min(trials, TRIALS_AN_ITERATION)
    total = trials * len(contexts)
    report(0, total, f"{len(contexts)} kernels")
    counting = _progress(ms, total, report)
    shared: dict[str, Any] = {
        "work_dir": folder,
        "num_trials_per_iter": first,
        "builder": _builder(ms, int(asked["threads"])),
        "runner": _runner(ms),
        "database": ms.database.JSONDatabase(work_dir=folder),
        "cost_model": ms.cost_model.CostModel.create("xgb", num_tuning_cores=int(asked["threads"])),
        "measure_callbacks": [*ms.measure_callback.MeasureCallback.create("default"), counting],
    }
    for wanted in dict.fromkeys((first, trials)):
        for context, weight in zip(contexts, weights, strict=True):
            more = wanted - _recorded(shared["database"], context, wanted)
            if more > 0:
                one = {"tasks": [context.clone()], "task_weights": [weight]}
                ms.tune.tune_tasks(**one, max_trials_global=more, **shared)
    return {"tasks": len(contexts), "trials": total}


def _recorded(database: Any, context: Any, most: int) -> int:
    """Candidates of this function that an earlier search, or an earlier round, measured."""
    if not database.has_workload(context.mod):
        return 0
    return len(database.get_top_k(database.commit_workload(context.mod), most))


def _dearness(task: Any) -> float:
    from tvm.s_tir.analysis import estimate_tir_flops

    try:
        return float(estimate_tir_flops(task.dispatched[0])) * int(task.weight)
    except Exception:  # data-dependent loops have no count; they come last
        return 0.0


def _strategy(ms: Any) -> Any:
    # the stock population (512) takes longer to breed than these few trials take to run
    return ms.search_strategy.EvolutionarySearch(
        population_size=64, init_min_unmeasured=16, genetic_num_iters=2
    )


def _builder(ms: Any, threads: int) -> Any:
    workers = max(1, min(threads, os.cpu_count() or 1))
    return ms.builder.LocalBuilder(max_workers=workers, timeout_sec=60, initializer=tvm_intrinsics.load)


def _runner(ms: Any) -> Any:
    config = ms.runner.EvaluatorConfig(number=1, repeat=3, min_repeat_ms=20, enable_cpu_cache_flush=False)
    return ms.runner.LocalRunner(timeout_sec=30, evaluator_config=config)


def _progress(ms: Any, total: int, report: Report) -> Any:
    from tvm.ir.utils import derived_object

    @derived_object
    class Counting(ms.measure_callback.PyMeasureCallback):
        """Counts measured candidates."""

        done, failed = 0, 0

        def apply(self, task_scheduler: Any, task_id: int, candidates: Any, built: Any, ran: Any) -> None:
            """Called after each batch."""
            self.done += len(candidates)
            self.failed += sum(1 for b in built if b.error_msg is not None)
            report(self.done, total, f"{self.failed} did not build" if self.failed else "")

    return Counting()
