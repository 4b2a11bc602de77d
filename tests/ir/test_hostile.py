"""Files made to hurt: bombs, lies, loops, places outside; one clear error each, in little time and memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import mlp, proto, run

from lamina.errors import CaptureError, LaminaError, UnsupportedOperator
from lamina.ir import io
from lamina.ir.capture import capture
from lamina.passes.fold import fold

HUNG = 120.0  # seconds for one file in a child of its own: far above any machine's need, far below a bomb's
MEMORY = 3 << 30  # bytes of address space beyond what importing takes


def _fails(source: object, kind: type[LaminaError], *words: str) -> LaminaError:
    with pytest.raises(kind) as caught:
        capture(source)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.advice
    return caught.value


# -- absurd sizes -----------------------------------------------------------------------------------------


def _adding(node: onnx.NodeProto, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """``y = x + sum(what the node makes of constants alone)``."""
    nodes = [
        node,
        helper.make_node("Cast", [node.output[0]], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    return proto(nodes, {"x": [1]}, {"y": [1]}, weights)


_ONES = numpy_helper.from_array(np.array([1]))
_HUGE = np.array([2**20, 2**20])
BOMBS: dict[str, Callable[[], onnx.ModelProto]] = {
    "range": lambda: _adding(
        helper.make_node("Range", ["a", "b", "c"], ["r"]),
        {"a": np.array(0), "b": np.array(2**40), "c": np.array(1)},
    ),
    "constant of shape": lambda: _adding(
        helper.make_node("ConstantOfShape", ["n"], ["r"], value=_ONES), {"n": _HUGE}
    ),
    "expand": lambda: _adding(
        helper.make_node("Expand", ["a", "n"], ["r"]), {"a": np.array([1]), "n": _HUGE}
    ),
    "tile": lambda: _adding(helper.make_node("Tile", ["a", "n"], ["r"]), {"a": np.array([[1]]), "n": _HUGE}),
    "pad": lambda: _adding(
        helper.make_node("Pad", ["a", "n"], ["r"]), {"a": np.array([1]), "n": np.array([0, 2**40])}
    ),
    "one hot": lambda: _adding(
        helper.make_node("OneHot", ["a", "n", "v"], ["r"]),
        {"a": np.array([1]), "n": np.array(2**40), "v": np.array([0, 1])},
    ),
    "computed": lambda: _computed_bomb(),
    "broadcast": lambda: proto(
        [
            helper.make_node("Sum", ["a", "b", "c"], ["r"]),
            helper.make_node("ReduceSum", ["r"], ["s"], keepdims=0),
            helper.make_node("Add", ["x", "s"], ["y"]),
        ],
        {"x": [1]},
        {"y": [1]},
        {k: np.zeros(np.roll([5000, 1, 1], i), np.float32) for i, k in enumerate("abc")},
    ),
    "deep nesting": lambda: _nested(24),
    "many nodes in a row": lambda: _row(5_000),
    "functions that double": lambda: _functions(40, lambda i: [f"F{i + 1}", f"F{i + 1}"]),
    "a function that calls itself": lambda: _functions(1, lambda i: ["F0"]),
    "functions in a circle": lambda: _functions(3, lambda i: [f"F{(i + 1) % 3}"]),
    "a tensor of 2 to the 40": lambda: _with_dims(mlp(), [2**40]),
    "a tensor of 2 to the 120": lambda: _with_dims(mlp(), [2**40, 2**40, 2**40]),
    "a tensor without data": lambda: _with_dims(mlp(), [2**40], clear=True),
    "a tensor of many dims": lambda: _with_dims(mlp(), [1] * 100_000),
    "negative dims": lambda: _with_dims(mlp(), [-8, -16]),
    "an input of 2 to the 40": lambda: proto(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": [2**40]}, {"y": [2**40]}
    ),
    "an input of many dims": lambda: proto(
        [helper.make_node("Relu", ["x"], ["y"])], {"x": [64] * 60}, {"y": [64] * 60}
    ),
    "many strings": lambda: _strings(300_000),
    "a long name": lambda: _long_name(20_000_000),
}


def _computed_bomb() -> onnx.ModelProto:
    model = _adding(
        helper.make_node("ConstantOfShape", ["n"], ["r"], value=_ONES), {"a": np.array([2**20, 2**19])}
    )
    model.graph.node.insert(0, helper.make_node("Mul", ["a", "a"], ["n"]))
    return model


def _branch(nodes: list[onnx.NodeProto], output: str) -> onnx.GraphProto:
    info = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, f"g_{output}", [], [info])


def _nested(depth: int) -> onnx.ModelProto:
    inner = _branch([helper.make_node("Neg", ["x"], ["b0"])], "b0")
    for i in range(1, depth):
        node = helper.make_node("If", ["c"], [f"b{i}"])
        for side, graph in (
            ("then_branch", inner),
            ("else_branch", _branch([helper.make_node("Abs", ["x"], [f"e{i}"])], f"e{i}")),
        ):
            node.attribute.add(name=side, type=onnx.AttributeProto.GRAPH).g.CopyFrom(graph)
        inner = _branch([node], f"b{i}")
    model = proto(list(inner.node), {"x": [2]}, {}, {"c": np.array(True)})
    model.graph.output.extend(inner.output)
    return model


def _row(count: int) -> onnx.ModelProto:
    names = ["x", *(f"v{i}" for i in range(count - 1)), "y"]
    nodes = [helper.make_node("Neg", [a], [b]) for a, b in pairwise(names)]
    return proto(nodes, {"x": [2]}, {"y": [2]})


def _functions(count: int, calls: Callable[[int], list[str]]) -> onnx.ModelProto:
    model = proto([helper.make_node("F0", ["x"], ["y"], domain="d")], {"x": [2]}, {"y": [2]})
    imports = [helper.make_opsetid("", 18), helper.make_opsetid("d", 1)]
    for i in range(count):
        names = ["a", *(f"t{k}" for k in range(len(calls(i)) - 1)), "b"]
        known = [c if int(c[1:]) < count else "Neg" for c in calls(i)]
        body = [
            helper.make_node(op, [a], [b], domain="" if op == "Neg" else "d")
            for op, a, b in zip(known, names, names[1:], strict=False)
        ]
        model.functions.append(helper.make_function("d", f"F{i}", ["a"], ["b"], body, imports))
    model.opset_import.append(helper.make_opsetid("d", 1))
    return model


def _with_dims(model: onnx.ModelProto, dims: list[int], *, clear: bool = False) -> onnx.ModelProto:
    tensor = model.graph.initializer[0]
    tensor.dims[:] = dims
    if clear:
        tensor.ClearField("raw_data")
    return model


def _strings(count: int) -> onnx.ModelProto:
    model = mlp()
    tensor = model.graph.initializer.add(name="s", data_type=TensorProto.STRING, dims=[count])
    tensor.string_data.extend([b"text"] * count)
    return model


def _long_name(length: int) -> onnx.ModelProto:
    model = mlp()
    model.graph.node[2].name = "n" * length
    return model


_CHILD = """
import json, logging, resource, sys, warnings
logging.disable(logging.CRITICAL); warnings.simplefilter("ignore")
import onnxruntime
import lamina.passes.fold
from lamina.errors import LaminaError
from lamina.ir import io
from lamina.ir.fix_shapes import fix_shapes
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize:")) * 1024
limit = size + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    program = io.load(sys.argv[1])
    if len(sys.argv) > 3:
        program = fix_shapes(program, json.loads(sys.argv[3]))
    folded, _, _ = lamina.passes.fold.fold(program)
    io.save_model(folded.model, sys.argv[1] + ".out")
    outcome = ["saved", "", ""]
