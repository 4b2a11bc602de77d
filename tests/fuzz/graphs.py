"""Random valid models: a graph is a list of small seeds, so that leaving some out gives a smaller graph.

Every piece draws from a generator of its own, seeded by its entry in :attr:`Spec.pieces`; what a piece reads
is chosen among the values made so far. Shapes hold numbers and the dynamic dims ``N`` and ``S``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dim = int | str
Shape = tuple[Dim, ...]
FLOAT = np.dtype(np.float32)
HALF = np.dtype(np.float16)
DOUBLE = np.dtype(np.float64)
LONG = np.dtype(np.int64)
INT = np.dtype(np.int32)
BOOL = np.dtype(bool)
BYTE = np.dtype(np.uint8)
OPSETS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 17, 18, 18, 18, 19, 20, 20, 21, 21, 22, 23, 23, 24, 25)
SIZES = ({"N": 2, "S": 3}, {"N": 1, "S": 1}, {"N": 3, "S": 5})


@dataclass(frozen=True)
class Spec:
    """What a random model is made from; equal specs make equal models.

    Attributes:
        seed: Of everything but the pieces: opset, dims, names, outputs.
        pieces: One seed a piece, in order.
        grid: Whether weights lie on a grid that int8 and float16 hold exactly.
        opset: The default operator set, or 0 for one drawn from the seed.
    """

    seed: int
    pieces: tuple[int, ...]
    grid: bool = False
    opset: int = 0


@dataclass(frozen=True)
class Val:
    """One value of the graph under construction.

    Attributes:
        exact: Whether no rounding lies between the inputs and it, so that a step function may read it.
    """

    name: str
    dtype: np.dtype[Any]
    shape: Shape
    exact: bool = False

    @property
    def rank(self) -> int:
        return len(self.shape)


Read = Val | str | np.ndarray | None


@dataclass(frozen=True)
class Made:
    """A finished model and how to feed it."""

    spec: Spec
    proto: onnx.ModelProto
    inputs: tuple[Val, ...]
    pieces: tuple[str, ...]

    def reference(self) -> onnx.ModelProto:
        """The same model without node names, which ONNX Runtime refuses where two are equal."""
        plain = onnx.ModelProto()
        plain.CopyFrom(self.proto)
        _unname(plain.graph)
        return plain

    def feeds(self, sizes: dict[str, int], seed: int, kind: str = "normal") -> dict[str, np.ndarray]:
        """One array an input; ``kind`` is normal, tiny, zero, edge or special (with NaN and infinities)."""
        rng = np.random.default_rng([seed, self.spec.seed])
        return {
            v.name: _array(
                rng, v.dtype, [sizes.get(d, d) if isinstance(d, str) else d for d in v.shape], kind
            )
            for v in self.inputs
        }


def _unname(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.ClearField("name")
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                _unname(inner)


def spec_of(seed: int) -> Spec:
    """The spec a number stands for: what the unbounded run enumerates."""
    rng = np.random.default_rng([1, seed])
    count = int(rng.integers(1, 9))
    pieces = tuple(int(v) for v in rng.integers(0, 2**31, count))
    return Spec(seed, pieces, grid=bool(rng.random() < 0.25))


@dataclass
class Builder:
    """The graph under construction. ``rng`` is the current piece's own."""

    rng: np.random.Generator
    opset: int
    width: int
    noise: np.random.Generator | None = None
    grid: bool = False
    dynamic: bool = True
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    overridable: list[str] = field(default_factory=list)
    inputs: list[Val] = field(default_factory=list)
    values: list[Val] = field(default_factory=list)
    _count: int = 0

    # -- choosing ---------------------------------------------------------------------------------------

    def chance(self, probability: float) -> bool:
        return bool(self.rng.random() < probability)

    def one_of(self, *items: Any) -> Any:
        return items[int(self.rng.integers(len(items)))]

    def pick(self, fits: Callable[[Val], bool], make: Callable[[], Val]) -> Val:
        """A value that fits, later ones more often; else what ``make`` makes."""
        found = [v for v in self.values if fits(v)]
        if not found or self.chance(0.05):
            return make()
        return found[-1] if self.chance(0.5) else found[int(self.rng.integers(len(found)))]

    def floats(self, rank: int | None = None, dtype: np.dtype[Any] = FLOAT) -> Val:
        """A float activation of this rank."""
        return self.pick(
            lambda v: v.dtype == dtype and (rank is None or v.rank == rank),
            lambda: self.input(dtype, self.default_shape(3 if rank is None else rank)),
        )

    def tokens(self) -> Val:
        """A [N, S, width] float32 activation."""
        return self.pick(
            lambda v: v.dtype == FLOAT and v.rank == 3 and isinstance(v.shape[2], int) and v.shape[2] > 1,
            lambda: self.input(FLOAT, self.default_shape(3)),
        )

    def image(self) -> Val:
        """A [N, C, H, W] float32 activation with known C, H and W of at least 3."""
        return self.pick(
            lambda v: (
                v.dtype == FLOAT
                and v.rank == 4
                and isinstance(v.shape[1], int)
                and all(isinstance(d, int) and d >= 3 for d in v.shape[2:])
            ),
            lambda: self.input(FLOAT, self.default_shape(4)),
        )

    def default_shape(self, rank: int) -> Shape:
        n: Dim = "N" if self.dynamic else 2
        s: Dim = "S" if self.dynamic and self.width % 4 == 0 else 3
        shapes: dict[int, Shape] = {0: (), 1: (self.width,), 2: (n, self.width), 3: (n, s, self.width)}
        return shapes.get(rank, (n, 2 + self.width % 3, 7, 6, 2, 2)[:rank])

    # -- making -----------------------------------------------------------------------------------------

    def fresh(self, hint: str) -> str:
        self._count += 1
        return f"{hint}_{self._count}"

    def input(self, dtype: np.dtype[Any], shape: Shape) -> Val:
        value = Val(self.fresh("x"), dtype, shape, exact=True)
        self.inputs.append(value)
        self.values.append(value)
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[Read],
        shape: Shape,
        dtype: np.dtype[Any] = FLOAT,
        *,
        exact: bool = False,
        keep: bool = True,
        domain: str = "",
        **attributes: Any,
    ) -> Val:
        """Append a node with one output; arrays among the inputs become constants."""
        return self.ops(
            op_type, inputs, [(shape, dtype)], exact=exact, keep=keep, domain=domain, **attributes
        )[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[Read],
        results: Sequence[tuple[Shape, np.dtype[Any]]],
        *,
        exact: bool = False,
        keep: bool = True,
        domain: str = "",
        **attributes: Any,
    ) -> list[Val]:
        """Append a node; its outputs may be read by later pieces when ``keep`` is set."""
        reads = [self.name(v) for v in inputs]
        made = [Val(self.fresh(op_type.lower()), dtype, shape, exact) for shape, dtype in results]
        raw = [v.name for v in made]
        noisy = [i for i, v in enumerate(made) if self._noisy(v)]
        for i in noisy:
            raw[i] = f"{made[i].name}_raw"
        node = helper.make_node(op_type, reads, raw, self._node_name(op_type), domain=domain or None)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items() if v is not None)
        self.nodes.append(node)
        for i in noisy:
            self._perturb(raw[i], made[i])
        if keep:
            self.values.extend(made)
        return made

    def _noisy(self, value: Val) -> bool:
        return self.noise is not None and value.dtype.kind == "f" and not value.exact

    def _perturb(self, raw: str, value: Val) -> None:
        """Every rounded value off by up to two units of the last place: what any other rounding may do."""
        assert self.noise is not None
        step = float(self.noise.choice([-2, -1, 1, 2])) * float(np.finfo(value.dtype).eps)
        factor = f"{value.name}_noise"
        self.weights[factor] = np.array(1 + step, value.dtype)
        self.nodes.append(helper.make_node("Mul", [raw, factor], [value.name]))

    def _node_name(self, op_type: str) -> str:
        draw = self.rng.random()
        return "" if draw < 0.1 else "same" if draw < 0.2 else self.fresh(f"n/{op_type}")

    def name(self, value: Read) -> str:
        if value is None:
            return ""
        if isinstance(value, (np.ndarray, np.generic)):
            return self.constant(np.asarray(value))
        return value if isinstance(value, str) else value.name

    def constant(self, array: np.ndarray) -> str:
        """A constant in one of the ways exporters write them; equal ones may be shared or repeated."""
        same = [k for k, a in self.weights.items() if a.dtype == array.dtype and np.array_equal(a, array)]
        if same and self.chance(0.5):
            return same[0]
        name, draw = self.fresh("c"), self.rng.random()
        if draw < 0.15:
            value = numpy_helper.from_array(array)
            self.nodes.append(helper.make_node("Constant", [], [name], self._node_name("c"), value=value))
            return name
        self.weights[name] = array
        if draw < 0.2:
            self.overridable.append(name)
        elif draw < 0.25:
            copy = self.fresh("c")
            self.nodes.append(helper.make_node("Identity", [name], [copy]))
            return copy
        return name

    def weight(self, *shape: int, dtype: np.dtype[Any] = FLOAT, scale: float | None = None) -> np.ndarray:
        """Random weights, or now and then those of an earlier operator of the same shape."""
        found = [a for a in self.weights.values() if a.shape == shape and a.dtype == dtype and a.ndim > 1]
        if found and self.chance(0.15):
            return found[0]
        if scale is None:
            scale = 1 / max(1.0, float(np.prod(shape[1:])) ** 0.5) if len(shape) > 1 else 0.5
        if self.grid:
            return np.asarray(_on_grid(self.rng, shape)).astype(dtype)
        return np.asarray(self.rng.standard_normal(shape) * scale).astype(dtype)


