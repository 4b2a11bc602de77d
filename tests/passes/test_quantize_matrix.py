"""Every form of every operator at several opsets: two runtimes agree with float32 and with each other.

The second is the ONNX reference evaluator, which knows no fusion; OpenVINO is a third where it is installed.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import apply_quantize, calibrate, program, relative_error, session, sites

from lamina.passes.quantize import FORMS, Quantize

# Largest relative error of the output against float32, on normal weights and inputs.
BOUNDS = {
    "w8a8-static": 0.04,
    "w8a8-dynamic": 0.04,
    "w8": 0.02,
    "w4": 0.13,
    "stored-w8": 0.012,
    "stored-w4": 0.13,
    "float16": 1e-3,
    "bfloat16": 6e-3,
    "stored-f8": 0.035,
    "stored-mxf8": 0.035,
}
OPSETS = (13, 17, 21)
EVERY = Quantize(forms=(*FORMS, "stored-f8", "stored-mxf8"), dynamic_conv=True, products=True)
rng = np.random.default_rng(31)


def normal(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@dataclass(frozen=True)
class Operator:
    """One weighted operator: its type, constants by input position, attributes, shapes of what it reads."""

    op_type: str
    constants: dict[int, np.ndarray]
    shapes: tuple[tuple[int, ...], ...]
    flags: dict[str, object]
    least: int = 13


def op(op_type, constants, *shapes, least=13, **flags):
    return Operator(op_type, constants, shapes, flags, least)


OPERATORS = {
    "conv 1d": op("Conv", {1: normal(8, 16, 3), 2: normal(8)}, (2, 16, 12)),
    "conv 2d": op("Conv", {1: normal(8, 16, 3, 3), 2: normal(8)}, (2, 16, 7, 7), pads=[1, 1, 1, 1]),
    "conv 3d": op("Conv", {1: normal(8, 16, 2, 2, 2)}, (1, 16, 4, 4, 4)),
    "conv grouped": op("Conv", {1: normal(8, 8, 3, 3)}, (2, 16, 7, 7), group=2),
    "conv depthwise": op("Conv", {1: normal(16, 1, 3, 3), 2: normal(16)}, (2, 16, 7, 7), group=16),
    "conv dilated": op("Conv", {1: normal(8, 16, 3, 3)}, (1, 16, 9, 9), dilations=[2, 2], strides=[2, 2]),
    "transposed": op("ConvTranspose", {1: normal(16, 8, 3, 3), 2: normal(8)}, (1, 16, 5, 5)),
    "transposed grouped": op("ConvTranspose", {1: normal(16, 4, 3, 3)}, (1, 16, 5, 5), group=2),
    "transposed 1d": op("ConvTranspose", {1: normal(16, 8, 4)}, (1, 16, 6), strides=[2]),
    "gemm": op("Gemm", {1: normal(64, 24), 2: normal(24)}, (5, 64)),
    "gemm transposed": op("Gemm", {1: normal(24, 64), 2: normal(24)}, (5, 64), transB=1, alpha=0.5),
    "matmul": op("MatMul", {1: normal(64, 24)}, (2, 5, 64)),
    "matmul left": op("MatMul", {0: normal(24, 64)}, (2, 64, 5)),
    "embedding": op("Gather", {0: normal(100, 32)}, ()),
    "lstm": op("LSTM", {1: normal(1, 32, 16) / 4, 2: normal(1, 32, 8) / 4}, (6, 2, 16), hidden_size=8),
    "gru both ways": op(
        "GRU",
        {1: normal(2, 24, 16) / 4, 2: normal(2, 24, 8) / 4, 3: normal(2, 48)},
        (6, 2, 16),
        hidden_size=8,
        direction="bidirectional",
        least=14,
    ),
    "attention": op("MatMul", {}, (2, 3, 5, 32), (2, 3, 32, 7)),
}


def build(case: Operator, opset: int):
    def graph(r, *activations):
        if case.op_type == "Gather":
            flat = r.op("Cast", [activations[0]], {"to": int(ir.DataType.INT64)}, dtype=ir.DataType.INT64)
            return r.op("Gather", [r.constant(case.constants[0], "w0"), flat], name="op")
        waiting = list(activations)
        last = max([*case.constants, len(waiting) - 1 + len(case.constants)])
        inputs = [
            r.constant(case.constants[i], f"w{i}") if i in case.constants else waiting.pop(0)
            for i in range(last + 1)
        ]
        return r.op(case.op_type, inputs, case.flags, name="op")

    shapes = [(10,)] if case.op_type == "Gather" else case.shapes
    return program(graph, *shapes, opset=opset)


def feeds(case: Operator) -> list[np.ndarray]:
    if case.op_type == "Gather":
        return [np.arange(10, dtype=np.float32) * 9]
    return [normal(*shape) for shape in case.shapes]


@cache
def prepared(name: str, opset: int):
    """Program, inputs, float32 output, and the options of its one weighted operator."""
    case = OPERATORS[name]
    prog, arrays = build(case, opset), feeds(case)
    site = sites(prog, EVERY)["op"]
    options = {o.name: o for o in EVERY.options(site, prog, calibrate(prog, *arrays), None)}
    given = {f"x{i}": a for i, a in enumerate(arrays)}
    return prog, given, session(prog).run(None, given)[0], options


def offered() -> list[tuple[str, str, int]]:
    found = []
    for name, case in OPERATORS.items():
        options = prepared(name, OPSETS[-1])[3]
        found += [(name, form, o) for form in options if form in BOUNDS for o in OPSETS if o >= case.least]
    return found


def evaluate(prog, given) -> np.ndarray:
    from onnx.reference import ReferenceEvaluator

    from lamina.ir.opset import raise_opset

    if prog.opset < 21:  # the evaluator has no conversions before opset 19; what they mean is the same
        prog = prog.clone()
        raise_opset(prog.model, 21)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # overflow of numpy's own in an activation
        return ReferenceEvaluator(ir.to_proto(prog.model)).run(None, given)[0]


@pytest.mark.parametrize(("name", "form", "opset"), offered())
def test_runtimes_agree_with_float32_and_with_each_other(name, form, opset):
    prog, given, expected, options = prepared(name, opset)
    made = apply_quantize(prog, {"op": options[form]}, EVERY)
    # a form may ask for a newer opset than the model had
    assert made.opset == max(opset, int(options[form].parameters.get("opset", 13)))
    answer = session(made).run(None, given)[0]
    assert answer.shape == expected.shape
    assert answer.dtype == expected.dtype
    assert 0 < relative_error(answer, expected) < BOUNDS[form]
    if name == "transposed grouped":
        return  # the evaluator's own ConvTranspose knows no groups
    other = evaluate(made, given)
    assert other.shape == expected.shape
    # a step of the output may be rounded the other way; fused block kernels round activations to 8 bits
    assert relative_error(other, answer) < BOUNDS[form] / (2 if form in ("w8", "w4") else 4)


def test_every_form_and_every_operator_is_covered():
    pairs = {(name, form) for name, form, _ in offered()}
    assert {form for _, form in pairs} == set(BOUNDS) - {"bfloat16"}
    assert {name for name, _ in pairs} == set(OPERATORS)
    kinds = {"transposed", "lstm", "gru both ways"}
    assert all((name, "stored-w8") in pairs and (name, "w8a8-static") not in pairs for name in kinds)
    assert {form for name, form in pairs if name == "attention"} == {"w8a8-static", "w8a8-dynamic"}


@pytest.mark.parametrize("name", ["conv 2d", "matmul", "embedding", "lstm", "transposed"])
def test_bfloat16_stores_what_float16_cannot(name):
    prog, given, expected, options = prepared(name, 21)
    assert "bfloat16" not in options
    site, only = sites(prog, EVERY)["op"], Quantize(forms=("bfloat16",))
    (option,) = only.options(site, prog, None, None)
    made = apply_quantize(prog, {"op": option}, only)
    answer = session(made).run(None, given)[0]
    assert 0 < relative_error(answer, expected) < BOUNDS["bfloat16"]
    if name != "embedding":  # the evaluator gathers no bfloat16
        assert relative_error(evaluate(made, given), answer) < 1e-5
    scale = np.float32(1e6)
    case = OPERATORS[name]
    large = Operator(case.op_type, {i: a * scale for i, a in case.constants.items()}, case.shapes, case.flags)
    wide = build(large, 21)
    names = [o.name for o in EVERY.options(sites(wide, EVERY)["op"], wide, None, None)]
    assert "bfloat16" in names
    assert "float16" not in names


@pytest.mark.parametrize(("name", "form", "opset"), offered())
def test_openvino_agrees(name, form, opset):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    prog, given, expected, options = prepared(name, opset)
    made = apply_quantize(prog, {"op": options[form]}, EVERY)
    read = openvino.Core().read_model(ir.to_proto(made.model).SerializeToString())
    # on CPUs with bfloat16 its float operators would round to that
    compiled = openvino.compile_model(read, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert relative_error(next(iter(compiled(given).values())), expected) < BOUNDS[form]


@pytest.mark.parametrize(
    ("name", "form"), [("conv 2d", "w8a8-static"), ("matmul", "stored-w4"), ("gemm", "w8a8-dynamic")]
)
def test_tvm_agrees(name, form):
    pytest.importorskip("tvm", reason="TVM is not installed")
    from lamina.backends import get_backend
    from lamina.backends.backend import Target

    prog, given, expected, options = prepared(name, 13)
    target = Target.parse("tvm:llvm?threads=1")
    made = apply_quantize(prog, {"op": options[form]}, EVERY)
    answer = next(iter(get_backend(target).compile(made.model, target).run(given).values()))
    assert relative_error(answer, expected) < BOUNDS[form]


def test_all_outputs_of_a_recurrent_operator_are_given():
    from lamina.planner.apply import apply_moves
    from lamina.planner.plan import Move

    def graph(r, x):
        weights = [r.constant(normal(1, 32, k) / 4, n) for n, k in (("w", 16), ("r", 8))]
        y = r.op("LSTM", [x, *weights], {"hidden_size": 8}, outputs=3, name="op")
        state = y.producer().outputs[2]
        state.dtype = ir.DataType.FLOAT
        axes = r.constant(np.array([1]), "axes")
        return r.op("Add", [y, r.op("Unsqueeze", [state, axes], name="up")], name="both")

    prog = program(graph, (6, 2, 16))
    (site,) = sites(prog).values()
    assert len(site.outputs) == 2
    (option,) = Quantize(forms=("stored-w8",)).options(site, prog, None, None)
    made = apply_moves(prog, [Move(site, option)])
    x = {"x0": normal(6, 2, 16)}
    before, after = session(prog).run(None, x)[0], session(made).run(None, x)[0]
    assert 0 < relative_error(after, before) < 0.012
    assert len(ir.to_proto(made.model).SerializeToString()) < len(ir.to_proto(prog.model).SerializeToString())


def test_float16_arithmetic_keeps_to_what_was_measured_to_fit():
    """Ranges decide, and normalizations, softmax and sums are no sites at all."""
    prog, given, _, _ = prepared("matmul", 17)
    only = Quantize(forms=("float16-compute",))
    stats = calibrate(prog, *given.values())
    site = sites(prog, only)["op"]

    class Halves(Quantize):
        def _offered(self, form, site, kernels):
            return True

    half = Halves(forms=("float16-compute",))
    assert [o.name for o in half.options(site, prog, stats, None)] == ["float16-compute"]
    large = calibrate(prog, given["x0"] * np.float32(20000))
    assert not half.options(site, prog, large, None)


def test_products_of_activations_are_offered_on_request():
    prog, _, _, _ = prepared("attention", 17)
    assert not sites(prog)
    assert sites(prog, EVERY)["op"].kind == "product"
