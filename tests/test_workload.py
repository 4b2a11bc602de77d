"""Workloads: how cases are written, where their arrays come from, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from interfaces import interface

from lamina.backends.backend import Case
from lamina.data import Dataset
from lamina.errors import BudgetError
from lamina.workload import parse_workload

TOKENS = interface(
    {"tokens": ("int64", ["batch", "seq"])},
    {"logits": ("float32", ["batch", "seq", 50])},
    example={"tokens": np.array([[3, 40, 7, 21]])},
)
IMAGES = interface({"x": ("float32", ["batch", 3, 4, 4])}, {"y": ("float32", ["batch", 10])})
FIXED = interface({"x": ("float32", [1, 3])}, {"y": ("float32", [1])})
BERT = interface(
    {"input_ids": ("int64", ["batch", "seq"]), "attention_mask": ("int64", ["batch", "seq"])},
    {"h": ("float32", ["batch", "seq", 8])},
)
CACHED = interface(
    {
        "input_ids": ("int64", ["batch", "seq"]),
        "attention_mask": ("int64", ["batch", "past + seq"]),
        "past_key": ("float32", ["batch", 2, "past", 4]),
    },
    {"logits": ("float32", ["batch", "seq", 9])},
)


def message(spec: Any, program: Any = TOKENS, dataset: Dataset | None = None) -> str:
    with pytest.raises(BudgetError) as caught:
        parse_workload(spec, program, dataset)
    return str(caught.value)


def shapes(spec: Any, program: Any = TOKENS, dataset: Dataset | None = None) -> list[Any]:
    cases = parse_workload(spec, program, dataset)
    return [(c.name, {k: v.shape for k, v in c.feeds.items()}, round(c.weight, 6)) for c in cases]


def test_sizes_in_order_with_weights() -> None:
    assert shapes("1x128@0.2; 1x1@0.8") == [
        ("1x128", {"tokens": (1, 128)}, 0.2),
        ("1x1", {"tokens": (1, 1)}, 0.8),
    ]


@pytest.mark.parametrize(
    "spec",
    ["batch=2,seq=8@3", "seq = 8, batch = 2", "2x8", "2X8@7", " 2 x 8 ;", "2\u00d78", ["2x8"], [("2x8", 5)]],
)
def test_one_case_written_in_many_ways(spec: Any) -> None:
    assert shapes(spec) == [("2x8", {"tokens": (2, 8)}, 1.0)]


def test_named_cases_and_equal_weights() -> None:
    assert shapes("prefill: 1x16; decode: batch=1,seq=1") == [
        ("prefill", {"tokens": (1, 16)}, 0.5),
        ("decode", {"tokens": (1, 1)}, 0.5),
    ]


def test_weights_are_normalized() -> None:
    cases = parse_workload("1x2@1;1x3@3", TOKENS)
    assert [c.weight for c in cases] == [0.25, 0.75]
    assert [c.weight for c in parse_workload([("1x2", 1), ("1x3", 3)], TOKENS)] == [0.25, 0.75]


def test_fixed_dims_are_not_counted() -> None:
    assert shapes("1@0.5;32@0.5", IMAGES) == [
        ("1", {"x": (1, 3, 4, 4)}, 0.5),
        ("32", {"x": (32, 3, 4, 4)}, 0.5),
    ]


def test_a_model_without_dynamic_dims_has_one_case() -> None:
    assert shapes(None, FIXED) == [("fixed", {"x": (1, 3)}, 1.0)]
    assert "every dim of this model is fixed" in message("1", FIXED)


def test_the_default_is_batch_one_shaped_like_data_or_example() -> None:
    assert shapes(None) == [("1x4", {"tokens": (1, 4)}, 1.0)]
    data = Dataset({"tokens": np.ones((6, 9), np.int64)}, {})
    assert shapes(None, TOKENS, data) == [("1x9", {"tokens": (1, 9)}, 1.0)]
    assert shapes(None, BERT) == [("1x8", {"input_ids": (1, 8), "attention_mask": (1, 8)}, 1.0)]


def test_feeds_are_rows_of_the_data_cropped_or_repeated() -> None:
    data = Dataset({"tokens": np.array([[1, 2, 3], [4, 5, 6]])}, {})
    long, short = parse_workload("3x5; 1x2", TOKENS, data)
    assert long.feeds["tokens"].tolist() == [[1, 2, 3, 1, 2], [4, 5, 6, 4, 5], [1, 2, 3, 1, 2]]
    assert short.feeds["tokens"].tolist() == [[1, 2]]
    assert long.feeds["tokens"].dtype == np.int64
    assert short.feeds["tokens"].flags["C_CONTIGUOUS"]


def test_feeds_without_data_are_drawn_like_the_example() -> None:
    (case,) = parse_workload("4x64", TOKENS)
    tokens = case.feeds["tokens"]
    assert (tokens.min() >= 3, tokens.max() <= 40, len(np.unique(tokens)) > 10) == (True, True, True)
    assert np.array_equal(parse_workload("4x64", TOKENS)[0].feeds["tokens"], tokens)
    (case,) = parse_workload("2x5", BERT)
    assert (case.feeds["attention_mask"] == 1).all()


def test_a_cache_dim_may_be_empty_and_sums_follow() -> None:
    assert shapes("batch=1,seq=4,past=0; batch=2,seq=1,past=7", CACHED) == [
        ("1x4x0", {"input_ids": (1, 4), "attention_mask": (1, 4), "past_key": (1, 2, 0, 4)}, 0.5),
        ("2x1x7", {"input_ids": (2, 1), "attention_mask": (2, 8), "past_key": (2, 2, 7, 4)}, 0.5),
    ]
    assert "the batch 'batch' cannot be 0" in message("0x4x0", CACHED)


def test_unnamed_dims_get_names() -> None:
    program = interface(
        {"x": ("float32", [None, 3, "?", None]), "y": ("float32", [None, 2])}, {"z": ("float32", [None])}
    )
    expected = [("2x8x9", {"x": (2, 3, 8, 9), "y": (2, 2)}, 1.0)]
    assert shapes("2x8x9", program) == expected
    assert shapes("batch=2,x.2=8,x.3=9", program) == expected


def test_arrays_are_fed_as_they_are() -> None:
    tokens = np.array([[1, 2, 3]])
    for spec in ([{"tokens": tokens}], {"tokens": tokens}, [({"tokens": tokens}, 2.0)]):
        (case,) = parse_workload(spec, TOKENS)
        assert case.feeds["tokens"].tolist() == [[1, 2, 3]]
        assert case.weight == 1.0
    given = Case("mine", {"tokens": tokens}, 3.0)
    cases = parse_workload([given, ("1x1", 1.0)], TOKENS)
    assert [(c.name, c.weight) for c in cases] == [("mine", 0.75), ("1x1", 0.25)]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("", "the workload is empty"),
        (";", "the workload is empty"),
        ([], "the workload is empty"),
        ("1", "1 size given, the model has 2 dynamic dims (batch, seq)"),
        ("1x2x3", "3 sizes given, the model has 2 dynamic dims (batch, seq)"),
        ("1xtwo", "the size of 'seq' must be a whole number, not 'two'"),
        ("1x-2", "the size of 'seq' must be a whole number, not '-2'"),
        ("1x1.5", "the size of 'seq' must be a whole number, not '1.5'"),
        ("0x5", "the batch 'batch' cannot be 0"),
        ("1x2@0", "the weight of a case must be a positive number, not '0'"),
        ("1x2@-1", "the weight of a case must be a positive number, not '-1'"),
        ("1x2@nan", "the weight of a case must be a positive number, not 'nan'"),
        ("1x2@inf", "the weight of a case must be a positive number, not 'inf'"),
        ("1x2@", "the weight of a case must be a positive number, not ''"),
        ("1x2@0.5;1x3", "case '1x3' has no weight, others have"),
        ("batch=1,length=3", "the model has no dynamic dim 'length', it has batch, seq"),
        ("batch=1", "no size is given for dim seq"),
        ("batch=1,batch=2", "dim 'batch' is given twice"),
        ("batch=1,5", "'5' is not dim=size"),
        (5, "a workload is text or a list, not int"),
        ([5], "int is not a case of a workload"),
        ([("1x2", 0)], "the weight of a case must be a positive number"),
        ([{"ids": np.ones((1, 2), np.int64)}], "the feeds are ids, the model takes tokens"),
        (
            [{"tokens": np.ones((1, 2), np.int32)}],
            "input 'tokens' expects int64 [batch, seq], got int32 [1, 2]",
        ),
        ([{"tokens": np.ones(2, np.int64)}], "got int64 [2]"),
    ],
)
def test_refusals(spec: Any, expected: str) -> None:
    assert expected in message(spec)


def test_fed_arrays_agree_on_dims() -> None:
    feeds = {"input_ids": np.ones((1, 4), np.int64), "attention_mask": np.ones((1, 3), np.int64)}
    assert "dim 'seq' is 4 in one input and 3 in 'attention_mask'" in message([feeds], BERT)


def test_a_refusal_shows_how_to_write_one() -> None:
    assert message("7") == (
        "1 size given, the model has 2 dynamic dims (batch, seq)\n"
        "  at workload '7'\n"
        "  write it like '1x128' or 'batch=1,seq=128', cases separated by ';', weights after '@'"
    )
