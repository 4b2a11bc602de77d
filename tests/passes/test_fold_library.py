"""The library passes behind their fence, and the pipeline that runs, undoes and replays passes."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from folding import check, interface, ops, program, run

from lamina.errors import PassError, VerificationError
from lamina.ir.program import Program
from lamina.passes.fold import CLEANUP, FOLDS, FORMS, apply_named, fold, form_names, load
from lamina.passes.fold.fold_constants import FoldConstants
from lamina.passes.fold.simplify_patterns import RULES
from lamina.passes.pass_ import Fold, pass_name

F = np.float32


def build(
    body: str, weights: dict[str, np.ndarray] | None = None, outputs: str = "float[N,C,H,W] y"
) -> Program:
    used = {k: np.asarray(v) for k, v in (weights or {}).items() if re.search(rf"\b{k}\b", body)}
    return program(f"g (float[N,3,5,6] x) => ({outputs}) {{ {body} }}", used)


def feeds() -> list[dict[str, np.ndarray]]:
    return [{"x": np.random.default_rng(n).normal(size=(n, 3, 5, 6)).astype(np.float32)} for n in (1, 3)]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# -- library passes ---------------------------------------------------------------------------------


def test_constants_become_initializers_of_the_same_name() -> None:
    before = build("c = Constant <value_float=2.5> () y = Mul(x, c)")
    after = check(before, "lift_constants", feeds())
    assert ops(after) == {"Mul": 1}
    assert set(after.graph.initializers) == {"c"}


def test_identities_go_and_the_output_keeps_its_name() -> None:
    after = check(build("a = Relu(x) b = Identity(a) y = Identity(b)"), "eliminate_identities", feeds())
    assert ops(after) == {"Relu": 1}
    assert after.outputs[0].name == "y"


@pytest.mark.parametrize(
    ("body", "outputs", "left"),
    [
        ("y = Identity(x)", "float[N,3,5,6] y", 1),
        ("y = Relu(x) z = Identity(y)", "float[N,3,5,6] y, float[N,3,5,6] z", 1),
        ("y = Relu(x) z = Relu(x)", "float[N,3,5,6] y, float[N,3,5,6] z", 1),
    ],
)
def test_every_interface_name_survives(body: str, outputs: str, left: int) -> None:
    before = build(body, outputs=outputs)
    for name in FOLDS:
        check(before, name, feeds())
    after, _, records = fold(before)
    assert interface(after) == interface(before)
    assert not [r for r in records if r.why.startswith("undone")]
    assert ops(after)["Relu"] <= left


def test_equal_initializers_and_expressions_merge() -> None:
    before = build("a = Mul(x, p) b = Mul(x, q) y = Add(a, b)", {"p": random(6), "q": random(6)})
    after, names, _ = fold(before)
    assert ops(after) == {"Mul": 1, "Add": 1}
    assert set(after.graph.initializers) == {"p"}
    assert names == ("deduplicate_initializers", "merge_common_subexpressions")


@pytest.mark.parametrize("op", ["RandomNormalLike", "RandomUniformLike", "Bernoulli"])
def test_random_operators_never_merge(op: str) -> None:
    before = build(f"s = Sigmoid(x) a = {op}(s) b = {op}(s) y = Sub(a, b)")
    after, _, _ = fold(before)
    assert ops(after)[op] == 2


def test_unknown_domains_never_merge() -> None:
    text = '<ir_version: 10, opset_import: ["" : 18, "custom" : 1]> g (float[N] x) => (float[N] y)'
    model = ir.from_onnx_text(f"{text} {{ a = custom.Count(x) b = custom.Count(x) y = Add(a, b) }}")
    for node in model.graph:
        node.name = f"node_{node.outputs[0].name}"
    after, _, records = fold(Program(model))
    assert ops(after) == {"Count": 2, "Add": 1}
    assert {n.domain for n in after.graph} == {"custom", ""}
    assert not [r for r in records if r.why.startswith("undone")]


BATCHNORM = {k: np.abs(random(4, seed=i)) + F(0.5) for i, k in enumerate(("scale", "shift", "mean", "var"))}


@pytest.mark.parametrize("bias", ["", ", c"])
def test_batch_normalization_folds_into_conv(bias: str) -> None:
    body = f"a = Conv(x, w{bias}) y = BatchNormalization(a, scale, shift, mean, var)"
    before = build(body, {**BATCHNORM, "w": random(4, 3, 3, 3), "c": random(4)})
    after = check(before, "simplify_patterns", feeds(), limit=16)
    assert ops(after) == {"Conv": 1}
    assert next(iter(after.graph)).name == "node_y"


def test_batch_normalization_folds_into_grouped_conv_transpose() -> None:
    body = (
        "k = Conv(x, w) a = ConvTranspose <group=2> (k, t) y = BatchNormalization(a, scale, shift, mean, var)"
    )
    before = build(body, {**BATCHNORM, "w": random(4, 3, 1, 1), "t": random(4, 2, 2, 2)})
    assert ops(check(before, "simplify_patterns", feeds(), limit=16))["BatchNormalization"] == 0


def test_batch_normalization_with_shared_weights_stays() -> None:
    body = "a = Conv(x, w) a2 = Conv(x, w) b = BatchNormalization(a, scale, shift, mean, var) y = Sub(b, a2)"
    before = build(body, {**BATCHNORM, "w": random(4, 3, 3, 3)})
    after = check(before, "simplify_patterns", feeds(), limit=16)
    assert ops(after) == {"Conv": 2, "BatchNormalization": 1, "Sub": 1}


def test_training_mode_is_fenced() -> None:
    body = "a = Conv(x, w) y, m, v = BatchNormalization <training_mode=1> (a, scale, shift, mean, var)"
    before = build(body, {**BATCHNORM, "w": random(4, 3, 3, 3)})
    after, _, _ = fold(before)
    assert ops(after) == {"Conv": 1, "BatchNormalization": 1}
    node = next(n for n in after.graph if n.op_type == "BatchNormalization")
    assert node.attributes["training_mode"].value == 1


def test_disjoint_clips_keep_their_value() -> None:
    before = build("a = Clip(x, p, q) y = Clip(a, q, r)", {"p": F(0), "q": F(1), "r": F(2)})
    after, _, _ = fold(before)
    for feed in feeds():
        assert np.array_equal(run(after, feed)[0], run(before, feed)[0])


def test_odd_slices_do_not_become_an_even_split() -> None:
    body = "a = Slice(x, z, m, ax) b = Slice(x, m, e, ax) c = ReduceSum(a) d = ReduceSum(b) y = Sub(c, d)"
    weights = {"z": np.array([0]), "m": np.array([2]), "e": np.array([5]), "ax": np.array([2])}
    before = build(body, weights)
    after, _, _ = fold(before)
    for feed in feeds():
        assert np.array_equal(run(after, feed)[0], run(before, feed)[0])


def test_constant_subgraphs_are_computed() -> None:
    before = build("a = Sqrt(c) b = Add(a, a) y = Mul(x, b)", {"c": np.full(6, 4, np.float32)})
    after, _, _ = fold(before)
    assert ops(after) == {"Mul": 1}
    assert next(iter(after.graph.initializers.values())).const_value.numpy().tolist() == [4.0] * 6


def test_large_constants_are_not_blown_up() -> None:
    before = build(
        "a = Expand(c, s) b = ReduceSum(a) y = Mul(x, b)", {"c": F([1]), "s": np.array([2000, 2000])}
    )
    after, _, _ = fold(before)
    assert sum(v.const_value.nbytes for v in after.graph.initializers.values()) < 1000


def test_every_rule_exists_in_the_library() -> None:
    from onnxscript.rewriter.rules import common

    assert [name for name in RULES if not hasattr(common, name)] == []


# -- catalog and pipeline ---------------------------------------------------------------------------


def test_every_name_loads_a_fold_called_so() -> None:
    for name in dict.fromkeys(FOLDS + FORMS + CLEANUP):
        found = load(name)
        assert isinstance(found, Fold)
        assert pass_name(type(found)) == name.replace("_", "-") == found.name
    assert load("fuse-gelu") is load("fuse_gelu")
    assert form_names() == FORMS


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(PassError) as error:
        fold(build("y = Relu(x)"), forms=["fuse_gelus"])
    assert str(error.value).splitlines()[0] == "no fold is called 'fuse_gelus'"
    assert "fuse_gelu, fuse_layer_normalization" in str(error.value)


def messy() -> Program:
    body = (
        "c = Constant <value_float=1.0> () a = Mul(x, c) b = Identity(a) r = Relu(b) q = Relu(r)"
        " k = Conv(q, w) n = BatchNormalization(k, scale, shift, mean, var) e = Sqrt(d) o = Mul(n, e)"
        " o2 = Mul(n, e2) y = Add(o, o2) dead = Neg(x)"
    )
    weights = {**BATCHNORM, "w": random(4, 3, 3, 3), "d": F([4]), "e2": F([2])}
    return build(body, weights)


def test_fold_reaches_a_fixed_point_and_keeps_the_function() -> None:
    before = messy()
    text = str(before.graph)
    after, names, records = fold(before)
    assert str(before.graph) == text
    assert ops(after) == {"Relu": 1, "Conv": 1, "Add": 1}
    assert {r.pass_name for r in records} <= {load(n).name for n in names}
    assert fold(after)[1] == ()
    for feed in feeds():
        assert np.allclose(run(after, feed)[0], run(before, feed)[0], rtol=1e-5, atol=1e-5)


def test_names_reproduce_the_result() -> None:
    before = messy()
    after, names, _ = fold(before)
    again = apply_named(before, names)
    described = [
        [(n.name, n.op_type, [v and v.name for v in n.inputs]) for n in p.graph] for p in (after, again)
    ]
    assert described[0] == described[1]
    assert list(after.graph.initializers) == list(again.graph.initializers)


def test_only_none_changes_nothing() -> None:
    after, names, records = fold(messy(), only=())
    assert (names, records) == ((), [])
    assert ops(after) == ops(messy())


def test_a_failing_library_is_undone_and_on_record(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: FoldConstants, model: ir.Model) -> None:
        model.graph.remove(list(model.graph)[-1], safe=False)
        raise RuntimeError("no evaluator")

    monkeypatch.setattr(FoldConstants, "run", broken)
    before = messy()
    after, names, records = fold(before)
    assert "fold_constants" not in names
    assert ("fold-constants", "undone: RuntimeError: no evaluator") in [(r.pass_name, r.why) for r in records]
    for feed in feeds():
        assert np.allclose(run(after, feed)[0], run(before, feed)[0], rtol=1e-5, atol=1e-5)


def test_what_fails_once_only_is_on_record_and_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = FoldConstants.run, list[int]()

    def moody(self: FoldConstants, model: ir.Model) -> None:
        calls.append(1)
        if len(calls) == 1:
            model.graph.remove(list(model.graph)[-1], safe=False)
            raise RuntimeError("not today")
        real(self, model)

    monkeypatch.setattr(FoldConstants, "run", moody)
    used_up, again = messy(), messy()
    after, names, records = fold(used_up, again=lambda: again)
    assert "fold_constants" in names
    assert [r.why for r in records if r.why.startswith("undone")] == [
        "undone: RuntimeError: not today, at the first attempt only"
    ]
    for feed in feeds():
        assert np.allclose(run(after, feed)[0], run(messy(), feed)[0], rtol=1e-5, atol=1e-5)


def test_verify_all_runs_the_program_after_every_fold(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that writes Sub for Add leaves a sound graph: only running it shows."""

    def subtracts(self: FoldConstants, model: ir.Model) -> None:
        for node in model.graph:
            node.op_type = "Sub" if node.op_type == "Add" else node.op_type

    monkeypatch.setattr(FoldConstants, "run", subtracts)
    program = messy()
    program = replace(program, example=feeds()[0])
    assert "fold_constants" in fold(program)[1]
    monkeypatch.setenv("LAMINA_VERIFY", "all")
    after, names, records = fold(program)
    assert "fold_constants" not in names
    assert any(r.pass_name == "fold-constants" and "differs by" in r.why for r in records)
    for feed in feeds():
        assert np.allclose(run(after, feed)[0], run(program, feed)[0], rtol=1e-5, atol=1e-5)


