"""Weights in few bits: fused block kernels, forms that cost nothing at run time, embeddings, float16."""

from __future__ import annotations

import json

import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import (
    apply_quantize,
    bytes_of,
    kernels,
    pick,
    program,
    quantize_all,
    relative_error,
    run,
    session,
    sites,
)

from lamina.errors import PassError
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option
from lamina.passes.quantize import Quantize

rng = np.random.default_rng(3)


def normal(*shape):
    return rng.standard_normal(shape).astype(np.float32)


def op(op_type, weight, bias=None, left=False, **flags):
    def build(r, x):
        w = r.constant(weight, "w")
        inputs = [w, x] if left else [x, w]
        if bias is not None and op_type != "MatMul":
            inputs.append(r.constant(bias, "b"))
        y = r.op(op_type, inputs, flags, name="op")
        if bias is not None and op_type == "MatMul":
            y = r.op("Add", [y, r.constant(bias, "b")], name="bias")
        return y

    return build


LINEAR = {
    "matmul": (op("MatMul", normal(64, 48)), (3, 5, 64)),
    "matmul bias": (op("MatMul", normal(64, 48), normal(48)), (3, 5, 64)),
    "gemm": (op("Gemm", normal(64, 48), normal(48), alpha=0.5, beta=2.0), (10, 64)),
    "gemm transB": (op("Gemm", normal(48, 64), normal(48), transB=1), (10, 64)),
    "depth not in blocks": (op("MatMul", normal(50, 48)), (10, 50)),
}
OTHERS = {
    "weight left": (op("MatMul", normal(48, 64), left=True), (64, 7)),
    "conv": (op("Conv", normal(8, 4, 3, 3), normal(8)), (2, 4, 9, 9)),
    "depthwise": (op("Conv", normal(8, 1, 3, 3), normal(8), group=8), (2, 8, 9, 9)),
    "conv 1-D": (op("Conv", normal(8, 4, 8)), (2, 4, 20)),
}
EVERY = LINEAR | OTHERS
BOUNDS = {
    **{"w8": 0.02, "w4": 0.1, "w2": 0.5, "stored-w8": 0.01},
    **{"stored-w4": 0.1, "stored-w3": 0.2, "stored-w2": 0.4, "float16": 1e-3},
}
BLOCKS = ("w8", "w4", "w2")
STORED = ("stored-w8", "stored-w4", "stored-w3", "stored-w2", "float16")


def offered(case, form):
    build, shape = EVERY[case]
    prog = program(build, ("b", *shape[1:]) if case != "weight left" else shape)
    (site,) = sites(prog).values()
    return prog, shape, [o for o in Quantize().options(site, prog, None, None) if o.name == form]


@pytest.mark.parametrize("form", BOUNDS)
@pytest.mark.parametrize("case", EVERY)
def test_result_is_within_the_bound_of_its_bits(case, form):
    prog, shape, options = offered(case, form)
    if not options:
        assert form in BLOCKS
        assert case in OTHERS
        return
    x = normal(*shape)
    quantized = apply_quantize(prog, {"op": options[0]})
    error = relative_error(run(quantized, x), run(prog, x))
    assert 1e-5 < error < BOUNDS[form]
    assert quantized.outputs == prog.outputs


def test_four_bits_are_stored_where_a_block_divides_the_reduction():
    assert [case for case in EVERY if offered(case, "stored-w4")[2]] == [
        *("matmul", "matmul bias", "gemm", "gemm transB", "depth not in blocks", "weight left"),
        *("conv", "depthwise", "conv 1-D"),
    ]
    (option,) = offered("depth not in blocks", "stored-w4")[2]
    assert option.parameters["block"] == 25
    (option,) = offered("depthwise", "stored-w4")[2]
    assert option.parameters["block"] == 9
    for depth, block in ((172, 43), (173, 173), (5, 5)):
        prog = program(op("MatMul", normal(depth, 48)), ("b", depth))
        assert pick(prog, sites(prog)["op"], "stored-w4").parameters["block"] == block


@pytest.mark.parametrize("dims", ["known", "batch", "none"])
@pytest.mark.parametrize("form", BLOCKS)
@pytest.mark.parametrize("case", LINEAR)
def test_blocks_become_one_matmulnbits(case, form, dims):
    build, shape = LINEAR[case]
    known = {"known": shape, "batch": ("b", *shape[1:]), "none": tuple(f"d{i}" for i in range(len(shape)))}
    counts = kernels(quantize_all(program(build, known[dims]), form))
    assert counts["MatMulNBits"] == 1
    assert not {"MatMul", "Gemm", "DequantizeLinear"} & set(counts)


@pytest.mark.parametrize("form", STORED)
@pytest.mark.parametrize("case", EVERY)
def test_stored_forms_run_as_the_original_does(case, form):
    prog, _, options = offered(case, form)
    for option in options:
        assert kernels(apply_quantize(prog, {"op": option})) == kernels(prog)


@pytest.mark.parametrize(
    ("form", "share"),
    [
        *(("w8", 0.30), ("w4", 0.18), ("w2", 0.115), ("stored-w8", 0.27)),
        *(("stored-w4", 0.15), ("stored-w3", 0.12), ("stored-w2", 0.089), ("float16", 0.51)),
    ],
)
def test_the_file_shrinks(form, share):
    prog = program(op("MatMul", normal(256, 256)), ("b", 256))
    assert bytes_of(quantize_all(prog, form)) < share * bytes_of(prog)


