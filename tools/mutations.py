"""Ways to damage a model file: cut, flipped and moved bytes, and well-formed protobufs that make no sense."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

_NUMBERS = (0, 1, -1, 2, 7, 255, -128, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63))
_OPERATORS = (
    "Add",
    "MatMul",
    "Reshape",
    "Conv",
    "If",
    "Loop",
    "Gather",
    "Concat",
    "Split",
    "Identity",
    "Nope",
)
_TEXTS = ("", "x_1", "\x00", "../..", "ü" * 50, "a" * 5000, "same")
_PLACES = (
    "../up.bin",
    "/etc/passwd",
    "model.onnx",
    ".",
    "",
    "sub/../../x",
    "fifo",
    "loop",
    "nul\x00l",
    "a" * 300,
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """One damaged version of a serialized model."""
    kinds: tuple[Callable[[bytes, random.Random], bytes], ...] = (_cut, _flip, _flip, _bytes, _structure)
    return rng.choice(kinds if rng.random() < 0.5 else (_structure,))(data, rng)


def damage_data(path: Path, rng: random.Random) -> None:
    """Damage an external data file: shorter, longer, gone, or something that is no ordinary file."""
    kind = rng.randrange(5)
    content = path.read_bytes()
    if kind == 0:
        path.write_bytes(content[: rng.randrange(len(content) + 1)])
    elif kind == 1:
        path.write_bytes(_flip(content, rng) if content else b"x")
    elif kind == 2:
        path.unlink()
    elif kind == 3:
        path.unlink()
        path.mkdir()
    else:
        path.unlink()
        path.symlink_to(path)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    # Most bytes of a model are weights; its structure is mostly at the front and between them.
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _bytes(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = rng.choice((1, 4, 30, 300))
    piece = data[start : start + length]
    at = rng.randrange(len(data))
    kind = rng.randrange(4)
    if kind == 0:
        return data[:start] + data[start + length :]
    if kind == 1:
        return data[:at] + piece + data[at:]
    if kind == 2:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    return data[:at] + bytes([rng.choice((0, 0xFF, 0x80, 0x7F))]) * length + data[at + length :]


# -- structure ----------------------------------------------------------------------------------------


def _structure(data: bytes, rng: random.Random) -> bytes:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return _flip(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        try:
            rng.choice(STRUCTURES)(model, rng)
        except (IndexError, ValueError):
            continue  # nothing of that kind is in this model (any more)
    return model.SerializeToString()


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _graph(model: onnx.ModelProto, rng: random.Random) -> onnx.GraphProto:
    return rng.choice(list(_graphs(model.graph)))


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return rng.choice(_graph(model, rng).node)


def _tensor(model: onnx.ModelProto, rng: random.Random) -> onnx.TensorProto:
    found = [t for g in _graphs(model.graph) for t in g.initializer]
    found += [a.t for g in _graphs(model.graph) for n in g.node for a in n.attribute if a.HasField("t")]
    return rng.choice(found)


def _some_name(model: onnx.ModelProto, rng: random.Random) -> str:
    names = [name for g in _graphs(model.graph) for n in g.node for name in (*n.input, *n.output)]
    return rng.choice([*names, *(t.name for t in model.graph.initializer), *_TEXTS])


def dims(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    if tensor.dims and rng.random() < 0.8:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(_NUMBERS)
    else:
        tensor.dims.append(rng.choice(_NUMBERS))


def port_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    port = rng.choice([*model.graph.input, *model.graph.output])
    shape = port.type.tensor_type.shape
    if shape.dim and rng.random() < 0.7:
        shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice(_NUMBERS)
    elif rng.random() < 0.5:
        shape.dim.add(dim_value=rng.choice(_NUMBERS))
    else:
        del shape.dim[:]


def dtype(model: onnx.ModelProto, rng: random.Random) -> None:
    _tensor(model, rng).data_type = rng.choice((0, *range(1, 28), 99, 2**31 - 1))


def port_dtype(model: onnx.ModelProto, rng: random.Random) -> None:
    port = rng.choice([*model.graph.input, *model.graph.output])
    kind = rng.randrange(3)
    if kind == 0:
        port.type.tensor_type.elem_type = rng.choice((*range(28), 99))
    elif kind == 1:
        port.type.sequence_type.elem_type.tensor_type.elem_type = 1
    else:
        port.ClearField("type")


def rename_value(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    names = rng.choice((node.input, node.output))
    names[rng.randrange(len(names))] = _some_name(model, rng)


def rename_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice(model.graph.initializer).name = _some_name(model, rng)


def rename_port(model: onnx.ModelProto, rng: random.Random) -> None:
    rng.choice([*model.graph.input, *model.graph.output]).name = _some_name(model, rng)


def drop_node(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(model, rng)
    del graph.node[rng.randrange(len(graph.node))]


def repeat_node(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(model, rng)
    graph.node.append(rng.choice(graph.node))


def shuffle_nodes(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(model, rng)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in graph.node]
    rng.shuffle(nodes)
    del graph.node[:]
    graph.node.extend(nodes)


def drop_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def repeat_tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    model.graph.initializer.append(rng.choice(model.graph.initializer))


def drop_port(model: onnx.ModelProto, rng: random.Random) -> None:
    ports = rng.choice((model.graph.input, model.graph.output))
    del ports[rng.randrange(len(ports))]


def repeat_port(model: onnx.ModelProto, rng: random.Random) -> None:
    ports = rng.choice((model.graph.input, model.graph.output))
    ports.append(rng.choice(ports))


def back_edge(model: onnx.ModelProto, rng: random.Random) -> None:
    graph = _graph(model, rng)
    early, late = sorted(rng.randrange(len(graph.node)) for _ in range(2))
    node = graph.node[early]
    node.input[rng.randrange(len(node.input))] = rng.choice(graph.node[late].output)


def add_input(model: onnx.ModelProto, rng: random.Random) -> None:
    _node(model, rng).input.append(_some_name(model, rng))


def drop_input(model: onnx.ModelProto, rng: random.Random) -> None:
    names = rng.choice((_node(model, rng).input, _node(model, rng).output))
    del names[rng.randrange(len(names))]


def operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if rng.random() < 0.7:
        node.op_type = rng.choice(_OPERATORS)
    else:
        node.domain = rng.choice(("com.acme", "com.microsoft", "ai.onnx.ml", "ai.onnx", "\x00"))


def attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    attributes = _node(model, rng).attribute
    found = attributes[rng.randrange(len(attributes))]
    kind = rng.randrange(6)
    if kind == 0:
        del attributes[:]
    elif kind == 1:
        found.type = rng.choice(range(1, 15))
    elif kind == 2:
        found.name = rng.choice(("axis", "perm", "bogus", "value", "body", ""))
    elif kind == 3:
        found.ref_attr_name = "nowhere"
    elif found.ints:
        found.ints[rng.randrange(len(found.ints))] = rng.choice(_NUMBERS)
    elif found.HasField("i"):
        found.i = rng.choice(_NUMBERS)
    else:
        found.f = rng.choice((float("nan"), float("inf"), -1e30, 0.0))


def versions(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        model.opset_import[0].version = rng.choice((*range(-1, 30), 10**6, 2**62))
    elif kind == 1:
        model.opset_import.add(domain=rng.choice(("", "ai.onnx", "com.acme")), version=rng.randrange(30))
    elif kind == 2:
        del model.opset_import[:]
    elif kind == 3:
        model.ir_version = rng.choice((0, 1, 3, 4, 20, -1, 2**62))
    else:
        model.opset_import[0].domain = rng.choice(("ai.onnx.ml", "com.acme", "ai.onnx"))


def raw_data(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    kind = rng.randrange(4)
    if kind == 0:
        tensor.raw_data = tensor.raw_data[: len(tensor.raw_data) // 2]
    elif kind == 1:
        tensor.ClearField("raw_data")
    elif kind == 2:
        tensor.float_data.extend([1.0] * rng.randrange(5))
    else:
        tensor.raw_data = rng.randbytes(len(tensor.raw_data))


def external(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {e.key: e for e in tensor.external_data}
    key = rng.choice(("location", "offset", "length", "checksum", "basepath"))
    entry = entries.get(key)
    if entry is None:
        entry = tensor.external_data.add(key=key)
    entry.value = (
        rng.choice(_PLACES) if key in ("location", "basepath") else str(rng.choice((*_NUMBERS, "x")))
    )
    if rng.random() < 0.3:
        tensor.ClearField("raw_data")


def sparse(model: onnx.ModelProto, rng: random.Random) -> None:
    tensor = _tensor(model, rng)
    added = model.graph.sparse_initializer.add()
    added.values.CopyFrom(tensor)
    added.dims.extend([rng.choice(_NUMBERS)])


def function(model: onnx.ModelProto, rng: random.Random) -> None:
    """A function of the node's own name, which may call itself or a missing one."""
    node = _node(model, rng)
    node.domain = "com.acme"
    made = model.functions.add(name=node.op_type, domain="com.acme")
    made.input.extend(dict.fromkeys(node.input))
    made.output.extend(node.output)
    inner = made.node.add(op_type=rng.choice((node.op_type, "Identity", "Missing")))
    inner.domain = rng.choice(("com.acme", ""))
    inner.input.extend(node.input)
    inner.output.extend(node.output)
    made.opset_import.add(domain="", version=18)
    model.opset_import.add(domain="com.acme", version=1)


def nest(model: onnx.ModelProto, rng: random.Random) -> None:
    """The graph inside itself, as a branch of an If that may lie anywhere."""
    inner = onnx.GraphProto.FromString(model.graph.SerializeToString())
    node = _node(model, rng)
    node.attribute.add(name="then_branch", type=onnx.AttributeProto.GRAPH, g=inner)
    if rng.random() < 0.5:
        node.op_type = "If"
        node.attribute.add(name="else_branch", type=onnx.AttributeProto.GRAPH, g=inner)


STRUCTURES: tuple[Callable[[onnx.ModelProto, random.Random], None], ...] = (
    dims,
    port_dims,
    dtype,
    port_dtype,
    rename_value,
    rename_tensor,
    rename_port,
    drop_node,
    repeat_node,
    shuffle_nodes,
    drop_tensor,
    repeat_tensor,
    drop_port,
    repeat_port,
    back_edge,
    add_input,
    drop_input,
    operator,
    attribute,
    versions,
    raw_data,
    external,
    sparse,
    function,
    nest,
)