def test_a_changed_interface_is_undone_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def renames(self: FoldConstants, model: ir.Model) -> None:
        model.graph.outputs[0].name = "other"

    monkeypatch.setattr(FoldConstants, "run", renames)
    with pytest.raises(VerificationError) as error:
        apply_named(messy(), ["fold_constants"])
    assert str(error.value).splitlines()[0] == (
        "after fold-constants: the outputs changed from ['y'] to ['other']"
    )
    after, names, _ = fold(messy())
    assert after.outputs[0].name == "y"
    assert "fold_constants" not in names


def test_inferred_dimensions_do_not_reach_the_interface() -> None:
    before = build("y = Relu(x)", outputs="float[N,A,B,C] y")
    after, _, _ = fold(before)
    assert after.outputs == before.outputs


def test_a_node_meets_only_the_rules_of_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.rewriter import RewriteRule

    asked: list[str] = []
    real = RewriteRule.try_rewrite

    def counted(self: Any, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
        asked.append(node.op_type)
        return real(self, model, graph, node, **options)

    monkeypatch.setattr(RewriteRule, "try_rewrite", counted)
    chain = "".join(f"v{i + 1} = Neg(v{i})\n" for i in range(50))
    after = apply_named(
        build(f"v0 = Relu(x)\nr = Relu(v0)\n{chain.replace('(v0)', '(r)')}y = Abs(v50)"),
        ["simplify_patterns"],
    )
    assert set(asked) == {"Relu"}
    assert ops(after) == {"Relu": 1, "Neg": 50, "Abs": 1}


def test_a_form_that_does_not_match_leaves_the_opset() -> None:
    after, names, _ = fold(build("y = Relu(x)"), forms=FORMS)
    assert names == ()
    assert after.opset == 18


def test_subgraphs_keep_what_they_read_from_outside() -> None:
    body = (
        "s = ReduceSum(x) z = Cast <to=9> (s) a = Relu(x)"
        " y = If (z) <then_branch = t () => (float[N,3,5,6] p) { p = Identity(a) },"
        " else_branch = e () => (float[N,3,5,6] q) { q = Neg(a) }>"
    )
    text = f"g (float[N,3,5,6] x) => (float[N,3,5,6] y) {{ {body} }}".replace(
        "ReduceSum(x)", "ReduceSum <keepdims=0> (x)"
    )
    before = program(text)
    after, _, records = fold(before)
    assert not [r for r in records if r.why.startswith("undone")]
    for feed in feeds():
        assert np.array_equal(run(after, feed)[0], run(before, feed)[0])


@pytest.mark.parametrize(
    "body", ["y = Add(x, e)", "y = Add(e, x)", "y = Sub(x, e)", "y = Mul(x, f)", "y = Div(x, f)"]
)
def test_a_constant_that_is_nearly_neutral_stays(body: str) -> None:
    weights = {"e": np.float32(1e-9), "f": np.float32(1.000001)}
    before = program(
        f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}",
        {k: v for k, v in weights.items() if f"{k}" in body.split("(")[1]},
    )
    feeds = [{"x": np.array([[0, 1, -2, 3]], np.float32) * np.float32(1e-9)}]
    assert ops(check(before, "simplify_patterns", feeds)) == ops(before)


