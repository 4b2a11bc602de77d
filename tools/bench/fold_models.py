"""Models the fold benchmark builds itself: decoders of any depth, and exports of torch modules."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS = 4


class _Writer:
    """Nodes and weights of one graph, with fresh names."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._random = np.random.default_rng(seed)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: object) -> str:
        label = f"{op_type.lower()}_{len(self.nodes)}"
        made = [label if i == 0 else f"{label}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), made, name=f"n_{label}", **attributes))
        return label

    def constant(self, array: np.ndarray) -> str:
        """A Constant node, as exporters write scalars and shapes."""
        label = f"const_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node("Constant", [], [label], name=f"n_{label}", value=numpy_helper.from_array(array))
        )
        return label

    def weight(self, *shape: int) -> str:
        label = f"w_{len(self.weights)}"
        array = (self._random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)
        self.weights.append(numpy_helper.from_array(array, label))
        return label

    def scalar(self, value: float) -> str:
        return self.constant(np.array(value, np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def decoder(layers: int, width: int = 32, opset: int = 18) -> onnx.ModelProto:
    """A decoder as exporters write one: decomposed RMS norm and GELU, heads by Reshape, shapes at run time.

    About 55 nodes a layer, many of them foldable: identities, casts to the same type, constants computed
    from constants, equal subexpressions, Dropout in inference mode.
    """
    w = _Writer()
    x = w.op("Gather", w.weight(64, width), "tokens")
    for _ in range(layers):
        x = w.op("Add", x, _attention(w, _norm(w, x, width), width))
        x = w.op("Add", w.op("Identity", x), _mlp(w, _norm(w, x, width), width))
    logits = w.op("MatMul", _norm(w, x, width), w.weight(width, 64))
    w.nodes.append(helper.make_node("Identity", [logits], ["logits"], name="n_logits"))
    graph = helper.make_graph(
        w.nodes,
        f"decoder{layers}",
        [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["b", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", 64])],
        w.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


def _norm(w: _Writer, x: str, width: int) -> str:
    square = w.op("Pow", x, w.scalar(2.0))
    mean = w.op("ReduceMean", square, w.ints(-1), keepdims=1)
    root = w.op("Sqrt", w.op("Add", mean, w.op("Add", w.scalar(5e-6), w.scalar(5e-6))))
    return w.op("Mul", w.op("Div", x, root), w.weight(width))


def _attention(w: _Writer, x: str, width: int) -> str:
    heads = [_heads(w, w.op("MatMul", x, w.weight(width, width)), x, width) for _ in range(3)]
    scores = w.op("MatMul", heads[0], w.op("Transpose", heads[1], perm=[0, 1, 3, 2]))
    scaled = w.op("Div", scores, w.op("Sqrt", w.scalar(float(width // HEADS))))
    mixed = w.op("MatMul", w.op("Softmax", w.op("Cast", scaled, to=1), axis=-1), heads[2])
    joined = w.op("Reshape", w.op("Transpose", mixed, perm=[0, 2, 1, 3]), w.ints(0, 0, width))
    return w.op("Dropout", w.op("MatMul", joined, w.weight(width, width)))


def _heads(w: _Writer, y: str, x: str, width: int) -> str:
    shape = w.op("Shape", x)
    batch, time = (w.op("Gather", shape, w.constant(np.array(i, np.int64)), axis=0) for i in (0, 1))
    parts = [w.op("Unsqueeze", part, w.ints(0)) for part in (batch, time)]
    target = w.op("Concat", *parts, w.ints(HEADS), w.ints(width // HEADS), axis=0)
    return w.op("Transpose", w.op("Reshape", y, target), perm=[0, 2, 1, 3])


def _mlp(w: _Writer, x: str, width: int) -> str:
    hidden = w.op("Add", w.op("MatMul", x, w.weight(width, 2 * width)), w.weight(2 * width))
    erf = w.op("Erf", w.op("Div", hidden, w.scalar(float(np.sqrt(2.0)))))
    gelu = w.op("Mul", w.op("Mul", hidden, w.op("Add", erf, w.scalar(1.0))), w.scalar(0.5))
    return w.op("Dropout", w.op("MatMul", gelu, w.weight(2 * width, width)))


def export_cnn(path: Path) -> None:
    """ResNet-18 with random weights, exported by torch's dynamo exporter at opset 18."""
    import torch

    torch.manual_seed(0)
    model = _resnet().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    _export(model, torch.zeros(1, 3, 224, 224), path)


def export_encoder(path: Path) -> None:
    """A 6-layer pre-LN encoder, width 384, 6 heads, vocabulary 8192, 128 tokens, exported likewise."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8192, 384)
            self.position = torch.nn.Parameter(torch.randn(1, 128, 384) * 0.02)
            self.layers = torch.nn.ModuleList([_layer() for _ in range(6)])
            self.norm, self.head = torch.nn.LayerNorm(384), torch.nn.Linear(384, 16)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens) + self.position
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x).mean(dim=1))

    torch.manual_seed(0)
    _export(Encoder().eval(), torch.zeros(1, 128, dtype=torch.int64), path)


def _layer() -> object:
    import torch
    from torch.nn import functional

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = torch.nn.LayerNorm(384), torch.nn.LayerNorm(384)
            self.qkv, self.out = torch.nn.Linear(384, 3 * 384), torch.nn.Linear(384, 384)
            self.up, self.down = torch.nn.Linear(384, 1536), torch.nn.Linear(1536, 384)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            b, t, d = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, 6, d // 6).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
            x = x + self.out(mixed.transpose(1, 2).reshape(b, t, d))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    return Layer()


def _resnet() -> object:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, wide: int, out: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(wide, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
                nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
            )  # fmt: skip
            same = stride == 1 and wide == out
            self.skip = (
                nn.Identity()
                if same
                else nn.Sequential(nn.Conv2d(wide, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(self.body(x) + self.skip(x))

    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    blocks, wide = [], 64
    for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        blocks += [Block(wide, out, stride), Block(out, out, 1)]
        wide = out
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def _export(model: object, example: object, path: Path) -> None:
    import torch

    torch.onnx.export(model, (example,), path, dynamo=True, opset_version=18, external_data=False)
