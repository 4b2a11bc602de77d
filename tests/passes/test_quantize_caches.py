"""Caches in 8 bits: codes pass through untouched, steps stay near float32, two runtimes agree."""

from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import session
from residual_nets import HEADS, WIDTH, Net, tokens

from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.program import Program
from lamina.passes.quantize.cache_edits import expose_caches, quantize_caches
from lamina.passes.quantize.cache_places import cache_places
from lamina.passes.quantize.caches import CacheCodes, calibrate_caches, coded_feeds, decoded_outputs

SIZE = WIDTH // HEADS
LAYERS = 2
STEPS = 6


def written_out(layout: str = "heads first") -> Program:
    """Attention in operators; keys may be cached as ``[batch, heads, size, tokens]``."""
    net = Net(4, opset=21)
    x = tokens(net)
    shown: list[ir.Value] = []
    for i in range(LAYERS):

        def cache(value: ir.Value, what: str, layer: int = i) -> ir.Value:
            turned = what == "key" and layout == "keys turned"
            shape = ["batch", HEADS, SIZE, "past"] if turned else ["batch", HEADS, "past", SIZE]
            before = net.input(f"past.{layer}.{what}", shape)
            value = net.op("Transpose", value, perm=[0, 1, 3, 2]) if turned else value
            value = net.op("Concat", before, value, axis=3 if turned else 2)
            shown.append(net.op("Identity", value) if what == "value" else value)
            shown[-1].name = f"present.{layer}.{what}"
            return net.op("Transpose", value, perm=[0, 1, 3, 2]) if turned else value

        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn", cache=cache))
        x = net.op("Add", x, net.mlp(net.norm(x), f"l.{i}.mlp"))
    out = net.norm(x)
    out.name = "y"
    return net.program(out, *shown)


def standard(flat: bool, causal: int = 1) -> Program:
    """The standard Attention operator with past and present, keys in three dimensions or four."""
    net = Net(5, opset=23)
    x = tokens(net)
    shown: list[ir.Value] = []
    for i in range(LAYERS):
        name, h = f"l.{i}.attn", net.norm(x)
        parts = [net.linear(h, name=f"{name}.{n}") for n in "qkv"]
        parts = parts if flat else [net.heads(p) for p in parts]
        past = [net.input(f"past.{i}.{what}", ["batch", HEADS, "past", SIZE]) for what in ("key", "value")]
        flags = {"q_num_heads": HEADS, "kv_num_heads": HEADS} if flat else {}
        y, key, value = net.op("Attention", *parts, None, *past, outputs=3, is_causal=causal, **flags)
        for made, what in ((key, "key"), (value, "value")):
            made.name = f"present.{i}.{what}"
            shown.append(made)
        if not flat:
            mixed = net.op("Transpose", y, perm=[0, 2, 1, 3])
            y = net.op("Reshape", mixed, net.ints(0, 0, WIDTH))
        x = net.op("Add", x, net.linear(y, name=f"{name}.o"))
    out = net.norm(x)
    out.name = "y"
    return net.program(out, *shown)


MODELS = {
    "operators": written_out,
    "operators, keys turned": lambda: written_out("keys turned"),
    "Attention": lambda: standard(False),
    "Attention, three dimensions": lambda: standard(True),
}


def empty(program: Program, rows: int, kind: type = np.float32) -> dict[str, np.ndarray]:
    found = {}
    for port in program.inputs:
        if port.name != "x":
            found[port.name] = np.zeros([{"batch": rows, "past": 0}.get(d, d) for d in port.shape], kind)
    return found


def decode(run, program: Program, rows: int, kind: type = np.float32, seed: int = 1):
    """Outputs of a prompt of 4 tokens and then one token a step, caches handed on as they come."""
    random = np.random.default_rng(seed)
    state, steps = empty(program, rows, kind), []
    names = [port.name for port in program.outputs]
    for step in range(STEPS):
        x = random.standard_normal((rows, 4 if step == 0 else 1, WIDTH)).astype(np.float32)
        outputs = dict(zip(names, run({"x": x, **state}), strict=True))
        state = {n.replace("present", "past"): a for n, a in outputs.items() if n != "y"}
        steps.append(({"x": x}, outputs))
    return steps


