from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from sample_analysis import HOSTILE, sample

from lamina.report.analysis_columns import OPTION_GROUPS, SAYS, group_of
from lamina.report.analysis_table import analysis_table
from lamina.report.reading import reading, suggestion
from lamina.report.scores import redundancy, sensitivity
from lamina.report.tree import rows


class _File(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding


def shown(found: dict[str, Any], width: int, encoding: str = "utf-8", **options: Any) -> list[str]:
    file = _File(encoding)
    analysis_table(found, console=Console(file=file, width=width), **options)
    return file.getvalue().splitlines()


def tree(lines: list[str]) -> list[str]:
    start = next(i for i, line in enumerate(lines) if line.startswith("part"))
    end = next(i for i, line in enumerate(lines) if line.startswith("total"))
    return lines[start : end + 1]


@pytest.mark.parametrize("width", [80, 100, 120, 160, 240])
@pytest.mark.parametrize(
    "prefix",
    ["l.", "a.very.long.module.path.of.an.encoder.layers.", "解析器官层次结构名称很长很长.", HOSTILE],
)
@pytest.mark.parametrize("timed", [True, False])
def test_the_tree_fits_every_width(width: int, prefix: str, timed: bool) -> None:
    lines = tree(shown(sample(prefix=prefix, timed=timed), width))
    assert max(cell_len(line) for line in lines) <= width
    assert len(lines) == 3 + 3 * 3 + 4 + (1 if width < 100 else 0) or len(lines) >= 16


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (80, []),
        (140, ["time %", "kind"]),
        (240, ["bound", "of roof", "params %", "block-influence", "quantization-error-w4"]),
    ],
)
def test_wider_consoles_show_more(width: int, titles: list[str]) -> None:
    head = " ".join(tree(shown(sample(), width))[:2])
    for title in ("params", "FLOPs", "time", "options", *titles):
        assert title in head


def test_branches_stand_under_their_block_without_its_name() -> None:
    labels = [(row.level, row.label) for row in rows(sample(layers=1))]
    assert labels == [
        (0, "layers.0"),
        (1, "attention"),
        (1, "mlp"),
        (0, "in no branch (4)"),
        (1, "layers.head"),
        (1, "3 x LayerNormalization"),
    ]


def test_operators_on_request() -> None:
    labels = [row.label for row in rows(sample(layers=1), operators=True)]
    assert labels[:6] == ["layers.0", "attention", "up", "down", "mlp", "up"]


def test_scores_are_shares_of_the_largest() -> None:
    found = sample()
    scores, bits = redundancy(found), sensitivity(found)
    assert scores is not None
    assert bits is not None
    assert scores.shares["layers.0.attention"] == pytest.approx(1 - 1 / 6)
    assert scores.shares["layers.2.mlp"] == 0
    assert scores.marked == ["layers.0.attention"]
    assert bits.shares["layers.head"] == 1
    assert bits.marked[0] == "layers.head"


def test_what_was_measured_comes_first() -> None:
    found = sample()
    for index, branch in enumerate(found["branches"]):
        branch["metrics"]["output-kl"] = 1.0 / (1 + index)
    scores = redundancy(found)
    assert scores is not None
    assert scores.source.metric == "output-kl"
    assert scores.marked == ["layers.2.mlp"]


def test_a_metric_of_which_high_means_redundant_is_not_turned() -> None:
    found = sample()
    for index, branch in enumerate(found["branches"]):
        branch["metrics"] = {"branch-similarity": 0.5 + 0.05 * index}
    scores = redundancy(found)
    assert scores is not None
    assert scores.marked == ["layers.2.mlp"]
    assert scores.shares["layers.2.mlp"] == 1


def test_rows_show_shares_marks_and_options() -> None:
    line = next(line for line in shown(sample(), 80) if line.strip().startswith("attention"))
    assert "83 %*" in line
    assert line.rstrip().endswith("dmi84s+")
    wide = next(line for line in shown(sample(), 160) if line.strip().startswith("attention"))
    assert wide.rstrip().endswith("drop map int8 w8 w4 stored third-party")
    narrow, words = (" ".join(" ".join(shown(sample(), width)).split()) for width in (80, 160))
    assert "+: others, which a wider terminal names" in narrow
    assert "others, which" not in words


