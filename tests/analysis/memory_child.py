"""Run as a process of its own: one analysis on so many samples, then its peak memory in bytes on stdout."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
from residual_nets import Net

from lamina.analysis.instrument import InstrumentedSession, feeds_of
from lamina.analysis.metrics import METRICS
from lamina.analysis.needs import union
from lamina.analysis.statistics import BranchProbe, collect
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.ir.program import Program
from lamina.passes.single_drops import drop_damages
from lamina.quality.divergence import RelativeL2

BATCH, TOKENS, WIDTH, LAYERS = 64, 512, 64, 2


def program() -> Program:
    """Two residual multilayer perceptrons; an activation of one batch takes 8 MiB."""
    net = Net(seed=3)
    x = net.input("x", ["b", TOKENS, WIDTH])
    for _ in range(LAYERS):
        hidden = net.op("Relu", net.op("MatMul", x, net.weight(WIDTH, WIDTH)))
        x = net.op("Add", x, net.op("MatMul", hidden, net.weight(WIDTH, WIDTH)))
    graph = ir.Graph(
        net.inputs, [x], nodes=net.nodes, initializers=net.initializers, opset_imports=net.domains
    )
    return Program(ir.Model(graph, ir_version=10))


def data(rows: int) -> Dataset:
    """Different samples that share their memory: sample i begins one element after sample i - 1."""
    size = TOKENS * WIDTH
    buffer = np.random.default_rng(5).normal(size=rows + size).astype(np.float32)
    samples = np.lib.stride_tricks.as_strided(buffer, (rows, TOKENS, WIDTH), (4, 4 * WIDTH, 4))
    return Dataset({"x": samples}, {}, BATCH)


def main() -> None:
    what, rows = sys.argv[1], int(sys.argv[2])
    model, samples = program(), data(rows)
    probes = [BranchProbe.of(branch) for branch in find_branches(model).branches]
    assert len(probes) == LAYERS
    if what == "plain":
        session = InstrumentedSession(model, threads=1)
        for batch in samples.batches():
            session.run([port.name for port in model.outputs], feeds_of(model, batch))
    elif what == "metrics":
        statistics = collect(model, samples, branches=probes, needs=union(METRICS), threads=1)
        assert statistics.samples == rows
    elif what == "drops":
        found = drop_damages(model, samples, RelativeL2((model.outputs[0].name,)), threads=1)
        assert all(len(d.samples) == rows for d in found.values())
    elif what == "hoard":  # what the test must be able to see: everything kept
        session = InstrumentedSession(model, threads=1)
        kept = [session.run([model.outputs[0].name], feeds_of(model, b)) for b in samples.batches()]
        assert len(kept) * BATCH == rows
    print(peak_bytes())


def peak_bytes() -> int:
    """Peak of this process alone; ``ru_maxrss`` would hold that of the process it was forked from too."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


if __name__ == "__main__":
    main()
