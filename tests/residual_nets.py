"""Small networks with residual branches and random weights, built node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program

WIDTH, HEADS = 8, 2
FLOAT = ir.DataType.FLOAT


class Net:
    """A graph being built; each method adds nodes and returns the value they make."""

    def __init__(self, seed: int = 0, opset: int = 18) -> None:
        self.random = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []
        self.initializers: list[ir.Value] = []
        self.domains = {"": opset}
        self._names: set[str] = set()

    def name(self, hint: str) -> str:
        label, n = hint, 1
        while label in self._names:
            label, n = f"{hint}_{n}", n + 1
        self._names.add(label)
        return label

    def input(self, name: str, shape: Sequence[int | str], dtype: ir.DataType = FLOAT) -> ir.Value:
        value = ir.Value(name=self.name(name), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.inputs.append(value)
        return value

    def array(self, array: np.ndarray, name: str = "const") -> ir.Value:
        tensor = ir.Tensor(np.asarray(array), name=self.name(name))
        kind = ir.TensorType(tensor.dtype)
        value = ir.Value(name=tensor.name, shape=ir.Shape(tensor.shape), type=kind, const_value=tensor)
        self.initializers.append(value)
        return value

    def weight(self, *shape: int, name: str = "w") -> ir.Value:
        scale = 1 / np.sqrt(max(shape[0], 1))
        return self.array((self.random.standard_normal(shape) * scale).astype(np.float32), name)

    def ints(self, *numbers: int) -> ir.Value:
        return self.array(np.array(numbers, np.int64), "ints")

    def op(
        self, op_type: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any
    ):
        label = self.name(op_type.lower())
        node = ir.node(
            op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=f"node_{label}"
        )
        if domain:
            self.domains[domain] = 1
        for i, value in enumerate(node.outputs):
            value.name = label if i == 0 else self.name(f"{label}_{i}")
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)

    # -- layers ---------------------------------------------------------------------------------------

    def linear(self, x: ir.Value, out: int = WIDTH, name: str = "", width: int = WIDTH) -> ir.Value:
        y = self.op("MatMul", x, self.weight(width, out, name=f"{name or 'lin'}.weight"))
        return self.op("Add", y, self.weight(out, name=f"{name or 'lin'}.bias"))

    def norm(self, x: ir.Value, name: str = "norm") -> ir.Value:
        scale, shift = self.weight(WIDTH, name=f"{name}.weight"), self.weight(WIDTH, name=f"{name}.bias")
        return self.op("LayerNormalization", x, scale, shift, axis=-1)

    def gelu(self, x: ir.Value) -> ir.Value:
        """The tanh form: holds a residual-like Add of its own."""
        cube = self.op("Mul", self.op("Mul", x, self.op("Mul", x, x)), self.array(np.float32(0.044715)))
        inner = self.op("Mul", self.op("Add", x, cube), self.array(np.float32(0.79788)))
        gate = self.op("Add", self.op("Tanh", inner), self.array(np.float32(1)))
        return self.op("Mul", self.op("Mul", x, gate), self.array(np.float32(0.5)))

    def mlp(self, x: ir.Value, name: str = "mlp") -> ir.Value:
        hidden = self.gelu(self.linear(x, 2 * WIDTH, f"{name}.fc1"))
        return self.linear(hidden, WIDTH, f"{name}.fc2", width=2 * WIDTH)

    def heads(self, x: ir.Value) -> ir.Value:
        split = self.op("Reshape", x, self.ints(0, 0, HEADS, WIDTH // HEADS))
        return self.op("Transpose", split, perm=[0, 2, 1, 3])

    def attention(
        self,
        x: ir.Value,
        name: str = "attn",
        *,
        context: ir.Value | None = None,
        mask: ir.Value | None = None,
        cache: Callable[[ir.Value, str], ir.Value] | None = None,
        show: list[ir.Value] | None = None,
    ) -> ir.Value:
        source = x if context is None else context
        q = self.heads(self.linear(x, name=f"{name}.q"))
        k, v = (self.heads(self.linear(source, name=f"{name}.{n}")) for n in "kv")
        if cache is not None:
            k, v = cache(k, "key"), cache(v, "value")
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Mul", scores, self.array(np.float32(0.5)))
        if mask is not None:
            scores = self.op("Add", scores, mask)
        weights = self.op("Softmax", scores, axis=-1)
        if show is not None:
            show.append(weights)
        mixed = self.op("Transpose", self.op("MatMul", weights, v), perm=[0, 2, 1, 3])
        return self.linear(self.op("Reshape", mixed, self.ints(0, 0, WIDTH)), name=f"{name}.o")

    def conv(self, x: ir.Value, out: int = 4, width: int = 4, stride: int = 1, kernel: int = 3) -> ir.Value:
        w = self.weight(out, width, kernel, kernel, name="conv.weight")
        y = self.op("Conv", x, w, strides=[stride] * 2, pads=[kernel // 2] * 4)
        stats = [self.weight(out), self.weight(out), self.weight(out)]
        variance = self.array(np.abs(self.random.standard_normal(out)).astype(np.float32) + 0.5)
        return self.op("BatchNormalization", y, *stats, variance)

    # -- end ------------------------------------------------------------------------------------------

    def program(self, *outputs: ir.Value) -> Program:
        """The finished program, with inferred shapes."""
        for value in outputs:
            value.type = value.type or ir.TensorType(FLOAT)
        graph = ir.Graph(
            self.inputs,
            list(outputs),
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=self.domains,
            name="net",
        )
        model = ir.Model(graph, ir_version=9)
        import onnx_ir.passes.common as common

        common.ShapeInferencePass()(model)
        return Program(model)


def tokens(net: Net) -> ir.Value:
    return net.input("x", ["batch", "seq", WIDTH])


def image(net: Net) -> ir.Value:
    return net.input("x", ["batch", 4, 6, 6])


def run(program: Program, feeds: Mapping[str, np.ndarray], *, optimize: bool = False) -> list[np.ndarray]:
    """Outputs in ONNX Runtime, by default with every optimization off."""
    return session_of(program, optimize=optimize)(feeds)


def session_of(
    program: Program, *, optimize: bool = False
) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
    """What runs a program, compiled once."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = ir.external_data.load_to_model(program.model.clone())
    data = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, options, ["CPUExecutionProvider"])
    names = {i.name for i in session.get_inputs()}
    return lambda feeds: session.run(None, {k: v for k, v in feeds.items() if k in names})


