from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from lamina.analysis.divergence import DIVERGENCES, default_divergence, divergence, kl
from lamina.errors import DataError, PassError
from lamina.ir.program import Program

RNG = np.random.default_rng(9)


@pytest.mark.parametrize("shape", [(6, 10), (6, 4, 10)])
def test_kl_is_its_definition(shape: tuple[int, ...]) -> None:
    a, b = RNG.normal(0, 4, shape), RNG.normal(0, 4, shape)
    expected = rel_entr(softmax(a, -1), softmax(b, -1)).sum(-1).reshape(6, -1).mean(1)
    np.testing.assert_allclose(kl(a, b), expected, rtol=1e-12)


def test_kl_takes_probabilities_as_they_are() -> None:
    a, b = (softmax(RNG.normal(0, 2, (5, 7)), -1).astype(np.float32) for _ in range(2))
    expected = rel_entr(a.astype(np.float64), b.astype(np.float64)).sum(-1)
    np.testing.assert_allclose(kl(a, b), expected, rtol=1e-9)


def test_kl_takes_log_probabilities_as_logits() -> None:
    a, b = RNG.normal(0, 2, (5, 7)), RNG.normal(0, 2, (5, 7))
    np.testing.assert_allclose(kl(log_softmax(a, -1), log_softmax(b, -1)), kl(a, b), rtol=1e-12)


def test_kl_is_stable_for_huge_and_masked_logits() -> None:
    a = np.array([[1e4, 0.0, -1e4], [0.0, -np.inf, 1.0]], dtype=np.float32)
    b = np.array([[1e4, 0.0, -1e4], [0.0, 5.0, 1.0]], dtype=np.float32)
    found = kl(a, b)
    assert found[0] == 0
    assert np.isfinite(found[1])
    assert found[1] == pytest.approx(rel_entr(softmax(a[1]), softmax(b[1])).sum(), rel=1e-5)


def test_a_class_lost_altogether_is_infinitely_far() -> None:
    assert kl(np.array([[0.5, 0.5]]), np.array([[1.0, 0.0]]))[0] == np.inf


def test_cosine_and_relative_l2_are_their_definitions() -> None:
    a, b = RNG.normal(size=(4, 3, 5)), RNG.normal(size=(4, 3, 5))
    flat_a, flat_b = a.reshape(4, -1), b.reshape(4, -1)
    norm = np.linalg.norm
    cosines = [x @ y / norm(x) / norm(y) for x, y in zip(flat_a, flat_b, strict=True)]
    np.testing.assert_allclose(divergence({"y": a}, {"y": b}, "cosine"), 1 - np.array(cosines), rtol=1e-12)
    ratios = [norm(x - y) ** 2 / norm(x) ** 2 for x, y in zip(flat_a, flat_b, strict=True)]
    np.testing.assert_allclose(divergence({"y": a}, {"y": b}, "relative-l2"), ratios, rtol=1e-12)


@pytest.mark.parametrize("kind", [name for name, _ in DIVERGENCES])
def test_equal_outputs_are_exactly_zero_apart(kind: str) -> None:
    a = RNG.normal(size=(4, 9)).astype(np.float32)
    assert (divergence({"y": a}, {"y": a.copy()}, kind) == 0).all()


@pytest.mark.parametrize("kind", [name for name, _ in DIVERGENCES])
def test_samples_are_judged_apart(kind: str) -> None:
    a = RNG.normal(size=(3, 9))
    b = a.copy()
    b[1] = RNG.normal(size=9)
    assert [bool(d > 0) for d in divergence({"y": a}, {"y": b}, kind)] == [False, True, False]


def test_zero_outputs_have_defined_distances() -> None:
    zero, one = np.zeros((1, 3)), np.ones((1, 3))
    assert divergence({"y": zero}, {"y": zero}, "relative-l2")[0] == 0
    assert divergence({"y": zero}, {"y": one}, "relative-l2")[0] == np.inf
    assert divergence({"y": zero}, {"y": one}, "cosine")[0] == 1


def test_several_outputs_are_averaged_and_integers_left_out() -> None:
    a, b = RNG.normal(size=(4, 9)), RNG.normal(size=(4, 9))
    both = divergence(
        {"p": a, "q": a, "i": np.ones(4, int)}, {"p": b, "q": a, "i": np.zeros(4, int)}, "cosine"
    )
    np.testing.assert_allclose(both, divergence({"p": a}, {"p": b}, "cosine") / 2)


def test_misfits_say_so() -> None:
    a = np.ones((2, 3))
    with pytest.raises(
        PassError, match="divergence 'mse' is unknown\n  choose one of kl, cosine, relative-l2"
    ):
        divergence({"y": a}, {"y": a}, "mse")
    with pytest.raises(DataError, match="the candidate has no output 'y'"):
        divergence({"y": a}, {}, "kl")
    with pytest.raises(DataError, match=r"output 'y' has shape \[2, 1\], the original's has \[2, 3\]"):
        divergence({"y": a}, {"y": a[:, :1]}, "kl")


@pytest.mark.parametrize(
    ("op", "output", "shape", "expected"),
    [
        ("Relu", "logits", ["b", "t", 9], "kl"),
        ("Relu", "class_scores", ["b", 9], "kl"),
        ("Softmax", "y", ["b", 9], "kl"),
        ("Relu", "y", ["b", 9], "relative-l2"),
        ("Relu", "last_hidden_state", ["b", "t", 9], "relative-l2"),
    ],
)
def test_the_default_follows_the_output(op: str, output: str, shape: list[object], expected: str) -> None:
    x = ir.Value(name="x", shape=ir.Shape(shape))  # type: ignore[arg-type]
    node = ir.node(op, [x], name="n")
    y = node.outputs[0]
    y.name, y.shape, y.dtype, x.dtype = output, x.shape, ir.DataType.FLOAT, ir.DataType.FLOAT
    graph = ir.Graph([x], [y], nodes=[node], opset_imports={"": 18})
    assert default_divergence(Program(ir.Model(graph, ir_version=10))) == expected