except LaminaError as error:
    outcome = [type(error).__name__, error.what, error.advice or ""]
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps([outcome, peak]))
"""


def _in_child(path: Path, shapes: Mapping[str, object] | None = None) -> tuple[list[str], int]:
    """What came of a file in a process with little memory, ended where it hangs: outcome, peak bytes."""
    command = [sys.executable, "-c", _CHILD, str(path), str(MEMORY)]
    command += [] if shapes is None else [json.dumps(shapes)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, peak = json.loads(done.stdout.splitlines()[-1])
    return outcome, peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is bounded through /proc")
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_little_and_are_refused_or_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / "bomb.onnx"
    path.write_bytes(BOMBS[name]().SerializeToString())
    (kind, what, advice), peak = _in_child(path)
    assert peak < 2 << 30
    assert kind == "saved" or (what and advice)
    assert not what.startswith("the model cannot be read"), what


def _sized_by_an_input(op_type: str) -> onnx.ModelProto:
    """As many elements as the input has, times 2 to the 38: nobody knows before the dim ``n`` is given."""
    reads = {"Range": ["zero", "many", "one"], "ConstantOfShape": ["count"], "Expand": ["one", "count"]}
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "huge"], ["count"]),
        helper.make_node("Squeeze", ["count"], ["many"]),
        helper.make_node(op_type, reads[op_type], ["r"]),
        helper.make_node("Cast", ["r"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0),
        helper.make_node("Add", ["x", "s"], ["y"]),
    ]
    weights = {"huge": np.array([2**38]), "zero": np.array(0), "one": np.array(1)}
    return proto(nodes, {"x": ["n"]}, {"y": ["n"]}, weights)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is bounded through /proc")
@pytest.mark.parametrize("op_type", ["Range", "ConstantOfShape", "Expand"])
def test_shapes_that_set_off_a_bomb_cost_little(tmp_path: Path, op_type: str) -> None:
    path = tmp_path / "bomb.onnx"
    path.write_bytes(_sized_by_an_input(op_type).SerializeToString())
    (kind, what, advice), peak = _in_child(path, {"n": 4})
    assert peak < 2 << 30
    assert kind == "saved" or (what and advice)


def _nested_bytes(depth: int) -> bytes:
    """A graph in an attribute of a node of a graph, and so on: deeper than protobuf itself goes."""

    def field(number: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 127:
            length += bytes([size & 127 | 128])
            size >>= 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(depth):
        graph = field(1, field(5, field(6, graph)))
    return b"\x08\x08" + field(7, graph)


def test_deeper_than_protobuf_goes(tmp_path: Path) -> None:
    path = tmp_path / "deep.onnx"
    path.write_bytes(_nested_bytes(2_000))
    _fails(path, CaptureError, "'deep.onnx' is not a readable ONNX model")


# -- places outside ---------------------------------------------------------------------------------------


def _external(folder: Path, **entries: object) -> Path:
    """The MLP with its first weight outside, under entries that may be lies."""
    model = mlp(16)
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    (folder / "w.bin").write_bytes(data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": 0, "length": len(data), **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_the_honest_one_is_read(tmp_path: Path) -> None:
    assert capture(_external(tmp_path)).fingerprint == capture(mlp(16)).fingerprint
    assert capture(_external(tmp_path, offset=None, length=None)).fingerprint == capture(mlp(16)).fingerprint


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "../w.bin"},
        {"location": "a/../../w.bin"},
        {"location": "/etc/hostname"},
        {"location": ""},
        {"location": "w.bin\0"},
        {"location": "..\\w.bin"},
        {"location": "."},
        {"location": "m" * 300},
        {"location": None},
        {"offset": -1},
        {"offset": 2**62},
        {"offset": 4},
        {"offset": "x"},
        {"length": 2**62},
        {"length": -5},
        {"length": "much"},
    ],
)
def test_external_data_that_lies(tmp_path: Path, entries: Mapping[str, Any]) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "w.bin").write_bytes(bytes(10_000))
    _fails(_external(tmp_path / "inner", **entries), CaptureError)


def test_external_data_in_a_linked_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "w.bin").write_bytes(bytes(10_000))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to(tmp_path / "secret")
    path = _external(tmp_path / "model", location="sub/w.bin")
    _fails(path, CaptureError, "'sub/w.bin' is a link out of the model's folder")


def test_external_data_linked_in_a_circle(tmp_path: Path) -> None:
    path = _external(tmp_path, location="loop")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    _fails(path, CaptureError, "external data")


def test_pipes_and_folders_are_no_data(tmp_path: Path) -> None:
    path = _external(tmp_path, location="pipe")
    os.mkfifo(tmp_path / "pipe")
    _fails(path, CaptureError, "'pipe' cannot be read: it is not an ordinary file")
    path = _external(tmp_path, location="folder")
    (tmp_path / "folder").mkdir()
    _fails(path, CaptureError, "external data file 'folder' cannot be read")


def test_a_device_behind_a_link_is_no_data(tmp_path: Path) -> None:
    path = _external(tmp_path, location="zero")
    (tmp_path / "zero").symlink_to("/dev/zero")
    _fails(path, CaptureError, "is a link out of the model's folder")


def test_pipes_and_devices_are_no_models(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    _fails(tmp_path / "pipe.onnx", CaptureError, "is not an ordinary file")
    _fails(Path("/dev/zero"), CaptureError, "is not an ordinary file")


def test_strings_cannot_lie_outside(tmp_path: Path) -> None:
    path = _external(tmp_path)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].data_type = TensorProto.STRING
    path.write_bytes(model.SerializeToString())
    _fails(path, CaptureError, "'w1'")


def test_constants_in_nodes_obey_the_same_rules(tmp_path: Path) -> None:
    model = mlp()
    value = TensorProto(name="v", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="/etc/hostname")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["k"], value=value))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    _fails(path, CaptureError, "leaves the model's folder")


def test_saving_writes_nowhere_but_where_it_was_told(tmp_path: Path) -> None:
    """A weight's name is no path, whatever it looks like."""
    model = mlp(64)
    for name in ("w1", "w2"):
        evil = f"../../{name}"
        next(t for t in model.graph.initializer if t.name == name).name = evil
        for node in model.graph.node:
            for i, read in enumerate(node.input):
                if read == name:
                    node.input[i] = evil
    out = tmp_path / "a" / "b" / "out"
    out.mkdir(parents=True)
    above = io.EXTERNAL_ABOVE
    io.EXTERNAL_ABOVE = 100
    try:
        io.save_model(capture(model).model, out / "m.onnx")
    finally:
        io.EXTERNAL_ABOVE = above
    files = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert files == ["a/b/out/m.onnx", "a/b/out/m.onnx.data"]
    assert io.load(out / "m.onnx").fingerprint == capture(mlp(64)).fingerprint