def _on_grid(rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
    """Multiples of 1/128 up to 127/128, the largest in every row and column, both signs."""
    array = rng.integers(-127, 128, shape).astype(np.float64)
    if array.size and array.ndim:
        array.reshape(array.shape[0], -1)[:, 0] = 127
        array.reshape(-1, array.shape[-1])[0, :] = 127
        if array.ndim > 1:
            array[:, 0] = 127
    return array / 128


def _array(rng: np.random.Generator, dtype: np.dtype[Any], shape: Sequence[int], kind: str) -> np.ndarray:
    if dtype == BOOL:
        return np.asarray(rng.random(shape) < 0.5)
    if dtype.kind in "iu":
        return rng.integers(0, 2 if kind == "zero" else 4, shape).astype(dtype)
    array = rng.standard_normal(shape)
    if kind == "zero":
        array = array * 0
    elif kind == "tiny":
        array = array * 1e-6
    elif kind in ("edge", "special"):
        values = [0.0, -0.0, 1.0, -1.0, 6.0, 0.5, -0.5, 1e-30, -100.0]
        if kind == "special":
            values += [np.nan, np.inf, -np.inf]
        array = np.where(rng.random(shape) < 0.6, rng.choice(values, shape), array)
    return np.asarray(array).astype(dtype)


def build(spec: Spec, *, noise: int | None = None) -> Made:
    """The model of a spec. With ``noise`` every rounded value is off by an ulp or two, drawn from it."""
    from fuzz_pieces import PIECES

    rng = np.random.default_rng([2, spec.seed])
    opset = int(rng.choice(OPSETS))
    builder = Builder(
        rng,
        spec.opset or opset,
        width=int(rng.choice([4, 6, 8, 12])),
        grid=spec.grid,
        dynamic=bool(rng.random() < 0.75),
        noise=None if noise is None else np.random.default_rng([3, noise]),
    )
    weights = np.array([w for w, _ in PIECES], float)
    names = []
    for seed in spec.pieces:
        builder.rng = np.random.default_rng([4, seed])
        piece = PIECES[int(builder.rng.choice(len(PIECES), p=weights / weights.sum()))][1]
        names.append(piece.__name__)
        piece(builder)
    if not any(v not in builder.inputs for v in builder.values):
        builder.rng = rng
        builder.op("Relu", [builder.floats(2)], builder.default_shape(2), exact=True)
    made = _finish(spec, builder, rng, tuple(names))
    if builder.noise is not None:
        _perturb_weights(made.proto, builder.noise)
    return made


def _perturb_weights(proto: onnx.ModelProto, noise: np.random.Generator) -> None:
    """Rounding inside an operator, such as a normalization's, is like other weights by an ulp or two."""
    values = [a.t for n in proto.graph.node if n.op_type == "Constant" for a in n.attribute]
    for tensor in (*proto.graph.initializer, *values):
        array = numpy_helper.to_array(tensor)
        if array.size > 1 and array.dtype.kind == "f":
            steps = noise.choice([-2, -1, 1, 2], array.shape) * np.finfo(array.dtype).eps
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array((array * (1 + steps)).astype(array.dtype), name))


