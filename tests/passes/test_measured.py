"""All that only changed programs show, from one call, and the metrics that read it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr
from stacked_model import stacked

from lamina.analysis.gradient_operators import quantization_error, weighted_operators
from lamina.analysis.instrument import InstrumentedSession
from lamina.analysis.metrics import METRICS, scores
from lamina.analysis.needs import Need, union
from lamina.analysis.residual import BranchProbe
from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.ir.branches import find_branches
from lamina.passes.drop_branch import apply_drops
from lamina.passes.measured import measured, rounded
from lamina.quality.divergence import RelativeL2

OUTPUT = "add3_out"
METRIC = RelativeL2((OUTPUT,))


def _data() -> Dataset:
    random = np.random.default_rng(8)
    return Dataset({"x": random.normal(size=(10, 5, 16)).astype(np.float32)}, {}, 4)


def test_every_metric_rates_sites_after_one_run_and_one_measurement() -> None:
    program, data = stacked(4), _data()
    probes = [BranchProbe.of(b) for b in find_branches(program).branches]
    collected = collect(program, data, branches=probes, needs=union(METRICS), threads=1)
    found = measured(program, data, collected, METRIC, pairs=3, threads=1)
    names = [p.name for p in probes]

    def run(which):
        value = InstrumentedSession(which, threads=1).run([which.outputs[0].name], data.inputs)[0]
        return value.astype(np.float64)

    original = run(program)

    def damage(which) -> float:
        return float(np.linalg.norm(run(which) - original) / np.linalg.norm(original))

    singles = {n: damage(apply_drops(program, [n])) for n in names}
    assert scores(program, found, "output-kl") == pytest.approx(singles, rel=1e-4)
    assert len(found.pairs) == 3
    for pair, value in scores(program, found, "hessian-interlayer").items():
        a, b = pair.split(" | ")
        expected = damage(apply_drops(program, [a, b])) - singles[a] - singles[b]
        assert value == pytest.approx(expected, rel=1e-3, abs=1e-6)
    low = run(rounded(program, 4))
    losses = np.linalg.norm(low - original, axis=(1, 2)) / np.linalg.norm(original, axis=(1, 2))
    assert found.losses == pytest.approx(losses, rel=1e-4)
    for name, risk in scores(program, found, "residual-norm-risk").items():
        assert risk == pytest.approx(spearmanr(found.examples[name], losses).statistic)
    assert list(scores(program, found, "lieq-diagnostics")) == names
    assert scores(program, found, "lieq-diagnostics") != scores(program, collected, "lieq-diagnostics")
    for metric in METRICS:
        assert metric.rate(program, found) or Need.ATTENTION in metric.needs, metric.name


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_rounding_is_the_one_that_errors_are_stated_for(bits: int) -> None:
    program = stacked(2)
    changed = rounded(program, bits)
    for operator in weighted_operators(program):
        before = program.graph.initializers[operator.weight].const_value.numpy()
        after = changed.graph.initializers[operator.weight].const_value.numpy()
        error = float(np.square(after.astype(np.float64) - before).sum())
        assert error == pytest.approx(quantization_error(before, operator.channel_axis, bits), rel=1e-4)
        assert error > 0