# -- nonsense ---------------------------------------------------------------------------------------------


def test_a_cycle_through_a_subgraph() -> None:
    branches = [_branch([helper.make_node("Neg", ["late"], [n])], n) for n in ("t", "e")]
    nodes = [
        helper.make_node("If", ["c"], ["early"], "choose", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Relu", ["early"], ["late"], "relu"),
    ]
    model = proto(nodes, {"x": [2]}, {"late": [2]}, {"c": np.array(True)})
    _fails(model, CaptureError, "the graph has a cycle through If 'choose', Relu 'relu'")


def test_a_node_that_reads_itself() -> None:
    model = proto([helper.make_node("Relu", ["y"], ["y"], "own")], {"x": [2]}, {"y": [2]})
    _fails(model, CaptureError, "cycle through Relu 'own'")


def test_a_subgraph_that_reads_what_nobody_makes() -> None:
    branches = [_branch([helper.make_node("Neg", ["ghost"], [n], "inner")], n) for n in ("t", "e")]
    node = helper.make_node("If", ["c"], ["y"], "choose", then_branch=branches[0], else_branch=branches[1])
    model = proto([node], {"x": [2]}, {"y": [2]}, {"c": np.array(True)})
    _fails(model, CaptureError, "'ghost', read by Neg 'inner', is produced by nothing")


def test_a_graph_that_reads_the_inside_of_a_subgraph() -> None:
    branches = [_branch([helper.make_node("Neg", ["x"], [n])], n) for n in ("t", "e")]
    nodes = [
        helper.make_node("If", ["c"], ["z"], "choose", then_branch=branches[0], else_branch=branches[1]),
        helper.make_node("Relu", ["t"], ["y"], "outside"),
    ]
    model = proto(nodes, {"x": [2]}, {"y": [2]}, {"c": np.array(True)})
    _fails(model, CaptureError, "'t'")


def test_two_inputs_or_two_weights_of_one_name() -> None:
    model = mlp()
    model.graph.input.append(model.graph.input[0])
    _fails(model, CaptureError, "x")
    model = mlp()
    model.graph.initializer.append(model.graph.initializer[0])
    model.graph.initializer[-1].raw_data = bytes(len(model.graph.initializer[0].raw_data))
    _fails(model, CaptureError, "w1")


def test_a_missing_weight() -> None:
    model = mlp()
    del model.graph.initializer[1]
    _fails(model, CaptureError, "value 'b1', read by Add 'bias', is produced by nothing")


def test_an_attribute_of_no_function() -> None:
    model = mlp()
    model.graph.node[2].op_type = "LeakyRelu"
    model.graph.node[2].attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, ref_attr_name="slope")
    _fails(model, CaptureError, "attribute 'alpha' of LeakyRelu 'relu' refers to 'slope' of a function")


