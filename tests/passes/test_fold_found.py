"""What the ONNX backend suites found wrong in the folds; each once."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from lamina.ir.capture import capture
from lamina.passes.fold import fold, form_names


def _undone(records: object) -> list[str]:
    return [r.why for r in records if r.why.startswith("undone")]  # type: ignore[attr-defined]


def test_castlike_keeps_what_it_says_about_saturation() -> None:
    node = helper.make_node("CastLike", ["x", "like"], ["y"], saturate=0)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT8E4M3FN, [3])],
        [helper.make_tensor("like", TensorProto.FLOAT8E4M3FN, [1], [0.0])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    after = fold(capture(model))[0]
    (kept,) = after.graph
    assert kept.attributes["saturate"].as_int() == 0


def test_a_split_known_at_run_time_undoes_nothing() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    graph = helper.make_graph(
        [helper.make_node("SplitToSequence", ["x", "split"], ["y"], axis=1)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 6]),
            helper.make_tensor_value_info("split", TensorProto.INT64, []),
        ],
        [helper.make_value_info("y", kind)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    after, _, records = fold(capture(model))
    assert not _undone(records)
    assert [n.op_type for n in after.graph] == ["SplitToSequence"]
    assert isinstance(after.graph.outputs[0].type, ir.SequenceType)


def test_strided_weights_are_deduplicated_like_others() -> None:
    array = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "a"], ["p"]),
            helper.make_node("MatMul", ["p", "b"], ["q"]),
            helper.make_node("MatMul", ["q", "a"], ["r"]),
            helper.make_node("MatMul", ["r", "c"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])],
        [
            numpy_helper.from_array(np.ascontiguousarray(array.T), "a"),
            numpy_helper.from_array(array, "b"),
            numpy_helper.from_array(np.ascontiguousarray(array.T), "c"),
        ],
    )
    program = capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])).clone()
    weight = program.graph.initializers["a"]
    weight.const_value = ir.Tensor(array.T, name="a")  # a view, as folding a Transpose leaves it
    after, names, records = fold(program, only=("deduplicate_initializers",))
    assert names == ("deduplicate_initializers",)
    assert not _undone(records)
    assert sorted(after.graph.initializers) == ["a", "b"]


def test_operators_of_an_unknown_domain_are_left_alone() -> None:
    custom = [helper.make_node("Add", ["k", "k"], [f"c{i}"], domain="acme", level=3) for i in (1, 2)]
    graph = helper.make_graph(
        [
            *custom,
            helper.make_node("Identity", ["c2"], ["d"], domain="acme"),
            helper.make_node("Sum", ["x", "c1", "d"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.ones(2, np.float32), "k")],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    model = helper.make_model(graph, opset_imports=imports)
    after, _, records = fold(capture(model), forms=form_names())
    assert not _undone(records)
    kept = [n for n in ir.to_proto(after.model).graph.node if n.domain == "acme"]
    assert [onnx.NodeProto(op_type=n.op_type, input=n.input, output=n.output) for n in kept] == [
        onnx.NodeProto(op_type=n.op_type, input=n.input, output=n.output) for n in model.graph.node[:3]
    ]
    assert [n.attribute[0].i for n in kept[:2]] == [3, 3]


def test_subgraphs_of_opaque_operators_stay_closed() -> None:
    score = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Mul", ["half", "two"], ["one"]),
            helper.make_node("Mul", ["s", "one"], ["t"]),
        ],
        "score",
        [helper.make_tensor_value_info("s", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)],
        [helper.make_tensor("half", TensorProto.FLOAT, [], [0.5])],
    )
    graph = helper.make_graph(
        [helper.make_node("Attend", ["x"], ["y"], domain="acme", score=score)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    )
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("acme", 1)]
    after, _, records = fold(capture(helper.make_model(graph, opset_imports=imports)), forms=form_names())
    assert not _undone(records)
    assert not after.graph.initializers
    (kept,) = ir.to_proto(after.model).graph.node
    inner = kept.attribute[0].g
    assert [n.op_type for n in inner.node] == ["Constant", "Mul", "Mul"]
    assert [t.name for t in inner.initializer] == ["half"]


def test_a_constant_output_keeps_its_dynamic_dims() -> None:
    graph = helper.make_graph(
        [helper.make_node("Add", ["a", "a"], ["y"])],
        "g",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor("a", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])],
    )
    program = capture(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))
    after, names, records = fold(program)
    assert not _undone(records)
    assert names == ("fold_constants",)
    assert after.outputs == program.outputs
    assert after.outputs[0].shape == ("n",)
