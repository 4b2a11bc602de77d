"""Rows in pieces for a library of fixed rows; needs no TVM."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from lamina.backends.tvm_batches import fixed_rows, run_in_pieces
from lamina.backends.tvm_import import prepare


def model(batch: object, out: object) -> ir.Model:
    text = f"""
    <ir_version: 8, opset_import: ["" : 18]>
    m (float[{batch}, 3] x) => (float[{out}, 3] y) {{ y = Relu (x) }}
    """
    return ir.from_onnx_text(text)


@pytest.mark.parametrize(
    ("batch", "out", "shapes", "rows"),
    [
        ("n", "n", {"x": (4, 3)}, 4),
        ("n", "n", {}, None),  # open: any number of rows fits already
        (4, 4, {}, None),  # the model itself takes four rows: they may belong together
        ("n", "m", {"x": (4, 3)}, None),  # the output's rows are not the input's
    ],
)
def test_rows_are_counted_only_where_the_model_takes_any_number(batch, out, shapes, rows):
    assert fixed_rows(prepare(model(batch, out), shapes, None)) == rows


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8])
def test_pieces_are_the_whole(count):
    seen = []

    def run(feeds):
        seen.append(feeds["x"].shape)
        return {"y": feeds["x"] * 2, "best": feeds["x"].argmax(axis=1)}

    x = np.random.default_rng(count).standard_normal((count, 5))
    found = run_in_pieces(run, {"x": x}, 4)
    np.testing.assert_array_equal(found["y"], 2 * x)
    np.testing.assert_array_equal(found["best"], x.argmax(axis=1))
    assert set(seen) == {(4, 5)}