@pytest.mark.parametrize("kind", [0, 24, 25, 26, 99, 2**31 - 1])
def test_types_that_do_not_fit_or_do_not_exist(kind: int) -> None:
    model = mlp()
    model.graph.initializer[0].data_type = kind
    _fails(model, CaptureError)


def test_inputs_of_the_wrong_type_are_named() -> None:
    model = mlp()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    _fails(model, CaptureError, "types of MatMul 'up' do not fit: input 1 is tensor(float) but input 0 is")


def test_sparse_constants_are_named() -> None:
    values = helper.make_tensor("values", TensorProto.FLOAT, [2], [3.0, 5.0])
    places = helper.make_tensor("places", TensorProto.INT64, [2], [0, 3])
    sparse = helper.make_sparse_tensor(values, places, [4])
    nodes = [
        helper.make_node("Constant", [], ["c"], sparse_value=sparse),
        helper.make_node("Add", ["x", "c"], ["y"]),
    ]
    model = proto(nodes, {"x": [4]}, {"y": [4]})
    _fails(model, UnsupportedOperator, "a constant is stored sparse", "store it dense")


def test_strings_are_carried_through() -> None:
    words = np.array(["a", "b\n", "ü"], dtype=object)
    nodes = [
        helper.make_node("Gather", ["words", "i"], ["y"]),
        helper.make_node("Identity", ["y"], ["z"]),
    ]
    model = proto(nodes, {}, {})
    model.graph.initializer.append(numpy_helper.from_array(words, "words"))
    model.graph.input.append(helper.make_tensor_value_info("i", TensorProto.INT64, ["n"]))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.STRING, ["n"]))
    folded, _, _ = fold(capture(model))
    got = run(folded.model, {"i": np.array([2, 0, 1])})[0]
    assert got.tolist() == ["ü", "a", "b\n"]


