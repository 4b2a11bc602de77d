"""Repeated blocks: of branches where there are skips, of operators where there are none."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from reference import models_dir, needs_reference, zoo_dir
from residual_nets import Net

from lamina.analysis.analyze import PartResult, analyze
from lamina.analysis.cost import cost
from lamina.analysis.repeats import Repeat, _Dominators, repeated_operators
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program


def conv(net: Net, x: ir.Value, out: int, width: int, kernel: int = 1, **attributes: Any) -> ir.Value:
    group = attributes.get("group", 1)
    weight = net.weight(out, width // group, kernel, kernel)
    return net.op("Conv", x, weight, pads=[kernel // 2] * 4, **attributes)


def separable(net: Net, x: ir.Value, out: int, width: int, stride: int = 1) -> ir.Value:
    h = net.op("Relu", conv(net, x, width, width, 3, group=width, strides=[stride, stride]))
    return net.op("Relu", conv(net, h, out, width))


def repeats(program: Program) -> list[Repeat]:
    shape = [d if isinstance(d, int) else 1 for d in program.inputs[0].shape]
    tensors = cost(program, {"x": np.zeros(shape, dtype=np.float32)}).tensors
    return list(repeated_operators(program.graph, find_branches(program), tensors))


def kinds(program: Program, found: list[Repeat]) -> list[list[str]]:
    types = {n.name: n.op_type for n in program.graph}
    return [[types[n] for n in turn.nodes] for turn in found]


def image(net: Net, channels: int = 4, size: int = 8) -> ir.Value:
    return net.input("x", ["n", channels, size, size])


def test_separable_convolutions_repeat_whatever_their_widths_and_strides() -> None:
    net = Net()
    h = net.op("Relu", conv(net, image(net), 4, 4, 3))
    for out, width, stride in ((8, 4, 1), (8, 8, 2), (16, 8, 1)):
        h = separable(net, h, out, width, stride)
    program = net.program(net.op("GlobalAveragePool", h))
    found = repeats(program)
    assert kinds(program, found) == [["Conv", "Relu", "Conv", "Relu"]] * 3
    assert [(t.run, t.index) for t in found] == [(0, 0), (0, 1), (0, 2)]


def test_another_kernel_or_operator_ends_a_run() -> None:
    net = Net()
    h = image(net)
    for kernel in (3, 3, 5, 1, 1):
        h = conv(net, h, 4, 4, kernel)
    program = net.program(net.op("Tanh", h))
    # the 1x1 that Tanh follows is not like the one before
    assert [(t.run, t.index) for t in repeats(program)] == [(0, 0), (0, 1)]


def test_parallel_paths_are_one_cell() -> None:
    net = Net()
    h = image(net)
    for _ in range(3):
        h = net.op("Concat", conv(net, h, 2, 4), conv(net, h, 2, 4, 3), axis=1)
    program = net.program(h)
    assert kinds(program, repeats(program)) == [["Conv", "Conv", "Concat"]] * 3


def test_a_head_beside_the_trunk_does_not_hide_what_follows() -> None:
    def backbone(head: bool) -> Program:
        net = Net()
        h, tapped = image(net), []
        for _ in range(4):
            h = separable(net, h, 4, 4)
            tapped.append(h)
        heads = [conv(net, t, 2, 4) for t in tapped[:2]] if head else []
        return net.program(h, *heads)

    assert len(repeats(backbone(head=False))) == len(repeats(backbone(head=True))) == 4


def test_branches_are_left_to_the_branch_finder() -> None:
    net = Net()
    h = image(net)
    for _ in range(3):
        h = net.op("Add", h, conv(net, net.op("Relu", conv(net, h, 4, 4, 3)), 4, 4, 3))
    for _ in range(2):
        h = separable(net, h, 4, 4)
    program = net.program(h)
    shape = {"x": np.zeros((1, 4, 8, 8), dtype=np.float32)}
    program = Program(program.model, example=shape)
    blocks = analyze(program)["blocks"]
    assert [(b["run"], len(b["members"])) for b in blocks] == [(0, 1)] * 3 + [(1, 4)] * 2
    assert {b["kind"] for b in blocks} == {"block"}


def test_what_has_no_weights_or_no_inputs_is_no_block() -> None:
    net = Net()
    x = image(net)
    for _ in range(4):
        x = net.op("Relu", net.op("MaxPool", x, kernel_shape=[1, 1]))
    assert repeats(net.program(x)) == []


def dominators(sources: dict[int, list[int]]) -> dict[int, int]:
    """Closest dominator of each node: without it there is no way from the inputs (-1)."""

    def reached(without: int) -> set[int]:
        there = {-1} - {without}
        for node, given in sources.items():
            if node != without and any(g in there for g in given):
                there.add(node)
        return there

    above = {d: set(sources) - reached(d) - {d} for d in (-1, *sources)}
    return {node: max(d for d in above if node in above[d]) for node in sources}


@pytest.mark.parametrize("seed", range(20))
def test_dominators_are_what_cuts_a_node_off(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sources: dict[int, list[int]] = {}
    tree = _Dominators()
    for node in range(30):
        low = max(-1, node - 1 - int(rng.integers(1, 6)))
        sources[node] = rng.integers(low, node, size=int(rng.integers(1, 3))).tolist()
        tree.add(node, sources[node])
    assert tree.parent == {-1: -1, **dominators(sources)}


def test_a_hundred_thousand_nodes_that_all_join_the_first() -> None:
    """Going up the tree a step at a time would take billions of them."""
    count = 100_000
    tree = _Dominators()
    tree.add(0, [-1])
    for node in range(1, count):
        tree.add(node, [node - 1] if node <= count // 2 else [count // 2, 0])
    assert tree.parent[count - 1] == 0
    assert tree.longest() == list(range(count // 2 + 1))


def runs(blocks: list[PartResult]) -> list[int]:
    """Turns of each run."""
    return [len(list(turns)) for _, turns in groupby(blocks, key=lambda b: b["run"])]


@needs_reference
@pytest.mark.parametrize(
    ("file", "turns", "members"),
    [
        ("resnet20_cifar10.onnx", [9], 1),
        ("resnet56_cifar10.onnx", [27], 1),
        ("mobilenet_v1_025_imagenet.onnx", [13], 4),
        ("kwt1_speech_commands.onnx", [12], 2),
        ("stories260k.onnx", [5], 2),
        ("minilm/minilm_l6_v2.onnx", [6], 2),
    ],
)
def test_the_blocks_of_known_networks_come_out(file: str, turns: list[int], members: int) -> None:
    found = analyze(capture(models_dir / file))
    assert runs(found["blocks"]) == turns
    assert {len(b["members"]) for b in found["blocks"]} == {members}
    assert len({b["name"] for b in found["blocks"]}) == sum(turns)


@needs_reference
@pytest.mark.parametrize(
    ("file", "turns"),
    [("ultraface_rfb320", [1, 6, 5]), ("fastestdet", [1, 3, 7, 2]), ("dtln_1", [])],
)
def test_backbones_of_detectors_repeat(file: str, turns: list[int]) -> None:
    assert runs(analyze(capture(zoo_dir / f"{file}.onnx"))["blocks"]) == turns


@needs_reference
def test_the_blocks_of_mobilenet_hold_its_separable_convolutions() -> None:
    program = capture(models_dir / "mobilenet_v1_025_imagenet.onnx")
    found = analyze(program)
    blocks = found["blocks"]
    by_name = {o["name"]: o for o in found["operators"]}
    for block in blocks:
        members = [by_name[n] for n in block["members"]]
        assert [m["kind"] for m in members] == ["Conv", "Clip", "Conv", "Clip"]
        assert block["macs"] == sum(m["macs"] for m in members)
        assert block["parameters"] == sum(m["parameters"] for m in members)
    # all but the first convolution and the classifier
    rest = [o for o in found["operators"] if o["name"] not in {n for b in blocks for n in b["members"]}]
    assert [o["kind"] for o in rest] == ["Conv", "Clip", "ReduceMean", "Gemm"]
