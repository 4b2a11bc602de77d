from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lamina.analysis.analyze import analyze
from lamina.analysis.cost import cost
from lamina.analysis.roofline import crossing_bytes, intensity, position, roof_share
from lamina.backends import roof as roof_module
from lamina.backends.backend import Target
from lamina.backends.roof import Roof, measure_roof, roof
from lamina.errors import BackendError
from lamina.ir.capture import capture
from lamina.ir.program import Program

ROOF = Roof(flops_per_s=100.0, bytes_per_s=10.0, quiet=True, date="")


def program_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, np.ndarray],
    weights: dict[str, np.ndarray],
    outputs: list[str],
) -> Program:
    def info(name: str, array: np.ndarray) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)

    graph = helper.make_graph(
        nodes,
        "g",
        [info(n, a) for n, a in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return capture(model, example_inputs=inputs)


def f32(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=np.float32)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=outputs.split()[0], **attributes)


def moved(program: Program) -> dict[str, int]:
    return {o.name: o.bytes_moved for o in cost(program, program.example).operators}


def two_products() -> Program:
    """y = relu(reshape(x A)) B, and the relu is read a second time by ``s``."""
    nodes = [
        node("MatMul", "x a", "h"),
        node("Reshape", "h shape", "v"),
        node("Relu", "v", "r"),
        node("MatMul", "r b", "y"),
        node("Mul", "r r", "s"),
    ]
    weights = {"a": f32(4, 8), "b": f32(8, 2), "shape": np.array([3, 8], dtype=np.int64)}
    return program_of(nodes, {"x": f32(1, 3, 4)}, weights, ["y", "s"])


def test_an_operator_reads_each_input_once_and_views_move_nothing() -> None:
    assert moved(two_products()) == {
        "h": 4 * (12 + 32 + 24),
        "v": 0,
        "r": 4 * (24 + 24),
        "y": 4 * (24 + 16 + 6),
        "s": 4 * (24 + 24),
    }


def test_what_is_picked_counts_and_not_what_it_is_picked_from() -> None:
    index = np.array([[1, 5, 5]], dtype=np.int64)
    edges = {n: np.array([v], dtype=np.int64) for n, v in (("from", 0), ("to", 1), ("axis", 1))}
    program = program_of(
        [node("Gather", "table ids", "e"), node("Slice", "e from to axis", "y"), node("Shape", "e", "n")],
        {"ids": index},
        {"table": f32(1000, 6), **edges},
        ["y"],
    )
    gathered, sliced = 4 * 3 * 6, 4 * 6
    costs = moved(program)
    assert costs["e"] == 2 * gathered + 3 * 8
    assert costs["y"] == 2 * sliced + 3 * 8
    assert costs.get("n", 3 * 8) == 3 * 8


def test_only_what_crosses_the_border_counts_for_a_fused_kernel() -> None:
    program = two_products()
    tensors = cost(program, program.example).tensors
    named = {n.name: n for n in program.graph}

    def crossing(*names: str) -> int:
        return crossing_bytes([named[n] for n in names], tensors)

    # x, A, B, the target of the reshape; relu leaves too, for s
    assert crossing("h", "v", "r", "y") == 4 * (12 + 32 + 16 + 24 + 6) + 2 * 8
    assert crossing("h", "v", "r", "y", "s") == 4 * (12 + 32 + 16 + 6 + 24) + 2 * 8
    assert crossing("y") == moved(program)["y"]


def test_a_table_two_lookups_share_is_never_read_more_than_whole() -> None:
    ids = np.zeros((1, 9), dtype=np.int64)
    nodes = [node("Gather", "table ids", "p"), node("Gather", "table ids", "q"), node("Add", "p q", "y")]
    program = program_of(nodes, {"ids": ids}, {"table": f32(10, 2)}, ["y"])
    tensors = cost(program, program.example).tensors
    assert crossing_bytes(list(program.graph), tensors) == 4 * 20 + 8 * 9 + 4 * 18


@pytest.mark.parametrize(
    ("work", "seconds", "bound"),
    [
        ([(1000, 10)], 10.0, "compute"),
        ([(100, 100)], 10.0, "memory"),
        ([(1000, 10), (100, 200)], 30.0, "memory"),
        ([(0, 10)], 1.0, "memory"),
    ],
)
def test_the_larger_term_binds(work: list[tuple[int, int]], seconds: float, bound: str) -> None:
    place = position(work, ROOF)
    assert place is not None
    assert (place.seconds, place.bound) == (seconds, bound)
    assert roof_share(place, 4 * seconds) == 0.25


def test_nothing_to_do_has_no_place() -> None:
    assert position([(0, 0)], ROOF) is None
    assert intensity(5, 0) is None
    assert roof_share(None, 1.0) is None
    assert ROOF.balance == 10.0


def test_the_roof_is_measured_once_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(target: Target, *, quiet: bool = True) -> Roof:
        calls.append(target.threads)
        return Roof(2e9, 1e9, True, "today")

    monkeypatch.setattr(roof_module, "measure_roof", measured)
    assert roof(Target(threads=1), tmp_path) == roof(Target(threads=1), tmp_path)
    assert calls == [1]
    roof(Target(threads=2), tmp_path)
    assert calls == [1, 2]
    for file in tmp_path.glob("roof-*.json"):
        assert json.loads(file.read_text())["versions"]
        file.write_text('{"format": 1, "roof": {}}')
    roof(Target(threads=1), tmp_path)
    assert calls == [1, 2, 1]


def test_a_roof_taken_beside_other_work_is_taken_again_when_it_is_quiet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = iter([False, False, True, True])
    calls = []

    def measured(target: Target, *, quiet: bool = True) -> Roof:
        calls.append(quiet)
        return Roof(2e9, 1e9, quiet, "today")

    class Load:
        def __init__(self, quiet: bool) -> None:
            self.quiet = quiet

    monkeypatch.setattr(roof_module, "measure_roof", measured)
    monkeypatch.setattr(roof_module, "machine_load", lambda: Load(next(loads)))
    for _ in range(4):
        roof(Target(threads=1), tmp_path)
    assert calls == [False, True]


def test_a_measured_roof_is_of_the_order_numpy_reaches() -> None:
    import time

    found = measure_roof(Target(threads=1))
    x = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    start = time.perf_counter()
    x @ x
    assert found.flops_per_s > 0.1 * 2 * 512**3 / (time.perf_counter() - start)
    assert found.bytes_per_s < found.flops_per_s * 4


def test_only_onnx_runtime_has_a_roof() -> None:
    with pytest.raises(BackendError, match="roofs are measured on ONNX Runtime only"):
        roof(Target("tvm", "llvm", 1))


def test_parts_say_what_they_move_and_what_binds_them() -> None:
    from test_analyze import DEPTH, WIDTH, stacked_program

    plain = analyze(stacked_program())
    branch = plain["branches"][0]
    rows, square = 2 * 4 * WIDTH * 4, WIDTH * WIDTH * 4
    assert branch["macs"] == 2 * 8 * WIDTH * WIDTH
    assert branch["bytes_moved"] == 6 * rows + 2 * square
    assert branch["bytes_crossing"] == 2 * rows + 2 * square
    assert branch["intensity"] == branch["flops"] / branch["bytes_moved"]
    assert (branch["bound"], branch["roof_share"]) == (None, None)
    assert plain["blocks"][0]["bytes_moved"] == branch["bytes_moved"]
    assert plain["blocks"][0]["bytes_crossing"] == branch["bytes_crossing"]
    assert plain["totals"]["bytes_moved"] == DEPTH * (9 * rows + 2 * square)
    timed = analyze(stacked_program(), target=Target())
    product = next(o for o in timed["operators"] if o["kind"] == "MatMul")
    assert product["bound"] in ("compute", "memory")
    assert product["roof_share"] is not None
    assert product["roof_share"] > 0
