"""FuseGelu: every spelling of both forms, and nothing else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from folding import check, ops, program, reasons

ERF = {
    "div, half last": "b = Div(x, r2) e = Erf(b) f = Add(e, one) g = Mul(half, f) y = Mul(x, g)",
    "mul, half first": "b = Mul(x, rr2) e = Erf(b) f = Add(one, e) h = Mul(x, half) y = Mul(h, f)",
    "gate times x first": "b = Mul(rr2, x) e = Erf(b) f = Add(e, one) g = Mul(f, x) y = Mul(g, half)",
    "halved by division": "b = Div(x, r2) e = Erf(b) f = Add(e, one) g = Mul(x, f) y = Div(g, two)",
    "x halved by division": "b = Div(x, r2) e = Erf(b) f = Add(e, one) h = Div(x, two) y = Mul(f, h)",
}
TANH = {
    "pow": "p = Pow(x, three) k = Mul(c3, p) s = Add(x, k) t = Mul(cc, s)"
    " e = Tanh(t) f = Add(e, one) g = Mul(half, f) y = Mul(x, g)",
    "x * x * x": "q = Mul(x, x) p = Mul(q, x) k = Mul(p, c3) s = Add(k, x) t = Mul(s, cc)"
    " e = Tanh(t) f = Add(one, e) h = Mul(half, x) y = Mul(h, f)",
    "factored": "q = Mul(x, x) k = Mul(q, c3) u = Add(one, k) v = Mul(x, cc) t = Mul(v, u)"
    " e = Tanh(t) f = Add(e, one) h = Mul(x, half) y = Mul(h, f)",
}
CONSTANTS = {
    "r2": np.float32(2**0.5),
    "rr2": np.float32(0.5**0.5),
    "one": np.float32(1),
    "half": np.float32(0.5),
    "two": np.float32(2),
    "three": np.float32(3),
    "c3": np.float32(0.044715),
    "cc": np.float32((2 / np.pi) ** 0.5),
}


def gelu(body: str, dtype: str = "float", **constants: object) -> object:
    merged = {**CONSTANTS, **constants}
    numbers = {k: np.asarray(v) for k, v in merged.items() if k in re.findall(r"\w+", body)}
    if dtype == "double":
        numbers = {k: v.astype(np.float64) for k, v in numbers.items()}
    return program(f"g ({dtype}[N,5,7] a) => ({dtype}[N,5,7] z) {{ x = Neg(a) {body} z = Neg(y) }}", numbers)


def feeds() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [{"a": rng.normal(0, 2, (n, 5, 7)).astype(np.float32)} for n in (1, 3)]


@pytest.mark.parametrize("body", ERF.values(), ids=ERF.keys())
def test_erf_forms_become_gelu(body: str) -> None:
    after = check(gelu(body), "fuse_gelu", feeds(), limit=8)
    assert ops(after) == {"Neg": 2, "Gelu": 1}
    node = next(n for n in after.graph if n.op_type == "Gelu")
    assert node.attributes["approximate"].value == "none"
    assert (node.name, node.outputs[0].name) == ("node_y", "y")
    assert after.opset == 20


@pytest.mark.parametrize("body", TANH.values(), ids=TANH.keys())
def test_tanh_forms_become_gelu(body: str) -> None:
    after = check(gelu(body), "fuse_gelu", feeds(), limit=8)
    assert ops(after) == {"Neg": 2, "Gelu": 1}
    assert next(n for n in after.graph if n.op_type == "Gelu").attributes["approximate"].value == "tanh"


def test_result_as_interface_output_keeps_its_name() -> None:
    body = ERF["div, half last"]
    numbers = {k: np.asarray(CONSTANTS[k]) for k in ("r2", "one", "half")}
    before = program(f"g (float[N,4] x) => (float[N,4] y) {{ {body} }}", numbers)
    rng = np.random.default_rng(1)
    after = check(before, "fuse_gelu", [{"x": rng.normal(size=(2, 4)).astype(np.float32)}], limit=8)
    assert ops(after) == {"Gelu": 1}


@pytest.mark.parametrize(
    ("constants", "body"),
    [
        ({"r2": np.float32(1.5)}, ERF["div, half last"]),
        ({"c3": np.float32(0.0447)}, TANH["pow"]),
        ({"three": np.float32(2)}, TANH["pow"]),
    ],
)
def test_other_constants_are_another_function(constants: dict[str, object], body: str) -> None:
    before = gelu(body, **constants)
    assert reasons(before, "fuse_gelu") == ["its argument is not the one of GELU"]
    after = check(before, "fuse_gelu", feeds())
    assert after.opset == 18


def test_another_factor_is_refused() -> None:
    before = gelu(ERF["div, half last"], half=np.float32(0.25))
    assert reasons(before, "fuse_gelu") == ["1 + its output is read elsewhere, or is not multiplied to x / 2"]
    assert ops(check(before, "fuse_gelu", feeds()))["Gelu"] == 0


def test_a_vector_constant_is_refused() -> None:
    before = gelu(ERF["div, half last"], half=np.full(7, 0.5, np.float32))
    assert ops(check(before, "fuse_gelu", feeds()))["Gelu"] == 0


def test_a_gate_read_elsewhere_is_refused() -> None:
    body = "b = Div(x, r2) e = Erf(b) f = Add(e, one) g = Mul(half, f) w = Mul(x, g) y = Add(w, f)"
    assert ops(check(gelu(body), "fuse_gelu", feeds()))["Gelu"] == 0


def test_an_argument_read_elsewhere_stays() -> None:
    body = "b = Div(x, r2) e = Erf(b) f = Add(e, one) g = Mul(half, f) w = Mul(x, g) y = Add(w, b)"
    assert ops(check(gelu(body), "fuse_gelu", feeds(), limit=8)) == {"Neg": 2, "Gelu": 1, "Div": 1, "Add": 1}


def test_double_is_refused() -> None:
    before = gelu(ERF["div, half last"], "double")
    assert reasons(before, "fuse_gelu") == ["it is not known to be float32"]
