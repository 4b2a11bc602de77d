"""Reading ONNX: one normalized form, nothing of the caller's touched, every bad file one clear error."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import branching, mlp, proto, run

from lamina.errors import CaptureError, DataError, LaminaError, UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.verify import check, verify_structure


def _saved(tmp_path: Path, model: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = tmp_path / name
    path.write_bytes(model.SerializeToString())
    return path


# -- kinds of input -------------------------------------------------------------------------------------


def test_every_kind_of_onnx_gives_the_same_program(tmp_path: Path) -> None:
    model = mlp()
    path = _saved(tmp_path, model)
    programs = [capture(s) for s in (path, str(path), model, ir.from_proto(model))]
    assert len({p.fingerprint for p in programs}) == 1
    feeds = {"x": np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)}
    for program in programs:
        np.testing.assert_array_equal(run(program.model, feeds)[0], run(model, feeds)[0])
        assert [(p.name, p.shape) for p in program.inputs] == [("x", ("batch", 8))]


def test_a_program_is_handed_through() -> None:
    program = capture(mlp())
    assert capture(program) is program


def test_text_format_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnxtxt"
    onnx.save(mlp(), path)
    assert capture(path).fingerprint == capture(mlp()).fingerprint


def test_something_else_is_refused_with_advice() -> None:
    with pytest.raises(CaptureError, match=r"a builtins\.dict is not a model lamina can read") as caught:
        capture({"weights": 1})
    assert caught.value.advice is not None
    assert "torch.nn.Module" in caught.value.advice


# -- nothing of the caller's changes --------------------------------------------------------------------


def _untidy() -> onnx.ModelProto:
    """Names that clash or are missing, constants in nodes, nodes out of order, weights listed as inputs."""
    model = mlp()
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [8, 16]))
    for node in graph.node:
        node.name = "same" if node.op_type == "MatMul" else ""
    constant = numpy_helper.from_array(np.array(2.0, np.float32))
    graph.node.append(helper.make_node("Constant", [], ["two"], value=constant))
    graph.node.append(helper.make_node("Mul", ["h4", "two"], ["h5"]))
    graph.node[4].input[1] = "h5"
    return model


@pytest.mark.parametrize("make", [_untidy, branching])
def test_the_callers_proto_is_not_changed(make: object) -> None:
    model = make()  # type: ignore[operator]
    before = model.SerializeToString(deterministic=True)
    program = capture(model)
    ir.to_proto(program.model)
    assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("make", [_untidy, branching])
def test_the_callers_ir_model_is_not_changed(make: object) -> None:
    model = ir.from_proto(make())  # type: ignore[operator]
    model.graph.sort()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    program = capture(model)
    for value in program.model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value.name = "renamed"
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_weights_are_shared_with_an_ir_model() -> None:
    array = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model = ir.from_proto(mlp())
    model.graph.initializers["w1"].const_value = ir.Tensor(array[:8, :16], name="w1")
    captured = capture(model).graph.initializers["w1"].const_value
    assert captured is not None
    assert np.shares_memory(captured.numpy(), array)


# -- normal form ----------------------------------------------------------------------------------------


def test_untidy_models_are_normalized() -> None:
    model = _untidy()
    program = capture(model)
    verify_structure(program)
    check(program)
    assert [p.name for p in program.inputs] == ["x"]
    assert "Constant" not in {n.op_type for n in program.graph}
    names = [n.name for n in program.graph]
    assert all(names)
    assert len(set(names)) == len(names)
    feeds = {"x": np.ones((2, 8), np.float32)}
    order = {id(v): i for i, n in enumerate(program.graph) for v in n.outputs}
    assert all(order.get(id(v), -1) < i for i, n in enumerate(program.graph) for v in n.inputs)
    w = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = feeds["x"] + 2 * (np.maximum(feeds["x"] @ w["w1"] + w["b1"], 0) @ w["w2"])
    np.testing.assert_allclose(run(program.model, feeds)[0], expected, rtol=1e-5)


def test_subgraphs_are_normalized_and_compute_the_same() -> None:
    program = capture(branching())
    verify_structure(program)
    nodes = [n.name for n in program.graph.all_nodes()]
    values = [v.name for n in program.graph.all_nodes() for v in n.outputs]
    assert len(set(nodes)) == len(nodes)
    assert len(set(values)) == len(values)
    assert all(not g.initializers for g in program.graph.subgraphs())
    for sign in (1, -1):
        feeds = {"x": sign * np.random.default_rng(2).random((3, 4)).astype(np.float32)}
        np.testing.assert_array_equal(run(program.model, feeds)[0], run(branching(), feeds)[0])


def test_functions_are_inlined() -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["b"]), helper.make_node("Relu", ["b"], ["c"])]
    function = helper.make_function("local", "Square", ["a"], ["c"], body, [helper.make_opsetid("", 18)])
    nodes = [
        helper.make_node("Square", ["x"], ["h"], domain="local"),
        helper.make_node("Square", ["h"], ["y"], domain="local"),
    ]
    model = proto(nodes, {"x": ["n"]}, {"y": ["n"]})
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("local", 1))
    program = capture(model)
    assert [n.op_type for n in program.graph] == ["Mul", "Relu", "Mul", "Relu"]
    assert not program.model.functions
    assert set(program.model.opset_imports) == {""}
    feeds = {"x": np.array([1.5, -2.0], np.float32)}
    np.testing.assert_array_equal(run(program.model, feeds)[0], run(model, feeds)[0])


def test_an_omitted_optional_output_stays_omitted() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.standard_normal((1, 8, 3)).astype(np.float32),
        "r": rng.standard_normal((1, 8, 2)).astype(np.float32),
    }
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], "lstm", hidden_size=2)]
    program = capture(proto(nodes, {"x": [4, 1, 3]}, {"y": [1, 1, 2]}, weights))
    assert [v.name for v in program.graph.node(0).outputs] == ["", "y"]
    verify_structure(program)


def test_an_input_handed_out_keeps_its_name() -> None:
    program = capture(proto([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2], "x": [2]}))
    assert [p.name for p in program.inputs] == ["x"]
    assert [p.name for p in program.outputs] == ["y", "x"]


def test_a_constant_that_is_an_output_is_still_produced() -> None:
    value = numpy_helper.from_array(np.array([3.0], np.float32))
    nodes = [helper.make_node("Constant", [], ["c"], value=value), helper.make_node("Add", ["x", "c"], ["y"])]
    program = capture(proto(nodes, {"x": [1]}, {"y": [1], "c": [1]}))
    feeds = {"x": np.ones(1, np.float32)}
    np.testing.assert_array_equal(run(program.model, feeds)[1], [3.0])


def _constant(name: str, *values: float, **more: object) -> onnx.NodeProto:
    tensor = numpy_helper.from_array(np.array(values, np.float32), "not its name")
    return helper.make_node("Constant", [], [name], value=tensor, **more)


def _add(read: str, made: str) -> onnx.NodeProto:
    return helper.make_node("Add", ["x", read], [made])


_NUMBER = helper.make_node("Constant", [], ["d"], value_float=2.0)


@pytest.mark.parametrize(
    ("nodes", "lifted_early"),
    [
        ([_constant("c", 3.0), _add("c", "h"), _constant("d", 4.0), _add("d", "y")], True),
        ([_constant("c", 3.0), _NUMBER, _add("c", "y")], False),
        ([_constant("y", 3.0)], False),
    ],
)
def test_constants_of_a_file_are_lifted_as_those_of_a_message(
    nodes: list[onnx.NodeProto], lifted_early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.ir import capture_onnx

    seen: list[list[str]] = []
    reader = capture_onnx._from_proto

    def kept(message: onnx.ModelProto, *more: object) -> ir.Model:
        seen.append([n.op_type for n in message.graph.node])
        return reader(message, *more)

    model = proto(nodes, {"x": [1]}, {"y": [1]})
    expected = capture(model)
    monkeypatch.setattr(capture_onnx, "_from_proto", kept)
    found = capture(_saved(tmp_path, model))
    assert ("Constant" not in seen[0]) == lifted_early
    assert list(found.graph.initializers) == list(expected.graph.initializers)
    assert [n.name for n in found.graph] == [n.name for n in expected.graph]
    assert found.fingerprint == expected.fingerprint
    assert all(
        v.const_value is not None and v.const_value.name == k for k, v in found.graph.initializers.items()
    )


@pytest.mark.parametrize(
    "nodes",
    [
        [_constant("c", 3.0), _constant("c", 4.0), _add("c", "y")],
        [_constant("c", 3.0), helper.make_node("Relu", ["x"], ["c"]), _add("c", "y")],
        [_constant("x", 3.0), _add("x", "y")],
    ],
)
def test_a_constant_that_takes_a_name_twice_is_refused(nodes: list[onnx.NodeProto], tmp_path: Path) -> None:
    model = proto(nodes, {"x": [1]}, {"y": [1]})
    with pytest.raises(CaptureError) as of_message:
        capture(model)
    with pytest.raises(CaptureError) as of_file:
        capture(_saved(tmp_path, model))
    assert of_file.value.what == of_message.value.what


def test_wrong_inner_shapes_are_corrected_and_the_interface_is_believed() -> None:
    model = mlp()
    model.graph.value_info.append(helper.make_tensor_value_info("h1", TensorProto.FLOAT, ["batch", 99]))
    program = capture(model)
    h1 = next(v for n in program.graph for v in n.outputs if v.name == "h1")
    assert str(h1.shape) == "[batch,16]"
    assert program.outputs[0].shape == ("batch", 8)


def test_minus_one_is_a_dynamic_dim() -> None:
    program = capture(proto([helper.make_node("Relu", ["x"], ["y"])], {"x": [-1, 3]}, {"y": [-1, 3]}))
    assert program.inputs[0].shape == (None, 3)
    assert program.example["x"].shape == (2, 3)


def test_contrib_operators_pass_through() -> None:
    nodes = [helper.make_node("Gelu", ["x"], ["y"], "gelu", domain="com.microsoft")]
    model = proto(nodes, {"x": [2, 3]}, {"y": [2, 3]})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    program = capture(model)
    np.testing.assert_array_equal(run(program.model, program.example)[0], run(model, program.example)[0])


# -- example inputs -------------------------------------------------------------------------------------


def test_examples_can_be_given_by_position_or_name() -> None:
    x = np.ones((5, 8))
    for given in (x, (x,), {"x": x}):
        program = capture(mlp(), example_inputs=given)
        assert not program.example_is_synthetic
        assert program.example["x"].dtype == np.float32
        assert program.example["x"].shape == (5, 8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": np.ones((1, 8))}, r"example inputs lack \['x'\]"),
        (np.ones((1, 7)), r"example input 'x' has shape \[1, 7\], the model wants \[batch, 8\]"),
        ((np.ones((1, 8)), 2), "2 example inputs for 1 model inputs"),
        (np.ones((1, 8), complex), "example input 'x' is complex128, the model wants float32"),
    ],
)
def test_examples_that_do_not_fit_are_refused(given: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        capture(mlp(), example_inputs=given)


# -- bad files ------------------------------------------------------------------------------------------


def _fails(source: object, kind: type[LaminaError], *words: str) -> LaminaError:
    with pytest.raises(kind) as caught:
        capture(source)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.advice
    return caught.value


def test_a_truncated_file(tmp_path: Path) -> None:
    data = mlp(64).SerializeToString()
    for keep in (10, len(data) // 3, len(data) // 2, len(data) - 1):
        path = tmp_path / f"cut{keep}.onnx"
        path.write_bytes(data[:keep])
        _fails(path, CaptureError, path.name, "truncated or not an ONNX model")


@pytest.mark.parametrize("content", [b"", b"hello, this is no model\n" * 50, b"\x00" * 100, b"\x08\x07"])
def test_a_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.onnx"
    path.write_bytes(content)
    _fails(path, CaptureError, "text.onnx", "truncated or not an ONNX model")


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    _fails(tmp_path / "absent.onnx", CaptureError, "there is no file", "absent.onnx")
    _fails(tmp_path, CaptureError, "is a folder, not a model")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl"])
def test_pickles_are_never_opened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    _fails(path, CaptureError, "is not an ONNX file", "load it yourself and pass the torch.nn.Module")


def test_operators_of_an_unknown_domain_are_carried_through() -> None:
    model = mlp()
    model.graph.node[2].domain = "acme.custom"
    model.opset_import.append(helper.make_opsetid("acme.custom", 3))
    program = capture(model)
    node = next(n for n in program.graph if n.name == "relu")
    assert (node.domain, node.op_type, program.model.opset_imports["acme.custom"]) == (
        "acme.custom",
        "Relu",
        3,
    )


def test_a_domain_that_is_not_imported_is_refused() -> None:
    model = mlp()
    model.graph.node[2].domain = "acme.custom"
    _fails(model, CaptureError, "not a valid ONNX model", "acme.custom")


def test_an_unknown_operator_is_named() -> None:
    model = mlp()
    model.graph.node[2].op_type = "Rleu"
    assert _fails(model, UnsupportedOperator).what == "Rleu 'relu' is not an ONNX operator"


@pytest.mark.parametrize("version", [0, onnx.defs.onnx_opset_version() + 1])
def test_opsets_outside_the_range(version: int) -> None:
    model = mlp()
    model.opset_import[0].version = version
    _fails(model, UnsupportedOperator, f"opset {version} is not supported")


def test_a_cycle_is_named() -> None:
    model = mlp()
    model.graph.node[0].input[0] = "h4"
    error = _fails(model, CaptureError)
    assert error.what == "the graph has a cycle through MatMul 'up', Add 'bias', Relu 'relu', MatMul 'down'"


def test_a_value_nothing_produces() -> None:
    model = mlp()
    model.graph.node[2].input[0] = "ghost"
    assert _fails(model, CaptureError).what == "value 'ghost', read by Relu 'relu', is produced by nothing"
    model = mlp()
    model.graph.output[0].name = "ghost"
    assert "'ghost', read by the graph's outputs" in _fails(model, CaptureError).what


def test_a_value_defined_twice() -> None:
    model = mlp()
    model.graph.node[1].output[0] = "h1"
    _fails(model, CaptureError, "not a valid ONNX model", "h1")


def test_the_checkers_message_is_passed_on() -> None:
    model = mlp()
    model.graph.node[0].attribute.append(helper.make_attribute("bogus", 1))
    _fails(model, CaptureError, "not a valid ONNX model", "Unrecognized attribute: bogus")


def test_weights_that_do_not_fit_their_shape() -> None:
    model = mlp()
    model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[:-4]
    _fails(model, CaptureError, "weight 'w1' does not fit its shape")


def test_sequence_inputs_pass_and_are_named_where_tensors_are_needed() -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    model = mlp()
    model.graph.node.append(helper.make_node("ConcatFromSequence", ["s"], ["z"], axis=0))
    model.graph.input.append(helper.make_value_info("s", kind))
    program = capture(model)
    assert [p.kind for p in program.inputs] == ["tensor", "sequence"]
    assert list(program.example) == ["x"]
    with pytest.raises(UnsupportedOperator, match="'s' is not a tensor but a sequence"):
        program.require_tensors()
    with pytest.raises(UnsupportedOperator, match="'s' is not a tensor but a sequence"):
        capture(model, example_inputs=program.example)


def test_sparse_weights_are_named() -> None:
    model = mlp()
    values = helper.make_tensor("sparse_w", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    _fails(model, UnsupportedOperator, "'sparse_w' is stored sparse")


def test_unreadable_files_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _saved(tmp_path, mlp())

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(onnx, "load", denied)
    _fails(path, CaptureError, "cannot be read: Permission denied")


# -- external data --------------------------------------------------------------------------------------


def _external(folder: Path, *, location: str = "weights.bin", split: bool = False) -> Path:
    """The MLP with its matrices outside, in one file or in two."""
    model = mlp(32)
    end: dict[str, int] = {}
    for i, tensor in enumerate(t for t in model.graph.initializer if len(t.dims) == 2):
        name = f"{i}.{location}" if split else location
        offset = end.get(name, 0)
        data = tensor.raw_data
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(data)
        end[name] = offset + len(data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", str(offset)), ("length", str(len(data)))):
            tensor.external_data.add(key=key, value=value)
    return _saved(folder, model)


@pytest.mark.parametrize("split", [False, True])
def test_external_data_is_mapped(tmp_path: Path, split: bool) -> None:
    path = _external(tmp_path, split=split)
    program = capture(path)
    feeds = {"x": np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)}
    np.testing.assert_array_equal(run(program.model, feeds)[0], run(str(path), feeds)[0])
    weight = program.graph.initializers["w1"].const_value
    assert weight is not None
    base = weight.numpy()
    while isinstance(base, np.ndarray) and base.base is not None:
        base = base.base
    assert type(base).__name__ == "mmap" or isinstance(base, memoryview)


def test_replacing_the_data_file_leaves_the_program_whole(tmp_path: Path) -> None:
    path = _external(tmp_path)
    program = capture(path)
    new = tmp_path / "new"
    new.write_bytes(b"\0" * (tmp_path / "weights.bin").stat().st_size)
    new.replace(tmp_path / "weights.bin")
    weight = program.graph.initializers["w1"].const_value
    assert weight is not None
    assert np.abs(weight.numpy()).max() > 0


def test_external_data_that_is_missing_or_short(tmp_path: Path) -> None:
    path = _external(tmp_path)
    data = tmp_path / "weights.bin"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    _fails(path, CaptureError, "external data file 'weights.bin' is too short", "'w2'")
    data.write_bytes(b"")
    _fails(path, CaptureError, "is too short")
    data.unlink()
    _fails(path, CaptureError, "external data file 'weights.bin' cannot be read: No such file")


@pytest.mark.parametrize("location", ["../weights.bin", "sub/../../weights.bin"])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = _external(folder, location=location)
    _fails(path, CaptureError, f"external data location '{location}' leaves the model's folder")


def test_external_data_by_absolute_path(tmp_path: Path) -> None:
    location = str(tmp_path / "weights.bin")
    path = _external(tmp_path, location=location)
    _fails(path, CaptureError, "leaves the model's folder")


def test_external_data_behind_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = _external(folder)
    (folder / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")
    _fails(path, CaptureError, "'weights.bin' is a link out of the model's folder")


def test_external_data_without_a_folder(tmp_path: Path) -> None:
    model = onnx.load(_external(tmp_path), load_external_data=False)
    _fails(model, CaptureError, "the model came without a folder", "pass the path")


def test_a_damaged_length_entry(tmp_path: Path) -> None:
    path = _external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "length").value = "12"
    path.write_bytes(model.SerializeToString())
    _fails(path, CaptureError, "says 12 bytes, its shape needs")


# -- cost -----------------------------------------------------------------------------------------------


def test_a_clone_shares_weights() -> None:
    program = capture(mlp(64))
    clone = program.clone()
    pair = [p.graph.initializers["w1"].const_value for p in (program, clone)]
    assert pair[0] is pair[1]
    assert isinstance(clone, Program)


def test_capturing_onnx_loads_no_heavy_library(tmp_path: Path) -> None:
    path = _saved(tmp_path, mlp())
    code = (
        "import sys; from lamina.ir.capture import capture; "
        f"capture({str(path)!r}); heavy = ('torch', 'onnxruntime', 'onnxscript', 'tvm'); "
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_garbage_collector_is_left_as_it_was(tmp_path: Path) -> None:
    for switch in (gc.disable, gc.enable):
        switch()
        before = gc.isenabled()
        capture(mlp())
        with pytest.raises(CaptureError):
            capture(tmp_path / "absent.onnx")
        assert gc.isenabled() == before


def _zip_map() -> tuple[onnx.NodeProto, onnx.ValueInfoProto]:
    node = helper.make_node(
        "ZipMap", ["y"], ["pairs"], domain="ai.onnx.ml", classlabels_int64s=list(range(8))
    )
    numbers = helper.make_tensor_type_proto(TensorProto.FLOAT, [])
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(TensorProto.INT64, numbers))
    return node, helper.make_value_info("pairs", kind)


def test_maps_at_the_interface_are_named() -> None:
    model = mlp()
    node, info = _zip_map()
    model.graph.node.append(node)
    model.graph.output.append(info)
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    assert _fails(model, UnsupportedOperator, "'pairs' is or holds a map").advice is not None


def test_maps_inside_are_carried_through() -> None:
    model = mlp()
    model.graph.node.append(_zip_map()[0])
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    program = capture(model)
    verify_structure(program)
    assert [n.op_type for n in program.graph][-1] == "ZipMap"
