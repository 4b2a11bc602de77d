"""Where quantization applies, where it is refused and why, and what is offered for a target."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import (
    Ranges,
    apply_quantize,
    program,
    range_of,
    refusals,
    relative_error,
    run,
    session,
    sites,
)
from work import steps

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes import get_transform
from lamina.passes.pass_ import Lossy, Option
from lamina.passes.quantize import FORMS, Quantize

rng = np.random.default_rng(4)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def one(op_type, weight=None, *more, change=None, **flags):
    """A program of one operator; ``change`` edits the model behind its back."""

    def build(r, x):
        inputs = [x, *([] if weight is None else [r.constant(weight, "w")])]
        inputs += [r.constant(m, "b") if isinstance(m, np.ndarray) else m for m in more]
        return r.op(op_type, inputs, flags, name="op")

    dims = ("b", weight.shape[1], 8, 8) if op_type == "Conv" else ("b", 16)
    prog = program(build, dims)
    if change is not None:
        change(prog.model)
    return prog


def make_input(model):
    model.graph.inputs.append(model.graph.initializers["w"])


def make_output(model):
    model.graph.outputs.append(model.graph.initializers["w"])


def with_infinity():
    weight = normal(16, 8)
    weight[0, 0] = np.inf
    return weight


REFUSED = {
    "is an input of the model: a caller": lambda: one("Gemm", normal(16, 8), change=make_input),
    "is an output of the model": lambda: one("Gemm", normal(16, 8), change=make_output),
    "transA=1": lambda: one("Gemm", normal(4, 8), transA=1),
    "alpha is 0": lambda: one("Gemm", normal(16, 8), alpha=0.0),
    "the bias has shape [5, 8]": lambda: one("Gemm", normal(16, 8), normal(5, 8)),
    "has rank 3": lambda: one("MatMul", normal(2, 16, 8)),
    "not finite": lambda: one("MatMul", with_infinity()),
    "sums only 2 products": lambda: one("Conv", normal(8, 2, 1, 1)),
    "has rank 2": lambda: one("LSTM", normal(16, 8), normal(1, 16, 4), hidden_size=4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_say_why(reason):
    prog = REFUSED[reason]()
    assert not sites(prog)
    found = refusals(prog)["op"]
    assert reason in found


def test_a_weight_in_double_precision_is_refused():
    def build(r, x):
        wide = r.op("Cast", [x], {"to": int(ir.DataType.DOUBLE)}, dtype=ir.DataType.DOUBLE)
        y = r.op("MatMul", [wide, r.constant(normal(16, 8).astype(np.float64), "w")], name="op")
        return r.op("Cast", [y], {"to": 1})

    assert refusals(program(build, ("b", 16)))["op"] == "weight 'w' is double, not float32"


def test_a_bias_that_is_computed_is_refused():
    def build(r, x, y):
        return r.op("Gemm", [x, r.constant(normal(16, 8), "w"), y], name="op")

    assert refusals(program(build, ("b", 16), (8,)))["op"] == "the bias is not constant"


def test_products_of_activations_and_shape_arithmetic_are_no_near_misses():
    def build(r, x):
        y = r.op("MatMul", [x, r.op("Transpose", [x])], name="scores")
        length = r.op("Gather", [r.op("Shape", [x]), r.constant(np.array(0), "zero")], name="length")
        return r.op("Mul", [y, r.op("Cast", [length], {"to": 1})])

    prog = program(build, ("b", 16))
    assert not sites(prog)
    assert not refusals(prog)


def branching(weight) -> Program:
    """A MatMul inside a branch of an If."""

    def build(r, x):
        inside = ir.Graph([], [], nodes=[], name="then")
        inner = Rewriter(r.model, inside, parent=r)
        inside.outputs.append(inner.op("MatMul", [x, r.constant(weight, "w")], name="deep"))
        other = ir.Graph([], [], nodes=[], name="else")
        outer = Rewriter(r.model, other, parent=r)
        other.outputs.append(outer.op("Identity", [x], name="same"))
        first = r.op("ReduceMax", [x], {"keepdims": 0})
        flag = r.op("Greater", [first, r.constant(np.float32(0), "zero")], dtype=ir.DataType.BOOL)
        return r.op("If", [flag], {"then_branch": inside, "else_branch": other}, name="if")

    return program(build, ("b", 16))


def test_operators_in_subgraphs_are_refused():
    prog = branching(normal(16, 16))
    assert not sites(prog)
    assert refusals(prog) == {"deep": "it is in a subgraph"}


@pytest.mark.parametrize("form", ["w8a8-static", "w8a8-dynamic", "w4", "stored-w8", "float16"])
def test_options_can_be_written_into_a_subgraph(form):
    """What the supergraph does: the nodes go into a branch, what they read lies outside."""
    weight, x = normal(32, 32), normal(4, 32)

    def build(r, v):
        return r.op("MatMul", [v, r.constant(weight, "w")], name="op")

    prog = program(build, ("b", 32), opset=21)
    (site,) = sites(prog).values()
    stats = Ranges({"x0": range_of(x)})
    option = next(o for o in Quantize().options(site, prog, stats, None) if o.name == form)
    model = prog.clone().model
    parent = Rewriter(model)
    branch = ir.Graph([], [], nodes=[], name="chosen")
    inner = Rewriter(model, branch, parent=parent)
    branch.outputs.extend(Quantize().emit(site, option, inner, {"op": parent.node("op")}))
    old = ir.Graph([], [], nodes=[], name="kept")
    other = Rewriter(model, old, parent=parent)
    old.outputs.append(other.op("MatMul", list(parent.node("op").inputs), name="copy"))
    flag = parent.constant(np.array(True), "flag")
    y = parent.op("If", [flag], {"then_branch": branch, "else_branch": old}, name="if")
    y.dtype = ir.DataType.FLOAT
    model.graph.outputs[0] = y
    result = session(Program(model)).run(None, {"x0": x})[0]
    np.testing.assert_array_equal(result, run(apply_quantize(prog, {"op": option}), x))
    assert not any(".int8" in name for name in model.graph.initializers)


def test_weights_in_constant_nodes_count():
    weight = normal(32, 32)

    def build(r, x):
        w = r.op("Constant", [], {"value": ir.Tensor(weight, name="t")}, name="hold", dtype=ir.DataType.FLOAT)
        return r.op("MatMul", [x, w], name="op")

    prog = program(build, ("b", 32))
    (site,) = sites(prog).values()
    quantized = apply_quantize(prog, {"op": Option("stored-w8", {"weight_bits": 8, "clipping": "mse"})})
    assert site.inputs == ("x0",)
    assert relative_error(run(quantized, x := normal(3, 32)), run(prog, x)) < 0.01


# -- shape of sites --------------------------------------------------------------------------------


def test_a_site_takes_its_activation_or_bias_only_where_nobody_else_reads_between():
    weight = normal(8, 4, 3, 3)

    def build(shared):
        def graph(r, x):
            y = r.op("Conv", [x, r.constant(weight, "w")], name="conv")
            z = r.op("Relu", [y], name="relu")
            return r.op("Add", [y, z], name="add") if shared else z

        return program(graph, ("b", 4, 9, 9))

    assert sites(build(False))["conv"].nodes == ("conv", "relu")
    assert sites(build(True))["conv"].nodes == ("conv",)


@pytest.mark.parametrize(
    ("bias", "shape", "joined"),
    [
        (normal(8), ("b", 16), True),
        (normal(1, 8), ("b", 16), True),
        (normal(1, 1, 8), ("b", 16), False),  # would raise the rank of the result
        (normal(4, 8), ("b", 16), False),
        (normal(1), ("b", 16), False),
    ],
)
def test_a_bias_add_joins_its_product_only_as_a_vector(bias, shape, joined):
    weight = normal(16, 8)

    def build(r, x):
        y = r.op("MatMul", [x, r.constant(weight, "w")], name="op")
        return r.op("Add", [y, r.constant(bias, "b")], name="bias")

    site = sites(program(build, shape))["op"]
    assert site.nodes == (("op", "bias") if joined else ("op",))
    assert site.weights == (("w", "b") if joined else ("w",))


def test_sites_are_linear_in_the_nodes():
    weight = normal(16, 16)

    def chain(length):
        def build(r, x):
            w = r.constant(weight, "w")
            for i in range(length):
                x = r.op("MatMul", [x, w], name=f"n{i}")
            return x

        return program(build, ("b", 16))

    short, long = chain(200), chain(2000)
    assert len(sites(long)) == 2000
    assert steps(lambda: sites(long)) < 11 * steps(lambda: sites(short))


# -- options ---------------------------------------------------------------------------------------


def offered(prog, target=None, transform=None):
    (site,) = sites(prog).values()
    transform = transform or Quantize()
    return [o.name for o in transform.options(site, prog, Ranges({"x0": range_of(normal(99))}), target)]


def test_forms_offered_for_a_product():
    names = ["w8a8-static", "w8a8-dynamic", "w8", "w4", "w2"]
    names += ["stored-w8", "stored-w4", "stored-w3", "stored-w2", "float16"]
    assert offered(one("MatMul", normal(16, 8))) == names
    picked = Quantize(forms=("float16", "w8a8-dynamic"))
    assert offered(one("MatMul", normal(16, 8)), transform=picked) == ["float16", "w8a8-dynamic"]


def test_the_target_decides_what_is_offered():
    names = offered(one("MatMul", normal(16, 8)), "ort:cpu?threads=1")
    assert {"w8a8-static", "stored-w8", "float16"} <= set(names)
    plain = offered(one("MatMul", normal(16, 8)), "ort:cpu?threads=1&opt=disabled")
    assert not {"w8", "w4", "w2"} & set(plain)
    assert "stored-w8" in plain


def test_bad_options_are_refused():
    for wrong, message in (
        ({"forms": ("w3",)}, "quantize has no form 'w3'"),
        ({"ranges": "guess"}, "range method 'guess' is unknown"),
        ({"clipping": "best"}, "weight clipping 'best' is unknown"),
        ({"block": 48}, "block=48 is not possible"),
    ):
        with pytest.raises(PassError, match=message):
            Quantize(**wrong)


def test_an_option_of_another_kind_is_refused_by_name():
    prog = one("Conv", normal(8, 4, 3, 3))
    with pytest.raises(PassError) as caught:
        apply_quantize(prog, {"op": Option("w4")})
    assert str(caught.value) == (
        "'op' (conv) has no option 'w4'\n  at quantize w4\n  the plan belongs to another version of lamina"
    )


def test_it_is_registered_and_lossy():
    assert get_transform("quantize") == Quantize()
    assert isinstance(Quantize.effect, Lossy)
    assert set(Quantize().forms) == set(FORMS)


def test_the_original_is_left_as_it_was():
    prog = one("Gemm", normal(16, 8), normal(8))
    before = ir.to_proto(prog.model).SerializeToString()
    (site,) = sites(prog).values()
    for option in Quantize().options(site, prog, Ranges({"x0": range_of(normal(99))}), None):
        apply_quantize(prog, {"op": option})
    assert ir.to_proto(prog.model).SerializeToString() == before


def test_unknown_range_of_a_constant_activation_still_works():
    prog = one("MatMul", normal(16, 8))
    (site,) = sites(prog).values()
    stats = Ranges({"x0": range_of(np.zeros(50, np.float32))})
    option = Quantize().options(site, prog, stats, None)[0]
    assert option.name == "w8a8-static"
    assert not run(apply_quantize(prog, {"op": option}), np.zeros((2, 16), np.float32)).any()
