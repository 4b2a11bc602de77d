"""The reference suite: models, data, metrics, splits and timed shapes, as the data's manifest names them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(os.environ.get("LAMINA_REFERENCE", Path(__file__).resolve().parents[3] / "shared" / "data"))
Splits = dict[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Case:
    """One model of the suite.

    Attributes:
        name: Case name.
        model: Path under the data's ``models``.
        metric: lamina's metric.
        load: Makes calibration, selection and report samples.
        workload: Timed shapes, in lamina's workload text.
        batch_size: Rows a run gets in evaluation.
    """

    name: str
    model: str
    metric: str
    load: Callable[[], dict[str, Any]]
    workload: str
    batch_size: int = 32

    @property
    def path(self) -> Path:
        """The model file."""
        return ROOT / "models" / self.model


def _npz(name: str) -> dict[str, np.ndarray]:
    with np.load(ROOT / "sets" / name) as file:
        return {key: file[key] for key in file.files if file[key].dtype.kind != "U"}


def training_images() -> np.ndarray:
    """All 2,000 training images of the set, as resnet56 reads them: float32 ``[2000, 3, 32, 32]``."""
    return _images(_npz("cifar10_train_2000.npz")["images"])


def _images(raw: np.ndarray) -> np.ndarray:
    images = raw.astype(np.float32) / 255.0
    images = (images - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _cifar() -> dict[str, Any]:
    def part(arrays: dict[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
        return {"x": _images(arrays["images"][rows]), "labels": arrays["labels"][rows]}

    train, test = _npz("cifar10_train_2000.npz"), _npz("cifar10_test_6000.npz")
    return {
        "calibration": part(train, slice(0, 256)),
        "selection": part(test, slice(0, 2000)),
        "report": part(test, slice(2000, 6000)),
    }


def _imagenet() -> dict[str, Any]:
    arrays = _npz("imagenet_sample_400.npz")
    images = np.ascontiguousarray((arrays["images"].astype(np.float32) / 127.5 - 1).transpose(0, 3, 1, 2))

    def part(rows: slice) -> dict[str, np.ndarray]:
        return {"x": images[rows], "labels": arrays["labels"][rows]}

    first = part(slice(0, 100))
    return {"calibration": first, "selection": first, "report": part(slice(100, 400))}


def _speech() -> dict[str, Any]:
    arrays = _npz("speech_commands_kwt_2400.npz")

    def part(rows: slice) -> dict[str, np.ndarray]:
        return {"feats": arrays["feats"][rows].astype(np.float32), "labels": arrays["labels"][rows]}

    return {
        "calibration": part(slice(0, 400)),
        "selection": part(slice(400, 1200)),
        "report": part(slice(1200, 2400)),
    }


def _stories() -> dict[str, Any]:
    tokens = _npz("tinystories_tok512_758x512.npz")["tokens"].astype(np.int64)
    rows = {"calibration": slice(0, 128), "selection": slice(128, 384), "report": slice(384, 758)}
    return {name: {"tokens": tokens[part]} for name, part in rows.items()}


def _sentences() -> dict[str, Any]:
    train = _npz("stsb_train1024_minilm_tokens.npz")
    ids = train["ids"].astype(np.int64)
    calibration = {
        "input_ids": ids,
        "attention_mask": train["mask"].astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }

    def pairs(name: str) -> dict[str, np.ndarray]:
        arrays = _npz(name)
        found: dict[str, np.ndarray] = {"score": arrays["score"]}
        width = max(arrays["a_ids"].shape[1], arrays["b_ids"].shape[1])
        for side in "ab":
            for key, source in (("input_ids", f"{side}_ids"), ("attention_mask", f"{side}_mask")):
                values = arrays[source].astype(np.int64)
                found[f"{side}.{key}"] = np.pad(values, ((0, 0), (0, width - values.shape[1])))
            found[f"{side}.token_type_ids"] = np.zeros_like(found[f"{side}.input_ids"])
        return found

    return {
        "calibration": calibration,
        "selection": pairs("stsb_dev_minilm_tokens.npz"),
        "report": pairs("stsb_test_minilm_tokens.npz"),
    }


CASES = (
    Case("resnet56", "resnet56_cifar10.onnx", "top1", _cifar, "1@0.5; 32@0.5", 50),
    Case("mobilenet", "mobilenet_v1_025_imagenet.onnx", "top1", _imagenet, "1@0.5; 16@0.5", 10),
    Case("kwt1", "kwt1_speech_commands.onnx", "top1", _speech, "1@0.5; 16@0.5", 25),
    Case("stories260k", "stories260k.onnx", "cross-entropy", _stories, "1x128@0.5; 1x1@0.5", 8),
    Case("minilm", "minilm/minilm_l6_v2.onnx", "spearman", _sentences, "1x32@0.5; 16x64@0.5", 32),
)
