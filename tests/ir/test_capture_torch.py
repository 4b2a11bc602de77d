"""Torch modules, exported programs and graph modules: captured equal to eager, module untouched."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_tools import run

from lamina.errors import CaptureError, UnsupportedOperator
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.ir.scopes import scope_of
from lamina.ir.verify import check, verify_structure

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
nn = torch.nn


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Any) -> Any:
        return x + self.conv2(torch.relu(self.norm1(self.conv1(x))))


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.body = nn.Sequential(Residual(8), nn.Dropout(0.5), Residual(8))
        self.head = nn.Linear(8, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)

    def forward(self, image: Any) -> Any:
        return self.head(self.body(self.stem(image)).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 50)

    def forward(self, tokens: Any, scale: Any = None) -> Any:
        hidden = self.encoder(self.embed(tokens))
        return self.head(hidden if scale is None else hidden * scale)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _equal_to_eager(program: Program, module: Any, *inputs: Any) -> None:
    verify_structure(program)
    check(program)
    was = module.training
    module.eval()
    with torch.no_grad():
        want = module(*inputs).numpy()
    module.train(was)
    feeds = {p.name: t.numpy() for p, t in zip(program.inputs, inputs, strict=True)}
    np.testing.assert_allclose(run(program.model, feeds)[0], want, atol=2e-6)


def test_a_convnet_with_dynamic_batch() -> None:
    module = ConvNet().train()
    module.body[0].norm1.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    program = capture(module, example_inputs=torch.randn(1, 3, 16, 16))
    assert [(p.name, p.shape) for p in program.inputs] == [("image", ("batch", 3, 16, 16))]
    assert program.outputs[0].shape == ("batch", 5)
    assert program.source == "<ConvNet>"
    assert not program.example_is_synthetic
    assert program.example["image"].shape == (1, 3, 16, 16)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert "BatchNormalization" not in {n.op_type for n in program.graph} or program.opset >= 15
    for batch in (1, 3):
        _equal_to_eager(program, module, torch.randn(batch, 3, 16, 16))


def test_a_transformer_with_dynamic_batch_and_length() -> None:
    module = Transformer().eval()
    names = {"tokens": {0: "batch", 1: "length"}}
    program = capture(module, example_inputs=torch.randint(0, 50, (1, 7)), dynamic_shapes=names)
    assert [(p.name, p.shape) for p in program.inputs] == [("tokens", ("batch", "length"))]
    assert program.outputs[0].shape == ("batch", "length", 50)
    for shape in ((1, 7), (3, 11)):
        _equal_to_eager(program, module, torch.randint(0, 50, shape))
    scopes = {scope_of(n) for n in program.graph}
    assert {"embed", "encoder.layers.0.self_attn", "encoder.layers.1.linear2", "head"} <= scopes


def test_inputs_by_name_and_several_of_them() -> None:
    module = Transformer().eval()
    given = {"tokens": torch.randint(0, 50, (2, 5)), "scale": torch.rand(2, 1, 1)}
    program = capture(module, example_inputs=given)
    assert {p.name: p.shape for p in program.inputs} == {"tokens": ("batch", 5), "scale": ("batch", 1, 1)}
    np.testing.assert_array_equal(program.example["scale"], given["scale"].numpy())
    _equal_to_eager(program, module, torch.randint(0, 50, (4, 5)), torch.rand(4, 1, 1))


def test_numpy_arrays_do_as_example_inputs() -> None:
    module = ConvNet()
    program = capture(module, example_inputs=np.random.default_rng(0).random((2, 3, 8, 8), np.float32))
    _equal_to_eager(program, module, torch.randn(3, 3, 8, 8))


def test_a_batch_that_cannot_be_dynamic_becomes_static() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Any) -> Any:
            return x.reshape(6, 2) * 2

    program = capture(Fixed(), example_inputs=torch.randn(4, 3))
    assert program.inputs[0].shape == (4, 3)


def test_exported_programs_and_graph_modules() -> None:
    module = ConvNet().eval()
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("n")},))
    program = capture(exported)
    assert program.inputs[0].shape == ("batch", 3, 16, 16)
    assert not program.example_is_synthetic
    _equal_to_eager(program, module, torch.randn(3, 3, 16, 16))
    for graph_module in (exported.module(), torch.fx.symbolic_trace(module)):
        program = capture(graph_module, example_inputs=x)
        _equal_to_eager(program, module, torch.randn(3, 3, 16, 16))


def test_weights_are_shared_with_the_module() -> None:
    module = ConvNet()
    program = capture(module, example_inputs=torch.randn(2, 3, 8, 8))
    weight = program.graph.initializers["head.weight"].const_value
    assert isinstance(weight, ir.Tensor)
    assert np.shares_memory(weight.numpy(), module.head.weight.detach().numpy())


def test_capture_says_nothing(capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder) -> None:
    capture(ConvNet(), example_inputs=torch.randn(2, 3, 8, 8))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    assert not [w for w in recwarn if "torch" in str(w.filename)]


class Branchy(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + 1 if x.sum() > 0 else x - 1


def test_what_cannot_be_exported_is_one_clear_error() -> None:
    with pytest.raises(
        CaptureError, match=r"torch\.export cannot trace the module: .*data-dependent"
    ) as caught:
        capture(Branchy(), example_inputs=torch.randn(2, 2))
    assert "torch.cond" in (caught.value.advice or "")
    with pytest.raises(CaptureError, match="needs example inputs"):
        capture(ConvNet())
    with pytest.raises(CaptureError, match=r"do not fit forward\(\): too many positional arguments"):
        capture(ConvNet(), example_inputs=(torch.randn(1, 3, 8, 8), 1))
    with pytest.raises(CaptureError, match=r"dynamic_shapes names \['nothing'\]"):
        capture(ConvNet(), example_inputs=torch.randn(1, 3, 8, 8), dynamic_shapes={"nothing": {0: "n"}})


def test_a_failed_export_restores_the_mode() -> None:
    module = Branchy().train()
    with pytest.raises(CaptureError):
        capture(module, example_inputs=torch.randn(2, 2))
    assert module.training


def test_an_operator_without_onnx_form_is_named() -> None:
    @torch.library.custom_op("lamina_test::strange", mutates_args=())
    def strange(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @strange.register_fake
    def _(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    class Custom(nn.Module):
        def forward(self, x: Any) -> Any:
            return strange(x)

    with pytest.raises(UnsupportedOperator, match=r"torch operator 'lamina_test\.strange' has no ONNX form"):
        capture(Custom(), example_inputs=torch.randn(2, 2))