@pytest.mark.parametrize(
    "body", ["y = Add(x, e)", "y = Add(e, x)", "y = Sub(x, e)", "y = Mul(f, x)", "y = Div(x, f)"]
)
def test_a_neutral_constant_leaves(body: str) -> None:
    weights = {"e": np.float32(0), "f": np.float32(1)}
    before = program(
        f"g (float[N,4] x) => (float[N,4] z) {{ {body} z = Abs(y) }}",
        {k: v for k, v in weights.items() if f"{k}" in body.split("(")[1]},
    )
    feeds = [{"x": np.array([[0, 1, -2, 3]], np.float32)}]
    assert ops(check(before, "simplify_patterns", feeds)) in ({"Abs": 1}, {"Identity": 1, "Abs": 1})


def test_equal_computations_on_constants_are_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxscript.optimizer import _constant_folding as library

    asked: list[str] = []
    real = library._reference_evaluator.evaluate

    def counted(domain: str, op_type: str, version: int, *inputs: Any, **attributes: Any) -> Any:
        asked.append(op_type)
        return real(domain, op_type, version, *inputs, **attributes)

    monkeypatch.setattr(library._reference_evaluator, "evaluate", counted)
    body = " ".join(f"r{i} = Sqrt(a{i}) m{i} = Mul(x, r{i})" for i in range(4))
    weights = {f"a{i}": np.array([4.0 if i < 3 else 9.0], np.float32) for i in range(4)}
    after = check(build(f"{body} y = Sum(m0, m1, m2, m3)", weights), "fold_constants", feeds())
    assert asked == ["Sqrt", "Sqrt"]
    found = {k: float(v.const_value.numpy()[0]) for k, v in after.graph.initializers.items() if v.const_value}
    assert found == {"r0": 2.0, "r1": 2.0, "r2": 2.0, "r3": 3.0}


