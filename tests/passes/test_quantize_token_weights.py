"""Attention a token receives: against a direct computation, and as weights of rounding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from quantize_tools import program
from test_quantize_rounding import mlp, moves, normal, tokens

from lamina.data import Dataset
from lamina.errors import DataError
from lamina.passes.quantize.rounding import Rounding
from lamina.passes.quantize.token_weights import attention_received


def attention(r, x):
    axis = r.constant(np.array([1], np.int64), "axis")
    q = r.op("Unsqueeze", [x, axis])
    k = r.op("Transpose", [q], {"perm": [0, 1, 3, 2]})
    scores = r.op("Softmax", [r.op("MatMul", [q, k])], {"axis": -1}, name="softmax")
    y = r.op("Squeeze", [r.op("MatMul", [scores, q]), axis])
    return r.op("MatMul", [y, r.constant(normal(9, 32, 32), "w")], name="op")


def test_it_is_the_sum_of_the_column_stretched():
    prog, x = program(attention, ("b", "t", 32)), 0.2 * tokens(3, rows=10)
    found = attention_received(prog, Dataset({"x0": x}, {}, 4), least=0.1, threads=1)
    for row in range(10):
        scores = np.exp(x[row] @ x[row].T)
        column = (scores / scores.sum(axis=1, keepdims=True)).sum(axis=0)
        expected = 0.1 + 0.9 * (column - column.min()) / np.ptp(column)
        np.testing.assert_allclose(found[row], expected, atol=2e-3)


def test_padding_weighs_nothing_and_is_no_extreme():
    prog, x = program(attention, ("b", "t", 32)), 0.2 * tokens(3, rows=8)
    mask = np.ones((8, 6), np.int64)
    mask[:, 4:] = 0
    found = attention_received(prog, Dataset({"x0": x}, {"attention_mask": mask}, 4), threads=1)
    assert (found[:, 4:] == 0).all()
    np.testing.assert_allclose(found[:, :4].max(axis=1), 1)
    np.testing.assert_allclose(found[:, :4].min(axis=1), 0.05, atol=1e-6)


def test_a_model_without_attention_is_told_so():
    with pytest.raises(DataError, match="makes no attention maps"):
        attention_received(program(mlp, ("b", "t", 32)), Dataset({"x0": tokens(3)}, {}, 8), threads=1)


def test_weights_change_the_codes():
    prog, data = program(attention, ("b", "t", 32)), Dataset({"x0": 0.2 * tokens(3)}, {}, 8)
    weights = attention_received(prog, data, threads=1)
    weighed = replace(data, extras={"received": weights})
    how = Rounding(weights="received")
    first, second = (moves(prog, "stored-w2", d, how)[0].option.parameters for d in (data, weighed))
    assert first["codes"] != second["codes"]