def switched(program: Program, branches: Sequence[Any]) -> Program:
    """A clone in which each branch's body is multiplied by an input ``keep.<name>`` right before its Add."""
    clone = program.clone()
    nodes = {n.name: n for n in clone.graph}
    for k, branch in enumerate(branches):
        label = f"keep.{branch.name}"
        keep = ir.Value(name=label, shape=ir.Shape([]), type=ir.TensorType(FLOAT))
        clone.graph.inputs.append(keep)
        add = nodes[branch.add]
        index = next(i for i, v in enumerate(add.inputs) if v is not None and v.name == branch.body)
        product = ir.node("Mul", [add.inputs[index], keep], name=f"switch_{k}")
        product.outputs[0].name = f"switch_{k}_out"
        clone.graph.insert_before(add, product)
        add.replace_input_with(index, product.outputs[0])
    return clone


def keeping(branches: Sequence[Any], dropped: Sequence[str]) -> dict[str, np.ndarray]:
    """Switches for :func:`switched`: zero for the branches in ``dropped``."""
    return {f"keep.{b.name}": np.array(b.name not in dropped, np.float32) for b in branches}


def text_of(program: Program) -> bytes:
    """Everything a program holds, to prove that nothing changed it."""
    return ir.to_proto(program.model).SerializeToString(deterministic=True)


def finished(net: Net, *outputs: ir.Value) -> Program:
    """The net as a user would have it captured: with example inputs."""
    from lamina.ir.capture import capture

    return capture(net.program(*outputs).model)