def test_computations_on_constants_that_differ_in_an_attribute_are_all_done() -> None:
    body = "p = ReduceSum <keepdims=1> (c) q = ReduceSum <keepdims=0> (c) r = Mul(x, p) y = Mul(r, q)"
    before = build(body, {"c": np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], np.float32)})
    after = check(before, "fold_constants", feeds())
    found = {k: v.const_value.numpy() for k, v in after.graph.initializers.items() if v.const_value}
    assert found["p"].shape == (1,)
    assert found["q"].shape == ()


def test_an_operator_that_only_a_subgraph_has_is_seen() -> None:
    before = program(
        """g (float[N,4] x, bool c) => (float[N,4] y) { y = If (c) <
            then_branch = t () => (float[N,4] p) { a = Relu(x) b = Identity(a) p = Neg(b) },
            else_branch = e () => (float[N,4] q) { q = Abs(x) }> }"""
    )
    after, names, _ = fold(before)
    assert names == ("eliminate_identities",)
    branch = after.graph[0].attributes["then_branch"].as_graph()
    assert [n.op_type for n in branch] == ["Relu", "Neg"]


def test_a_pass_is_not_run_where_no_operator_is_what_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    for name in ("lift_constants", "eliminate_identities", "fold_constant_if", "fold_shapes"):
        cls = type(load(name))
        assert cls.wants
        monkeypatch.setattr(cls, "idle", lambda self, model: asked.append(self.name))
        monkeypatch.setattr(cls, "apply", lambda self, rewriter: asked.append(self.name))
    fold(build("y = Relu(x)"))
    assert asked == []
    fold(build("s = Shape(x) a = Identity(x) y = Reshape(a, s)"))
    assert set(asked) == {"eliminate-identities", "fold-shapes"}


def test_what_rules_did_to_one_model_does_not_change_what_they_do_to_the_next() -> None:
    weights = {"p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "w": random(4, 3, 3, 3)}
    padded = build("a = Pad(x, p) y = Conv <pads=[1,1,1,1]> (a, w)", weights)
    relus = build("a = Relu(x) y = Relu(a)", outputs="float[N,3,5,6] y")

    def nodes() -> list[tuple[str, str]]:
        after = apply_named(padded, ["simplify_patterns"])
        return [(n.op_type, n.name or "") for n in after.graph]

    first = nodes()
    for other in (relus, build("a = Cast <to=1> (x) y = Relu(a)", outputs="float[N,3,5,6] y")):
        apply_named(other, ["simplify_patterns"])
        assert nodes() == first
    assert [op for op, _ in first] == ["Conv"]
