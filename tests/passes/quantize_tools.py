"""Small models, ranges, and direct application for the quantization tests."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from lamina.analysis.streaming import RangeAccumulator
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Refusal, Site
from lamina.passes.quantize import Quantize

F = np.float32


@dataclass(frozen=True)
class Ranges:
    """What the transform reads of the calibration statistics."""

    ranges: Mapping[str, object] = field(default_factory=dict)


def program(build: Callable[..., ir.Value], *shapes, opset: int = 17) -> Program:
    """A program whose graph ``build(rewriter, *inputs)`` writes; inputs are x0, x1, ...; the output is y."""
    graph = ir.Graph([], [], nodes=[], opset_imports={"": opset}, name="main")
    model = ir.Model(graph, ir_version=10)
    for i, shape in enumerate(shapes):
        kind = ir.TensorType(ir.DataType.FLOAT)
        graph.inputs.append(ir.Value(name=f"x{i}", type=kind, shape=ir.Shape(shape) if shape else None))
    out = build(Rewriter(model), *graph.inputs)
    out.name, out.type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(out)
    for node in graph:
        for value in node.outputs:
            value.dtype = value.dtype or ir.DataType.FLOAT
    return Program(model, "test")


def sites(prog: Program, transform: Quantize | None = None) -> dict[str, Site]:
    found = (transform or Quantize()).sites(prog)
    return {s.name: s for s in found if isinstance(s, Site)}


def refusals(prog: Program, transform: Quantize | None = None) -> dict[str, str]:
    return {r.where: r.reason for r in (transform or Quantize()).sites(prog) if isinstance(r, Refusal)}


def pick(prog: Program, site: Site, name: str, stats=None, transform: Quantize | None = None) -> Option:
    options = (transform or Quantize()).options(site, prog, stats, None)
    return next(o for o in options if o.name == name)


def apply_quantize(
    prog: Program, choices: Mapping[str, Option], transform: Quantize | None = None
) -> Program:
    """Emit the chosen options in place on a clone and remove what nobody reads."""
    transform = transform or Quantize()
    found = sites(prog, transform)
    clone = prog.clone()
    version = max([13, *(int(o.parameters.get("opset", 13)) for o in choices.values())])
    if clone.opset < version:
        from lamina.ir.opset import raise_opset

        raise_opset(clone.model, version)
    rewriter = Rewriter(clone.model)
    for name, option in choices.items():
        nodes = {n: rewriter.node(n) for n in found[name].nodes}
        last = nodes[found[name].nodes[-1]]
        (value,) = transform.emit(found[name], option, rewriter.at(last), nodes)
        rewriter.at(None).replace_uses(last.outputs[0], value)
    remove_dead(clone.model)
    return clone


def remove_dead(model: ir.Model) -> None:
    for node in reversed(list(model.graph)):
        if not any(v.uses() or v.is_graph_output() for v in node.outputs):
            model.graph.remove(node, safe=True)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def quantize_all(prog: Program, form: str, stats=None, transform: Quantize | None = None) -> Program:
    """Every site that offers ``form`` takes it."""
    transform = transform or Quantize()
    choices = {}
    for name, site in sites(prog, transform).items():
        for option in transform.options(site, prog, stats, None):
            if option.name == form:
                choices[name] = option
    return apply_quantize(prog, choices, transform)


def session(prog: Program, *, optimized: str | None = None, extra=()):
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if optimized:
        options.optimized_model_filepath = optimized
    model = prog.model.clone()
    model.graph.outputs.extend(extra)
    return ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(prog: Program, *arrays: np.ndarray) -> np.ndarray:
    feeds = {f"x{i}": a for i, a in enumerate(arrays)}
    return session(prog).run(None, feeds)[0]


def kernels(prog: Program) -> Counter:
    """Operator types in the graph ONNX Runtime really runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "optimized.onnx")
        session(prog, optimized=path)
        return Counter(n.op_type for n in ir.load(path).graph.all_nodes())


def range_of(*arrays: np.ndarray):
    accumulator = RangeAccumulator()
    for array in arrays:
        accumulator.add(np.asarray(array))
    return accumulator.result()


def calibrate(prog: Program, *arrays: np.ndarray) -> Ranges:
    """Ranges of every input and node output, from one run with nothing optimized away."""
    import onnxruntime as ort

    model = prog.model.clone()
    names = [v.name for n in model.graph for v in n.outputs if not v.is_graph_output()]
    model.graph.outputs.extend(v for n in list(model.graph) for v in n.outputs if not v.is_graph_output())
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    running = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    feeds = {f"x{i}": a for i, a in enumerate(arrays)}
    found = dict(zip(["y", *names], running.run(["y", *names], feeds), strict=True))
    found = {k: v for k, v in (found | feeds).items() if v.dtype == np.float32}
    return Ranges({k: range_of(v) for k, v in found.items()})


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    difference = actual.astype(np.float64) - expected
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def bytes_of(prog: Program) -> int:
    return len(ir.to_proto(prog.model).SerializeToString())