def samples(program: Program) -> Dataset:
    """Steps in the middle of decoding, as a user would record them."""
    running = session(program)
    steps = decode(lambda feeds: running.run(None, feeds), program, 16, seed=2)
    inputs = {n.replace("present", "past"): a for n, a in steps[-2][1].items() if n != "y"}
    return Dataset({**steps[-1][0], **inputs}, {})


def made(name: str) -> tuple[Program, Program, Program, tuple[CacheCodes, ...]]:
    program = MODELS[name]()
    caches = calibrate_caches(program, samples(program))
    inner = quantize_caches(program, caches)
    return program, inner, expose_caches(inner, caches), caches


def evaluator(program: Program):
    from onnx.reference import ReferenceEvaluator

    running = ReferenceEvaluator(ir.to_proto(program.model))

    def run(feeds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return running.run(None, feeds)

    return run


@pytest.mark.parametrize("name", MODELS)
def test_steps_stay_near_float32_and_codes_pass_untouched(name):
    program, _, exposed, caches = made(name)
    kinds = {p.name: p.dtype for p in (*exposed.inputs, *exposed.outputs)}
    ports = {n for c in caches for n in (c.past, c.present)}
    assert len(ports) == 4 * LAYERS
    assert {n for n, kind in kinds.items() if kind == ir.DataType.INT8} == ports
    assert [p.name for p in exposed.inputs] == [p.name for p in program.inputs]
    assert [p.shape for p in exposed.outputs] == [p.shape for p in program.outputs]
    float32, coded = session(program), session(exposed)
    expected = decode(lambda feeds: float32.run(None, feeds), program, 3)
    found = decode(lambda feeds: coded.run(None, feeds), program, 3, np.int8)
    for (_, before), (_, after) in zip(expected, found, strict=True):
        error = np.linalg.norm(after["y"] - before["y"]) / np.linalg.norm(before["y"])
        assert 0 < error < 0.02
        real = decoded_outputs(after, caches)
        for cache in caches:
            codes = after[cache.present]
            assert codes.dtype == np.int8
            assert codes.nbytes * 4 == before[cache.present].nbytes
            # another layer's rounding moved what this one reads, by little
            far = np.abs(real[cache.present] - before[cache.present]).max()
            assert far < 0.05 * np.abs(before[cache.present]).max()
    for (_, one), (_, two) in pairwise(found):
        for cache in caches:
            axis = 3 if one[cache.present].shape[3] != two[cache.present].shape[3] else 2
            kept = np.take(two[cache.present], range(one[cache.present].shape[axis]), axis)
            assert np.array_equal(kept, one[cache.present])


@pytest.mark.parametrize("name", MODELS)
def test_two_runtimes_agree_and_so_do_both_interfaces(name):
    program, inner, exposed, caches = made(name)
    feeds = samples(program).inputs
    coded = coded_feeds(exposed, feeds, caches)
    assert {a.dtype for n, a in coded.items() if n != "x"} == {np.dtype(np.int8)}
    names = [p.name for p in exposed.outputs]
    first = dict(zip(names, session(exposed).run(None, coded), strict=True))
    second = dict(zip(names, evaluator(exposed)(coded), strict=True))
    floats = dict(zip(names, session(inner).run(None, dict(feeds)), strict=True))
    assert np.abs(first["y"] - second["y"]).max() < 1e-2 * np.abs(first["y"]).max()
    np.testing.assert_allclose(first["y"], floats["y"], rtol=0, atol=1e-5)
    for cache in caches:
        # a value in the middle between two codes may go either way
        apart = np.abs(first[cache.present].astype(int) - second[cache.present])
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.01
        np.testing.assert_allclose(decoded_outputs(first, caches)[cache.present], floats[cache.present])


def test_a_head_has_its_own_scale_and_an_axis_none_is_joined_along():
    program = written_out("keys turned")
    data = samples(program)
    caches = calibrate_caches(program, data)
    assert {c.axis for c in caches} == {1}
    outputs = dict(
        zip([p.name for p in program.outputs], session(program).run(None, dict(data.inputs)), strict=True)
    )
    for cache in caches:
        largest = np.abs(outputs[cache.present]).max(axis=(0, 2, 3))
        np.testing.assert_allclose(cache.scale, 1.1 * largest / 127, rtol=1e-6)
        codes = cache.encode(outputs[cache.present])
        assert (np.abs(codes.astype(int)).max(axis=(0, 2, 3)) == round(127 / 1.1)).all()
        assert np.array_equal(cache.encode(cache.decode(codes)), codes)


def test_nothing_but_conversions_and_the_join_is_new():
    program, _, exposed, _ = made("operators")
    kinds = lambda p: sorted(n.op_type for n in p.graph if n.op_type != "Identity")  # noqa: E731
    conversions = ["DequantizeLinear", "QuantizeLinear"] * 2 * LAYERS
    assert kinds(exposed) == sorted(kinds(program) + conversions)


# -- what has another form --------------------------------------------------------------------------------


def refusal(program: Program) -> str:
    with pytest.raises(PassError) as caught:
        cache_places(program)
    return str(caught.value)


def test_a_model_without_caches_is_told():
    net = Net()
    x = tokens(net)
    text = refusal(net.program(net.op("Add", x, net.attention(net.norm(x)))))
    assert text.splitlines()[0] == "the model has no key or value cache at its interface"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("both", "input 'past.key' is read by Mul 'node_mul_1', Concat 'node_concat'"),
        ("three", "Concat 'node_concat' joins 3 values"),
        ("sliced", "what Concat 'node_concat' makes is no output of the model"),
    ],
)
def test_other_forms_are_refused_by_node(change, reason):
    net = Net()
    x = tokens(net)

    def cache(value: ir.Value, what: str) -> ir.Value:
        if what == "value":
            return value
        past = net.input("past.key", ["batch", HEADS, "past", SIZE])
        if change == "both":
            shown.append(net.op("Mul", past, past))
        more = [value] if change == "three" else []
        value = net.op("Concat", past, value, *more, axis=2)
        kept = net.op("Slice", value, net.ints(1), net.ints(99), net.ints(2)) if change == "sliced" else value
        kept.name = "present.key"
        shown.append(kept)
        return value

    shown: list[ir.Value] = []
    y = net.op("Add", x, net.attention(net.norm(x), cache=cache))
    text = refusal(net.program(y, *shown))
    first = "cache 'past.key' cannot be stored in 8 bits: "
    assert text.splitlines()[0].startswith(first)
    assert set(reason.split(", ")) & set(text.splitlines()[0][len(first) :].split(", "))
    assert "leave kv_cache out" in text


