"""Networks whose branches are hard to drop: caches, cross attention, post-norm, projections, U-Nets, ties."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from residual_nets import HEADS, WIDTH, Net, image, tokens

from lamina.ir.program import Program


def transformer(layers: int = 3, *, pre: bool = True, seed: int = 0) -> Program:
    net = Net(seed)
    x = tokens(net)
    for i in range(layers):
        for make, part in ((net.attention, "attn"), (net.mlp, "mlp")):
            name = f"l.{i}.{part}"
            x = net.op("Add", x, make(net.norm(x) if pre else x, name))
            x = x if pre else net.norm(x)
    return net.program(net.norm(x) if pre else x)


def classifier(layers: int = 2, seed: int = 0) -> Program:
    """Tokens in, one distribution a token out; the head is tied to the embedding."""
    net = Net(seed)
    ids = net.input("input_ids", ["batch", "seq"], ir.DataType.INT64)
    table = net.weight(11, WIDTH, name="embedding")
    x = net.op("Gather", table, ids, axis=0)
    for i in range(layers):
        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn"))
        x = net.op("Add", x, net.mlp(net.norm(x), f"l.{i}.mlp"))
    logits = net.op("MatMul", net.norm(x), net.op("Transpose", table, perm=[1, 0]))
    logits.name = "logits"
    return net.program(logits)


def tied(layers: int = 3, seed: int = 0) -> Program:
    """Every MLP has the same weights."""
    net = Net(seed)
    x = tokens(net)
    w1, w2 = net.weight(WIDTH, WIDTH, name="shared.1"), net.weight(WIDTH, WIDTH, name="shared.2")
    for i in range(layers):
        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn"))
        hidden = net.op("Relu", net.op("MatMul", net.norm(x), w1))
        x = net.op("Add", x, net.op("MatMul", hidden, w2))
    return net.program(net.norm(x))


def decoder(layers: int = 3, seed: int = 0) -> Program:
    """Each attention with a key and value cache."""
    net = Net(seed)
    x = tokens(net)
    shown: list[ir.Value] = []
    for i in range(layers):

        def cache(value: ir.Value, what: str, layer: int = i) -> ir.Value:
            before = net.input(f"past.{layer}.{what}", ["batch", HEADS, "past", WIDTH // HEADS])
            value = net.op("Concat", before, value, axis=2)
            shown.append(net.op("Identity", value) if what == "key" else value)
            shown[-1].name = f"present.{layer}.{what}"
            return value

        x = net.op("Add", x, net.attention(net.norm(x), f"l.{i}.attn", cache=cache))
        x = net.op("Add", x, net.mlp(net.norm(x), f"l.{i}.mlp"))
    return net.program(net.norm(x), *shown)


def encoder_decoder(layers: int = 2, seed: int = 0) -> Program:
    """Two streams; the decoder's cross attention reads the encoder's end."""
    net = Net(seed)
    x = tokens(net)
    for i in range(layers):
        x = net.op("Add", x, net.attention(net.norm(x), f"enc.{i}.attn"))
        x = net.op("Add", x, net.mlp(net.norm(x), f"enc.{i}.mlp"))
    memory = net.norm(x)
    y = net.input("y", ["batch", "target", WIDTH])
    for i in range(layers):
        y = net.op("Add", y, net.attention(net.norm(y), f"dec.{i}.attn"))
        y = net.op("Add", y, net.attention(net.norm(y), f"dec.{i}.cross", context=memory))
        y = net.op("Add", y, net.mlp(net.norm(y), f"dec.{i}.mlp"))
    return net.program(net.norm(y))


def resnet(seed: int = 0) -> Program:
    """Two stages; the second begins with a projection shortcut."""
    net = Net(seed)
    x = image(net)
    for _ in range(3):
        inner = net.op("Relu", net.conv(x))
        x = net.op("Relu", net.op("Add", x, net.conv(inner)))
    wide = net.op("Relu", net.conv(x, out=6, stride=2))
    x = net.op("Relu", net.op("Add", net.conv(x, out=6, stride=2, kernel=1), net.conv(wide, 6, 6)))
    for _ in range(2):
        inner = net.op("Relu", net.conv(x, 6, 6))
        x = net.op("Relu", net.op("Add", x, net.conv(inner, 6, 6)))
    return net.program(net.op("GlobalAveragePool", x))


def unet(seed: int = 0) -> Program:
    """Residual blocks on the way down and up; what is concatenated across has the shape of a stage."""
    net = Net(seed)

    def block(x: ir.Value, width: int) -> ir.Value:
        return net.op("Add", x, net.conv(net.op("Relu", net.conv(x, width, width)), width, width))

    x = block(image(net), 4)
    across = block(x, 4)
    low = net.conv(across, out=6, stride=2)
    for _ in range(2):
        low = block(low, 6)
    up = net.op("Resize", low, None, net.array(np.array([1, 1, 2, 2], np.float32)), mode="nearest")
    x = net.conv(net.op("Concat", up, across, axis=1), out=4, width=10)
    x = block(block(x, 4), 4)
    return net.program(net.conv(x, out=2, kernel=1))


NETS: dict[str, Callable[[], Program]] = {
    "pre-norm": transformer,
    "post-norm": lambda: transformer(pre=False),
    "tied": tied,
    "cached decoder": decoder,
    "encoder-decoder": encoder_decoder,
    "resnet": resnet,
    "u-net": unet,
    "classifier": classifier,
}


def samples(program: Program, count: int = 12, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs, ``count`` rows each."""
    random = np.random.default_rng(seed)
    sizes = {"seq": 5, "target": 4, "past": 3}
    found = {}
    for port in program.inputs:
        shape = [count, *(d if isinstance(d, int) else sizes[d] for d in port.shape[1:])]
        if port.numpy_dtype.kind == "f":
            found[port.name] = random.standard_normal(shape).astype(np.float32)
        else:
            found[port.name] = random.integers(0, 11, shape).astype(port.numpy_dtype)
    return found
