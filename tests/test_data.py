"""Data: every kind of source, what does not fit, pairs, padding, splits, made-up samples."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interfaces import interface
from reference import models_dir, needs_reference, sets_dir

from lamina.data import Dataset, Splits, load_data, load_splits, overlap, split, synthetic
from lamina.errors import DataError
from lamina.ir.program import Program

RNG = np.random.default_rng(0)
IMAGES = interface({"x": ("float32", ["batch", 3, 4, 4])}, {"logits": ("float32", ["batch", 10])})
TOKENS = interface({"tokens": ("int64", ["batch", "seq"])}, {"logits": ("float32", ["batch", "seq", 50])})
BERT = interface(
    {
        "input_ids": ("int64", ["batch", "seq"]),
        "attention_mask": ("int64", ["batch", "seq"]),
        "token_type_ids": ("int64", ["batch", "seq"]),
    },
    {"last_hidden_state": ("float32", ["batch", "seq", 8])},
)
TWO = interface(
    {"a": ("float32", ["batch", 2]), "b": ("float32", ["batch", 3])}, {"y": ("float32", ["batch", 1])}
)


def images(n: int = 10) -> np.ndarray:
    return RNG.standard_normal((n, 3, 4, 4)).astype(np.float32)


def message(source: Any, program: Program, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        load_data(source, program, **options)
    return str(caught.value)


# ---- Dataset ---------------------------------------------------------------------------------------


def test_batches_are_consecutive_and_complete() -> None:
    data = Dataset({"x": np.arange(10)}, {"labels": np.arange(10) * 2}, batch_size=4)
    batches = list(data.batches())
    assert [len(b) for b in batches] == [4, 4, 2]
    assert np.concatenate([b.inputs["x"] for b in batches]).tolist() == list(range(10))
    assert np.concatenate([b.extras["labels"] for b in batches]).tolist() == list(range(0, 20, 2))


@pytest.mark.parametrize(
    "index", [slice(1, 3), np.array([1, 2]), [1, 2], np.array([False, True, True, False, False])]
)
def test_groups_stay_together(index: Any) -> None:
    data = Dataset({"x": np.arange(10)}, {"score": np.arange(5)}, batch_size=4, group=2)
    assert (len(data), data.samples) == (10, 5)
    part = data.rows(index)
    assert part.inputs["x"].tolist() == [2, 3, 4, 5]
    assert part.extras["score"].tolist() == [1, 2]
    assert part.group == 2


def test_a_number_selects_one_sample() -> None:
    data = Dataset({"x": np.arange(10)}, {"score": np.arange(5)}, group=2)
    part = data.rows(3)
    assert (part.inputs["x"].tolist(), part.extras["score"].tolist()) == ([6, 7], [3])


@pytest.mark.parametrize(("batch_size", "expected"), [(4, [4, 4, 2]), (5, [4, 4, 2]), (1, [2] * 5)])
def test_batches_hold_whole_groups(batch_size: int, expected: list[int]) -> None:
    data = Dataset({"x": np.arange(10)}, {"score": np.arange(5)}, batch_size=batch_size, group=2)
    assert [len(b) for b in data.batches()] == expected
    assert all(len(b.extras["score"]) * 2 == len(b) for b in data.batches())


def test_an_input_without_a_batch_axis_is_fed_to_every_run() -> None:
    data = Dataset({"rate": np.array(16000), "x": np.arange(5)}, {}, batch_size=2, layout={"rate": 0})
    assert [int(b.inputs["rate"]) for b in data.batches()] == [16000] * 3
    assert data.rows(slice(0, 2)).samples == 2


def test_a_fixed_batch_is_always_full() -> None:
    data = Dataset({"x": np.arange(10)}, {}, batch_size=32, fixed_batch=4)
    assert [len(b) for b in data.batches()] == [4, 4]


def test_splits_are_never_empty() -> None:
    full, empty = Dataset({"x": np.arange(2)}, {}), Dataset({"x": np.arange(0)}, {})
    with pytest.raises(DataError, match="no samples are left for selection"):
        Splits(full, empty, full)


# ---- sources ---------------------------------------------------------------------------------------


def test_npz_file(tmp_path: Path) -> None:
    x, labels = images(), np.arange(10)
    np.savez(tmp_path / "d.npz", x=x, labels=labels, label_names=np.array(["cat", "dog"]))
    data = load_data(tmp_path / "d.npz", IMAGES)
    assert np.array_equal(data.inputs["x"], x)
    assert list(data.extras) == ["labels"], "a legend that is not one entry a sample is left out"


def test_npz_folder_is_concatenated_in_order(tmp_path: Path) -> None:
    for i in range(3):
        np.savez(tmp_path / f"part{i}.npz", x=np.full((2, 3, 4, 4), i, np.float32), labels=np.full(2, i))
    data = load_data(str(tmp_path), IMAGES)
    assert data.extras["labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert data.inputs["x"][:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_npy_array_and_bare_array(tmp_path: Path) -> None:
    x = images()
    np.save(tmp_path / "x.npy", x)
    assert np.array_equal(load_data(tmp_path / "x.npy", IMAGES).inputs["x"], x)
    assert np.array_equal(load_data(x, IMAGES).inputs["x"], x)


def batch_dicts() -> Iterator[dict[str, np.ndarray]]:
    for i in range(3):
        yield {"x": images(2), "labels": np.full(2, i)}


def sample_pairs() -> Iterator[tuple[np.ndarray, int]]:
    for i in range(6):
        yield images(1)[0], i // 2


@pytest.mark.parametrize(
    "source",
    [
        lambda: {"x": images(6), "labels": [0, 0, 1, 1, 2, 2]},
        lambda: (images(6), np.array([0, 0, 1, 1, 2, 2])),
        lambda: [(images(2), np.full(2, i)) for i in range(3)],
        lambda: [[images(2), np.full(2, i)] for i in range(3)],
        lambda: [({"x": images(2)}, np.full(2, i)) for i in range(3)],
        lambda: [({"x": images(2)}, {"labels": np.full(2, i)}) for i in range(3)],
        batch_dicts,
        sample_pairs,
        lambda: list(sample_pairs()),
        lambda: [{"x": images(1)[0], "labels": i // 2} for i in range(6)],
    ],
)
def test_labelled_sources_agree(source: Any) -> None:
    data = load_data(source(), IMAGES)
    assert data.inputs["x"].shape == (6, 3, 4, 4)
    assert data.extras["labels"].tolist() == [0, 0, 1, 1, 2, 2]


def test_several_inputs_by_position() -> None:
    a, b = np.ones((4, 2), np.float32), np.zeros((4, 3), np.float32)
    for source in ((a, b), [(a, b)], [((a, b), np.arange(4))], [(a, b, np.arange(4))]):
        data = load_data(source, TWO)
        assert np.array_equal(data.inputs["a"], a)
        assert np.array_equal(data.inputs["b"], b)
    assert data.extras["labels"].tolist() == [0, 1, 2, 3]


def test_lists_of_numbers_are_samples() -> None:
    assert load_data([[1, 2, 3], [4, 5, 6]], TOKENS).inputs["tokens"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_tensors_and_loaders() -> None:
    torch = pytest.importorskip("torch")
    x, y = torch.randn(6, 3, 4, 4, requires_grad=True), torch.arange(6)
    assert load_data(x, IMAGES).inputs["x"].dtype == np.float32
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x.detach(), y), batch_size=4)
    data = load_data(loader, IMAGES)
    assert np.array_equal(data.inputs["x"], x.detach().numpy())
    assert data.extras["labels"].tolist() == list(range(6))
    half = torch.full((1, 3, 4, 4), 0.5, dtype=torch.bfloat16)
    assert load_data([half], IMAGES).inputs["x"].max() == 0.5


def test_a_dataset_is_itself_when_it_fits() -> None:
    data = load_data(images(), IMAGES)
    assert load_data(data, IMAGES) is data
    assert "lacks the input tokens" in message(data, TOKENS)
    assert "float64" in message(Dataset({"x": images().astype(np.float64)}, {}), IMAGES)
    assert "NaN" in message(Dataset({"x": images() * np.nan}, {}), IMAGES)


# ---- refusals --------------------------------------------------------------------------------------


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    assert "no such data file" in message(tmp_path / "none.npz", IMAGES)
    (tmp_path / "text.npz").write_text("hello")
    assert "not an .npz, or damaged" in message(tmp_path / "text.npz", IMAGES)
    np.savez(tmp_path / "d.npz", x=images())
    raw = (tmp_path / "d.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(raw[: len(raw) // 2])
    assert "not an .npz, or damaged" in message(tmp_path / "cut.npz", IMAGES)
    flipped = bytearray(raw)
    flipped[len(raw) // 2] ^= 255
    (tmp_path / "bad.npz").write_bytes(bytes(flipped))
    assert "array 'x'" in message(tmp_path / "bad.npz", IMAGES)
    (tmp_path / "empty.npz").write_bytes(b"")
    assert "not an .npz, or damaged" in message(tmp_path / "empty.npz", IMAGES)
    (tmp_path / "folder").mkdir()
    assert "holds no .npz file" in message(tmp_path / "folder", IMAGES)
    np.savez(tmp_path / "nothing.npz")
    assert "holds no arrays" in message(tmp_path / "nothing.npz", IMAGES)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", x=np.array([{"a": 1}], dtype=object))
    text = message(tmp_path / "p.npz", IMAGES)
    assert "pickled Python objects" in text
    assert "array 'x'" in text


def test_names_that_do_not_fit() -> None:
    with pytest.raises(DataError) as caught:
        load_data({"images": images(), "labels": np.arange(10)}, IMAGES)
    assert str(caught.value) == (
        "the data lacks the input x\n"
        "  at data, which has images, labels\n"
        "  name the arrays like the inputs: x"
    )
    text = message({"input_id": np.ones((2, 3), np.int64), "attention_mask": np.ones((2, 3), np.int64)}, BERT)
    assert "lacks the inputs input_ids, token_type_ids" in text
    assert "rename 'input_id' to 'input_ids'" in text
    assert "add 'token_type_ids' as zeros" in text


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "transpose(0, 3, 1, 2)"),
        (np.zeros((2, 3, 5, 4), np.float32), "input 'x' expects [batch, 3, 4, 4], got [2, 3, 5, 4]"),
        (np.zeros((3, 4, 4), np.float32), "add the batch axis"),
        (np.zeros((2, 48), np.float32), "give 4 dims"),
        (np.zeros((0, 3, 4, 4), np.float32), "the data is empty"),
        (np.zeros((2, 3, 4, 4)), "input 'x' is float64, the model expects float32"),
        (np.zeros((2, 3, 4, 4), np.complex64), "input 'x' is complex64"),
        (np.full((2, 3, 4, 4), "a"), "the model expects float32"),
    ],
)
def test_shapes_and_dtypes_that_do_not_fit(array: np.ndarray, expected: str) -> None:
    assert expected in message({"x": array}, IMAGES)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.float16, np.bool_])
def test_lossless_casts_are_made(dtype: Any) -> None:
    given = np.ones((2, 3, 4, 4), dtype)
    data = load_data({"x": given}, IMAGES)
    assert data.inputs["x"].dtype == np.float32
    assert np.array_equal(data.inputs["x"], given)


def test_integers_widen_and_narrow_only_where_values_fit() -> None:
    small = interface({"t": ("int32", ["b", "s"])}, {"y": ("float32", ["b"])})
    assert load_data(np.ones((2, 3), np.int32), TOKENS).inputs["tokens"].dtype == np.int64
    assert load_data(np.ones((2, 3), np.int64), small).inputs["t"].dtype == np.int32
    assert "int64, the model expects int32" in message(np.full((2, 3), 2**40), small)
    assert "float32, the model expects int64" in message(np.ones((2, 3), np.float32), TOKENS)
    flags = interface({"f": ("bool", ["b"])}, {"y": ("float32", ["b"])})
    assert load_data(np.array([0, 1]), flags).inputs["f"].tolist() == [False, True]
    assert "the model expects bool" in message(np.array([0, 2]), flags)


def test_not_finite_values_are_named_with_their_sample() -> None:
    x = images()
    x[7, 1, 2, 3] = np.nan
    assert "'x' holds NaN, first in sample 7" in message(x, IMAGES)
    x[3, 0, 0, 0] = np.inf
    assert "'x' holds an infinite value, first in sample 3" in message(x, IMAGES)
    text = message({"x": images(2), "score": np.array([1.0, np.nan])}, IMAGES)
    assert "'score' holds NaN, first in sample 1" in text


def test_large_doubles_are_finite() -> None:
    double = interface({"x": ("float64", ["b"])}, {"y": ("float32", ["b"])})
    assert load_data(np.array([1e300, -1e300]), double).samples == 2


def test_sample_counts_must_agree() -> None:
    a, b = np.ones((4, 2), np.float32), np.zeros((3, 3), np.float32)
    assert "different numbers of samples (a: 4, b: 3)" in message({"a": a, "b": b}, TWO)
    assert "'labels' has 3 entries for 4 samples" in message(
        {"a": a, "b": np.zeros((4, 3), np.float32), "labels": np.arange(3)}, TWO
    )


def test_one_dim_has_one_size() -> None:
    ids = np.ones((2, 5), np.int64)
    text = message({"input_ids": ids, "attention_mask": ids[:, :4], "token_type_ids": ids}, BERT)
    assert "dim 'seq' is 5 in 'input_ids' but 4 in 'attention_mask'" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], "the data is empty"),
        (42, "data of type int cannot be read"),
        (b"abc", "data of type bytes cannot be read"),
        ([object()], "object is not a sample"),
        ([{"x": [[1.0], [1.0, 2.0]]}], "ragged"),
        ([(images(1), np.zeros(1), np.zeros(1))], "a tuple of 3 was given for a model with 1 inputs"),
        ([{"x": images(2)}, {"x": images(2), "labels": np.zeros(2)}], "labels is missing from one of two"),
        ({"x": [object()]}, "Python objects (object)"),
    ],
)
def test_sources_nobody_understands(source: Any, expected: str) -> None:
    assert expected in message(source, IMAGES)


def test_an_array_for_a_model_of_two_inputs() -> None:
    assert "give a mapping with a, b" in message(np.ones((2, 2), np.float32), TWO)


def test_batch_size_must_be_positive() -> None:
    assert "batch_size 0 is not positive" in message(images(), IMAGES, batch_size=0)
    assert load_data(images(), IMAGES, batch_size=3).batch_size == 3


# ---- layouts ---------------------------------------------------------------------------------------


def test_large_outputs_get_small_batches() -> None:
    wide = interface({"t": ("int64", ["b", "s"])}, {"logits": ("float32", ["b", "s", 50_000])})
    assert load_data(np.ones((40, 8), np.int64), wide).batch_size == 32
    assert load_data(np.ones((4, 128), np.int64), wide).batch_size == 2
    assert load_data(np.ones((4, 1024), np.int64), wide).batch_size == 1


def test_a_model_with_a_fixed_batch() -> None:
    fixed = interface({"x": ("float32", [4, 2])}, {"y": ("float32", [4, 1])})
    data = load_data({"x": np.ones((10, 2), np.float32), "labels": np.arange(10)}, fixed, batch_size=32)
    assert [len(b) for b in data.batches()] == [4, 4]
    assert "exactly 4 rows a run, the data has 3" in message(np.ones((3, 2), np.float32), fixed)
    parts = split(load_data(np.ones((24, 2), np.float32), fixed))
    assert [len(p) % 4 for p in (parts.calibration, parts.selection, parts.report)] == [0, 0, 0]


def test_inputs_whose_first_dims_differ_make_one_sample_a_run() -> None:
    stream = interface(
        {"mix": ("float32", [1, 5]), "cache": ("float32", [2, 1, 3])}, {"out": ("float32", [1, 5])}
    )
    runs = [
        {"mix": np.full((1, 5), i, np.float32), "cache": np.full((2, 1, 3), i, np.float32)} for i in range(4)
    ]
    data = load_data(runs, stream)
    assert data.samples == 4
    for i, batch in enumerate(data.batches()):
        assert batch.inputs["mix"].shape == (1, 5)
        assert batch.inputs["cache"].shape == (2, 1, 3)
        assert (batch.inputs["cache"] == i).all()


def test_scalar_and_constant_inputs() -> None:
    voice = interface(
        {"x": ("float32", ["b", 4]), "rate": ("int64", []), "state": ("float32", [2, 3])},
        {"y": ("float32", ["b"])},
    )
    state = np.ones((2, 3), np.float32)
    source = {"x": np.ones((6, 4), np.float32), "rate": np.array(16000), "state": state}
    data = load_data(source, voice, batch_size=4)
    batch = list(data.batches())[1]
    assert (batch.inputs["x"].shape, batch.inputs["rate"].shape, batch.inputs["state"].shape) == (
        (2, 4), (), (2, 3),
    )  # fmt: skip
    repeated = [{"x": np.ones((2, 4), np.float32), "rate": 16000, "state": state} for _ in range(3)]
    assert load_data(repeated, voice).inputs["state"].shape == (2, 3)
    repeated[1]["rate"] = 8000
    assert "input 'rate' has no batch axis ([]), but differs between samples" in message(repeated, voice)


# ---- padding and pairs -----------------------------------------------------------------------------


def bert(rows: int, length: int, value: int = 7) -> dict[str, np.ndarray]:
    ids = np.full((rows, length), value, np.int64)
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def test_token_batches_of_different_lengths_are_padded() -> None:
    parts = [
        bert(2, 3) | {"labels": np.ones((2, 3), np.int64)},
        bert(1, 5) | {"labels": np.ones((1, 5), int)},
    ]
    data = load_data(parts, BERT)
    assert data.inputs["input_ids"].tolist() == [[7, 7, 7, 0, 0]] * 2 + [[7] * 5]
    assert data.inputs["attention_mask"].tolist() == [[1, 1, 1, 0, 0]] * 2 + [[1] * 5]
    assert data.extras["labels"].tolist() == [[1, 1, 1, -100, -100]] * 2 + [[1] * 5]


def test_without_a_mask_nothing_is_padded() -> None:
    with pytest.raises(DataError) as caught:
        load_data([np.ones((1, 3), np.int64), np.ones((1, 5), np.int64)], TOKENS)
    assert str(caught.value) == (
        "'tokens' has samples of shape (5,) and of (3,)\n"
        "  at data, item 0 and data, item 1\n"
        "  pad every sample to one length (and mask the padding), or give samples of equal shape"
    )


def pairs(n: int = 4) -> dict[str, np.ndarray]:
    a, b = bert(n, 3, 1), bert(n, 5, 2)
    sides = {f"a.{k}": v for k, v in a.items()} | {f"b.{k}": v for k, v in b.items()}
    return sides | {"score": np.linspace(0, 5, n)}


def test_pairs_are_interleaved_and_padded_alike() -> None:
    data = load_data(pairs(), BERT)
    assert (len(data), data.samples, data.group) == (8, 4, 2)
    assert data.inputs["input_ids"][:2].tolist() == [[1, 1, 1, 0, 0], [2] * 5]
    assert data.inputs["attention_mask"][:2].sum(axis=1).tolist() == [3, 5]
    assert data.extras["score"].tolist() == np.linspace(0, 5, 4).tolist()


def test_pairs_from_an_iterable_of_samples() -> None:
    whole = pairs()
    data = load_data([{k: v[i] for k, v in whole.items()} for i in range(4)], BERT)
    assert np.array_equal(data.inputs["input_ids"], load_data(whole, BERT).inputs["input_ids"])


def test_pairs_survive_splitting_whole() -> None:
    whole = pairs(40)
    whole["a.input_ids"] = whole["a.input_ids"] * np.arange(1, 41)[:, None]
    parts = split(load_data(whole, BERT), seed=3)
    for part in (parts.calibration, parts.selection, parts.report):
        ids = part.inputs["input_ids"].reshape(-1, 2, 5)
        assert np.allclose(part.extras["score"], (ids[:, 0, 0] - 1) * 5 / 39)
        assert (ids[:, 1] == 2).all()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"b.token_type_ids": None}, "the data has pairs, but b.token_type_ids is missing"),
        ({"input_ids": np.ones((4, 3), np.int64)}, "but also input_ids without a side"),
        ({"b.input_ids": np.ones((3, 5), np.int64)}, "the sides of the pairs differ"),
        ({"score": np.ones(8)}, "'score' has 8 entries for 4 pairs"),
    ],
)
def test_pairs_that_do_not_fit(change: dict[str, Any], expected: str) -> None:
    source = {k: v for k, v in (pairs() | change).items() if v is not None}
    assert expected in message(source, BERT)


# ---- splits ----------------------------------------------------------------------------------------


def numbered(n: int) -> Dataset:
    return Dataset({"x": np.arange(n, dtype=np.float32)[:, None]}, {"labels": np.arange(n)})


@pytest.mark.parametrize("n", [3, 4, 5, 10, 101])
def test_split_is_disjoint_complete_and_seeded(n: int) -> None:
    parts = [p.extras["labels"].tolist() for p in vars(split(numbered(n), seed=1)).values()]
    assert sorted(itertools.chain(*parts)) == list(range(n))
    again = [p.extras["labels"].tolist() for p in vars(split(numbered(n), seed=1)).values()]
    assert parts == again
    if n > 50:
        assert [len(p) for p in parts] == [25, 35, 41]
        assert parts[0] != split(numbered(n), seed=2).calibration.extras["labels"].tolist()


def test_split_refusals() -> None:
    with pytest.raises(DataError, match="2 samples cannot be split"):
        split(numbered(2))
    with pytest.raises(DataError, match="do not make three parts"):
        split(numbered(9), fractions=(0.5, 0.5))
    with pytest.raises(DataError, match="do not make three parts"):
        split(numbered(9), fractions=(1.0, 0.0, 0.5))


def test_explicit_splits(tmp_path: Path) -> None:
    sets = {"calibration": images(2), "selection": {"x": images(3)}, "report": [images(2), images(2)]}
    splits = load_splits(sets, IMAGES, batch_size=2)
    assert [len(p) for p in vars(splits).values()] == [2, 3, 4]
    assert load_splits(splits, IMAGES).report.batch_size == 2
    for name, n in (("calibration", 2), ("selection", 3), ("report", 4)):
        np.savez(tmp_path / f"{name}.npz", x=images(n))
    assert [len(p) for p in vars(load_splits(tmp_path, IMAGES)).values()] == [2, 3, 4]
    with pytest.raises(DataError, match="calibration, report given without selection"):
        load_splits({"calibration": images(2), "report": images(2)}, IMAGES)


def test_implicit_splits_of_any_source() -> None:
    splits = load_splits({"x": images(20), "labels": np.arange(20)}, IMAGES, seed=1)
    assert sum(len(p) for p in vars(splits).values()) == 20
    with pytest.raises(DataError, match="splits were given"):
        load_data(splits, IMAGES)


def test_a_report_on_searched_data_is_refused() -> None:
    x = images(20)
    sets = {"calibration": images(2), "selection": x[:12], "report": x[:20]}
    with pytest.raises(DataError, match="60% of the report samples are also in selection"):
        load_splits(sets, IMAGES)
    splits = load_splits(sets | {"selection": x[:10]}, IMAGES)
    assert overlap(splits.report, splits.selection) == 0.5


def test_no_data_means_made_up_samples() -> None:
    splits = load_splits(None, IMAGES, seed=1)
    assert sum(len(p) for p in vars(splits).values()) == 96
    assert overlap(splits.report, splits.selection) == 0


# ---- made-up samples -------------------------------------------------------------------------------


def test_synthetic_follows_the_example() -> None:
    example = {
        "input_ids": np.array([[5, 90, 17]]),
        "attention_mask": np.ones((1, 3), np.int64),
        "token_type_ids": np.zeros((1, 3), np.int64),
    }
    program = interface(
        {name: ("int64", ["batch", "seq"]) for name in example},
        {"y": ("float32", ["batch"])},
        example=example,
    )
    data = synthetic(program, 50, seed=4)
    ids = data.inputs["input_ids"]
    assert ids.shape == (50, 3)
    assert (ids.min() >= 5, ids.max() <= 90, len(np.unique(ids)) > 20) == (True, True, True)
    assert (data.inputs["attention_mask"] == 1).all()
    assert (data.inputs["token_type_ids"] == 0).all()
    assert np.array_equal(synthetic(program, 50, seed=4).inputs["input_ids"], ids)
    assert not np.array_equal(synthetic(program, 50, seed=5).inputs["input_ids"], ids)


def test_synthetic_floats_have_the_example_s_spread() -> None:
    example = {"x": (5 + 3 * RNG.standard_normal((2, 3, 40, 40))).astype(np.float32)}
    program = interface({"x": ("float32", ["b", 3, None, None])}, {"y": ("float32", ["b"])}, example=example)
    x = synthetic(program, 8).inputs["x"]
    assert x.shape == (8, 3, 40, 40)
    assert abs(x.mean() - 5) < 0.2
    assert abs(x.std() - 3) < 0.2


def test_synthetic_without_an_example_and_with_odd_layouts() -> None:
    assert synthetic(BERT, 3).inputs["input_ids"].shape == (3, 8)
    stream = interface({"a": ("float32", [1, 5]), "b": ("float32", [2, 3])}, {"y": ("float32", [1])})
    assert synthetic(stream, 4).samples == 4
    scalar = interface({"x": ("float32", ["b", 4]), "r": ("int64", [])}, {"y": ("float32", ["b"])})
    assert synthetic(scalar, 4).inputs["r"].shape == ()
    words = interface({"w": ("string", ["b"])}, {"y": ("float32", ["b"])})
    assert synthetic(words, 2).inputs["w"].dtype == object
    with pytest.raises(DataError, match="0 synthetic samples"):
        synthetic(BERT, 0)


# ---- reference data --------------------------------------------------------------------------------


@needs_reference
def test_reference_sets_load() -> None:
    import onnx_ir as ir

    program = Program(ir.load(str(models_dir / "kwt1_speech_commands.onnx")))
    data = load_data(sets_dir / "speech_commands_kwt_2400.npz", program)
    assert (len(data), data.inputs["feats"].dtype, list(data.extras)) == (2400, np.float32, ["labels"])
    program = Program(ir.load(str(models_dir / "stories260k.onnx")))
    data = load_data(sets_dir / "tinystories_tok512_758x512.npz", program)
    assert (len(data), data.inputs["tokens"].dtype, data.extras) == (758, np.int64, {})
