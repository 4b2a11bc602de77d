"""The FX bridge on every reference and zoo model: equal to ONNX Runtime within a derived tolerance.

Eight ulps of the output's scale is the project's allowance for one reassociated operator. Roundings of
different operators are independent and add in quadrature, so D operators on the longest path are allowed
8 sqrt(D) ulps.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_tools import run
from reference import models_dir, needs_reference, zoo_dir

from lamina.ir.capture import capture
from lamina.ir.fx import to_fx
from lamina.ir.program import Program

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

_MODELS = ["kwt1_speech_commands", "minilm/minilm_l6_v2", "stories260k", "mobilenet_v1_025_imagenet"]
_MODELS += ["resnet20_cifar10", "resnet56_cifar10"]
_ZOO = ["ultraface_rfb320", "fastestdet", "ppocr_v2_cls", "magika_standard_v3_3", "dtln_1", "gtcrn_simple"]
_ZOO += ["mnist_cntk"]
_ALL = [f"models/{m}" for m in _MODELS] + [f"zoo/{m}" for m in _ZOO]
_ULP = 2.0**-23


def _program(name: str) -> Program:
    folder, _, rest = name.partition("/")
    return capture({"models": models_dir, "zoo": zoo_dir}[folder] / f"{rest}.onnx")


def _tolerance(program: Program) -> float:
    depth: dict[ir.Value, int] = {}
    for node in program.graph:
        below = max((depth.get(v, 0) for v in node.inputs if v is not None), default=0)
        depth.update(dict.fromkeys(node.outputs, below + 1))
    return 8 * math.sqrt(max(depth.values())) * _ULP


def _feeds(program: Program) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {k: np.asarray(v) for k, v in program.example.items()}
    for port in program.inputs:
        if port.dtype.is_floating_point():
            feeds[port.name] = rng.standard_normal(feeds[port.name].shape).astype(port.numpy_dtype)
        elif port.name == "bytes":
            # trap: this one takes a variance as E x^2 - (E x)^2, and made-up bytes that are all alike leave
            # only the rounding of either; any text is fine
            size = feeds["bytes"].size
            text = np.resize(np.frombuffer(Path(__file__).read_bytes(), np.uint8), size)
            feeds["bytes"] = text.reshape(feeds["bytes"].shape).astype(port.numpy_dtype)
    return feeds


def _relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got.astype(np.float64) - want).max() / max(float(np.abs(want).max()), 1e-30))


@needs_reference
@pytest.mark.parametrize("name", _ALL)
def test_equals_onnx_runtime(name: str) -> None:
    program = _program(name)
    feeds = _feeds(program)
    wanted = run(program.model, feeds)
    with torch.no_grad():
        answers = to_fx(program)(*(torch.from_numpy(feeds[p.name]) for p in program.inputs))
    assert any(np.ptp(w) > 0.01 for w in wanted)
    for got, want in zip(answers, wanted, strict=True):
        assert got.shape == want.shape
        assert _relative(got.numpy(), want) <= _tolerance(program)


@needs_reference
@pytest.mark.parametrize(
    "name", ["models/kwt1_speech_commands", "models/minilm/minilm_l6_v2", "zoo/gtcrn_simple"]
)
def test_double_precision_equals_it_too(name: str) -> None:
    program = _program(name)
    feeds = _feeds(program)
    wide = [torch.from_numpy(feeds[p.name]) for p in program.inputs]
    wide = [t.double() if t.is_floating_point() else t for t in wide]
    with torch.no_grad():
        answers = to_fx(program, precision=torch.float64)(*wide)
    for got, want in zip(answers, run(program.model, feeds), strict=True):
        assert got.dtype == torch.float64
        assert _relative(got.numpy(), want) <= _tolerance(program)


@needs_reference
@pytest.mark.parametrize(
    "name", ["models/resnet20_cifar10", "models/stories260k", "models/kwt1_speech_commands"]
)
def test_every_weight_of_a_network_gets_a_gradient(name: str) -> None:
    program = _program(name)
    feeds = _feeds(program)
    module = to_fx(program)
    answers = module(*(torch.from_numpy(feeds[p.name]) for p in program.inputs))
    answers[0].square().mean().backward()
    without = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without


@needs_reference
def test_other_dynamic_dims_than_those_of_the_example() -> None:
    program = _program("models/stories260k")
    module = to_fx(program)
    for shape in ((1, 1), (3, 17)):
        tokens = np.random.default_rng(2).integers(0, 512, shape)
        (want,) = run(program.model, {"tokens": tokens})
        with torch.no_grad():
            (got,) = module(torch.from_numpy(tokens))
        assert _relative(got.numpy(), want) <= _tolerance(program)
