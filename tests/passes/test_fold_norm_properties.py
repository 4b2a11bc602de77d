"""Random residual networks through the normalization folds: whatever fires keeps the function."""

from __future__ import annotations

import numpy as np
import pytest
from encoders import WORDS, F, Weights, build, norm
from folding import run

from lamina.ir.program import Program
from lamina.passes.fold import fold

FORMS = (("fold_layernorm_mean",), ("fold_norm_affine",), ("fold_layernorm_mean", "fold_norm_affine"))
LENGTH = 5


class Network:
    """A stream that random writers write to and normalizations read; some break the rules of a fold."""

    def __init__(self, seed: int, root_mean_square: bool = False) -> None:
        self.root_mean_square = root_mean_square
        self.rng = np.random.default_rng(seed)
        self.width = int(self.rng.choice([3, 4, 8]))
        self.w = Weights(seed, self.width)
        self.w.update(half=F(0.5), back=np.array([-1, LENGTH, self.width]))
        self.text: list[str] = []
        self.values = ["a"]
        self.outputs: list[str] = []

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def write(self, name: str) -> str:
        """A writer to the stream: a table, a shared table, MatMul, Gemm, Conv or something nonlinear."""
        w, kind = self.w, self.rng.integers(0, 7)
        source = str(self.rng.choice(self.values)) if kind < 6 else "a"
        size = 4 if source == "a" else self.width
        weight = f"{name}_w" if self.chance(0.85) or size != self.width else "shared_w"
        if weight not in w:
            w.matrix(weight, size, self.width)
        w.vector(f"{name}_b", 0.3)
        w[f"flat{size}"] = np.array([-1, size])
        if kind == 0:
            w.matrix(f"{name}_t", WORDS, self.width)
            return f"{name} = Gather({name}_t, ids)"
        if kind == 1:
            w.setdefault("shared_t", self.rng.normal(0.3, 1, (WORDS, self.width)).astype(F))
            w.matrix(f"{name}_p", LENGTH, self.width)
            return f"{name}_g = Gather(shared_t, ids) {name} = Add({name}_g, {name}_p)"
        if kind == 2:
            flat = f"{name}_r = Reshape({source}, flat{size})"
            product = f"{name}_g = Gemm <alpha=0.5> ({name}_r, {weight}, {name}_b)"
            return f"{flat} {product} {name} = Reshape({name}_g, back)"
        if kind == 6:
            w[f"{name}_k"] = self.rng.normal(0.3, 1, (self.width, 4, 1)).astype(F)
            turned = (
                f"{name}_t = Transpose <perm=[0, 2, 1]> (a) {name}_c = Conv({name}_t, {name}_k, {name}_b)"
            )
            return f"{turned} {name} = Transpose <perm=[0, 2, 1]> ({name}_c)"
        product = f"{name}_m = MatMul({source}, {weight}) {name}_s = Add({name}_m, {name}_b)"
        last = self.rng.choice(["Neg", "Identity", "Tanh"], p=[0.45, 0.45, 0.1])
        return f"{product} {name}_h = Mul({name}_s, half) {name} = {last}({name}_h)"

    def norm(self, name: str, x: str) -> str:
        text = norm(self.w, name, x)
        if not self.root_mean_square:
            return text
        return text.replace("LayerNormalization", "RMSNormalization").replace(f", {name}_b", "")

    def read(self, i: int, x: str) -> None:
        """A normalization of the stream and one or two readers of it."""
        w, name = self.w, f"n{i}"
        self.text.append(self.norm(name, x))
        if self.chance(0.2):
            w[f"{name}_g"] = np.full(self.width, 1.3, F)
        if self.chance(0.2):
            w[f"{name}_b"] = np.zeros(self.width, F)
        for j in range(int(self.rng.integers(1, 3))):
            reader = f"r{i}{j}"
            weight = f"{reader}_w" if self.chance(0.9) else "shared_w"
            if weight not in w:
                w.matrix(weight, self.width, self.width)
            w.vector(f"{reader}_b", 0.1)
            bias = f"Add({reader}_m, {reader}_b)" if self.chance(0.8) else f"Abs({reader}_m)"
            self.text.append(
                f"{reader}_m = MatMul({name}, {weight}) {reader}_s = {bias} {reader} = Relu({reader}_s)"
            )
            self.values.append(reader)
        if self.chance(0.1):
            self.values.append(name)

    def program(self) -> Program:
        self.text.append(self.write("x0"))
        x = "x0"
        for i in range(int(self.rng.integers(1, 5))):
            self.read(i, x)
            self.text.append(self.write(f"y{i}"))
            body = f"y{i}" if self.chance(0.9) else f"n{i}"
            total = self.rng.choice([f"Add({x}, {body})", f"Sub(y{i}, {x})", f"Sum({x}, y{i}, y{i})"])
            self.text.append(f"x{i + 1} = {total}")
            x = f"x{i + 1}"
            if self.chance(0.06):
                self.outputs.append(x)
            if self.chance(0.06):
                self.text.append(f"z{i} = Mul({x}, n{i}_g)")
                x = f"z{i}"
        self.w.matrix("head", self.width, 3)
        self.text.append(self.norm("last", x) + " logits = MatMul(last, head)")
        more = "".join(f", float[N,{LENGTH},{self.width}] {name}" for name in self.outputs)
        inputs = f"int64[N,{LENGTH}] ids, float[N,{LENGTH},4] a"
        outputs = f"float[N,{LENGTH},3] logits{more}"
        opset = 23 if self.root_mean_square else 18
        return build(" ".join(self.text), self.w, inputs, outputs, opset)


def feed_of(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"ids": rng.integers(0, WORDS, (2, LENGTH)), "a": rng.normal(size=(2, LENGTH, 4)).astype(F)}


@pytest.mark.parametrize("block", range(4))
def test_random_networks_keep_their_function(block: int) -> None:
    fired = 0
    for seed in range(block * 12, block * 12 + 12):
        before = Network(seed).program()
        feed = feed_of(seed)
        expected = run(before, feed)
        for forms in FORMS:
            after, names, records = fold(before, forms=forms, only=())
            assert not [r for r in records if r.why.startswith("undone")]
            fired += bool(set(forms) & set(names))
            for want, got in zip(expected, run(after, feed), strict=True):
                assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), (seed, forms)
    assert fired >= 12


@pytest.mark.parametrize("block", range(4))
def test_random_networks_of_root_mean_squares_turn_or_stay(block: int) -> None:
    fired = 0
    for seed in range(block * 24, block * 24 + 24):
        before = Network(seed, root_mean_square=True).program()
        after, names, records = fold(before, forms=["rotate_fold"], only=())
        assert not [r for r in records if r.why.startswith("undone")]
        fired += "rotate_fold" in names
        for want, got in zip(run(before, feed_of(seed)), run(after, feed_of(seed)), strict=True):
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), seed
    assert 4 <= fired < 24