def _finish(spec: Spec, builder: Builder, rng: np.random.Generator, names: tuple[str, ...]) -> Made:
    read = {name for node in builder.nodes for name in _reads(node)}
    made = {name for node in builder.nodes for name in node.output}
    known = [v for v in builder.values if v.name in made]
    outputs = [v for v in known if v.name not in read or rng.random() < 0.08]
    if not outputs:
        outputs = known[-1:]
    if rng.random() < 0.04:
        outputs += [v for v in builder.inputs[:1] if v not in outputs]
    if rng.random() < 0.5:
        builder.nodes = _shuffled(builder.nodes, rng)
    graph = helper.make_graph(
        builder.nodes,
        "fuzz",
        [_info(v) for v in builder.inputs] + [_weight_info(n, builder) for n in builder.overridable],
        [_info(v, hide=rng.random() < 0.1) for v in outputs],
        [numpy_helper.from_array(a, n) for n, a in builder.weights.items()],
    )
    imports = [helper.make_opsetid("", builder.opset)]
    if any(n.domain == "com.microsoft" for n in builder.nodes):
        imports.append(helper.make_opsetid("com.microsoft", 1))
    least = helper.find_min_ir_version_for([helper.make_opsetid("", builder.opset)])
    proto = helper.make_model(
        graph, opset_imports=imports, ir_version=max(least, int(rng.choice([4, 7, 8, 10])))
    )
    return Made(replace(spec, opset=builder.opset), proto, tuple(builder.inputs), names)


