"""Plans with integer weights are rounded against data at the end: whole runs on random residual MLPs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from stacked_model import stacked
from tiny import shorten_timing

import lamina
from lamina.ir.program import Program
from lamina.planner.plan import Plan
from lamina.report.terminal import result_tables

_WIDTH = 96  # wide enough that weights, not nodes, are what a file holds


def _program() -> Program:
    return stacked(2, _WIDTH)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lamina.Result]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "lamina-cache"))
        shorten_timing(patch)
        x = np.random.default_rng(1).normal(size=(240, 6, _WIDTH)).astype(np.float32)
        yield lamina.optimize(
            _program().model,
            "size<=0.35x",
            data={"x": x},
            transforms=["quantize"],
            target="ort:cpu?threads=1",
            workload="1x6",
            seconds=4,
            seed=0,
        )


def test_a_plan_is_rounded_where_that_brings_the_outputs_nearer(quantized: lamina.Result) -> None:
    told = quantized.evidence["rounding"]
    assert told["kept"]
    assert told["after"] < told["before"]
    carried = [m for m in quantized.plan.moves if "codes" in m.option.parameters]
    assert len(carried) == told["operators"] > 0


def test_without_data_weights_keep_their_nearest_codes(quantized: lamina.Result) -> None:
    assert quantized.evidence["rounding"] is not None
    made_up = lamina.optimize(
        _program().model,
        "size<=0.35x",
        transforms=["quantize"],
        target="ort:cpu?threads=1",
        workload="1x6",
        seconds=4,
    )
    assert made_up.evidence["rounding"] is None
    assert any("weight_bits" in m.option.parameters for m in made_up.plan.moves)
    assert not any("codes" in m.option.parameters for m in made_up.plan.moves)


def test_the_plan_reproduces_the_rounded_program(quantized: lamina.Result) -> None:
    again = lamina.apply(_program().model, Plan.from_json(quantized.plan.to_json()))
    made: list[Any] = [ir.to_proto(p.model) for p in (again, quantized.program)]
    assert made[0].SerializeToString(deterministic=True) == made[1].SerializeToString(deterministic=True)


def test_the_terminal_says_what_was_rounded(
    quantized: lamina.Result, capsys: pytest.CaptureFixture[str]
) -> None:
    told = quantized.evidence["rounding"]
    result_tables(quantized.evidence, ["out/model.onnx"])
    text = " ".join(capsys.readouterr().out.split())
    assert (
        f"rounding ({told['method']}) kept: {told['operators']} operators, divergence on selection data"
        in text
    )


def test_codes_of_few_bits_are_learned_against_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    from lamina.planner import rounding as module

    asked: list[tuple[str, float, int]] = []
    real = module.round_options

    def spied(program: Program, chosen: Any, data: Any, how: Any, **options: Any) -> Any:
        widths = [o.parameters["weight_bits"] for _, o in chosen if "weight_bits" in o.parameters]
        asked.append((how.method, options["learning"], min(widths)))
        return real(program, chosen, data, how, **options)

    monkeypatch.setattr(module, "round_options", spied)
    x = np.random.default_rng(1).normal(size=(240, 6, _WIDTH)).astype(np.float32)
    narrow = lamina.optimize(
        _program().model,
        "size<=0.2x",
        data={"x": x},
        transforms=["quantize"],
        target="ort:cpu?threads=1",
        workload="1x6",
        seconds=4,
        seed=0,
    )
    methods = [method for method, _, _ in asked]
    assert methods == ["descent"] * (len(asked) - 1) + ["output"]  # the chosen plan alone, and last
    assert asked[-1][1] > 0
    assert asked[-1][2] <= 4
    told = narrow.evidence["rounding"]
    assert told["after"] < told["before"]
    carried = [m.option.parameters for m in narrow.plan.moves if "codes" in m.option.parameters]
    assert any(p["weight_bits"] <= 4 and p["rounding"] == told["method"] for p in carried)
