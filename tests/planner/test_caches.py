"""``kv_cache=8`` from the command to the file: budget, interface, plan, and what is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from drop_nets import decoder, samples
from residual_nets import HEADS, WIDTH
from tiny import shorten_timing

import lamina
from lamina.cli import main
from lamina.data import Dataset
from lamina.errors import BudgetError, DataError, PassError, VerificationError
from lamina.ir.branches import find_branches
from lamina.passes import get_transform
from lamina.passes.quantize.cache_edits import expose_caches, quantize_caches
from lamina.passes.quantize.caches import CacheCodes, calibrate_caches
from lamina.planner.apply import apply_moves
from lamina.planner.plan import Move, Plan
from lamina.planner.referee import Referee

SIZE = WIDTH // HEADS
LAYERS = 2


@pytest.fixture(autouse=True)
def brief(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "prices"))
    shorten_timing(monkeypatch)


def model() -> onnx.ModelProto:
    return ir.to_proto(decoder(LAYERS).model)


def data() -> dict[str, np.ndarray]:
    return samples(decoder(LAYERS), 24)


def run(proto: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def command(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0


def coded(caches, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Feeds as docs/precision.md tells a caller to make them from the scales in result.json."""
    found = dict(feeds)
    for cache in caches:
        shape = [1, -1, 1, 1]
        scale = np.array(cache["scale"], np.float32).reshape(shape)
        found[cache["past"]] = np.clip(np.rint(feeds[cache["past"]] / scale), -128, 127).astype(np.int8)
    return found


def near(before: dict[str, np.ndarray], after: dict[str, np.ndarray], output: str, caches) -> None:
    error = np.linalg.norm(after[output] - before[output]) / np.linalg.norm(before[output])
    assert 0 < error < 0.05
    for cache in caches:
        scale = np.array(cache["scale"], np.float32).reshape(1, -1, 1, 1)
        codes, real = after[cache["present"]], before[cache["present"]]
        assert codes.dtype == np.int8
        # few samples: some values reach beyond theirs and are clipped
        assert np.linalg.norm(codes * scale - real) < 0.05 * np.linalg.norm(real)


@pytest.mark.parametrize("whole", ["quantize", "optimize"])
def test_result_has_int8_caches_says_so_and_is_repeated_by_its_plan(whole: str) -> None:
    proto = model()
    given = {"data": data(), "kv_cache": 8, "seconds": 3, "target": "ort:cpu?threads=1"}
    if whole == "quantize":
        result = lamina.quantize(proto, size="3x", bits=8, drop=0.5, **given)
    else:
        result = lamina.optimize(proto, size="3x", drop=0.5, transforms=["quantize"], **given)
    caches = result.evidence["kv_cache"]
    assert len(caches) == 2 * LAYERS
    assert {c["dtype"] for c in caches} == {"int8"}
    kinds = {p.name: p.dtype for p in (*result.program.inputs, *result.program.outputs)}
    ports = {c[end] for c in caches for end in ("past", "present")}
    assert {n for n, kind in kinds.items() if kind == ir.DataType.INT8} == ports
    feeds = samples(decoder(LAYERS), 5, seed=9)
    output = next(n for n in kinds if n not in ports and n != "x")
    near(run(proto, feeds), run(result.model, coded(caches, feeds)), output, caches)
    again = lamina.apply(proto, Plan.from_json(result.plan.to_json()))
    assert ir.to_proto(again.model).SerializeToString() == result.model.SerializeToString()
    assert result.evidence["damage"] > 0


def test_command_tells_that_the_interface_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(model(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **data())
    out = tmp_path / "out"
    asked = [
        "--data",
        str(tmp_path / "d.npz"),
        "--seconds",
        "2",
        "--size",
        "3x",
        "--bits",
        "8",
        "--drop",
        "0.5",
    ]
    command(["quantize", str(tmp_path / "m.onnx"), "-o", str(out), *asked, "--kv-cache", "8"])
    told = capsys.readouterr().out
    assert "interface changed: 4 caches are int8, with the scales in result.json" in told
    assert "past.0.key -> present.0.key" in told
    assert json.loads((out / "result.json").read_text())["kv_cache"][0]["past"] == "past.0.key"
    command(["apply", str(tmp_path / "m.onnx"), str(out), "-o", str(tmp_path / "again.onnx")])
    assert (tmp_path / "again.onnx").read_bytes() == (out / "model.onnx").read_bytes()


def test_nothing_changes_unasked() -> None:
    result = lamina.quantize(model(), data=data(), drop=0.5, seconds=2)
    assert result.evidence["kv_cache"] is None
    assert {p.dtype for p in result.program.inputs} == {ir.DataType.FLOAT}


def test_what_cannot_be_is_told_at_once() -> None:
    with pytest.raises(BudgetError, match="kv_cache=4 is not possible"):
        lamina.quantize(model(), data=data(), kv_cache=4)
    with pytest.raises(DataError, match="kv_cache needs samples"):
        lamina.quantize(model(), kv_cache=8)
    plain = {n: a for n, a in data().items() if n == "x"}
    from drop_nets import transformer

    with pytest.raises(PassError, match="no key or value cache at its interface"):
        lamina.quantize(ir.to_proto(transformer(1).model), data=plain, kv_cache=8)


@pytest.mark.filterwarnings("ignore:invalid value")  # codes of no number
def test_the_referee_runs_codes_against_the_original() -> None:
    """Codes that were asked for are run as codes; others, and scales that are no numbers, do not pass."""
    program = decoder(LAYERS)
    feeds = data()
    caches = calibrate_caches(program, Dataset(feeds, {}))
    made = expose_caches(quantize_caches(program, caches), caches)
    referee = Referee(program, [feeds])
    with pytest.raises(VerificationError, match="inputs changed from"):
        referee.check(made, "kv-cache", exact=False)
    referee.coded = caches
    referee.check(made, "kv-cache", exact=False)
    broken = CacheCodes(caches[0].past, caches[0].present, None, (float("nan"),))
    referee.coded = (broken, *caches[1:])
    with pytest.raises(VerificationError, match="not finite"):
        referee.check(made, "kv-cache", exact=False)


def test_attentions_that_are_dropped_take_their_caches_along() -> None:
    """Branches are found with conversions in them, and what stays is still opened at the interface."""
    program = decoder(LAYERS)
    caches = calibrate_caches(program, Dataset(data(), {}))
    inner = quantize_caches(program, caches)
    before, after = (find_branches(p).branches for p in (program, inner))
    assert [(b.name, b.cache_inputs, b.cache_outputs) for b in after] == [
        (b.name, b.cache_inputs, b.cache_outputs) for b in before
    ]
    drop = get_transform("drop")
    site = next(s for s in drop.sites(inner) if s.name == "l.0.attn")
    (option, *_) = drop.options(site, inner, None, None)
    made = expose_caches(apply_moves(inner, [Move(site, option)]), caches)
    kinds = {p.name: p.dtype for p in (*made.inputs, *made.outputs)}
    ports = {"past.1.key", "past.1.value", "present.1.key", "present.1.value"}
    assert {n for n, kind in kinds.items() if kind == ir.DataType.INT8} == ports
    assert not any(".0." in name for name in kinds)
