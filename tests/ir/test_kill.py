"""Killed while saving: what is there then is the old model or the new one, whole, and nothing piles up."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest
import saving_children
from onnx_tools import mlp
from saving_children import WIDTH

from lamina.ir import io, leftovers
from lamina.ir.capture import capture

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no kill -9")

RANDOM_KILLS = 30
# Calls that change what is on disk: the child dies right before or right after each of them.
STEPS = ("write", "fsync", "replace", "unlink", "open", "close")


@pytest.fixture(scope="module")
def processes() -> BaseContext:
    """Children start from a server that has the imports done, so a kill costs milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["saving_children"])
    with pytest.MonkeyPatch.context() as patch:  # the server looks for what it preloads on its own path
        patch.setenv("PYTHONPATH", os.pathsep.join(str(Path(__file__).parents[i]) for i in (0, 1)))
        first = context.Process(target=saving_children.nothing)
        first.start()
        first.join()
    return context


def _fingerprints() -> tuple[str, str]:
    return capture(mlp(WIDTH, seed=1)).fingerprint, capture(mlp(WIDTH, seed=2)).fingerprint


def _expect_whole(path: Path, allowed: tuple[str, ...]) -> None:
    assert io.load(path).fingerprint in allowed


def _expect_tidy(path: Path, external: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next save leaves the model and, where it has one, its data; nothing else."""
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100 if external else 2**40)
    written = io.save_model(capture(mlp(WIDTH, seed=1)).model, path)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(p.name for p in written)
    assert len(written) == 1 + external


def _kill_at_random(context: BaseContext, path: Path, external: bool, kills: int) -> None:
    allowed, rng = _fingerprints(), random.Random(0)
    for _ in range(kills):
        ready = context.Event()
        child = context.Process(target=saving_children.save_for_ever, args=(str(path), external, ready))  # type: ignore[attr-defined]
        child.start()
        assert ready.wait(30)
        time.sleep(rng.random() * 0.03)
        child.kill()
        child.join(30)
        assert child.exitcode == -signal.SIGKILL
        if path.exists():  # the first child may have died before its first save was done
            _expect_whole(path, allowed)


@pytest.mark.parametrize("external", [False, True])
def test_killed_at_random_moments(
    tmp_path: Path, processes: BaseContext, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    path = tmp_path / "m.onnx"
    _kill_at_random(processes, path, external, RANDOM_KILLS)
    # Each save takes away what the killed ones before it left, so it is a handful at the most.
    assert len(list(tmp_path.iterdir())) <= 6
    _expect_tidy(path, external, monkeypatch)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_at_every_step(
    tmp_path: Path, processes: BaseContext, monkeypatch: pytest.MonkeyPatch, step: str, external: bool
) -> None:
    path, allowed = tmp_path / "m.onnx", _fingerprints()
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100 if external else 2**40)
    io.save_model(capture(mlp(WIDTH, seed=1)).model, path)
    died = 0
    for after in (False, True) if step != "write" else (False,):
        for count in range(1, 20):
            arguments = (str(path), external, step, count, after)
            child = processes.Process(target=saving_children.save_and_die, args=arguments)  # type: ignore[attr-defined]
            child.start()
            child.join(30)
            _expect_whole(path, allowed)
            if child.exitcode == 0:
                break
            assert child.exitcode == -signal.SIGKILL
            died += 1
        else:
            pytest.fail("the save never ended")
    assert died or step == "unlink"
    _expect_tidy(path, external, monkeypatch)


def test_a_save_in_progress_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100)
    real, cleaned = io.write_atomic, []

    def meanwhile(target: Path, data: bytes) -> Path:
        """Another process ends its save of the same model between our data and our model."""
        cleaned.extend(leftovers.clean(path))
        return real(target, data)

    io.save_model(capture(mlp(WIDTH, seed=1)).model, path)
    monkeypatch.setattr(io, "write_atomic", meanwhile)
    io.save_model(capture(mlp(WIDTH, seed=2)).model, path)
    assert cleaned == []
    _expect_whole(path, _fingerprints()[1:])


def test_data_that_another_model_uses_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, copy = tmp_path / "m.onnx", tmp_path / "copy.onnx"
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100)
    io.save_model(capture(mlp(WIDTH, seed=1)).model, path)
    copy.write_bytes(path.read_bytes())
    io.save_model(capture(mlp(WIDTH, seed=2)).model, path)
    _expect_whole(copy, _fingerprints()[:1])
    _expect_whole(path, _fingerprints()[1:])


def test_only_files_of_our_own_names_are_removed(tmp_path: Path) -> None:
    mine = {".m.onnx.ab12cd34.tmp", "m.onnx.data", "m.onnx.3.data", ".m.onnx.data.ab12cd34.tmp"}
    others = {
        "m.onnx.data.old",
        ".m.onnx.tmp",
        "other.onnx.data",
        "m.data",
        ".n.onnx.ab12cd34.tmp",
        "m.onnx.x.data",
    }
    for name in mine | others:
        (tmp_path / name).write_text("")
    (tmp_path / "m.onnx.7.data").symlink_to(tmp_path / "m.data")
    io.save_model(capture(mlp()).model, tmp_path / "m.onnx")
    assert {p.name for p in tmp_path.iterdir()} == others | {"m.onnx", "m.onnx.7.data"}


def test_an_interrupt_after_the_model_is_in_place_keeps_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100)
    real: Callable[..., Path] = io.write_atomic

    def interrupted(target: Path, data: bytes) -> Path:
        real(target, data)
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "write_atomic", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save_model(capture(mlp(WIDTH, seed=2)).model, path)
    _expect_whole(path, _fingerprints()[1:])
