from __future__ import annotations

import pytest
from rich.cells import cell_len

from lamina.report.text import bar, count, percent, printable, seconds, shorten, size


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (2.5, "2.50 s"),
        (0.0123, "12.3 ms"),
        (0.000152, "152 µs"),
        (3e-8, "30 ns"),
        (0.09996, "100 ms"),
    ],
)
def test_seconds_have_three_digits_and_a_unit(value: float | None, text: str) -> None:
    assert seconds(value) == text


def test_counts_and_sizes() -> None:
    assert [count(v) for v in (0, 999, 4640, 16.45e3, 6.72e6, 1.33e9)] == [
        "0",
        "999",
        "4.64 k",
        "16.4 k",
        "6.72 M",
        "1.33 G",
    ]
    assert [size(v) for v in (12, 1.08e6)] == ["12 B", "1.08 MB"]


def test_a_small_share_is_not_nothing() -> None:
    assert [percent(v) for v in (0.0, 0.001, 0.12, 1.0)] == ["0 %", "<1 %", "12 %", "100 %"]


@pytest.mark.parametrize("name", ["layer", "a" * 50, "解析" * 20, "é" * 30, "x", ""])
@pytest.mark.parametrize("width", [1, 2, 3, 10, 21])
def test_shortened_names_fit_in_cells(name: str, width: int) -> None:
    assert cell_len(shorten(name, width)) <= width
    if cell_len(name) <= width:
        assert shorten(name, width) == name


def test_a_shortened_name_keeps_both_ends() -> None:
    assert shorten("encoder.layer.11.attention.output", 15) == "enco…ion.output"


def test_what_a_terminal_obeys_is_spelled_out() -> None:
    assert printable("a\x1b[31mb\nc\u202ed\ud800") == "a\\x1b[31mb\\nc\\u202ed\\ud800"


def test_bars_fill_in_eighths_and_show_the_least() -> None:
    assert bar(0.5, 4) == "██  "
    assert bar(1 / 32, 4) == "▏   "
    assert bar(1e-6, 4) == "▏   "
    assert bar(0, 4) == "    "
    assert bar(7, 4) == "████"
    assert bar(0.5, 4, plain=True) == "##  "
