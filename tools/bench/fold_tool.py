"""Fold one model with one tool in a process of its own and say how long it took; needs that tool and onnx.

    python tools/bench/fold_tool.py TOOL IN OUT

Prints one JSON line: ``seconds`` and ``cpu`` from reading the file to having written the result, imports left
out; for lamina ``checked_seconds`` says how much of it was running the result against the original.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

Work = Callable[[str, str], dict[str, Any] | None]


def lamina() -> Work:
    import onnxruntime  # noqa: F401 what folding imports when it first needs it is not its time
    import onnxscript.optimizer
    import onnxscript.rewriter  # noqa: F401

    from lamina.folding import run_fold
    from lamina.passes.fold import FOLDS, load

    for name in FOLDS:
        load(name)

    def work(source: str, output: str) -> dict[str, Any]:
        result = run_fold(source)
        result.save(output)
        return {"checked_seconds": result.seconds["check"], "equal": result.check.equal}

    return work


def onnxscript() -> Work:
    import onnx
    from onnxscript.optimizer import optimize

    return lambda source, output: onnx.save(optimize(onnx.load(source)), output)


def onnxruntime() -> Work:
    import onnxruntime

    def work(source: str, output: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = output
        onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])

    return work


def onnxslim() -> Work:
    import onnx
    import onnxslim

    return lambda source, output: onnx.save(onnxslim.slim(onnx.load(source)), output)


def onnxsim() -> Work:
    import onnx
    import onnxsim

    def work(source: str, output: str) -> None:
        found = onnxsim.simplify(onnx.load(source))
        onnx.save(found[0] if isinstance(found, tuple) else found, output)

    return work


TOOLS = {f.__name__: f for f in (lamina, onnxscript, onnxruntime, onnxslim, onnxsim)}


def main() -> None:
    tool, source, output = sys.argv[1:4]
    work = TOOLS[tool]()
    wall, cpu = time.perf_counter(), time.process_time()
    more = work(source, output)
    spent = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    print(json.dumps({**spent, **(more or {})}))


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: a tool named like a file in it must not be found here
    main()
