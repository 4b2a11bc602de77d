"""Whether two models are the same function, through Python and the command line."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny import tiny_data, tiny_model, write_tiny

import lamina
from lamina.cli import main
from lamina.comparison import damage
from lamina.errors import DataError, UnsupportedOperator


def changed(factor: float) -> onnx.ModelProto:
    model = tiny_model()
    weight = model.graph.initializer[1]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    return model


def identity(dtype: int) -> onnx.ModelProto:
    return model_of([helper.make_node("Identity", ["x"], ["y"])], dtype=dtype)


def model_of(nodes, weights=None, outputs=("y",), shape=("batch", 3), dtype=TensorProto.FLOAT):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info(name, dtype, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(a), n) for n, a in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def two_outputs(names: list[str]) -> onnx.ModelProto:
    nodes = [helper.make_node("Relu", ["x"], ["y"], "one"), helper.make_node("Neg", ["x"], ["z"], "other")]
    return model_of([n for n in nodes if n.output[0] in names], outputs=names)


def unary(operator: str) -> onnx.ModelProto:
    return model_of([helper.make_node(operator, ["x"], ["y"])])


def chain(*operators: str) -> onnx.ModelProto:
    names = ["x", *(f"t{i}" for i in range(len(operators) - 1)), "y"]
    return model_of([helper.make_node(o, [names[i]], [names[i + 1]]) for i, o in enumerate(operators)])


def scaled_exp() -> onnx.ModelProto:
    """exp(x) as exp(x / 2) squared: beyond 88 both overflow, the product earlier in the negative."""
    nodes = [
        helper.make_node("Mul", ["x", "half"], ["h"]),
        helper.make_node("Exp", ["h"], ["e"]),
        helper.make_node("Mul", ["e", "e"], ["y"]),
    ]
    return model_of(nodes, {"half": np.float32(0.5)})


def times(factor: np.float32) -> onnx.ModelProto:
    return model_of([helper.make_node("Mul", ["x", "f"], ["y"])], {"f": np.float32(factor)})


def clipped(bound: float) -> onnx.ModelProto:
    bounds = {"low": np.float32(-bound), "high": np.float32(bound)}
    return model_of([helper.make_node("Clip", ["x", "low", "high"], ["y"])], bounds)


def rows_summed() -> onnx.ModelProto:
    return model_of([helper.make_node("ReduceSum", ["x", "axes"], ["y"])], {"axes": np.array([0])})


def first_two_rows() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Slice", ["x", "start", "end", "axes"], ["s"]),
        helper.make_node("ReduceSum", ["s", "axes"], ["y"]),
    ]
    return model_of(nodes, {"start": np.array([0]), "end": np.array([2]), "axes": np.array([0])})


def fixed_by_weight() -> onnx.ModelProto:
    return model_of([helper.make_node("Add", ["x", "w"], ["y"])], {"w": np.ones((2, 3), np.float32)})


def shifted(by: int) -> onnx.ModelProto:
    return model_of(
        [helper.make_node("Add", ["x", "by"], ["y"])], {"by": np.int64(by)}, dtype=TensorProto.INT64
    )


def test_a_model_equals_itself():
    found = lamina.compare(tiny_model(), tiny_model())
    assert found.equal
    assert (found.outputs[0].max_abs, found.outputs[0].max_ulp) == (0.0, 0.0)
    assert found.samples == 16


@pytest.mark.parametrize(("factor", "equal"), [(1.01, False), (1000.0, False), (-1.0, False), (0.0, False)])
def test_wrong_weights_are_told_apart(factor, equal):
    assert lamina.compare(tiny_model(), changed(factor), data={"x": tiny_data()["x"]}).equal is equal


def test_difference_is_relative_to_the_largest_magnitude():
    (row,) = lamina.compare(tiny_model(), changed(1.5), data={"x": tiny_data()["x"]}).outputs
    assert row.max_rel == pytest.approx(0.5, rel=1e-5)
    assert lamina.compare(tiny_model(), changed(1.5), tolerance=0.51).equal


def test_nan_in_one_model_only_is_a_difference():
    found = lamina.compare(tiny_model(), tiny_model(bad_weight=float("nan")))
    assert not found.equal
    assert found.outputs[0].max_abs == float("inf")


def test_other_interface_is_an_error():
    other = tiny_model()
    other.graph.input[0].name = other.graph.node[0].input[0] = "y"
    with pytest.raises(DataError, match=r"inputs differ: \['x'\] and \['y'\]"):
        lamina.compare(tiny_model(), other)


def test_missing_output_is_unequal_and_the_rest_is_compared():
    both, one = two_outputs(["y", "z"]), two_outputs(["y"])
    found = lamina.compare(both, one)
    assert not found.equal
    assert found.structure.interface == ("output 'z' is missing in the second model",)
    assert [(o.name, o.equal, o.max_abs) for o in found.outputs] == [("y", True, 0.0)]
    assert found.first_divergence is None
    assert lamina.compare(one, both).structure.interface == ("output 'z' is new in the second model",)


def test_outputs_in_another_order_are_unequal_but_compared_by_name():
    found = lamina.compare(two_outputs(["y", "z"]), two_outputs(["z", "y"]))
    assert not found.equal
    assert found.structure.interface == ("the outputs are in another order: ['y', 'z'] and ['z', 'y']",)
    assert all(o.equal for o in found.outputs)


def test_no_common_output_is_an_error():
    with pytest.raises(DataError, match=r"outputs differ: \['y'\] and \['z'\]"):
        lamina.compare(two_outputs(["y"]), two_outputs(["z"]))


def test_another_dtype_is_named():
    with pytest.raises(DataError, match=r"inputs differ: \['x: FLOAT'\] and \['x: DOUBLE'\]"):
        lamina.compare(identity(TensorProto.FLOAT), identity(TensorProto.DOUBLE))


def test_sequences_at_the_interface_are_refused_by_name():
    nodes = [helper.make_node("SequenceConstruct", ["x"], ["y"])]
    model = model_of(nodes)
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model.graph.output[0].CopyFrom(helper.make_value_info("y", kind))
    with pytest.raises(UnsupportedOperator, match="'y' is not a tensor but a sequence"):
        lamina.compare(model, model)


def test_structure_counts_operators_weights_and_opsets():
    mine, other = tiny_model(), tiny_model()
    other.opset_import[0].version = 18
    other.graph.node[1].op_type = "Sigmoid"
    other.graph.initializer.append(numpy_helper.from_array(np.zeros(4, np.float32), "b"))
    other.graph.node.append(helper.make_node("Add", ["logits", "b"], ["unused"], "idle"))
    found = lamina.compare(mine, other, data={"x": tiny_data()["x"]}, samples=0).structure
    assert found.opsets == {"ai.onnx": (20, 18)}
    assert found.operators == {"Add": (0, 1), "Relu": (1, 0), "Sigmoid": (0, 1)}
    assert found.nodes == (3, 4)
    assert found.initializers == (2, 3)
    assert found.initializer_bytes[1] - found.initializer_bytes[0] == 16


def test_sizes_the_first_model_refuses_are_skipped():
    # A weight of 2 rows is added: batches of 1 (by broadcasting) and 2 run, 3 does not.
    found = lamina.compare(fixed_by_weight(), fixed_by_weight())
    assert found.equal
    assert found.skipped > 0
    assert found.samples + found.skipped == 16


def test_a_model_that_runs_on_nothing_is_an_error():
    model = fixed_by_weight()
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((5, 3), np.float32), "w"))
    model.graph.node[0].op_type = "MatMul"
    model.graph.input[0].type.tensor_type.shape.dim[1].ClearField("dim_value")
    with pytest.raises(DataError, match="the first model runs on none of 16 inputs"):
        lamina.compare(model, model)


def test_an_input_only_the_second_model_refuses_is_a_difference():
    free = fixed_by_weight()
    free.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((1, 3), np.float32), "w"))
    fixed = fixed_by_weight()
    fixed.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ones((2, 3), np.float32), "w"))
    found = lamina.compare(free, fixed)
    assert not found.equal
    assert any("batch=3" in line for line in found.failures)


def test_several_sizes_and_edge_values_are_tried():
    """Each of these differs from its twin on one kind of input only."""
    for wrong in ("Relu", "Abs"):  # the same on positive values
        assert not lamina.compare(unary("Identity"), unary(wrong)).equal
    assert not lamina.compare(unary("Sigmoid"), unary("HardSigmoid")).equal
    assert not lamina.compare(unary("Identity"), clipped(500.0)).equal  # only beyond 500
    assert lamina.compare(unary("Identity"), clipped(1e30)).equal
    assert not lamina.compare(rows_summed(), first_two_rows()).equal  # only from the third row on


def test_what_overflows_in_the_first_model_says_nothing():
    """exp(1000) is infinite: an equal model may overflow elsewhere."""
    assert lamina.compare(chain("Exp", "Log"), chain("Exp", "Log")).equal
    found = lamina.compare(chain("Exp"), scaled_exp())
    assert found.equal, found


def test_integers_must_be_equal_whatever_the_tolerance():
    one, other = shifted(1_000_000), shifted(1_000_001)
    found = lamina.compare(one, other, tolerance=0.1)
    assert not found.equal
    assert found.outputs[0].max_abs == 1.0
    assert found.outputs[0].max_ulp is None
    assert lamina.compare(one, one).equal


def test_short_dtypes_have_a_tolerance_of_their_own():
    found = lamina.compare(identity(TensorProto.FLOAT16), identity(TensorProto.FLOAT16))
    assert found.outputs[0].tolerance == pytest.approx(8 * 2**-10)


def test_ulps_count_roundings():
    found = lamina.compare(unary("Identity"), times(np.nextafter(np.float32(1), np.float32(2))))
    assert found.equal
    (row,) = found.outputs
    assert 1.0 <= row.max_ulp <= 2.0
    assert 0.0 < row.scale_ulp <= 2.0
    assert not lamina.compare(unary("Identity"), times(np.nextafter(np.float32(1), 2)), tolerance=0.0).equal


def test_models_too_large_for_one_message_run_from_a_file(monkeypatch):
    import onnx_ir as ir

    from lamina.backends import onnxruntime as backend

    saved = []
    save = ir.save
    monkeypatch.setattr(backend, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(ir, "save", lambda model, path, **kw: (saved.append(kw), save(model, path, **kw))[1])
    assert lamina.compare(tiny_model(), tiny_model()).equal
    found = lamina.compare(tiny_model(), changed(1.01))
    assert not found.equal
    assert found.first_divergence.name == "logits"
    assert saved
    assert all(kw == {"external_data": "model.onnx.data"} for kw in saved)


def test_generated_inputs_alone_given_ones_alone_or_both():
    data = {"x": tiny_data()["x"]}
    assert lamina.compare(tiny_model(), tiny_model(), data=data, samples=0).samples == 120
    assert lamina.compare(tiny_model(), tiny_model(), data=data, samples=4).samples == 124
    with pytest.raises(DataError, match="leave nothing to compare on"):
        lamina.compare(tiny_model(), tiny_model(), samples=0)


def test_the_seed_decides_the_inputs():
    runs = [lamina.compare(tiny_model(), changed(1.01), seed=s).outputs[0].max_abs for s in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_damage_has_both_scores_and_an_interval():
    found = damage(tiny_model(), changed(-1.0), data=tiny_data(), metric="top1")
    assert found["original"] == 1.0
    assert found["damage"] == pytest.approx(1.0 - found["optimized"])
    low, high = found["damage_ci95"]
    assert low <= found["damage"] <= high


def test_json_keys_are_stable_and_json_is_valid(tmp_path, capsys):
    onnx.save(tiny_model(), tmp_path / "a.onnx")
    onnx.save(tiny_model(bad_weight=float("nan")), tmp_path / "b.onnx")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx"), "--json"])
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert stopped.value.code == 1
    assert {"equal", "outputs", "first_divergence", "structure", "samples", "skipped"} - set(found) == set()
    assert {"name", "max_abs", "mean_abs", "max_rel", "max_ulp"} - set(found["outputs"][0]) == set()
    assert found["outputs"][0]["max_abs"] is None
    assert "NaN" in found["outputs"][0]["reason"]
    assert found["first_divergence"]["name"] == "h"
    assert found["first_divergence"]["node"] == "first"
    assert found["first_divergence"]["operator"] == "MatMul"


def test_table_says_what_differs_and_where(tmp_path, capsys):
    onnx.save(tiny_model(), tmp_path / "a.onnx")
    other = changed(1.5)
    other.graph.node[1].op_type = "Sigmoid"
    onnx.save(other, tmp_path / "b.onnx")
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a.onnx"), str(tmp_path / "b.onnx")])
    text = " ".join(capsys.readouterr().out.split())
    assert "the models part at 'r', made by Relu 'relu'" in text
    assert "in the second model: 'r', Sigmoid 'relu'" in text
    assert "what it is computed from agrees: h" in text
    assert "Relu 1 -> 0" in text
    assert "different at tolerance 1e-05" in text


def test_command_line_exit_code_is_the_verdict(tmp_path, capsys):
    model, data = write_tiny(tmp_path)
    onnx.save(changed(1.01), tmp_path / "other.onnx")
    for other, code in ((model, 0), (tmp_path / "other.onnx", 1)):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(model), str(other), "--data", str(data), "--metric", "top1", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert stopped.value.code == code
        assert found["equal"] is (code == 0)
        assert found["quality"]["original"] == 1.0