def test_every_option_that_is_offered_by_default_has_a_letter() -> None:
    offered = {
        "merge 0-1 without 0": "c",
        "keep-50": "n",
        "w2": "2",
        "stored-w3": "s",
        "bfloat16": "s",
        "rank-4": "m",
    }
    for option, letter in offered.items():
        group = group_of(option)
        assert [found for name, found, _ in OPTION_GROUPS if name == group] == [letter]
        assert group in SAYS


def test_the_words_name_branches_shares_and_operators() -> None:
    said = " ".join(reading(sample()))
    assert "Most redundant by block-influence look layers.0.attention (0.05)" in said
    assert "together 16 % of the time" in said
    assert "Most sensitive by quantization-error-w4 are layers.head (0.02)" in said
    assert "--damages" in said


def test_measured_damage_that_is_large_everywhere_is_called_so() -> None:
    found = sample()
    for branch in found["branches"]:
        branch["metrics"]["output-kl"] = 0.5
    found["damages"] = {"metric": "kl"}
    assert "No branch is cheap to drop" in reading(found)[0]
    found["branches"][3]["metrics"]["output-kl"] = 0.001
    assert reading(found)[0].startswith(
        "Cheapest to drop, measured one at a time in nats of KL divergence, are layers.1.mlp (0.001), "
    )


def test_without_samples_the_words_say_what_is_missing() -> None:
    found = sample()
    found["samples"]["all"] = 0
    assert reading(found) == [
        "No samples were given, so there are costs and nothing on redundancy or sensitivity: add --data."
    ]


def test_the_suggested_command_is_quoted_for_a_shell() -> None:
    found = sample()
    words = suggestion(found, "my model.onnx; rm -rf ~", "$(x).npz", "ort:cpu?threads=1", "top1")
    assert " ".join(words) == (
        "lamina optimize 'my model.onnx; rm -rf ~' -o optimized --budget 'drop<=1%' --data '$(x).npz' "
        "--metric top1 --target 'ort:cpu?threads=1'"
    )
    found["offers"] = [{"transform": "quantize"}]
    assert suggestion(found, "m.onnx", None, "ort:cpu", None)[-4:] == [
        "--target",
        "ort:cpu",
        "--transforms",
        "quantize",
    ]
    assert "'latency<=0.7x'" in suggestion(found, "m.onnx", None, "ort:cpu", None)


def test_the_command_stays_on_one_line() -> None:
    lines = shown(sample(), 80, command=["lamina", "optimize", "x" * 100, "-o", "out"])
    assert f"next: lamina optimize {'x' * 100} -o out" in lines


def test_hostile_names_do_nothing_to_the_terminal() -> None:
    found = sample(prefix=HOSTILE)
    found["model"] = found["model"] + HOSTILE
    found["skipped"] = {HOSTILE: HOSTILE}
    text = "\n".join(shown(found, 200, operators=True))
    assert not set(text) & set("\x1b\x00\u202e\r\x07")
    assert "[bold]" in text


def test_a_terminal_without_unicode_gets_no_blocks() -> None:
    lines = tree(shown(sample(), 100, encoding="ascii"))
    assert all(line.isascii() for line in lines)
    assert any("#" in line for line in lines)


def test_a_model_without_branches_lists_its_operators() -> None:
    found = sample(layers=0)
    assert [row.label for row in rows(found)] == ["layers.head", "3 x LayerNormalization"]
    assert reading(found)[0].startswith("The model has no residual branch")


def test_nested_branches_stand_under_the_one_that_holds_them() -> None:
    found = sample(layers=1)
    outer, inside = found["branches"]
    outer["members"] = [*outer["members"], *inside["members"]]
    found["blocks"] = [
        {**found["blocks"][0], "name": b["name"], "members": [b["name"]]} for b in (inside, outer)
    ]
    labels = [(row.level, row.label) for row in rows(found)][:2]
    assert labels == [(0, "layers.0.attention"), (1, "layers.0.mlp")]
    labels = [row.label for row in rows(found, operators=True)][:6]
    assert labels == ["layers.0.attention", "layers.0.mlp", "up", "down", "up", "down"]
