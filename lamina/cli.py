"""The command line: the same verbs as the Python API."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lamina.commands import finite, made, names, print_json, shapes, splits
from lamina.errors import BudgetError, LaminaError
from lamina.ir.quiet import quiet

app = typer.Typer(
    help="A compiler for trained neural networks: model and budget in, a smaller and faster model out.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[Path, typer.Argument(help="an ONNX file", show_default=False)]
Data = Annotated[
    Path | None, typer.Option(help=".npz with arrays named like the inputs, or a directory of them")
]
Metric = Annotated[
    str | None,
    typer.Option(help="top1, perplexity, cross-entropy, spearman, cosine, kl, or module:function"),
]
Target = Annotated[str, typer.Option(help="where the model will run, e.g. ort:cpu?threads=2")]
Workload = Annotated[
    str | None, typer.Option(help="shapes that matter and their weights, e.g. '1x128@0.2; 1x1@0.8'")
]
KvCache = Annotated[
    int | None, typer.Option(help="8: key and value caches become int8 at the interface; needs data")
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]
Output = Annotated[Path, typer.Option("-o", "--output", help="directory for the result")]


@app.command()
def optimize(
    model: Model,
    output: Output,
    budget: Annotated[str, typer.Option(help="e.g. 'latency<=0.5x, size<=10MB, drop<=1%'")],
    data: Data = None,
    selection_data: Annotated[Path | None, typer.Option(help="samples candidates are judged on")] = None,
    report_data: Annotated[Path | None, typer.Option(help="samples only the final figures come from")] = None,
    metric: Metric = None,
    target: Target = "ort:cpu",
    workload: Workload = None,
    transforms: Annotated[
        str | None, typer.Option(help="comma-separated, e.g. drop,quantize; default all but share")
    ] = None,
    minimize: Annotated[str | None, typer.Option(help="latency, size, flops, memory or damage")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="search (default), or rules and allocators: only their plans are looked at"),
    ] = None,
    kv_cache: KvCache = None,
    seconds: Annotated[float, typer.Option(help="time for measuring candidates", min=1.0)] = 120.0,
    seed: Annotated[int, typer.Option(help="of data splits and search")] = 0,
    batch_size: Annotated[int, typer.Option(help="rows a run gets during evaluation", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Make a model smaller and faster within a measured budget."""
    import lamina
    from lamina.report.terminal import LiveProgress, result_tables

    with made(output), LiveProgress(quiet=as_json) as progress:
        result = lamina.optimize(
            model,
            budget,
            data=splits(data, selection_data, report_data),
            metric=metric,
            target=target,
            workload=workload,
            transforms=names(transforms),
            minimize=minimize,
            strategy=strategy,
            kv_cache=kv_cache,
            seconds=seconds,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    written = result.save(output)
    if as_json:
        print_json({**result.evidence, "files": [str(p) for p in written]})
    else:
        result_tables(result.evidence, [str(p) for p in written])


@app.command()
def quantize(
    model: Model,
    output: Output,
    data: Data = None,
    metric: Metric = None,
    bits: Annotated[
        str | None,
        typer.Option(help="whole model in 8, 4, 3 or 2, or mixed; default 8, with --size mixed"),
    ] = None,
    size: Annotated[str | None, typer.Option(help="bound on the file, e.g. 0.2x or 10MB")] = None,
    latency: Annotated[str | None, typer.Option(help="bound on the latency, e.g. 0.5x or 4ms")] = None,
    drop: Annotated[str | None, typer.Option(help="bound on the quality lost, e.g. 1%")] = None,
    target: Target = "ort:cpu",
    workload: Workload = None,
    strategy: Annotated[
        str | None, typer.Option(help="search (default), or allocators: only their plans are looked at")
    ] = None,
    kv_cache: KvCache = None,
    seconds: Annotated[float, typer.Option(help="time for measuring candidates", min=1.0)] = 60.0,
    seed: Annotated[int, typer.Option(help="of data splits and search")] = 0,
    batch_size: Annotated[int, typer.Option(help="rows a run gets during evaluation", min=1)] = 32,
    as_json: Json = False,
) -> None:
    """Quantize a model, operator by operator; works with no option but the output."""
    from lamina.quantizing import quantize as run
    from lamina.report.terminal import LiveProgress, result_tables

    with made(output), LiveProgress(quiet=as_json) as progress:
        result = run(
            model,
            data=data,
            metric=metric,
            bits=bits,
            size=size,
            latency=latency,
            drop=drop,
            strategy=strategy,
            kv_cache=kv_cache,
            target=target,
            workload=workload,
            seconds=seconds,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    written = result.save(output)
    if as_json:
        print_json({**result.evidence, "files": [str(p) for p in written]})
    else:
        result_tables(result.evidence, [str(p) for p in written])


@app.command()
def fold(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", help="the ONNX file to write")],
    target: Annotated[
        str | None,
        typer.Option(
            help="choose equivalent forms by measuring there, e.g. ort:cpu?threads=1; default: none"
        ),
    ] = None,
    workload: Workload = None,
    data: Data = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="fix dynamic dims: INPUT=1x128 (? stays dynamic) or DIM=128; may be repeated"),
    ] = None,
    only: Annotated[str | None, typer.Option(help="comma-separated folds to use instead of all")] = None,
    forms: Annotated[
        str | None, typer.Option(help="comma-separated forms to apply, or to try on the target")
    ] = None,
    as_json: Json = False,
) -> None:
    """Rewrite a model into an equal one with fewer nodes, or into its fastest equal form on a target."""
    from lamina.folding import run_fold
    from lamina.report.fold_table import fold_table
    from lamina.report.terminal import LiveProgress

    with LiveProgress(quiet=as_json) as progress:
        result = run_fold(
            model,
            target=target,
            data=data,
            workload=workload,
            shapes=shapes(shape or ()),
            only=names(only),
            forms=names(forms),
            progress=progress,
        )
    files = [str(p) for p in result.save(output)]
    if as_json:
        print_json({**result.report(), "files": files})
    else:
        fold_table(result.report(), files)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(help="plan.json, or a result's directory", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="the ONNX file to write")],
    as_json: Json = False,
) -> None:
    """Apply a plan to the model it was made for."""
    import lamina
    from lamina.ir.io import save_model

    program = lamina.apply(model, plan)
    written = [str(p) for p in save_model(program.model, output)]
    if as_json:
        print_json({"files": written})
    else:
        typer.echo("wrote " + ", ".join(written))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="the model to compare with", show_default=False)],
    b: Annotated[Path, typer.Argument(help="the other model", show_default=False)],
    data: Data = None,
    metric: Metric = None,
    target: Target = "ort:cpu",
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="relative to an output's largest magnitude; default 1e-5, or 8 ulps of a shorter dtype",
            min=0.0,
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="inputs to generate", min=0)] = 16,
    seed: Annotated[int, typer.Option(help="of the generated inputs")] = 0,
    as_json: Json = False,
) -> None:
    """Say whether two models are the same function; exit code 1 when they are not."""
    from lamina.comparison import compare as run
    from lamina.comparison import damage
    from lamina.report.terminal import comparison_table

    found = run(a, b, data=data, target=target, tolerance=tolerance, samples=samples, seed=seed).to_dict()
    if metric is not None:
        if data is None:
            raise BudgetError("a metric needs samples", advice="give --data X.npz with what the metric reads")
        found["quality"] = dict(damage(a, b, data=data, metric=metric, target=target))
    if as_json:
        print_json(finite(found))
    else:
        comparison_table(found)
    raise typer.Exit(0 if found["equal"] else 1)


