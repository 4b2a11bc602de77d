"""Trained models with every operator quantized: quality near the original's, files a quarter of it."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from quantize_tools import apply_quantize, bytes_of, kernels, quantize_all, relative_error, session, sites
from reference import models_dir, needs_reference, sets_dir

from lamina.analysis.statistics import collect
from lamina.data import Dataset
from lamina.passes.quantize import Quantize

pytestmark = needs_reference


def load(name):
    from lamina.ir.capture import capture
    from lamina.passes.fold import fold

    folded = fold(capture(str(models_dir / name)))
    return folded[0] if isinstance(folded, tuple) else folded


def statistics(prog, inputs, rows=16):
    found = [s for s in sites(prog).values() if s.kind != "embedding"]
    names = [n for s in found for n in (*s.inputs, *s.outputs)]
    return collect(prog, Dataset(inputs, {}, rows), ranges=names, threads=1)


def logits(prog, array, rows=50):
    running = session(prog)
    name = running.get_inputs()[0].name
    return np.concatenate(
        [running.run(None, {name: array[i : i + rows]})[0] for i in range(0, len(array), rows)]
    )


def cleaned(prog, form, stats=None, transform=None):
    from lamina.passes.fold import cleanup

    return cleanup(quantize_all(prog, form, stats, transform))


def cifar(part, rows):
    images = np.load(sets_dir / part)
    mean, deviation = (np.array(v, np.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = (images["images"][:rows].astype(np.float32) / 255 - mean) / deviation
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)), images["labels"][:rows]


def test_resnet20_runs_in_integers_from_end_to_end():
    prog = load("resnet20_cifar10.onnx")
    calibration, _ = cifar("cifar10_train_2000.npz", 128)
    x, labels = cifar("cifar10_test_6000.npz", 400)
    quantized = cleaned(prog, "w8a8-static", statistics(prog, {prog.inputs[0].name: calibration}))
    counts = kernels(quantized)
    assert Counter(counts)["QLinearConv"] == 19
    assert counts["QLinearAdd"] == 9
    assert counts["QuantizeLinear"] == 1
    assert counts["QGemm"] == counts["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "FusedConv", "Add", "Gemm", "MatMul", "DequantizeLinear"} & set(counts)
    before, after = logits(prog, x), logits(quantized, x)
    assert relative_error(after, before) < 0.06
    drop = (before.argmax(1) == labels).mean() - (after.argmax(1) == labels).mean()
    assert drop <= 0.01
    assert bytes_of(quantized) < 0.32 * bytes_of(prog)


def images(rows):
    sample = np.load(sets_dir / "imagenet_sample_400.npz")
    x = sample["images"][:rows].astype(np.float32) / 127.5 - 1
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def test_balanced_rounding_halves_the_error_of_mobilenet():
    prog = load("mobilenet_v1_025_imagenet.onnx")
    x = images(50)
    before = logits(prog, x)
    errors = {}
    for balance in ("none", "kernel"):
        transform = Quantize()
        choices = {}
        for name, site in sites(prog).items():
            for option in transform.options(site, prog, None, None):
                if option.name == "stored-w8":
                    parameters = dict(option.parameters)
                    parameters["balance"] = "none" if balance == "none" else parameters["balance"]
                    choices[name] = type(option)(option.name, parameters)
        errors[balance] = relative_error(logits(apply_quantize(prog, choices), x), before)
    assert errors["kernel"] < 0.65 * errors["none"]


@pytest.mark.parametrize(("form", "share"), [("w8a8-dynamic", 0.36), ("w8a8-static", 0.36)])
def test_keyword_spotting_transformer(form, share):
    prog = load("kwt1_speech_commands.onnx")
    data = np.load(sets_dir / "speech_commands_kwt_2400.npz")
    x = data["feats"][400:600].astype(np.float32)
    stats = None
    if form == "w8a8-static":
        stats = statistics(prog, {prog.inputs[0].name: data["feats"][:64].astype(np.float32)})
    quantized = cleaned(prog, form, stats)
    counts = kernels(quantized)
    # what is left in float is attention's products of activations
    assert counts["MatMul"] + counts["FusedMatMul"] == 24
    assert not {"Gemm", "MatMulInteger"} & set(counts)
    before, after = logits(prog, x), logits(quantized, x)
    assert relative_error(after, before) < 0.08
    labels = data[next(k for k in data.files if data[k].ndim == 1)][400:600]
    assert (before.argmax(1) == labels).mean() - (after.argmax(1) == labels).mean() <= 0.01
    assert bytes_of(quantized) < share * bytes_of(prog)


def test_sentence_embeddings():
    prog = load("minilm/minilm_l6_v2.onnx")
    data = np.load(sets_dir / "stsb_test_minilm_tokens.npz")

    def similarity(candidate, rows=64):
        running = session(candidate)
        found = []
        for side in "ab":
            ids, mask = (data[f"{side}_{k}"][:rows].astype(np.int64) for k in ("ids", "mask"))
            feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
            hidden = running.run(None, feeds)[0]
            pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
            found.append(pooled / np.linalg.norm(pooled, axis=1, keepdims=True))
        return (found[0] * found[1]).sum(1)

    before = similarity(prog)
    dynamic = cleaned(prog, "w8a8-dynamic")
    counts = kernels(dynamic)
    assert counts["MatMulIntegerToFloat"] + counts["DynamicQuantizeMatMul"] == 36
    assert relative_error(similarity(dynamic), before) < 0.04
    stored = cleaned(prog, "stored-w8")
    assert relative_error(similarity(stored), before) < 0.01
    assert bytes_of(stored) < 0.27 * bytes_of(prog)


def test_language_model():
    """Static quantization of every activation ruins this one; of the weighted operators it does not."""
    prog = load("stories260k.onnx")
    tokens = np.load(sets_dir / "tinystories_tok512_758x512.npz")["tokens"].astype(np.int64)
    stats = statistics(prog, {"tokens": tokens[:16, :256]}, 8)

    def loss(candidate):
        x = tokens[384:416, :128]
        scores = logits(candidate, x, 16).astype(np.float64)[:, :-1]
        scores -= scores.max(-1, keepdims=True)
        normal = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        return -np.take_along_axis(normal, x[:, 1:, None], -1).mean()

    before = loss(prog)
    for form in ("w8a8-static", "w8a8-dynamic"):
        assert loss(cleaned(prog, form, stats)) < 1.015 * before
