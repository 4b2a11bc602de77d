"""Each metric against its definition, written out token by token in float64."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from residual_model import direct, residual_data, residual_program
from test_residual import probes, sums

from lamina.analysis.linear_map import fit, fit_map
from lamina.analysis.metrics import FORWARD_METRICS, METRICS, get_metric, rank, scores
from lamina.analysis.needs import FORWARD, Need, union
from lamina.analysis.redundancy import angular_matrix, cka_matrix
from lamina.analysis.sensitivity import (
    compactness,
    energy_gain,
    lieq_diagnostics,
    risky_examples,
)
from lamina.analysis.statistics import BranchProbe, BranchStatistics, Statistics, collect
from lamina.data import Dataset
from lamina.errors import DataError, PassError
from lamina.ir.program import Program

OF_BRANCHES = ("block-influence", "branch-similarity", "relative-contribution", "angular-distance")
LAYERS, WIDTH, TOKENS = 3, 6, 7


def _definitions(x: np.ndarray, body: np.ndarray) -> dict[str, float]:
    cosines, ratios, angles = [], [], []
    for sample_x, sample_body in zip(x, body, strict=True):
        for t, (a, f) in enumerate(zip(sample_x, sample_body, strict=True)):
            b = a + f
            cosine = float(a @ b) / float(np.sqrt(a @ a) * np.sqrt(b @ b))
            cosines.append(cosine)
            ratios.append(float(np.sqrt(f @ f) / np.sqrt(a @ a)))
            if t == len(sample_x) - 1:
                angles.append(np.arccos(cosine) / np.pi)
    return {
        "block-influence": 1 - float(np.mean(cosines)),
        "layer-input-modification": 1 - float(np.mean(cosines)),
        "branch-similarity": float(np.mean(cosines)),
        "relative-contribution": float(np.mean(ratios)),
        "angular-distance": float(np.mean(angles)),
    }


@pytest.mark.parametrize("metric", [*OF_BRANCHES, "layer-input-modification"])
def test_a_branch_metric_is_its_definition(metric: str) -> None:
    program, data = residual_program(), residual_data(12)
    statistics = collect(program, data, branches=[BranchProbe("b", "x", "body", "sum")], threads=1)
    values = direct(program, data)
    expected = _definitions(values["x"], values["body"])
    assert scores(program, statistics, metric) == {"b": pytest.approx(expected[metric], rel=1e-5)}


def _three() -> Statistics:
    def branch(name: str, cosine: float, norm: float, angle: float) -> BranchStatistics:
        return BranchStatistics(name, 2, 10, 2, cosine, norm, angle)

    parts = [branch("a", 0.9, 0.3, 0.2), branch("b", 0.5, 1.0, 0.4), branch("c", 0.99, 0.1, 0.1)]
    return Statistics(2, branches={p.name: p for p in parts})


@pytest.mark.parametrize("metric", OF_BRANCHES)
def test_every_direction_ranks_the_least_change_first(metric: str) -> None:
    assert rank(residual_program(), _three(), metric) == ["c", "a", "b"]


def test_the_registry_names_each_metric_once_with_its_needs() -> None:
    names = [m.name for m in METRICS]
    assert len(set(names)) == len(names)
    of_transforms = {Need.VECTORS}
    assert union(METRICS) == frozenset(Need) - of_transforms
    assert union(FORWARD_METRICS) == FORWARD - of_transforms - {Need.EXAMPLES}
    assert union([get_metric("block-influence")]) == {Need.LENGTHS}
    redundant = {m.name for m in METRICS if m.direction == "redundant"}
    assert redundant == {"branch-similarity", "void-rate", "linear-cka"}
    assert [m.name for m in METRICS if m.lowest] == ["outlier-weight-count"]


def test_an_unknown_metric_says_what_there_is() -> None:
    with pytest.raises(PassError) as error:
        get_metric("vibes")
    assert str(error.value).startswith(
        "metric 'vibes' is unknown\n  choose one of block-influence, branch-similarity,"
    )


# -- depths ---------------------------------------------------------------------------------------------


def _stack(rows: int = 12) -> tuple[Program, Dataset, list[np.ndarray]]:
    """A stream of three sums, its data, and the float64 stream at each depth."""
    random = np.random.default_rng(7)
    names = ["x", *(f"f{i}" for i in range(LAYERS))]
    data = {n: random.normal(0.3, 1, (rows, TOKENS, WIDTH)).astype(np.float32) for n in names}
    stream = np.cumsum([data[n].astype(np.float64) for n in names], axis=0)
    return sums(("b", TOKENS, WIDTH), LAYERS), Dataset(data, {}, 5), list(stream)


def _collect(rows: int = 12, needs: frozenset[Need] = frozenset(Need), mask: np.ndarray | None = None):
    program, data, stream = _stack(rows)
    if mask is not None:
        data = Dataset(data.inputs, {"attention_mask": mask}, 5)
    statistics = collect(program, data, branches=probes(LAYERS), needs=needs, threads=1)
    return program, statistics, stream


def test_the_angular_matrix_is_its_definition() -> None:
    mask = (np.arange(TOKENS) < np.array([7, 3, 1, 5, 7, 7, 2, 6, 4, 7, 7, 1])[:, None]).astype(np.int64)
    _, statistics, stream = _collect(mask=mask)
    names, matrix = angular_matrix(statistics)
    assert names == ("b0", "b1", "b2", "end")
    last = mask.sum(1) - 1
    for first in range(4):
        for step in range(4 - first):
            angles = []
            for row, token in enumerate(last):
                a, b = stream[first][row, token], stream[first + step][row, token]
                angles.append(np.arccos(min(1.0, a @ b / np.linalg.norm(a) / np.linalg.norm(b))) / np.pi)
            assert matrix[first, step] == pytest.approx(np.mean(angles), abs=1e-6)
        assert np.isnan(matrix[first, 4 - first :]).all()


def _rows_at(statistics: Statistics, stream: list[np.ndarray]) -> np.ndarray:
    """Which flat tokens were sampled, found by their values at the first depth."""
    flat = stream[0].reshape(-1, WIDTH)
    rows = [int(np.abs(flat - v).max(axis=1).argmin()) for v in statistics.depths.tokens["b0"]]
    assert len(set(rows)) == len(rows)
    return np.array(rows)


def test_tokens_are_the_same_ones_at_every_depth() -> None:
    _, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    for depth, values in zip(("b0", "b1", "b2", "end"), stream, strict=True):
        assert statistics.depths.tokens[depth] == pytest.approx(values.reshape(-1, WIDTH)[rows], abs=1e-5)


def test_padding_is_never_sampled() -> None:
    mask = (np.arange(TOKENS) < 2).astype(np.int64)[None].repeat(12, 0)
    _, statistics, stream = _collect(mask=mask)
    assert (_rows_at(statistics, stream) % TOKENS < 2).all()


def test_entropy_increase_is_its_definition() -> None:
    program, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    a, b = (s.reshape(-1, WIDTH)[rows].astype(np.float32) for s in stream[1:3])
    low, high = float(min(a.min(), b.min())), float(max(a.max(), b.max()))

    def entropy(values: np.ndarray) -> float:
        counts = np.zeros(256)
        for v in values.reshape(-1):
            counts[min(255, int((float(v) - low) / (high - low) * 256))] += 1
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    assert scores(program, statistics, "entropy-increase")["b1"] == pytest.approx(
        entropy(b) - entropy(a), abs=0.02
    )


def test_linear_cka_is_its_definition() -> None:
    program, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    x, y = (s.reshape(-1, WIDTH)[rows] for s in stream[1:3])
    x, y = x - x.mean(0), y - y.mean(0)
    # the kernel form of the same number: <K, L> / (|K| |L|)
    k, m = x @ x.T, y @ y.T
    expected = (k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum())
    assert scores(program, statistics, "linear-cka")["b1"] == pytest.approx(expected, rel=1e-5)
    names, matrix = cka_matrix(statistics)
    assert matrix[names.index("b1"), names.index("b2")] == pytest.approx(expected, rel=1e-5)
    assert np.diag(matrix) == pytest.approx(1.0)


def test_direct_matching_is_the_residual_of_least_squares() -> None:
    program, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    x, y = (s.reshape(-1, WIDTH)[rows] for s in stream[1:3])
    wide = np.hstack([x, np.ones((len(x), 1))])
    solution, *_ = np.linalg.lstsq(wide, y, rcond=None)
    expected = np.square(wide @ solution - y).sum() / np.square(y - y.mean(0)).sum()
    assert scores(program, statistics, "direct-matching")["b1"] == pytest.approx(expected, rel=1e-3)


def test_the_fitted_map_is_the_one_that_made_the_data() -> None:
    random = np.random.default_rng(2)
    x, a, b = random.normal(size=(500, 5)), random.normal(size=(4, 5)), random.normal(size=4)
    found = fit(x, x @ a.T + b, ridge=1e-12)
    assert found.matrix == pytest.approx(a, abs=1e-8)
    assert found.offset == pytest.approx(b, abs=1e-8)
    assert found.residual == pytest.approx(0.0, abs=1e-12)
    assert found(x[:3]) == pytest.approx(x[:3] @ a.T + b)


def test_a_map_over_several_depths_and_an_unknown_one() -> None:
    _, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    found = fit_map(statistics, "b0", "end")
    x, y = (s.reshape(-1, WIDTH)[rows] for s in (stream[0], stream[3]))
    assert found.residual == pytest.approx(
        np.square(found(x) - y).sum() / np.square(y - y.mean(0)).sum(), rel=1e-4
    )
    with pytest.raises(DataError, match="depth 'b9' was not sampled\n  sampled are: b0, b1, b2, end"):
        fit_map(statistics, "b9", "end")


def test_representation_quality_is_the_entropy_of_the_token_gram() -> None:
    lengths = np.array([7, 3, 4, 5, 7, 7, 2, 6, 4, 7, 7, 1])
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    program, statistics, stream = _collect(rows=5, mask=mask[:5])
    entropies, turns = [], []
    for row in range(5):  # one batch: all five of its samples are looked at
        z = stream[1][row, : lengths[row]]
        p = np.linalg.eigvalsh(z @ z.T)
        p = p[p > 1e-12] / p.sum()
        entropies.append(-(p * np.log(p)).sum())
        steps = np.diff(z, axis=0)
        cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairwise(steps)]
        turns.append(np.mean(np.arccos(cosines)) / np.pi)
    assert scores(program, statistics, "representation-quality")["b1"] == pytest.approx(
        np.mean(entropies), rel=1e-5
    )
    assert statistics.depths.spectra["b1"].curvature == pytest.approx(np.mean(turns), rel=1e-5)


def test_lieq_adds_normalised_terms() -> None:
    _, statistics, stream = _collect()
    rows = _rows_at(statistics, stream)
    values = [s.reshape(-1, WIDTH)[rows] for s in stream]
    energies = [np.linalg.svd(v - v.mean(0), compute_uv=False) ** 2 for v in values]
    shares = [e / e.sum() for e in energies]
    ranks = [float(np.exp(-(p * np.log(p)).sum())) / WIDTH for p in shares[1:]]
    gains = [float(b[0] - a[0]) for a, b in pairwise(shares)]
    assert list(compactness(statistics).values()) == pytest.approx(ranks, rel=1e-5)
    assert list(energy_gain(statistics).values()) == pytest.approx(gains, rel=1e-3, abs=1e-6)
    damages = {"b0": 1.0, "b1": 3.0, "b2": 2.0}
    terms = [np.array(v) for v in (ranks, gains, [1.0, 3.0, 2.0])]
    expected = sum((t - t.min()) / np.ptp(t) for t in terms)
    assert list(lieq_diagnostics(statistics, damages).values()) == pytest.approx(expected, rel=1e-3)


def test_measured_metrics_read_what_was_measured() -> None:
    statistics = Statistics(4, damages={"a": 0.5}, skips={"a": {"b": 0.2, "end": 0.4}}, pairs={"a | b": -0.1})
    found = {n: scores(residual_program(), statistics, n) for n in ("output-kl", "skip-effect")}
    assert found == {"output-kl": {"a": 0.5}, "skip-effect": {"a": pytest.approx(0.3)}}
    assert scores(residual_program(), statistics, "hessian-interlayer") == {"a | b": -0.1}


@pytest.mark.parametrize("sign", [1, -1])
def test_residual_norm_risk_is_the_rank_correlation_with_the_losses(sign: int) -> None:
    from scipy.stats import spearmanr

    random = np.random.default_rng(4)
    lengths = random.normal(size=20).round(1)  # with ties
    losses = np.zeros(40)
    losses[::2] = sign * lengths + random.normal(size=20)
    rows = np.arange(0, 40, 2)
    statistics = Statistics(40, examples={"a": lengths}, example_rows=rows, losses=losses)
    risk = scores(residual_program(), statistics, "residual-norm-risk")["a"]
    assert risk == pytest.approx(spearmanr(lengths, losses[::2]).statistic)
    assert np.sign(risk) == sign
    riskiest = risky_examples(statistics, "a", 3)
    assert lengths[riskiest // 2].tolist() == pytest.approx(sorted(lengths, key=lambda v: -sign * v)[:3])
