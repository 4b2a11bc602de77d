"""The models of the study and their data: six with a task, seven files found in the wild without one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data import Dataset
from lamina.data.splitting import load_data
from lamina.data.synthetic import synthetic
from lamina.ir.capture import capture
from lamina.ir.program import Program
from tools.bench.cases import CASES, ROOT, Case

_ZOO = ("dtln_1", "fastestdet", "gtcrn_simple", "magika_standard_v3_3", "mnist_cntk", "ppocr_v2_cls")
_TOKENS = 128  # of each story: the damage of a site is there after a quarter of the 512


@dataclass(frozen=True)
class Subject:
    """A model with disjoint data for metrics and for the truth.

    Attributes:
        name: Short name.
        program: As captured.
        calibration: What metrics see.
        report: What damage is measured on.
        task: lamina's metric of the task; None where there are no labels.
        inputs: Where the inputs come from.
        few: Most calibration samples that damage of a width is measured on to see how few will do.
        few_drops: The same for drops.
    """

    name: str
    program: Program
    calibration: Dataset
    report: Dataset
    task: str | None
    inputs: str
    few: int = 16
    few_drops: int = 16


@dataclass(frozen=True)
class _Size:
    calibration: int
    report: int
    few: int = 16
    few_drops: int = 64


# Samples (of minilm's report: pairs). As many as fit, all models together, in about 35 minutes of one core;
# the agreement of two halves of the truth, which the page shows, says whether that is enough.
_SIZES = {
    "resnet20": _Size(128, 512, 64),
    "resnet56": _Size(128, 192, 64),
    "mobilenet": _Size(64, 192, 64),
    "kwt1": _Size(128, 192, 64),
    "stories260k": _Size(64, 64, 64),
    "minilm": _Size(64, 32, 64),
}
_WILD = _Size(64, 64, 64)
_LARGE = {name: _Size(32, 16) for name in ("fastestdet", "gtcrn_simple", "ultraface_rfb320")}
NAMES = (*_SIZES, *_ZOO, "ultraface_rfb320")


def load(name: str) -> Subject:
    """The subject called ``name``, one of :data:`NAMES`."""
    return _task(name) if name in _SIZES else _wild(name)


def _case(name: str) -> Case:
    if name == "resnet20":
        from dataclasses import replace

        return replace(_case("resnet56"), name=name, model="resnet20_cifar10.onnx")
    return next(c for c in CASES if c.name == name)


def _task(name: str) -> Subject:
    case, size = _case(name), _SIZES[name]
    program, parts = capture(case.path), case.load()
    report: dict[str, Any] = dict(parts["report"])
    calibration: dict[str, Any] = dict(parts["calibration"])
    if name == "stories260k":
        report, calibration = ({k: v[:, :_TOKENS] for k, v in p.items()} for p in (report, calibration))
    data = [load_data(p, program, batch_size=8) for p in (calibration, report)]
    parted = _spread(data[0], size.calibration), _spread(data[1], size.report)
    return Subject(name, program, *parted, case.metric, "task data", size.few, size.few_drops)


def _spread(data: Dataset, count: int) -> Dataset:
    """``count`` samples from all over the data, in random order so that any first few are typical."""
    rows = np.linspace(0, data.samples - 1, min(count, data.samples)).astype(np.int64)
    return data.rows(np.random.default_rng(0).permutation(rows))


def _wild(name: str) -> Subject:
    program, size = capture(ROOT / "zoo" / f"{name}.onnx"), _LARGE.get(name, _WILD)
    count = size.calibration + size.report
    make = _INPUTS.get(name)
    if make is None:
        data, where = synthetic(program, count), "synthetic noise"
    else:
        arrays, where = make(count)
        data = load_data(arrays, program)
    order = np.random.default_rng(0).permutation(data.samples)
    calibration, report = data.rows(order[: size.calibration]), data.rows(order[size.calibration :])
    return Subject(name, program, calibration, report, None, where, size.few, size.few_drops)


def _photos(
    count: int,
    name: str,
    height: int,
    width: int,
    scale: Callable[[np.ndarray], np.ndarray],
    gray: bool = False,
) -> tuple[Mapping[str, np.ndarray], str]:
    """ImageNet crops, nearest neighbour to the wanted size."""
    with np.load(ROOT / "sets" / "imagenet_sample_400.npz") as file:
        images = file["images"][:count]
    rows = np.arange(height) * images.shape[1] // height
    columns = np.arange(width) * images.shape[2] // width
    picked = images[:, rows][:, :, columns].astype(np.float32)
    picked = picked.mean(axis=-1, keepdims=True) if gray else picked
    return {
        name: np.ascontiguousarray(scale(picked).transpose(0, 3, 1, 2)).astype(np.float32)
    }, "ImageNet crops"


def _bytes(count: int) -> tuple[Mapping[str, np.ndarray], str]:
    """Windows of files of several types, half of their sizes apart."""
    files = [
        *sorted(ROOT.glob("**/*.txt")),
        *sorted((ROOT / "zoo").glob("*.onnx")),
        *sorted((ROOT / "sets").glob("*.npz")),
        *sorted(Path(__file__).parents[2].glob("bench/*.py")),
    ]
    rows = []
    for i in range(count):
        text = files[i % len(files)].read_bytes()
        start = (i // len(files)) * max(1, len(text) // 8)
        rows.append(np.resize(np.frombuffer(text[start : start + 2048], np.uint8), 2048))
    return {"bytes": np.stack(rows).astype(np.int32)}, "pieces of text, code and binary files"


_INPUTS: Mapping[str, Callable[[int], tuple[Mapping[str, np.ndarray], str]]] = {
    "ultraface_rfb320": lambda n: _photos(n, "input", 240, 320, lambda x: (x - 127) / 128),
    "fastestdet": lambda n: _photos(n, "input.1", 352, 352, lambda x: x / 255),
    "ppocr_v2_cls": lambda n: _photos(n, "x", 48, 192, lambda x: x / 127.5 - 1),
    "mnist_cntk": lambda n: _photos(n, "Input3", 28, 28, lambda x: x, gray=True),
    "magika_standard_v3_3": _bytes,
}