@app.command()
def bench(
    models: Annotated[list[Path], typer.Argument(help="ONNX files with the same inputs", show_default=False)],
    data: Data = None,
    target: Target = "ort:cpu",
    workload: Workload = None,
    seconds: Annotated[float, typer.Option(help="time to measure, in all", min=0.1)] = 5.0,
    as_json: Json = False,
) -> None:
    """Time models in alternation, each in a process of its own; the first is the 1.0."""
    from lamina.backends import get_backend
    from lamina.backends.backend import Target as TargetSpec
    from lamina.comparison import same_interface
    from lamina.data import load_data
    from lamina.ir.capture import capture
    from lamina.report.terminal import bench_table
    from lamina.workload import parse_workload

    program = capture(models[0])
    for other in models[1:]:
        same_interface(program, capture(other))
    aim = TargetSpec.parse(target)
    cases = parse_workload(workload, program, None if data is None else load_data(data, program))
    with get_backend(aim).timer(aim, cases) as timer:
        ids = timer.add_all(models)
        timings = timer.time(ids, None, seconds)
        rows = [
            {
                "model": str(path),
                "case": case.name,
                "median_s": timings.latency(i, case.name).median_s,
                "minimum_s": timings.latency(i, case.name).minimum_s,
                "spread_s": timings.latency(i, case.name).spread_s,
                "samples": timings.latency(i, case.name).samples,
                "ratio": timings.ratio(i, ids[0], case.name).median,
                "ratio_low": timings.ratio(i, ids[0], case.name).low,
                "ratio_high": timings.ratio(i, ids[0], case.name).high,
            }
            for i, path in zip(ids, models, strict=True)
            for case in cases
        ]
    if as_json:
        print_json({"target": str(aim), "rows": rows})
    else:
        bench_table(str(aim), rows)


