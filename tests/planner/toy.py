"""A toy space: two branches, four weighted operators, made without any model file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from lamina.ir.program import Program
from lamina.ir.rewriter import Rewriter
from lamina.passes.pass_ import Option, Site, Transform
from lamina.planner.costs import Border, Costs
from lamina.planner.space import Choice, Space, build_space

TEXT = """
<ir_version: 8, opset_import: ["" : 18]>
toy (float[n, 8] x) => (float[n, 8] y) {
    [a1] h1 = MatMul (x, w1)
    [a2] r1 = Relu (h1)
    [a3] b1 = MatMul (r1, w2)
    [a4] s1 = Add (x, b1)
    [c1] h2 = MatMul (s1, w3)
    [c2] r2 = Tanh (h2)
    [c3] b2 = MatMul (r2, w4)
    [c4] s2 = Add (s1, b2)
    [c5] y = Relu (s2)
}
"""


def toy_program(seed: int = 0) -> Program:
    """x + mlp(x), twice, with random weights."""
    model = ir.from_onnx_text(
        TEXT.replace(
            "(float[n, 8] x)", "(float[n, 8] x, float[8,8] w1, float[8,8] w2, float[8,8] w3, float[8,8] w4)"
        )
    )
    rng = np.random.default_rng(seed)
    for value in list(model.graph.inputs)[1:]:
        array = rng.normal(size=(8, 8), scale=0.4).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.inputs.remove(value)
        model.graph.register_initializer(value)
    return Program(model)


@dataclass(frozen=True)
class Halve(Transform):
    """Scale a MatMul's output: two options, exactly predictable."""

    name: ClassVar[str] = "halve"

    def sites(self, program: Program) -> Iterator[Site]:
        for node in program.graph:
            if node.op_type == "MatMul":
                names = [v.name or "" for v in node.inputs if v is not None]
                yield Site(
                    "halve",
                    node.name or "",
                    "matmul",
                    (node.name or "",),
                    (names[0],),
                    (node.outputs[0].name or "",),
                    (names[1],),
                )

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        return (Option("half", {"by": 0.5}), Option("quarter", {"by": 0.25}))

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        node = nodes[site.nodes[0]]
        product = rewriter.op("MatMul", list(node.inputs))
        factor = rewriter.constant(np.float32(option.parameters["by"]), f"{site.name}_factor")
        return [rewriter.op("Mul", [product, factor])]


@dataclass(frozen=True)
class Cut(Transform):
    """Drop a branch and the Add behind it."""

    name: ClassVar[str] = "cut"
    removes_site: ClassVar[bool] = True

    def sites(self, program: Program) -> Iterator[Site]:
        for names, skip, output in (
            (("a1", "a2", "a3", "a4"), "x", "s1"),
            (("c1", "c2", "c3", "c4"), "s1", "s2"),
        ):
            yield Site("cut", f"branch.{names[0]}", "mlp", names, (skip,), (output,))

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        return (Option("drop"),)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        skip = nodes[site.nodes[-1]].inputs[0]
        assert skip is not None
        return [skip]


@dataclass(frozen=True)
class Clamp(Transform):
    """Owns the last Add together with the Relu behind it: overlaps the second branch partly."""

    name: ClassVar[str] = "clamp"

    def sites(self, program: Program) -> Iterator[Site]:
        yield Site("clamp", "c4", "add", ("c4", "c5"), ("s1", "b2"), ("y",))

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        return (Option("six"),)

    def emit(
        self, site: Site, option: Option, rewriter: Rewriter, nodes: Mapping[str, ir.Node]
    ) -> list[ir.Value]:
        total = rewriter.op("Add", list(nodes["c4"].inputs))
        low, high = rewriter.constant(np.float32(0), "low"), rewriter.constant(np.float32(0.5), "high")
        return [rewriter.op("Clip", [total, low, high])]


@dataclass(frozen=True)
class Straddle(Clamp):
    """Takes out the same nodes: of two that do and overlap only partly, one cannot be decided on its own."""

    name: ClassVar[str] = "straddle"
    removes_site: ClassVar[bool] = True


def toy_space(program: Program, *transforms: Transform) -> Space:
    """The space of the toy transforms."""
    from lamina.analysis.statistics import Statistics

    return build_space(program, transforms or (Cut(), Halve(), Clamp()), Statistics(0), None)  # type: ignore[arg-type]


def random_costs(space: Space, seed: int, *, borders: bool = False) -> tuple[Costs, list[list[float]]]:
    """Random prices and damages for a space."""
    rng = np.random.default_rng(seed)
    rows = [[float(v) for v in rng.normal(-0.05, 0.05, len(c.options))] for c in space.choices]
    sizes = [[float(v) for v in rng.integers(-100, 20, len(c.options))] for c in space.choices]
    damage = [[float(v) for v in rng.random(len(c.options))] for c in space.choices]
    found = []
    if borders:
        for i in range(1, len(space.choices)):
            cost = rng.random(2) * 0.05
            found.append(Border(f"t{i}", i - 1, (i,), bool(rng.integers(2)), float(cost[0]), float(cost[1])))
    delta = {"latency": rows, "size": sizes, "flops": [[0.0] * len(r) for r in rows]}
    return Costs(
        space, {"latency": 1.0, "size": 1000.0, "flops": 10.0}, delta, [0.1] * len(rows), found
    ), damage


def plain_choice(index: int, forms: Sequence[tuple[str, str]]) -> Choice:
    """A choice without a model: one option per (input form, output form)."""
    site = Site("halve", f"site{index}", "conv", (f"node{index}",), (), ())
    options = tuple(Option(f"o{k}", {}, i, o) for k, (i, o) in enumerate(forms))  # type: ignore[arg-type]
    return Choice(Halve(), site, options, frozenset(site.nodes))
