"""A small trained model and its samples: a residual convnet on 8x8 digits (see tools/demo/train.py)."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "digits.onnx"
DATA = FOLDER / "digits.npz"
METRIC = "top1"
BUDGET = "drop<=1%"
WORKLOAD = "32"
