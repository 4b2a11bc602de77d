"""Every group of every reference model and zoo file, proven by execution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from coupling_tools import prove, some_units, weight_elements
from reference import models_dir, needs_reference, zoo_dir

from lamina.analysis.coupling import coupled_groups
from lamina.ir.capture import capture

MODELS = (
    *("resnet20_cifar10.onnx", "resnet56_cifar10.onnx", "mobilenet_v1_025_imagenet.onnx"),
    *("kwt1_speech_commands.onnx", "stories260k.onnx", "minilm/minilm_l6_v2.onnx"),
)
ZOO = (
    *("ultraface_rfb320", "fastestdet", "ppocr_v2_cls", "magika_standard_v3_3", "dtln_1", "gtcrn_simple"),
    "mnist_cntk",
)
FILES = [models_dir / name for name in MODELS] + [zoo_dir / f"{name}.onnx" for name in ZOO]
# weight elements written in all: bounds the time a large model takes
MOST_ELEMENTS = 60_000_000
MOST_PROVEN = 12


@needs_reference
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_groups_hold_by_execution(file: Path) -> None:
    program = capture(file)
    found = coupled_groups(program)
    rng = np.random.default_rng(0)
    count = max(2, min(MOST_PROVEN, MOST_ELEMENTS // weight_elements(program)))
    # groups of one kind repeat from layer to layer: some are enough here
    for group in found.groups[:: max(1, -(-len(found.groups) // count))]:
        gap = prove(program, found, {group.name: some_units(group, rng)}, program.example)
        assert gap is None or gap < 1e-4


@needs_reference
@pytest.mark.parametrize(
    ("file", "stream", "units", "others"),
    [
        # n blocks a stage: a group an inner width, and a stream a stage that the shortcut pads with zeros
        ("resnet20_cifar10.onnx", "conv1.weight", 16, [16] * 3 + [32, 16, 32, 32] + [64, 32, 64, 64]),
        ("mobilenet_v1_025_imagenet.onnx", "f.0.1.weight", 8, [16, 32, 32, 64, 64, *[128] * 6, 256, 256]),
    ],
)
def test_the_known_architectures_come_out(file: str, stream: str, units: int, others: list[int]) -> None:
    found = coupled_groups(capture(models_dir / file))
    assert (found.groups[0].name, found.groups[0].units) == (stream, units)
    assert [g.units for g in found.groups[1:]] == others


@needs_reference
def test_heads_and_widths_of_a_llama_come_out() -> None:
    found = coupled_groups(capture(models_dir / "stories260k.onnx"))
    units = [g.units for g in found.groups]
    assert units.count(172) == 5  # the hidden width of each MLP
    assert units.count(64) == 1  # the residual stream
    heads = [g for g in found.groups if g.units == 4 and not g.inexact and len(g.weights) == 4]
    assert len(heads) == 5  # a key head with both its query heads
    assert {m.layout.block for m in heads[0].weights if m.layout} == {8, 16}


@needs_reference
def test_post_norm_streams_end_at_the_output_of_an_encoder() -> None:
    found = coupled_groups(capture(models_dir / "minilm" / "minilm_l6_v2.onnx"))
    units = [g.units for g in found.groups]
    assert (units.count(12), units.count(32), units.count(1536)) == (6, 12, 6)
    assert all("an output of the model" in f.reason for f in found.frozen)