def test_a_cache_that_is_only_handed_out_is_refused():
    net = Net()
    x = tokens(net)
    shown: list[ir.Value] = []

    def cache(value: ir.Value, what: str) -> ir.Value:
        shown.append(value)
        value.name = f"present.{what}"
        return value

    text = refusal(net.program(net.op("Add", x, net.attention(net.norm(x), cache=cache)), *shown))
    assert "output 'present.key', made by Transpose" in text
    assert "extends no input of the model" in text


def test_half_precision_caches_are_refused():
    net = Net()
    past = net.input("past.key", ["batch", HEADS, "past", SIZE], ir.DataType.FLOAT16)
    new = net.input("new", ["batch", HEADS, "seq", SIZE], ir.DataType.FLOAT16)
    present = net.op("Concat", past, new, axis=2)
    present.name, present.type = "present.key", ir.TensorType(ir.DataType.FLOAT16)
    assert "input 'past.key' is float16" in refusal(net.program(present))


def test_samples_that_write_nothing_are_refused():
    net = Net()
    past = net.input("past.key", ["batch", HEADS, "past", SIZE])
    new = net.input("x", ["batch", HEADS, "seq", SIZE])
    present = net.op("Concat", past, new, axis=2)
    present.name = "present.key"
    nothing = np.zeros((2, HEADS, 3, SIZE), np.float32)
    with pytest.raises(DataError, match=r"leave cache 'present.key' empty"):
        calibrate_caches(net.program(present), Dataset({"past.key": nothing, "x": nothing}, {}))


def test_a_plan_without_a_caches_scales_is_told():
    program = written_out()
    caches = calibrate_caches(program, samples(program))
    with pytest.raises(PassError, match="the plan has no scales for cache"):
        quantize_caches(program, caches[:2])
