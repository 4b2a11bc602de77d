"""Single-site damages with prefix reuse against really changing the program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from reference import models_dir, needs_reference, sets_dir
from stacked_model import stacked

from lamina.analysis.depths import depths_of
from lamina.analysis.instrument import InstrumentedSession
from lamina.analysis.residual import BranchProbe
from lamina.analysis.single_site import SingleSite, damages, interactions, skip_effect, suspicious_pairs
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.branches import find_branches
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.passes.single_drops import drop_damages, drop_variants
from lamina.quality.choose import get_metric
from lamina.quality.divergence import RelativeL2

OUTPUT = "add3_out"
L2 = RelativeL2((OUTPUT,))


def _data(rows: int = 10) -> Dataset:
    random = np.random.default_rng(8)
    return Dataset({"x": random.normal(size=(rows, 5, 16)).astype(np.float32)}, {}, 4)


def _run(program: Program, feeds: Any) -> dict[str, np.ndarray]:
    names = [port.name for port in program.outputs]
    return dict(zip(names, InstrumentedSession(program, threads=1).run(names, feeds), strict=True))


# -- every branch of the reference models ---------------------------------------------------------------


def _images(rows: int) -> dict[str, np.ndarray]:
    with np.load(sets_dir / "cifar10_train_2000.npz") as file:
        images = file["images"][:rows].astype(np.float32) / 255.0
    images = (images - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
    return {"x": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}


def _speech(rows: int) -> dict[str, np.ndarray]:
    with np.load(sets_dir / "speech_commands_kwt_2400.npz") as file:
        return {"feats": file["feats"][:rows].astype(np.float32)}


def _stories(rows: int) -> dict[str, np.ndarray]:
    with np.load(sets_dir / "tinystories_tok512_758x512.npz") as file:
        return {"tokens": file["tokens"][:rows, :64].astype(np.int64)}


def _sentences(rows: int) -> dict[str, np.ndarray]:
    with np.load(sets_dir / "stsb_train1024_minilm_tokens.npz") as file:
        ids, mask = file["ids"][:rows].astype(np.int64), file["mask"][:rows].astype(np.int64)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


MODELS = {
    "resnet20_cifar10.onnx": (_images, 9),
    "resnet56_cifar10.onnx": (_images, 27),
    "kwt1_speech_commands.onnx": (_speech, 24),
    "stories260k.onnx": (_stories, 10),
    "minilm/minilm_l6_v2.onnx": (_sentences, 12),
}


@needs_reference
@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_branch_of_a_reference_model_is_really_dropped(name: str) -> None:
    load, count = MODELS[name]
    program = capture(str(models_dir / name))
    variants = drop_variants(program)
    assert len(variants) == count
    ((_, _, original, changed),) = SingleSite(program, variants, threads=1).run(Dataset(load(2), {}, 2))
    for branch, outputs in changed:
        expected = _run(variants[branch], load(2))
        for output, values in expected.items():
            scale = float(np.abs(values).max())
            # the cut changes which kernels are fused: reassociation, no more
            np.testing.assert_allclose(outputs[output], values, rtol=0, atol=2e-5 * scale, err_msg=branch)
            assert np.abs(original[output] - values).max() > 1e-3 * scale


# -- a small model --------------------------------------------------------------------------------------


def test_the_suffix_runs_only_what_the_change_reaches() -> None:
    program = stacked(4)
    runs = SingleSite(program, drop_variants(program), threads=1)
    sizes = {name: len(suffix.open().graph) for name, suffix in runs._suffixes.items()}
    assert list(sizes.values()) == [12, 8, 4, 1]  # four nodes a layer, and an Identity that names the output


def test_damages_are_those_of_the_dropped_programs() -> None:
    program, data = stacked(4), _data()
    found = drop_damages(program, data, L2, threads=1)
    original = _run(program, data.inputs)[OUTPUT].astype(np.float64)
    for name, variant in drop_variants(program).items():
        difference = _run(variant, data.inputs)[OUTPUT] - original
        expected = np.linalg.norm(difference) / np.linalg.norm(original)
        each = np.linalg.norm(difference, axis=(1, 2)) / np.linalg.norm(original, axis=(1, 2))
        assert found[name].mean == pytest.approx(expected, rel=1e-4)
        assert found[name].samples == pytest.approx(each, rel=1e-4)
        assert found[name].tail == pytest.approx(np.quantile(each, 0.95), rel=1e-4)


def test_little_memory_means_several_parts_and_the_same_damages() -> None:
    program, data = stacked(4), _data()
    one = drop_damages(program, data, L2, threads=1)
    many = drop_damages(program, data, L2, threads=1, most_bytes=1)
    assert len(SingleSite(program, drop_variants(program), most_bytes=1)._parts) == 4
    assert {n: d.mean for n, d in many.items()} == pytest.approx({n: d.mean for n, d in one.items()})


def test_a_change_that_changes_nothing_runs_nothing() -> None:
    program = stacked(2)
    runs = SingleSite(program, {"same": program.clone()}, threads=1)
    assert len(runs._suffixes["same"].open().graph) == 0
    assert (
        damages(program, {"same": program.clone()}, _data(), RelativeL2(("add1_out",)), threads=1)[
            "same"
        ].mean
        == 0
    )


def test_skip_effect_is_its_definition_at_every_later_depth() -> None:
    program, data = stacked(4), _data()
    probes = [BranchProbe.of(b) for b in find_branches(program).branches]
    depths = {d.name: d.value for d in depths_of(probes)}
    variants = drop_variants(program)
    found = skip_effect(program, variants, data, probes, threads=1)
    names = list(variants)
    assert [list(found[n]) for n in names] == [[*names[i + 1 :], "end"] for i in range(4)]
    values = list(depths.values())
    read = [n for n in values if n != "x"]

    def stream(which: Program) -> dict[str, np.ndarray]:
        session = InstrumentedSession(which, read, threads=1)
        return dict(zip(read, session.run(read, data.inputs), strict=True))

    before = stream(program)
    # the second branch's sum is what the third reads: dropping it leaves the first one's sum there
    changed = before[depths[names[1]]].astype(np.float64)
    expected = np.linalg.norm(changed - before[depths[names[2]]], axis=-1)
    expected = expected / np.linalg.norm(before[depths[names[2]]], axis=-1)
    assert found[names[1]][names[2]] == pytest.approx(expected.mean(), rel=1e-5)


def test_interactions_are_what_the_sum_of_damages_misses() -> None:
    program, data = stacked(4), _data()
    singles = {n: d.mean for n, d in drop_damages(program, data, L2, threads=1).items()}
    names = list(singles)
    pairs = [(names[0], names[1]), (names[1], names[3])]
    found = interactions(program, lambda n: apply_drops(program, n), singles, pairs, data, L2, threads=1)
    original = _run(program, data.inputs)[OUTPUT].astype(np.float64)
    for a, b in pairs:
        both = _run(apply_drops(program, [a, b]), data.inputs)[OUTPUT] - original
        expected = np.linalg.norm(both) / np.linalg.norm(original) - singles[a] - singles[b]
        assert found[a, b] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_suspicious_pairs_are_damaging_neighbours() -> None:
    singles = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0}
    assert suspicious_pairs(singles, 3) == [("a", "b"), ("b", "d"), ("a", "d")]


def test_a_task_metric_is_refused() -> None:
    with pytest.raises(DataError, match="metric 'top1' scores one model by itself\n  give a divergence"):
        damages(stacked(2), {}, _data(), get_metric("top1", stacked(2)))
