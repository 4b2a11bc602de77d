from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from residual_nets import Net

from lamina.analysis.needs import Looks, Need
from lamina.analysis.statistics import BranchProbe, BranchStatistics, collect
from lamina.data import Dataset
from lamina.ir.program import Program


def sums(shape: tuple[int | str, ...], count: int = 1, dtype: str = "FLOAT") -> Program:
    """``x + f0``, then ``+ f1``, ...: every value is an input or a sum, so tests choose them freely."""
    net = Net()
    kind = ir.DataType[dtype]
    x = net.input("x", shape, kind)
    for i in range(count):
        x = net.op("Add", x, net.input(f"f{i}", shape, kind))
        x.name, x.shape, x.dtype = f"sum{i}", ir.Shape(shape), kind
    graph = ir.Graph(net.inputs, [x], nodes=net.nodes, opset_imports=net.domains)
    return Program(ir.Model(graph, ir_version=10))


def probes(count: int = 1, axis: int | None = None) -> list[BranchProbe]:
    skips = ["x", *(f"sum{i}" for i in range(count - 1))]
    return [BranchProbe(f"b{i}", skips[i], f"f{i}", f"sum{i}", axis) for i in range(count)]


def measured(
    data: dict[str, np.ndarray], batch_size: int = 8, **options: object
) -> dict[str, BranchStatistics]:
    shape = ("b", *next(iter(data.values())).shape[1:])
    count = len(data) - 1
    program = sums(shape, count, {"float32": "FLOAT", "float16": "FLOAT16"}[data["x"].dtype.name])
    options = {"branches": probes(count), "threads": 1, **options}
    return dict(collect(program, Dataset(data, {}, batch_size), **options).branches)  # type: ignore[arg-type]


def test_convolutional_branches_compare_channels_at_each_pixel() -> None:
    skip, body = np.random.default_rng(4).normal(size=(2, 3, 6, 4, 5)).astype(np.float32)
    stat = measured({"x": skip, "f0": body})["b0"]
    skip, body = skip.astype(float), body.astype(float)
    cosine = (
        (skip * (skip + body)).sum(1) / np.linalg.norm(skip, axis=1) / np.linalg.norm(skip + body, axis=1)
    )
    assert (stat.axis, stat.tokens) == (1, 3 * 4 * 5)
    assert stat.cosine == pytest.approx(cosine.mean(), rel=1e-5)
    assert stat.last_token_angle == pytest.approx(np.arccos(cosine).mean() / np.pi, rel=1e-5)


def test_large_images_are_looked_at_on_an_even_lattice() -> None:
    skip, body = np.random.default_rng(4).normal(size=(2, 3, 6, 32, 16)).astype(np.float32)
    stat = measured({"x": skip, "f0": body}, looks=Looks(pixels=8))["b0"]
    rows, columns = np.array([8, 24]), np.array([2, 6, 10, 14])
    skip, body = (a.astype(float)[:, :, rows][..., columns] for a in (skip, body))
    cosine = (
        (skip * (skip + body)).sum(1) / np.linalg.norm(skip, axis=1) / np.linalg.norm(skip + body, axis=1)
    )
    assert stat.tokens == 3 * 8
    assert stat.cosine == pytest.approx(cosine.mean(), rel=1e-5)


def test_zero_vectors_have_defined_angles() -> None:
    skip = np.array([[[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]]], np.float32)
    body = np.array([[[0.0, 0.0], [1.0, 0.0], [-3.0, -4.0]]], np.float32)
    stat = measured({"x": skip, "f0": body})["b0"]
    assert stat.cosine == pytest.approx(1 / 3)
    assert stat.relative_norm == 1.0


def test_a_tiny_branch_keeps_its_digits() -> None:
    random = np.random.default_rng(1)
    skip = random.normal(size=(4, 16, 64)).astype(np.float32)
    body = (random.normal(size=(4, 16, 64)) * 2.0**-9).astype(np.float32)
    stat = measured({"x": skip, "f0": body})["b0"]
    x, y = skip.astype(float), (skip + body).astype(float)
    change = 1 - (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert change.mean() < 3e-6  # a float32 cosine would have no digit of it right
    assert stat.influence == pytest.approx(change.mean(), rel=1e-2)


def test_a_huge_branch_turns_its_skip() -> None:
    random = np.random.default_rng(1)
    skip, body = random.normal(size=(2, 4, 16, 64)).astype(np.float32)
    stat = measured({"x": skip, "f0": body * 1000})["b0"]
    x, y = skip.astype(float), skip + body.astype(float) * 1000
    cosine = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert stat.cosine == pytest.approx(cosine.mean(), abs=1e-4)


def test_half_precision_lengths_do_not_overflow() -> None:
    skip = np.full((2, 3, 64), 300, np.float16)
    stat = measured({"x": skip, "f0": skip})["b0"]
    assert stat.relative_norm == pytest.approx(1.0)
    assert stat.cosine == pytest.approx(1.0)


def test_voids_are_short_lengthenings_of_their_token() -> None:
    random = np.random.default_rng(3)
    data = {name: random.normal(size=(9, 5, 8)).astype(np.float32) for name in ("x", "f0", "f1", "f2")}
    found = measured(data, batch_size=4)
    stream, lengths = data["x"].astype(float), []
    for i in range(3):
        after = stream + data[f"f{i}"]
        lengths.append(np.linalg.norm(after, axis=-1) - np.linalg.norm(stream, axis=-1))
        stream = after
    grown = np.stack(lengths)
    void = grown < 0.8 * (grown.max(0) - grown.min(0))
    assert [found[f"b{i}"].void for i in range(3)] == pytest.approx(void.mean(axis=(1, 2)))
    assert 0 < void.mean() < 1


def test_example_lengths_are_means_over_tokens_that_are_no_padding() -> None:
    random = np.random.default_rng(3)
    x, f = random.normal(size=(2, 9, 5, 8)).astype(np.float32)
    mask = (np.arange(5) < random.integers(1, 6, 9)[:, None]).astype(np.int64)
    data = Dataset({"x": x, "f0": f}, {"attention_mask": mask}, 4)
    program = sums(("b", 5, 8))
    found = collect(program, data, branches=probes(), needs={Need.EXAMPLES}, threads=1)
    lengths = np.linalg.norm(x.astype(float) + f, axis=-1)
    assert found.example_rows.tolist() == list(range(9))
    assert found.examples["b0"] == pytest.approx((lengths * mask).sum(1) / mask.sum(1), rel=1e-5)
    few = collect(program, data, branches=probes(), needs={Need.EXAMPLES}, looks=Looks(examples=4), threads=1)
    assert len(few.example_rows) == 3  # 1, 1 and 2 of batches of 4, 4 and 1
    assert few.examples["b0"] == pytest.approx(found.examples["b0"][few.example_rows])


def test_batches_of_which_nothing_is_needed_are_not_run() -> None:
    random = np.random.default_rng(3)
    images = {n: random.normal(size=(64, 3, 4, 4)).astype(np.float32) for n in ("x", "f0")}
    program = sums(("b", 3, 4, 4))
    options = {"branches": probes(), "threads": 1}
    found = collect(program, Dataset(images, {}, 4), **options)  # type: ignore[arg-type]
    assert (found.samples, found.branches["b0"].samples) == (8, 8)  # two batches of sixteen
    whole = collect(program, Dataset(images, {}, 4), ranges=["sum0"], **options)  # type: ignore[arg-type]
    assert (whole.samples, whole.branches["b0"]) == (64, found.branches["b0"])