def _reads(node: onnx.NodeProto) -> list[str]:
    found = list(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            found += [o.name for o in inner.output]
            for n in inner.node:
                found += _reads(n)
    return found


def _shuffled(nodes: list[onnx.NodeProto], rng: np.random.Generator) -> list[onnx.NodeProto]:
    """Another order in which every value is still made before it is read."""
    made_by = {name: i for i, n in enumerate(nodes) for name in n.output if name}
    needs = [{made_by[r] for r in _reads(n) if r in made_by and made_by[r] != i} for i, n in enumerate(nodes)]
    done: list[int] = []
    left = set(range(len(nodes)))
    while left:
        ready = sorted(i for i in left if needs[i] <= set(done))
        chosen = ready[int(rng.integers(len(ready)))]
        done.append(chosen)
        left.discard(chosen)
    return [nodes[i] for i in done]


def _info(value: Val, *, hide: bool = False) -> onnx.ValueInfoProto:
    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
    return helper.make_tensor_value_info(value.name, kind, None if hide else list(value.shape))


def _weight_info(name: str, builder: Builder) -> onnx.ValueInfoProto:
    array = builder.weights[name]
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    return helper.make_tensor_value_info(name, kind, list(array.shape))


def tensor_type(dtype: np.dtype[Any]) -> int:
    """The ONNX element type of a numpy dtype."""
    return int(helper.np_dtype_to_tensor_dtype(dtype))


BOOL_TYPE = TensorProto.BOOL