@pytest.mark.parametrize(("form", "opset"), [("w4", 21), ("w2", 25)])
def test_forms_of_new_operators_ask_for_their_opset(form, opset):
    prog, _, (option,) = offered("matmul", form)
    assert option.parameters["opset"] == opset
    rewriter, site = Rewriter(prog.clone().model), sites(prog)["op"]
    with pytest.raises(PassError, match=f"needs opset {opset}"):
        Quantize().emit(site, option, rewriter, {"op": rewriter.node("op")})


@pytest.mark.parametrize(("bits", "middle"), [(4, False), (3, False), (3, True), (2, False), (2, True)])
def test_weights_on_the_grid_are_exact(bits, middle):
    top = 2**bits - 1
    codes = rng.integers(0, top + 1, (64, 8))
    codes[::32], codes[1::32] = 0, top
    zero = top / 2 if middle else 2 ** (bits - 1)
    prog = program(op("MatMul", ((codes - zero) / 8).astype(np.float32)), (5, 64))
    quantized = quantize_all(prog, f"stored-w{bits}")
    x = normal(5, 64)
    np.testing.assert_allclose(run(quantized, x), run(prog, x), rtol=1e-5, atol=1e-5)


def test_shared_weights_are_stored_once_in_every_form():
    weight = normal(64, 64)

    def build(r, x):
        w = r.constant(weight, "w")
        return r.op("MatMul", [r.op("MatMul", [x, w], name="one"), w], name="two")

    prog = program(build, ("b", 64))
    for form in BOUNDS:
        quantized = quantize_all(prog, form)
        sizes = [v.const_value.nbytes for v in quantized.graph.initializers.values()]
        # in blocks, scales or zero points are as large as the codes of two bits
        assert sum(n >= weight.size // 8 for n in sizes) <= 1 + (form in BLOCKS), form


# -- float16 ---------------------------------------------------------------------------------------


def test_a_weight_that_overflows_float16_has_no_such_form():
    weight = normal(64, 48)
    weight[3, 4] = 7e4
    prog = program(op("MatMul", weight), ("b", 64))
    (site,) = sites(prog).values()
    names = [o.name for o in Quantize().options(site, prog, None, None)]
    assert "float16" not in names
    assert "stored-w8" in names


def test_float16_arithmetic_is_offered_only_for_kernels_the_target_has():
    prog = program(op("MatMul", normal(64, 48)), ("b", 64))
    (site,) = sites(prog).values()
    assert "float16-compute" not in [o.name for o in Quantize().options(site, prog, None, None)]


@pytest.mark.parametrize("case", ["matmul bias", "gemm transB", "conv"])
def test_float16_arithmetic_is_written_between_casts(case):
    build, shape = EVERY[case]
    prog = program(build, shape)
    quantized = apply_quantize(prog, {"op": Option("float16-compute")})
    x = normal(*shape)
    assert relative_error(run(quantized, x), run(prog, x)) < 3e-3
    assert [n.op_type for n in quantized.graph][:: len(quantized.graph) - 1] == ["Cast", "Cast"]
    halves = [v for v in quantized.graph.initializers.values() if v.dtype == ir.DataType.FLOAT16]
    assert len(halves) == len(quantized.graph.initializers)


# -- embeddings ------------------------------------------------------------------------------------


def embedding(rows=200, width=32):
    table = normal(rows, width) * rng.random((rows, 1)).astype(np.float32) * 10

    def build(r, x):
        index = r.op("Cast", [x], {"to": int(ir.DataType.INT64)}, dtype=ir.DataType.INT64)
        return r.op("Gather", [r.constant(table, "table"), index], {"axis": 0}, name="embed")

    return program(build, ("b", "t")), table


@pytest.mark.parametrize(
    ("form", "bound", "share"),
    [("stored-w8", 0.01, 0.32), ("stored-w4", 0.12, 0.21), ("float16", 1e-3, 0.52)],
)
def test_embeddings_stay_small_in_memory_too(form, bound, share):
    prog, _ = embedding()
    quantized = quantize_all(prog, form)
    index = rng.integers(0, 200, (3, 7)).astype(np.float32)
    result = run(quantized, index)
    assert result.shape == (3, 7, 32)
    assert relative_error(result, run(prog, index)) < bound
    assert bytes_of(quantized) < share * bytes_of(prog)
    # the table is not widened while loading: rows are gathered in few bits
    assert kernels(quantized)["Gather"] == (1 if form == "float16" else 2)
    assert kernels(quantized)["Cast"] == 2


def test_each_row_of_a_table_has_a_scale_of_its_own():
    prog, table = embedding()
    index = np.argsort(np.abs(table).max(axis=1))[:5].astype(np.float32)[None]
    quantized = quantize_all(prog, "stored-w8")
    assert relative_error(run(quantized, index), run(prog, index)) < 0.01


def test_options_survive_json():
    for case in ("gemm", "conv"):
        build, shape = EVERY[case]
        prog = program(build, shape)
        (site,) = sites(prog).values()
        for option in Quantize().options(site, prog, None, None):
            assert json.loads(json.dumps(dict(option.parameters))) == dict(option.parameters)


def test_weight_left_has_no_block_form_and_pick_names_exist():
    prog, _, options = offered("weight left", "w4")
    assert not options
    assert pick(prog, sites(prog)["op"], "stored-w4").parameters["weight_bits"] == 4
    assert session(prog) is not None