@app.command()
def analyze(
    model: Model,
    data: Data = None,
    target: Target = "ort:cpu",
    workload: Workload = None,
    metrics: Annotated[
        str | None, typer.Option(help="comma-separated, see docs/metrics.md; default: all that one run gives")
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="add hawq-trace and fisher-diagonal (needs torch)")
    ] = False,
    damages: Annotated[
        bool, typer.Option("--damages", help="add measured damage: drop each branch, round each operator")
    ] = False,
    bits: Annotated[str, typer.Option(help="widths for --damages and hawq-trace")] = "8,4",
    samples: Annotated[int, typer.Option(help="samples for --damages and gradients, at most")] = 64,
    no_options: Annotated[
        bool, typer.Option("--no-options", help="leave out what the planner would consider")
    ] = False,
    operators: Annotated[
        bool, typer.Option("--operators", help="also list the operators of each branch")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="directory for figures: SVG, and PNG with the extra 'plot'")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace figures that are there")] = False,
    as_json: Json = False,
) -> None:
    """Show what each part of a model costs, how redundant and how sensitive it is, and what to do next."""
    from lamina.analyze_command import run_analyze

    run_analyze(
        model,
        data,
        target=target,
        workload=workload,
        metrics=names(metrics),
        gradients=gradients,
        damages=damages,
        bits=bits,
        samples=samples,
        options=not no_options,
        operators=operators,
        figures=figures,
        force=force,
        as_json=as_json,
    )


@app.command()
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="directory for the result")] = Path(
        "lamina-demo"
    ),
    seconds: Annotated[float, typer.Option(help="time for measuring candidates", min=1.0)] = 12.0,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on a small model and data set that come with lamina."""
    from lamina import demo as shipped

    optimize(
        model=shipped.MODEL,
        output=output,
        budget=shipped.BUDGET,
        data=shipped.DATA,
        metric=shipped.METRIC,
        target="ort:cpu?threads=1",
        workload=shipped.WORKLOAD,
        seconds=seconds,
        as_json=as_json,
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one message and an exit code, never a traceback."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with quiet():  # stderr is for the one error, or for progress
            app(args=given)
    except LaminaError as error:
        if "--json" in given:
            print_json(_plain(error))
        else:
            from lamina.report.terminal import error_text

            error_text(error)
        if os.environ.get("LAMINA_TRACEBACK"):
            raise
        sys.exit(error.exit_code)


def _plain(error: LaminaError) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "what": error.what,
        "where": error.where,
        "advice": error.advice,
        "nearest": list(getattr(error, "nearest", ())),
    }


if __name__ == "__main__":
    main()
