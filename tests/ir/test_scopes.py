"""Module paths from metadata, from node names, from weights and biases."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from lamina.ir.scopes import scope_of


@pytest.mark.parametrize(
    ("metadata", "scope"),
    [
        ({"pkg.torch.onnx.name_scopes": "['', 'f', 'f.1', 'batch_norm']"}, "f.1"),
        ({"pkg.torch.onnx.name_scopes": "['', 'relu']"}, None),
        ({"pkg.torch.onnx.name_scopes": "not a list"}, None),
        ({"pkg.torch.onnx.name_scopes": "['_empty_nn_module_stack_from_metadata_hook', 'sym']"}, None),
        ({"namespace": ": __main__.Net/f: Sequential/f.1: BatchNorm2d/batch_norm: aten.batch_norm"}, "f.1"),
    ],
)
def test_metadata(metadata: dict[str, str], scope: str | None) -> None:
    assert scope_of(ir.node("Conv", [], metadata_props=metadata)) == scope


def test_path_like_node_names() -> None:
    assert scope_of(ir.node("MatMul", [], name="/encoder/layer.0/MatMul")) == "encoder.layer.0"
    assert scope_of(ir.node("MatMul", [], name="/MatMul")) is None


def _weight(name: str) -> ir.Value:
    tensor = ir.tensor([1.0], name=name)
    value = ir.Value(name=name, const_value=tensor)
    ir.Graph([], [], nodes=[], initializers=[value])
    return value


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("m.layer.0.query.weight", "m.layer.0.query"),
        ("dense/kernel:0", "dense"),
        ("onnx::MatMul_123", None),
        ("weight", None),
    ],
)
def test_weights(name: str, scope: str | None) -> None:
    assert scope_of(ir.node("Gemm", [ir.Value(name="x"), _weight(name)])) == scope


def test_the_bias_added_to_a_product() -> None:
    product = ir.node("MatMul", [ir.Value(name="x"), _weight("val_7")])
    add = ir.node("Add", [product.outputs[0], _weight("m.query.bias")])
    assert scope_of(product) == scope_of(add) == "m.query"
