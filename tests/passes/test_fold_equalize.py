"""EqualizeLayers: exact, even afterwards, and worth it to a quantizer with one scale a value."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from folding import check, ops, program, reasons

rng = np.random.default_rng(8)
UNEVEN = np.exp2(rng.integers(-5, 6, 8)).astype(np.float32)


def normal(*shape: int) -> np.ndarray:
    return rng.normal(0, 1, shape).astype(np.float32)


def images() -> list[dict[str, np.ndarray]]:
    return [{"x": normal(n, 3, 9, 9)} for n in (1, 2)]


def rows() -> list[dict[str, np.ndarray]]:
    return [{"x": normal(n, 6)} for n in (1, 4)]


def convolutions(between: str, second: str = "y = Conv(a, w2, b2)", w2: np.ndarray | None = None):
    weights = {"w1": normal(8, 3, 3, 3) * UNEVEN[:, None, None, None], "b1": normal(8) * UNEVEN}
    weights |= {
        "w2": normal(5, 8, 3, 3) if w2 is None else w2,
        "b2": normal(len(w2) if w2 is not None else 5),
    }
    body = f"c = Conv(x, w1, b1) {between} {second}"
    if "slope" in between:
        weights["slope"] = np.abs(normal(8, 1, 1))
    return program(f"g (float[N,3,9,9] x) => (float[N,d,h,k] y) {{ {body} }}", weights)


def matrices(body: str, **more: np.ndarray):
    weights = {"w1": normal(6, 8) * UNEVEN, "b1": normal(8) * UNEVEN, "w2": normal(8, 4), **more}
    return program(f"g (float[N,6] x) => (float[N,d] y) {{ {body} }}", weights)


CASES = {
    "relu": lambda: (convolutions("a = Relu(c)"), images()),
    "leaky": lambda: (convolutions("a = LeakyRelu <alpha=0.1> (c)"), images()),
    "prelu": lambda: (convolutions("a = PRelu(c, slope)"), images()),
    "nothing": lambda: (convolutions("a = Identity(c)"), images()),
    "pooled": lambda: (convolutions("r = Relu(c) a = MaxPool <kernel_shape=[2,2]> (r)"), images()),
    "depthwise": lambda: (
        convolutions("a = Relu(c)", "y = Conv <group=8> (a, w2, b2)", normal(8, 1, 3, 3)),
        images(),
    ),
    "gemm": lambda: (matrices("c = Gemm(x, w1, b1) a = Relu(c) y = Gemm(a, w2)"), rows()),
    "matmul": lambda: (matrices("m = MatMul(x, w1) c = Add(m, b1) a = Relu(c) y = MatMul(a, w2)"), rows()),
}


def reaches(target) -> tuple[np.ndarray, np.ndarray]:
    linear = [n for n in target.graph if n.op_type in ("Conv", "Gemm", "MatMul")]
    w1, w2 = (n.inputs[1].const_value.numpy() for n in linear)
    if w1.ndim == 2:
        return np.abs(w1).max(0), np.abs(w2).max(1)
    made = np.abs(w1).max((1, 2, 3))
    return made, np.abs(w2).max((0, 2, 3)) if w2.shape[1] > 1 else np.abs(w2).max((1, 2, 3))


@pytest.mark.parametrize("case", CASES)
def test_it_is_bit_equal_and_even(case):
    before, feeds = CASES[case]()
    after = check(before, "equalize_layers", feeds)
    assert ops(after) == ops(before)
    made, read = reaches(after)
    ratio = np.log2(made / read)
    assert np.abs(ratio).max() < 2
    assert np.abs(np.log2(np.divide(*reaches(before)))).max() > 4


def test_a_chain_ends_even_throughout():
    body = "c = Gemm(x, w1, b1) a = Relu(c) d = Gemm(a, w2) e = Relu(d) y = Gemm(e, w3)"
    before = matrices(body, w3=normal(4, 3) * np.float32([[1], [64], [1 / 64], [1]]))
    after = check(before, "equalize_layers", rows())

    def unevenness(target) -> list[float]:
        weights = [n.inputs[1].const_value.numpy() for n in target.graph if n.op_type == "Gemm"]
        pairs = [(np.abs(w).max(0), np.abs(v).max(1)) for w, v in itertools.pairwise(weights)]
        return [float(np.abs(np.log2(made / read)).max()) for made, read in pairs]

    assert max(unevenness(before)) > 4
    assert max(unevenness(after)) < 2
    assert len(unevenness(after)) == 2


def test_pairs_with_more_between_them_or_shared_weights_stay():
    gelu = matrices("c = Gemm(x, w1, b1) a = Sigmoid(c) y = Gemm(a, w2)")
    assert not any("folded" in n for n in check(gelu, "equalize_layers", rows()).graph.initializers)
    body = "c = Gemm(x, w1, b1) a = Relu(c) e = Gemm(a, w2) f = MatMul(x, w1) h = MatMul(f, w2) y = Add(e, h)"
    shared = matrices(body)
    assert "its weight or bias is shared" in reasons(shared, "equalize_layers")


def test_one_scale_for_the_value_between_loses_less():
    before, feeds = CASES["relu"]()
    after = check(before, "equalize_layers", feeds)

    def between(target) -> np.ndarray:
        from folding import run

        shown = target.clone()
        node = next(n for n in shown.graph if n.op_type == "Relu")
        shown.model.graph.outputs.append(node.outputs[0])
        return run(shown, feeds[1])[-1]

    def error(value: np.ndarray) -> np.ndarray:
        """Rounding error of each channel with one scale, relative to the channel's size."""
        step = value.max() / 255
        lost = np.abs(np.rint(value / step) * step - value).max((0, 2, 3))
        return lost / np.maximum(value.max((0, 2, 3)), 1e-9)

    assert error(between(after)).max() < 0.2 * error(between(before)).max()
