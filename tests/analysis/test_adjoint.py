"""Derivatives in numpy against differences of the program as ONNX Runtime runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from lamina.analysis.adjoint import Adjoint
from lamina.errors import UnsupportedOperator

sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
from quantize_tools import program


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def ints(*values):
    return np.array(values, np.int64)


def one(op_type, attributes=None, *more):
    """The operator behind a MatMul, with more constant inputs."""

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(normal(1, 6, 6) / 2, "w")], name="op")
        return r.op(op_type, [y, *(r.constant(c, f"c{i}") for i, c in enumerate(more))], attributes or {})

    return build


def positive(op_type, attributes=None, *more):
    """The same, of positive numbers."""

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(normal(1, 6, 6) / 2, "w")], name="op")
        y = r.op("Add", [r.op("Mul", [y, y]), r.constant(np.float32(0.5), "half")])
        return r.op(op_type, [y, *(r.constant(c, f"c{i}") for i, c in enumerate(more))], attributes or {})

    return build


def fork(op_type):
    """An operator of two values that depend on the weight, the second one with fewer axes."""

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(normal(1, 6, 6) / 2, "w")], name="op")
        few = r.op("ReduceMean", [r.op("Exp", [y])], {"axes": [0, 1], "keepdims": 0})
        return r.op(op_type, [y, few])

    return build


def attention(r, x):
    y = r.op("MatMul", [x, r.constant(normal(1, 6, 6) / 2, "w")], name="op")
    scores = r.op("Softmax", [r.op("MatMul", [y, r.op("Transpose", [x], {"perm": [0, 2, 1]})])], {"axis": -1})
    return r.op("MatMul", [scores, y])


def left(r, x):
    turned = r.op("Transpose", [x], {"perm": [0, 2, 1]})
    return r.op("Tanh", [r.op("MatMul", [r.constant(normal(1, 4, 6) / 2, "w"), turned], name="op")])


def gemm(**flags):
    def build(r, x):
        flat = r.op("Reshape", [x, r.constant(ints(-1, 6), "flat")])
        weight = normal(1, 5, 6) if flags.get("transB") else normal(1, 6, 5)
        inputs = [flat, r.constant(weight / 2, "w"), r.constant(normal(2, 5), "b")]
        return r.op("Tanh", [r.op("Gemm", inputs, flags)])

    return build


def split(r, x):
    y = r.op("MatMul", [x, r.constant(normal(1, 6, 6) / 2, "w")], name="op")
    first = r.op("Split", [y, r.constant(ints(2, 4), "sizes")], {"axis": -1}, outputs=2)
    places = [r.constant(ints(v), n) for v, n in ((1, "start"), (3, "end"), (2, "axis"))]
    return r.op("Mul", [first, r.op("Slice", [first.producer().outputs[1], *places])])


def conv(inner=None, weight=(6, 4, 3, 3), **flags):
    def build(r, x):
        inputs = [x, r.constant(normal(1, *weight) / 3, "w"), r.constant(normal(2, weight[0]), "b")]
        y = r.op("Tanh", [r.op("Conv", inputs, flags)])
        return inner(r, y) if inner else y

    return build


def second(r, y):
    flags = {"group": 2, "strides": [2, 1], "dilations": [1, 2], "pads": [1, 0, 0, 2]}
    return r.op("Conv", [y, r.constant(normal(3, 4, 3, 2, 3), "w2")], flags)


def pool(op_type, **flags):
    return lambda r, y: r.op(op_type, [y], {"kernel_shape": [3, 2], **flags})


TOKENS = {
    "attention": attention,
    "weight left": left,
    "gemm": gemm(alpha=0.5, beta=2.0),
    "gemm turned": gemm(transB=1),
    "add": fork("Add"),
    "sub": fork("Sub"),
    "mul": fork("Mul"),
    "div": fork("Div"),
    "pow": positive("Pow", None, np.float32(1.5)),
    "sqrt": positive("Sqrt"),
    "log": positive("Log"),
    "reciprocal": positive("Reciprocal"),
    "erf": one("Erf"),
    "exp": one("Exp"),
    "sigmoid": one("Sigmoid"),
    "softplus": one("Softplus"),
    "neg": one("Neg"),
    "relu": one("Relu"),
    "abs": one("Abs"),
    "leaky": one("LeakyRelu", {"alpha": 0.2}),
    "clip": one("Clip", None, np.float32(-0.7), np.float32(0.6)),
    "hard swish": one("HardSwish"),
    "hard sigmoid": one("HardSigmoid", {"alpha": 0.3}),
    "softmax over tokens": one("Softmax", {"axis": 1}),
    "cast like": one("CastLike", None, np.float32(0)),
    "log softmax": one("LogSoftmax", {"axis": 1}),
    "layer norm": one("LayerNormalization", {"axis": -1, "epsilon": 0.1}, normal(5, 6), normal(6, 6)),
    "mean": one("ReduceMean", {"axes": [1], "keepdims": 0}),
    "sum": one("ReduceSum", {"keepdims": 1}, ints(0, -1)),
    "transpose": one("Transpose", {"perm": [2, 0, 1]}),
    "unsqueeze": one("Unsqueeze", None, ints(1)),
    "expand": one("Expand", None, ints(2, 1, 1, 1)),
    "gather": one("Gather", {"axis": 1}, np.array([[0, 2], [2, 1]], np.int64)),
    "pad": one("Pad", None, ints(0, 1, 0, 1, 0, 2)),
    "slice back": one("Slice", None, ints(-1), ints(-100), ints(2), ints(-2)),
    "split": split,
}
IMAGES = {
    "conv": conv(pads=[1, 1, 1, 1]),
    "two convs": conv(second, pads=[0, 1, 2, 1]),
    "grouped": conv(weight=(6, 2, 3, 3), group=2, strides=[2, 2]),
    "same": conv(auto_pad="SAME_UPPER", strides=[2, 2]),
    "max pool": conv(pool("MaxPool", strides=[2, 2], pads=[1, 0, 1, 1], ceil_mode=1)),
    "average pool": conv(pool("AveragePool", strides=[2, 1], pads=[1, 0, 1, 1])),
    "average of padding": conv(pool("AveragePool", strides=[2, 1], pads=[1, 0, 1, 1], count_include_pad=1)),
    "global pool": conv(lambda r, y: r.op("GlobalAveragePool", [y])),
}
CASES = {name: (build, (2, 3, 6)) for name, build in TOKENS.items()}
CASES |= {name: (build, (2, 4, 7, 6)) for name, build in IMAGES.items()}


@pytest.mark.parametrize("case", CASES)
def test_derivatives_are_those_that_differences_show(case):
    build, shape = CASES[case]
    prog = program(build, shape)
    weight = prog.graph.initializers["w"].const_value.numpy()
    adjoint = Adjoint(prog, ["w"], ["y"], threads=1)
    feeds = {"x0": normal(7, *shape)}
    values = adjoint.run(feeds, {"w": weight})
    seed = normal(8, *values["y"].shape)
    slope = adjoint.back(values, {"y": seed})["w"]
    assert slope.shape == weight.shape
    for trial in range(3):
        way = normal(10 + trial, *weight.shape)
        step = np.float32(1e-3)
        ends = [adjoint.run(feeds, {"w": weight + s * way}, outputs_only=True)["y"] for s in (step, -step)]
        shown = float((seed.astype(np.float64) * (ends[0].astype(np.float64) - ends[1])).sum() / (2 * step))
        scale = float(np.linalg.norm(slope) * np.linalg.norm(way))
        assert abs(float((slope * way).sum()) - shown) < 5e-3 * scale + 2e-3


def test_derivatives_by_values_on_the_way_are_given_too():
    prog = program(attention, (2, 3, 6))
    adjoint = Adjoint(prog, ["w"], ["y"], threads=1)
    weight, feeds = prog.graph.initializers["w"].const_value.numpy(), {"x0": normal(7, 2, 3, 6)}
    values = adjoint.run(feeds, {"w": weight})
    name = adjoint.output_of("op")
    found = adjoint.back(values, {"y": normal(8, 2, 3, 6)}, [name])
    by_hand = feeds["x0"].reshape(-1, 6).T @ found[name].reshape(-1, 6)
    np.testing.assert_allclose(found["w"], by_hand, rtol=1e-5, atol=1e-5)


def test_an_operator_without_a_rule_is_named():
    prog = program(one("CumSum", None, np.array(1, np.int64)), (2, 3, 6))
    with pytest.raises(UnsupportedOperator, match="CumSum has no derivative here"):
        Adjoint(prog, ["w"], ["y"])