def test_scalars_and_tensors_without_elements() -> None:
    nodes = [
        helper.make_node("Concat", ["x", "none"], ["j"], axis=0),
        helper.make_node("Mul", ["j", "two"], ["m"]),
        helper.make_node("ReduceSum", ["m"], ["y"], keepdims=0),
    ]
    weights = {"none": np.zeros((0, 4), np.float32), "two": np.float32(2)}
    model = proto(nodes, {"x": ["n", 4]}, {"y": []}, weights)
    folded, _, _ = fold(capture(model))
    for rows in (0, 1, 3):
        feeds = {"x": np.ones((rows, 4), np.float32)}
        np.testing.assert_array_equal(run(folded.model, feeds)[0], run(model, feeds)[0])


def test_optionals_inside_the_graph_are_kept() -> None:
    nodes = [
        helper.make_node("Optional", ["x"], ["o"]),
        helper.make_node("OptionalHasElement", ["o"], ["h"]),
        helper.make_node("OptionalGetElement", ["o"], ["g"]),
        helper.make_node("Where", ["h", "g", "x"], ["y"]),
    ]
    model = proto(nodes, {"x": [3]}, {"y": [3]})
    folded, _, _ = fold(capture(model))
    feeds = {"x": np.array([1, -2, 3], np.float32)}
    np.testing.assert_array_equal(run(folded.model, feeds)[0], feeds["x"])


def test_bytes_that_are_no_text_in_names() -> None:
    data = mlp().SerializeToString().replace(b"relu", b"\xff\xfe\x00\xff")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:
        return  # protobuf itself refuses it
    with pytest.raises(LaminaError) as caught:
        fold(capture(model))
    assert caught.value.advice


def _break_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.ir import capture_onnx

    def broken(*_: object) -> None:
        raise ZeroDivisionError("by nought\nand more")

    monkeypatch.setattr(capture_onnx, "normalize", broken)


def test_unforeseen_failures_of_invalid_models_come_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    _break_reading(monkeypatch)
    model = mlp()
    model.graph.node[0].op_type = "NoSuchOperator"
    error = _fails(model, CaptureError, "the model cannot be read: ZeroDivisionError: by nought")
    assert "and more" not in str(error)
    assert "onnx.checker" in str(error.advice)
    assert isinstance(error.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("kind", ["path", "proto", "ir"])
def test_unforeseen_failures_on_valid_models_are_called_bugs_of_lamina(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    monkeypatch.delenv("LAMINA_VERIFY", raising=False)
    _break_reading(monkeypatch)
    path = tmp_path / "model.onnx"
    onnx.save(mlp(), path)
    model = {"path": path, "proto": mlp(), "ir": ir.from_proto(mlp())}[kind]
    with pytest.raises(CaptureError) as caught:
        capture(model)
    said = "lamina failed to read a model that onnx.checker accepts: ZeroDivisionError: by nought"
    assert caught.value.what == said
    assert re.match(r"lamina/ir/capture_onnx\.py:\d+ in _finish, reading ", caught.value.where or "")
    assert "this is a bug in lamina, report it" in (caught.value.advice or "")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_text_in_no_known_coding_is_the_files_fault(tmp_path: Path) -> None:
    model = mlp()
    model.graph.node[0].name = "LAMINA"
    path = tmp_path / "latin.onnx"
    path.write_bytes(model.SerializeToString().replace(b"LAMINA", b"LAM\xefNA"))
    onnx.checker.check_model(str(path))
    error = _fails(path, CaptureError)
    assert "bug in lamina" not in str(error)


def test_bugs_of_lamina_come_out_as_they_are_where_everything_is_verified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAMINA_VERIFY", "all")
    _break_reading(monkeypatch)
    with pytest.raises(ZeroDivisionError):
        capture(mlp())
