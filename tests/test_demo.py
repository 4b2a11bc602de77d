"""The shipped model and samples: small, good, and enough for the whole pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import shorten_timing

from lamina import demo
from lamina.cli import main


def test_shipped_files_are_small():
    assert sum(p.stat().st_size for p in demo.FOLDER.iterdir() if p.is_file()) <= 500_000


def test_shipped_model_is_good_at_what_ships_with_it():
    import onnxruntime

    samples = np.load(demo.DATA)
    session = onnxruntime.InferenceSession(demo.MODEL.read_bytes())
    logits = session.run(None, {"images": samples["images"]})[0]
    assert (logits.argmax(axis=1) == samples["labels"]).mean() > 0.95


def test_demo_prints_before_and_after_and_writes_the_result(tmp_path, capsys, monkeypatch):
    shorten_timing(monkeypatch)
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "-o", str(tmp_path / "out"), "--seconds", "1"])
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    assert {"model.onnx", "plan.json", "result.json"} <= {p.name for p in (tmp_path / "out").iterdir()}
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert found["damage"] <= 0.01
    assert max(len(line) for line in out.splitlines() if "wrote" not in line) <= 80
    for word in ("original", "optimized", "latency 32", "size", "peak memory", "top1", "damage"):
        assert word in out
    assert "drop met" in out
