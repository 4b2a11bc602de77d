"""Small transformer encoders written as ONNX text, with random weights, for tests of exact passes."""

from __future__ import annotations

import re

import numpy as np
from folding import program

from lamina.ir.program import Program

F = np.float32
WORDS = 11


class Weights(dict[str, np.ndarray]):
    """Random weights by name, drawn when first asked for."""

    def __init__(self, seed: int, width: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.width = width

    def matrix(self, name: str, *shape: int) -> str:
        """A weight of this shape, with a mean that is not zero."""
        self[name] = (self.rng.normal(0.3, 1, shape) / np.sqrt(shape[0])).astype(F)
        return name

    def vector(self, name: str, mean: float, size: int | None = None) -> str:
        """A gain or bias."""
        self[name] = self.rng.normal(mean, 0.5, size or self.width).astype(F)
        return name


def norm(w: Weights, name: str, x: str) -> str:
    """A layer normalization of ``x``, called ``name``."""
    gain, bias = w.vector(f"{name}_g", 1), w.vector(f"{name}_b", 0)
    return f"{name} = LayerNormalization <epsilon=1e-5> ({x}, {gain}, {bias})"


def linear(w: Weights, name: str, x: str, width_in: int, width: int) -> str:
    """MatMul and Add."""
    weight, bias = w.matrix(f"{name}_w", width_in, width), w.vector(f"{name}_bias", 0.2, width)
    return f"{name}_m = MatMul({x}, {weight}) {name} = Add({name}_m, {bias})"


def layer(w: Weights, i: int, x: str) -> tuple[str, str]:
    """One pre-norm layer: attention with one head, then an MLP; its text and its result."""
    d = w.width
    text = [
        norm(w, f"n{i}", x),
        *(linear(w, f"{p}{i}", f"n{i}", d, d) for p in "qkv"),
        f"kt{i} = Transpose <perm=[0, 2, 1]> (k{i}) sc{i} = MatMul(q{i}, kt{i})",
        f"sm{i} = Softmax <axis=-1> (sc{i}) c{i} = MatMul(sm{i}, v{i})",
        linear(w, f"o{i}", f"c{i}", d, d),
        f"h{i} = Add({x}, o{i})",
        norm(w, f"nn{i}", f"h{i}"),
        linear(w, f"up{i}", f"nn{i}", d, 2 * d),
        f"act{i} = Relu(up{i})",
        linear(w, f"down{i}", f"act{i}", 2 * d, d),
        f"x{i + 1} = Add(down{i}, h{i})",
    ]
    return " ".join(text), f"x{i + 1}"


def embedding(w: Weights) -> str:
    """Token and position tables: ids [N, T] to x0 [N, T, width]."""
    w.matrix("table", WORDS, w.width)
    w.matrix("positions", 16, w.width)
    w.update(zero=np.array([0]), one=np.array([1]), big=np.array([2]), axis0=np.array([0]))
    return (
        "e = Gather(table, ids) shape = Shape(ids) t = Slice(shape, one, big, axis0)"
        " p = Slice(positions, zero, t, axis0) x0 = Add(e, p)"
    )


def encoder(
    depth: int, width: int, seed: int = 0, *, tail: str = "", head: str | None = None
) -> tuple[str, Weights]:
    """The text and weights of a pre-norm encoder: ids to logits; ``tail`` follows the last layer."""
    w = Weights(seed, width)
    text, x = [embedding(w)], "x0"
    for i in range(depth):
        body, x = layer(w, i, x)
        text.append(body)
    text.append(norm(w, "final", x))
    text.append(head or linear(w, "logits", "final", width, WORDS))
    return " ".join([*text, tail]), w


def build(
    text: str,
    weights: dict[str, np.ndarray],
    inputs: str = "int64[N,T] ids",
    outputs: str = f"float[N,T,{WORDS}] logits",
    opset: int = 18,
) -> Program:
    """A program of ``text`` with those of ``weights`` it reads."""
    used = {k: np.asarray(v) for k, v in weights.items() if re.search(rf"\b{k}\b", text)}
    return program(f"g ({inputs}) => ({outputs}) {{ {text} }}", used, opset)


def ids(*shapes: tuple[int, int]) -> list[dict[str, np.ndarray]]:
    """Inputs of :func:`encoder`."""
    return [{"ids": np.random.default_rng(n + t).integers(0, WORDS, (n, t))} for n, t in shapes]
