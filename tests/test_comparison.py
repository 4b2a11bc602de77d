"""Whether two models are the same function, through Python and the command line."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny import tiny_data, tiny_model, write_tiny

import lamina
from lamina.cli import main
from lamina.comparison import damage
from lamina.errors import DataError


def changed(factor: float) -> onnx.ModelProto:
    model = tiny_model()
    weight = model.graph.initializer[1]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(factor), weight.name))
    return model


def test_a_model_equals_itself():
    found = lamina.compare(tiny_model(), tiny_model())
    assert found.equal
    assert (found.outputs[0].max_abs, found.outputs[0].max_ulp) == (0.0, 0.0)
    assert found.samples == 16


@pytest.mark.parametrize(("factor", "equal"), [(1.01, False), (1000.0, False), (-1.0, False), (0.0, False)])
def test_wrong_weights_are_told_apart(factor, equal):
    assert lamina.compare(tiny_model(), changed(factor), data={"x": tiny_data()["x"]}).equal is equal


def test_difference_is_relative_to_the_largest_magnitude():
    (row,) = lamina.compare(tiny_model(), changed(1.5), data={"x": tiny_data()["x"]}).outputs
    assert row.max_rel == pytest.approx(0.5, rel=1e-5)
    assert lamina.compare(tiny_model(), changed(1.5), tolerance=0.51).equal


def test_nan_in_one_model_only_is_a_difference():
    found = lamina.compare(tiny_model(), tiny_model(bad_weight=float("nan")))
    assert not found.equal
    assert found.outputs[0].max_abs == float("inf")


def test_other_interface_is_an_error():
    other = tiny_model()
    other.graph.input[0].name = other.graph.node[0].input[0] = "y"
    with pytest.raises(DataError, match=r"inputs differ: \['x'\] and \['y'\]"):
        lamina.compare(tiny_model(), other)


def test_damage_has_both_scores_and_an_interval():
    found = damage(tiny_model(), changed(-1.0), data=tiny_data(), metric="top1")
    assert found["original"] == 1.0
    assert found["damage"] == pytest.approx(1.0 - found["optimized"])
    low, high = found["damage_ci95"]
    assert low <= found["damage"] <= high


def test_command_line_exit_code_is_the_verdict(tmp_path, capsys):
    model, data = write_tiny(tmp_path)
    onnx.save(changed(1.01), tmp_path / "other.onnx")
    for other, code in ((model, 0), (tmp_path / "other.onnx", 1)):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", str(model), str(other), "--data", str(data), "--metric", "top1", "--json"])
        found = json.loads(capsys.readouterr().out)
        assert stopped.value.code == code
        assert found["equal"] is (code == 0)
        assert found["quality"]["original"] == 1.0
