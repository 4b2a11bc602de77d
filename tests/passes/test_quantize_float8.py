"""8-bit floats: nearest codes, scales that lose nothing, hard rows, and that nobody gets them unasked."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from quantize_tools import apply_quantize, bytes_of, program, relative_error, run, sites

from lamina.passes.quantize import FORMS, Quantize
from lamina.passes.quantize.float8 import quantize_float8, quantize_microscaled
from lamina.passes.quantize.weights import quantize_channels

rng = np.random.default_rng(8)
EIGHT = ("stored-f8", "stored-mxf8")


def error(rows: np.ndarray, made: np.ndarray) -> float:
    return float(np.linalg.norm(made - rows) / np.linalg.norm(rows))


def test_a_row_is_no_worse_than_with_its_largest_weight_at_the_top():
    rows = rng.standard_normal((32, 96)).astype(np.float32)
    codes, scale = quantize_float8(rows)
    assert codes.dtype == ml_dtypes.float8_e4m3fn
    made = codes.astype(np.float32) * scale[:, None]
    plain = np.abs(rows).max(axis=1, keepdims=True) / 448
    naive = (rows / plain).astype(codes.dtype).astype(np.float32) * plain
    better, worse = np.square(made - rows).sum(axis=1), np.square(naive - rows).sum(axis=1)
    assert (better <= worse).all()
    assert better.sum() < 0.97 * worse.sum()
    # every code is the nearest for its scale
    again = (rows / scale[:, None]).astype(codes.dtype)
    assert np.array_equal(again.view(np.uint8), codes.view(np.uint8))


@pytest.mark.parametrize("size", [1e-42, 1e-20, 1.0, 1e20, 1e38])
def test_any_magnitude_and_rows_of_zeros_are_kept(size):
    rows = (rng.uniform(0.5, 1, (4, 64)) * np.float32(size)).astype(np.float32)
    rows[1] = 0
    for codes, scale in (quantize_float8(rows), quantize_microscaled(rows, 32)):
        steps = scale.astype(np.float32)
        spread = np.repeat(steps.reshape(4, -1), 64 // steps.reshape(4, -1).shape[1], axis=1)
        made = codes.astype(np.float32) * spread
        assert np.isfinite(made).all()
        assert not made[1].any()
        if size >= 1e-20:
            assert error(rows[[0, 2, 3]] / size, made[[0, 2, 3]] / size) < 0.04


def test_powers_are_those_of_the_format_and_saturation_is_avoided_where_it_costs():
    rows = rng.standard_normal((64, 128)).astype(np.float32)
    codes, powers = quantize_microscaled(rows, 32)
    assert powers.dtype == ml_dtypes.float8_e8m0fnu
    assert powers.shape == (64, 4)
    blocks = rows.reshape(64, 4, 32)
    steps = powers.astype(np.float32)[:, :, None]
    made = codes.reshape(64, 4, 32).astype(np.float32) * steps
    lower = np.exp2(np.floor(np.log2(np.abs(blocks).max(axis=2, keepdims=True))) - 8)
    assert set(np.unique(steps / lower)) == {1.0, 2.0}
    scaled = np.clip(blocks / lower, -448, 448).astype(codes.dtype).astype(np.float32) * lower
    assert (np.square(made - blocks).sum(axis=2) <= np.square(scaled - blocks).sum(axis=2)).all()


def test_floats_beat_integers_on_rows_with_outliers_only():
    usual = rng.standard_normal((32, 256)).astype(np.float32)
    uneven = usual.copy()
    uneven[:, 7] *= 100

    def both(rows: np.ndarray) -> tuple[float, float]:
        codes, scale = quantize_float8(rows)
        whole = quantize_channels(rows, 0, clipping="minmax")
        small = np.delete(np.arange(256), 7)
        floats, integers = codes.astype(np.float32) * scale[:, None], whole.codes * whole.scale[:, None]
        return error(rows[:, small], floats[:, small]), error(rows[:, small], integers[:, small])

    floats, integers = both(usual)
    assert integers < 0.5 * floats
    floats, integers = both(uneven)
    assert floats < 0.2 * integers


def test_two_readers_of_a_weight_share_its_codes_and_the_file_shrinks():
    weight = rng.standard_normal((64, 96)).astype(np.float32)

    def graph(r, x):
        w = r.constant(weight, "w")
        first = r.op("MatMul", [x, w], name="one")
        return r.op("Add", [first, r.op("MatMul", [x, w], name="two")], name="sum")

    prog = program(graph, (5, 64))
    x = rng.standard_normal((5, 64)).astype(np.float32)
    for form in EIGHT:
        only = Quantize(forms=(form,))
        choices = {n: only.options(s, prog, None, None)[0] for n, s in sites(prog, only).items()}
        made = apply_quantize(prog, choices, only)
        kinds = [v.const_value.dtype for v in made.graph.initializers.values()]
        assert kinds.count(ir.DataType.FLOAT8E4M3FN) == 1
        assert 0 < relative_error(run(made, x), run(prog, x)) < 0.035
        assert bytes_of(made) < 0.33 * bytes_of(prog)


def test_nobody_gets_them_unasked():
    assert Quantize().forms == FORMS
    assert not set(FORMS) & set(EIGHT)
