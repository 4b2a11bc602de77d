"""Activation memory against a direct simulation: every array of a real run, held and released one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper
from reference import models_dir, needs_reference
from test_coupling_random import random_program

from lamina.analysis.analyze import analyze
from lamina.analysis.cost import cost
from lamina.ir.capture import capture
from lamina.ir.program import Program

VIEWS = ("Identity", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Dropout")
MODELS = (
    *("resnet20_cifar10.onnx", "resnet56_cifar10.onnx", "mobilenet_v1_025_imagenet.onnx"),
    *("kwt1_speech_commands.onnx", "stories260k.onnx", "minilm/minilm_l6_v2.onnx"),
)


def every_array(program: Program, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All activations of a run with every optimization off."""
    proto = ir.to_proto(program.model)
    shown = {o.name for o in proto.graph.output}
    for node in proto.graph.node:
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in node.output if n and n not in shown)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return {**feeds, **dict(zip(names, session.run(names, feeds), strict=True))}


def simulate(program: Program, feeds: dict[str, np.ndarray]) -> list[int]:
    """Bytes held at each node: arrays enter a store when made, and leave it once nothing needs them."""
    arrays = every_array(program, feeds)
    graph = ir.to_proto(program.model).graph
    stored = {i.name for i in graph.initializer}
    memory_of = {name: name for name in feeds}  # value -> whose memory holds it
    store = dict(feeds)
    held = []
    for step, node in enumerate(graph.node):
        for place, name in enumerate(node.output):
            if not name:
                continue
            if place == 0 and node.op_type in VIEWS:
                memory_of[name] = memory_of.get(node.input[0], node.input[0])
            else:
                memory_of[name] = name
                store[name] = arrays[name]
        held.append(sum(array.nbytes for array in store.values()))
        later = {o.name for o in graph.output}
        for other in graph.node[step + 1 :]:
            later |= _read(other)
        needed = {memory_of[n] for n in later if n in memory_of}
        unread = {n for n in feeds if not any(n in _read(other) for other in graph.node)}
        store = {n: a for n, a in store.items() if n in needed or n in unread}
    assert not stored & set(store)
    return held


def _read(node: onnx.NodeProto) -> set[str]:
    names = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names |= _read(inner)
        names |= {o.name for o in attribute.g.output}
    return names


def alive(program: Program, feeds: dict[str, np.ndarray]) -> list[int]:
    found = cost(program, feeds)
    assert found.peak_activation_bytes == max(o.live_bytes for o in found.operators)
    return [o.live_bytes for o in found.operators]


@pytest.mark.parametrize("seed", range(12))
def test_random_networks_hold_what_a_simulation_holds(seed: int) -> None:
    program = random_program(seed)
    shape = [d if isinstance(d, int) else 2 for d in program.inputs[0].shape]
    feeds = {"x": np.random.default_rng(seed).normal(size=shape).astype(np.float32)}
    assert alive(program, feeds) == simulate(program, feeds)


@needs_reference
@pytest.mark.parametrize("file", [models_dir / name for name in MODELS], ids=lambda f: f.stem)
def test_reference_models_hold_what_a_simulation_holds(file: Path) -> None:
    program = capture(file)
    assert alive(program, dict(program.example)) == simulate(program, dict(program.example))


def test_what_a_subgraph_captures_lives_until_its_node_and_what_it_makes_does_not_count() -> None:
    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [4])
        return helper.make_graph(list(nodes), name, [], [out])

    then = branch("then", helper.make_node("Neg", ["h"], ["t"]), helper.make_node("Exp", ["t"], ["u"]))
    other = branch("else", helper.make_node("Identity", ["x"], ["e"]))
    nodes = [
        helper.make_node("Abs", ["x"], ["h"], name="abs"),
        helper.make_node("ReduceMax", ["x"], ["m"], name="max", keepdims=0),
        helper.make_node("Cast", ["m"], ["c"], name="cast", to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["y"], name="if", then_branch=then, else_branch=other),
        helper.make_node("Relu", ["y"], ["z"], name="relu"),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xz"]
    graph = helper.make_graph(nodes, "g", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    feeds = {"x": np.ones(4, dtype=np.float32)}
    program = capture(model, example_inputs=feeds)
    # x and h pass by until the If has read them; it holds the flag and y besides
    assert alive(program, feeds) == [32, 36, 37, 49, 32]
    assert simulate(program, feeds) == [32, 36, 37, 49, 32]


def test_an_input_nobody_reads_stays_and_a_result_nobody_reads_goes() -> None:
    nodes = [
        helper.make_node("Abs", ["x"], ["dead"], name="dead"),
        helper.make_node("Neg", ["x"], ["h"], name="neg"),
        helper.make_node("Exp", ["h"], ["z"], name="exp"),
    ]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in ("x", "unread", "z")]
    graph = helper.make_graph(nodes, "g", info[:2], info[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    feeds = {n: np.ones(4, dtype=np.float32) for n in ("x", "unread")}
    program = capture(model, example_inputs=feeds)
    assert alive(program, feeds) == simulate(program, feeds)
    assert alive(program, feeds)[-1] == 48


@needs_reference
def test_a_part_peaks_where_one_of_its_operators_does() -> None:
    program = capture(models_dir / "resnet20_cifar10.onnx")
    found = analyze(program)
    held = dict(zip((n.name for n in program.graph), simulate(program, dict(program.example)), strict=True))
    for part in found["operators"]:
        assert part["peak_activation_bytes"] == held[part["name"]]
    for part in found["branches"]:
        assert part["peak_activation_bytes"] == max(held[n] for n in part["members"])
    assert found["totals"]["peak_activation_bytes"] == max(held.values())
