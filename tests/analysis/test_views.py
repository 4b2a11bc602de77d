"""InfoNCE between two halves of each sample, against its definition written out in float64."""

from __future__ import annotations

from math import exp, log

import numpy as np
import onnx_ir as ir
import pytest
from test_residual import probes, sums

from lamina.analysis.needs import Looks, Need
from lamina.analysis.redundancy import representation_invariance
from lamina.analysis.sampling import BatchView
from lamina.analysis.statistics import BranchProbe, Statistics, collect
from lamina.analysis.views import TEMPERATURE, info_nce
from lamina.data import Dataset

ROWS, TOKENS, WIDTH = 9, 7, 6


def _definition(first: list[np.ndarray], second: list[np.ndarray]) -> float:
    def one_way(queries: list[np.ndarray], keys: list[np.ndarray]) -> float:
        losses = []
        for i, q in enumerate(queries):
            cosines = [float(q @ k) / float(np.linalg.norm(q) * np.linalg.norm(k)) for k in keys]
            terms = [exp(c / 0.1) for c in cosines]
            losses.append(-log(terms[i] / sum(terms)))
        return float(np.mean(losses))

    return (one_way(first, second) + one_way(second, first)) / 2


def _collected(
    data: dict[str, np.ndarray], mask: np.ndarray | None = None, axis: int | None = None, **options: object
) -> Statistics:
    shape = ("b", *data["x"].shape[1:])
    extras = {} if mask is None else {"attention_mask": mask}
    program = sums(shape, len(data) - 1, "DOUBLE" if data["x"].dtype == np.float64 else "FLOAT")
    dataset = Dataset(data, extras, len(data["x"]))
    return collect(
        program,
        dataset,
        branches=probes(len(data) - 1, axis),
        needs={Need.VIEWS},
        threads=1,
        **options,  # type: ignore[arg-type]
    )


def _random(shape: tuple[int, ...], dtype: str = "float32") -> dict[str, np.ndarray]:
    random = np.random.default_rng(11)
    return {name: random.normal(0.2, 1, (ROWS, *shape)).astype(dtype) for name in ("x", "f0", "f1")}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_loss_is_its_definition_over_tokens_that_are_no_padding(dtype: str) -> None:
    data = _random((TOKENS, WIDTH), dtype)
    lengths = np.array([7, 3, 4, 5, 7, 2, 6, 1, 7])
    mask = (np.arange(TOKENS) < lengths[:, None]).astype(np.int64)
    found = _collected(data, mask)
    halves = BatchView(ROWS, 0, 0, 1, mask != 0, Looks()).halves(TOKENS)
    stream = np.cumsum([data[n].astype(np.float64) for n in ("x", "f0", "f1")], axis=0)
    for depth, values in zip(("b0", "b1", "end"), stream, strict=True):
        views = [
            [np.mean([values[r, t] for t in range(TOKENS) if halves[r, side, t] > 0], axis=0) for r in rows]
            for side, rows in ((s, [r for r in range(ROWS) if lengths[r] > 1]) for s in (0, 1))
        ]
        assert representation_invariance(found)[depth] == pytest.approx(_definition(*views), rel=1e-5)
        assert found.views[depth].samples == ROWS - 1


def test_halves_are_disjoint_even_random_and_never_padding() -> None:
    lengths = np.array([7, 3, 4, 5, 7, 2, 6, 1, 0])
    mask = np.arange(TOKENS) < lengths[:, None]
    halves = BatchView(ROWS, 0, 0, 1, mask, Looks()).halves(TOKENS)
    assert not halves[:7][~np.broadcast_to(mask[:7, None], (7, 2, TOKENS))].any()
    assert not (halves > 0).all(axis=1).any()
    assert (halves > 0).sum(axis=2)[:7].tolist() == [[n // 2, n - n // 2] for n in lengths[:7]]
    assert halves[:7].sum(axis=2) == pytest.approx(1.0)
    assert not halves[7:].any()
    assert not np.array_equal(halves[0] > 0, halves[4] > 0)  # two samples of seven tokens


def test_images_are_halved_by_positions() -> None:
    data = _random((WIDTH, 4, 2))
    found = _collected(data)
    halves = BatchView(ROWS, 0, 0, 1, None, Looks()).halves_of_images(8)
    x = (data["x"].astype(np.float64) + data["f0"]).reshape(ROWS, WIDTH, 8)
    views = [[x[r][:, halves[r, side] > 0].mean(axis=1) for r in range(ROWS)] for side in (0, 1)]
    assert found.views["b1"].loss == pytest.approx(_definition(*views), rel=1e-5)


def test_tokens_that_are_alike_within_a_sample_are_found_and_noise_is_not() -> None:
    random = np.random.default_rng(2)
    apart = np.repeat(np.eye(ROWS, 16, dtype=np.float32)[:, None], 32, axis=1)
    noise = random.normal(size=(ROWS, 32, 16)).astype(np.float32)
    found = _collected({"x": apart, "f0": noise * 100})
    assert found.views["b0"].loss == pytest.approx(log(1 + (ROWS - 1) * exp(-1 / TEMPERATURE)), rel=1e-4)
    assert found.views["end"].loss > 0.8 * log(ROWS)
    alike = np.ones((ROWS, 4), np.float32)
    assert info_nce(alike, alike) == pytest.approx(log(ROWS))


def test_only_so_many_samples_are_compared() -> None:
    assert _collected(_random((TOKENS, WIDTH)), looks=Looks(views=4)).views["end"].samples == 4
    assert _collected(_random((WIDTH, 4, 2)), looks=Looks(views=4)).views["end"].samples == 4


def test_a_sample_of_one_token_has_no_halves() -> None:
    assert _collected(_random((1, WIDTH))).views == {}


def test_samples_and_tokens_in_one_axis_are_told_apart() -> None:
    from residual_nets import Net

    from lamina.ir.program import Program

    net = Net()
    x = net.input("x", ["b", 4, WIDTH])
    flat = net.op("Reshape", x, net.ints(-1, WIDTH))
    y = net.op("Add", flat, net.op("Relu", flat))
    graph = ir.Graph(
        net.inputs, [y], nodes=net.nodes, initializers=net.initializers, opset_imports=net.domains
    )
    program = Program(ir.Model(graph, ir_version=10))
    data = np.random.default_rng(1).normal(size=(5, 4, WIDTH)).astype(np.float32)
    probe = BranchProbe("b", flat.name or "", None, y.name or "")
    found = collect(program, Dataset({"x": data}, {}, 5), branches=[probe], needs={Need.VIEWS}, threads=1)
    halves = BatchView(5, 0, 0, 1, None, Looks()).halves(4)
    views = [[data[r][halves[r, s] > 0].mean(axis=0, dtype=np.float64) for r in range(5)] for s in (0, 1)]
    assert found.views["b"].loss == pytest.approx(_definition(*views), rel=1e-5)
