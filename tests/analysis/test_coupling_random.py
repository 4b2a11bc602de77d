"""Random networks full of joins, cuts, shuffles and heads: every group holds by execution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from coupling_tools import checks, prove, run, some_units
from residual_nets import Net

from lamina.analysis.coupling import CouplingResult, coupled_groups
from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.shrink import shrink

Stream = tuple[ir.Value, int]
SEEDS = 40


class Images:
    """Feature maps [n, channels, size, size]; each step makes a stream from those there are."""

    def __init__(self, seed: int) -> None:
        self.net, self.random = Net(seed), np.random.default_rng(seed)
        self.streams: list[Stream] = [(self.net.input("x", ["n", 3, 4, 4]), 3)]
        self.streams.append(self.mix(self.streams[0], 12))

    def choose(self) -> Stream:
        return self.streams[int(self.random.integers(1, len(self.streams)))]

    def like(self, channels: int) -> Stream:
        """A stream of so many channels: one that is there, else a new one."""
        fitting = [s for s in self.streams[1:] if s[1] == channels]
        return (
            fitting[int(self.random.integers(len(fitting)))] if fitting else self.mix(self.choose(), channels)
        )

    def mix(self, stream: Stream, out: int = 0, group: int = 1) -> Stream:
        x, width = stream
        out = out or int(self.random.choice([6, 12, 24]))
        size = int(self.random.choice([1, 3]))
        w = self.net.weight(out, width // group, size, size)
        b = self.net.weight(out) if self.random.random() < 0.5 else None
        return self.net.op("Conv", x, w, b, group=group, pads=[size // 2] * 4), out

    def grouped(self, stream: Stream) -> Stream:
        group = int(self.random.choice([g for g in (2, 3, 6, stream[1]) if stream[1] % g == 0]))
        return self.mix(stream, stream[1] * int(self.random.choice([1, 2])), group)

    def transposed(self, stream: Stream) -> Stream:
        x, width = stream
        group = int(self.random.choice([g for g in (1, 2, 3) if width % g == 0]))
        w = self.net.weight(width, 6 // group if 6 % group == 0 else 1, 1, 1)
        return self.net.op("ConvTranspose", x, w, group=group), 6 if 6 % group == 0 else group

    def normalized(self, stream: Stream) -> Stream:
        x, width = stream
        stats = [self.net.weight(width) for _ in range(3)]
        variance = self.net.array(np.abs(self.random.standard_normal(width)).astype(np.float32) + 0.5)
        if self.random.random() < 0.3:
            return self.net.op("InstanceNormalization", x, *stats[:2]), width
        return self.net.op("BatchNormalization", x, *stats, variance), width

    def acted(self, stream: Stream) -> Stream:
        return self.net.op(
            str(self.random.choice(["Relu", "Sigmoid", "Tanh", "HardSwish"])), stream[0]
        ), stream[1]

    def joined(self, stream: Stream) -> Stream:
        other = self.choose()
        return self.net.op("Concat", stream[0], other[0], axis=1), stream[1] + other[1]

    def added(self, stream: Stream) -> Stream:
        kind = str(self.random.choice(["Add", "Mul", "Max"]))
        return self.net.op(kind, stream[0], self.like(stream[1])[0]), stream[1]

    def split(self, stream: Stream) -> Stream:
        x, width = stream
        at = int(self.random.integers(1, width)) if self.random.random() < 0.5 else width // 2
        parts = self.net.op("Split", x, self.net.ints(at, width - at), outputs=2, axis=1)
        self.streams += zip(parts, (at, width - at), strict=True)
        return self.streams.pop()

    def sliced(self, stream: Stream) -> Stream:
        x, width = stream
        step = int(self.random.choice([1, 2, 3, -1, -2]))
        start = int(self.random.integers(0, max(1, width // 3)))
        bounds = (start, width) if step > 0 else (width - 1 - start, -width - 9)
        ints = [self.net.ints(v) for v in (*bounds, 1, step)]
        taken = range(width)[slice(start, width, step) if step > 0 else slice(bounds[0], None, step)]
        return self.net.op("Slice", x, *ints), len(taken)

    def looked_up(self, stream: Stream) -> Stream:
        count = int(self.random.integers(2, stream[1] + 2))
        at = self.random.integers(0, stream[1], size=count)
        return self.net.op("Gather", stream[0], self.net.array(at), axis=1), count

    def shuffled(self, stream: Stream) -> Stream:
        x, width = stream
        groups = int(self.random.choice([g for g in (1, 2, 3) if width % g == 0]))
        parts = self.net.op("Reshape", x, self.net.ints(0, groups, width // groups, 4, 4))
        turned = self.net.op("Transpose", parts, perm=[0, 2, 1, 3, 4])
        return self.net.op("Reshape", turned, self.net.ints(0, width, 4, 4)), width

    def padded(self, stream: Stream) -> Stream:
        before, after = (int(n) for n in self.random.integers(0, 4, size=2))
        pads = self.net.ints(0, before, 0, 0, 0, after, 0, 0)
        return self.net.op("Pad", stream[0], pads), stream[1] + before + after

    def tiled(self, stream: Stream) -> Stream:
        return self.net.op("Tile", stream[0], self.net.ints(1, 2, 1, 1)), 2 * stream[1]

    def excited(self, stream: Stream) -> Stream:
        x, width = stream
        pooled = self.net.op("ReduceMean", x, self.net.ints(2, 3))
        gate = self.mix((self.net.op("Relu", self.mix((pooled, width), 4)[0]), 4), width)[0]
        return self.net.op("Mul", x, self.net.op("Sigmoid", gate)), width

    def finish(self) -> Program:
        last = self.streams[-1]
        flat = self.net.op("Flatten", last[0])
        y = self.net.op("MatMul", flat, self.net.weight(16 * last[1], 3))
        return self.net.program(y, self.mix(self.choose(), 2)[0])

    def steps(self) -> list[Callable[[Stream], Stream]]:
        return [
            *(self.mix, self.mix, self.grouped, self.transposed, self.normalized, self.acted, self.joined),
            *(self.added, self.split, self.sliced, self.looked_up, self.shuffled, self.padded, self.tiled),
            self.excited,
        ]


class Tokens(Images):
    """Token streams [n, 5, channels]."""

    def __init__(self, seed: int) -> None:
        self.net, self.random = Net(seed), np.random.default_rng(seed)
        self.streams = [(self.net.input("x", ["n", 5, 4]), 4)]
        self.streams.append(self.mix(self.streams[0], 12))

    def mix(self, stream: Stream, out: int = 0, group: int = 1) -> Stream:
        out = out or int(self.random.choice([6, 12, 24]))
        y = self.net.op("MatMul", stream[0], self.net.weight(stream[1], out))
        return (self.net.op("Add", y, self.net.weight(out)) if self.random.random() < 0.5 else y), out

    def normalized(self, stream: Stream) -> Stream:
        if self.random.random() < 0.7:
            return self.net.op("Mul", stream[0], self.net.weight(stream[1])), stream[1]
        return self.net.op("LayerNormalization", stream[0], self.net.weight(stream[1]), axis=-1), stream[1]

    def joined(self, stream: Stream) -> Stream:
        other = self.choose()
        return self.net.op("Concat", stream[0], other[0], axis=-1), stream[1] + other[1]

    def split(self, stream: Stream) -> Stream:
        parts = self.net.op("Split", stream[0], outputs=2, axis=-1, num_outputs=2)
        half = (stream[1] + 1) // 2
        self.streams += zip(parts, (half, stream[1] - half), strict=True)
        return self.streams.pop()

    def heads(self, x: ir.Value, count: int, width: int) -> ir.Value:
        parts = self.net.op("Reshape", x, self.net.ints(0, 5, count, width))
        return self.net.op("Transpose", parts, perm=[0, 2, 1, 3])

    def attended(self, stream: Stream) -> Stream:
        count, width = int(self.random.choice([1, 2, 3])), int(self.random.choice([2, 3]))
        q, k, v = (self.heads(self.mix(stream, count * width)[0], count, width) for _ in range(3))
        scores = self.net.op("MatMul", q, self.net.op("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = self.net.op("MatMul", self.net.op("Softmax", scores, axis=-1), v)
        flat = self.net.op(
            "Reshape", self.net.op("Transpose", mixed, perm=[0, 2, 1, 3]), self.net.ints(0, 0, -1)
        )
        return flat, count * width

    def steps(self) -> list[Callable[[Stream], Stream]]:
        return [
            *(self.mix, self.mix, self.normalized, self.acted, self.joined, self.added, self.split),
            *(self.attended, self.attended),
        ]

    def finish(self) -> Program:
        last = self.streams[-1]
        pooled = self.net.op("ReduceSum", last[0], self.net.ints(1), keepdims=0)
        y = self.net.op("Gemm", pooled, self.net.weight(2, last[1]), transB=1)
        return self.net.program(y, self.mix(self.choose(), 2)[0])


def random_program(seed: int) -> Program:
    maker = (Images if seed % 3 else Tokens)(seed)
    for _ in range(int(maker.random.integers(3, 12))):
        steps = maker.steps()
        maker.streams.append(steps[int(maker.random.integers(len(steps)))](maker.choose()))
    return maker.finish()


def prove_all(program: Program, found: CouplingResult, seed: int) -> int:
    """Cut each group alone, then several in one go; how many groups there are."""
    rng = np.random.default_rng(seed)
    shape = [d if isinstance(d, int) else 2 for d in program.inputs[0].shape]
    feeds = {"x": rng.normal(size=shape).astype(np.float32)}
    checked = checks(program)
    for group in found.groups:
        gap = prove(program, found, {group.name: some_units(group, rng)}, feeds, check=checked)
        assert gap is None or gap < 1e-4, (seed, group.name, gap)
    cuts: dict[str, list[int]] = {}
    for group in found.groups:
        wider = {**cuts, group.name: some_units(group, rng)}
        try:
            shrink(program, found, wider)
        except PassError:
            continue
        cuts = wider
    gap = prove(program, found, cuts, feeds, check=checked)
    assert gap is None or gap < 1e-4, (seed, "all", gap)
    return len(found.groups)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_every_group_of_a_random_network_holds(seed: int) -> None:
    program = random_program(seed)
    feeds = {"x": np.zeros([d if isinstance(d, int) else 2 for d in program.inputs[0].shape], np.float32)}
    prove_all(program, coupled_groups(program, feeds), seed)


def test_groups_found_with_one_batch_size_hold_for_another() -> None:
    program = random_program(7)
    found = coupled_groups(program, {"x": np.zeros((1, 3, 4, 4), dtype=np.float32)})
    assert found.groups
    feeds = {"x": np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)}
    for group in found.groups:
        small = shrink(program, found, {group.name: [0]})
        for name, array in run(small, feeds).items():
            assert array.shape == run(program, feeds)[name].shape


def test_the_random_networks_have_groups_of_every_shape() -> None:
    blocks, groups = set(), 0
    for seed in range(SEEDS):
        program = random_program(seed)
        feeds = {"x": np.zeros([d if isinstance(d, int) else 2 for d in program.inputs[0].shape], np.float32)}
        for group in coupled_groups(program, feeds).groups:
            groups += 1
            blocks |= {m.indices.shape[1] for m in group.weights}
    assert groups > 2 * SEEDS
    assert {1, 2, 3, 16} <= blocks
