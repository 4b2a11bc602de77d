"""Saving: atomic, deterministic, exact in size; a failure leaves what was there and nothing else."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_tools import branching, mlp, run

from lamina.errors import CaptureError, OutputError
from lamina.ir import io
from lamina.ir.capture import capture


@pytest.fixture
def big(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beyond a few bytes go outside, as they do past 1.9 GB."""
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100)


def test_saved_models_load_and_compute_the_same(tmp_path: Path) -> None:
    for make in (mlp, branching):
        program = capture(make())
        path = tmp_path / "m.onnx"
        assert io.save_model(program.model, path) == [path]
        assert io.load(path).fingerprint == program.fingerprint
        feeds = program.example
        np.testing.assert_array_equal(run(str(path), feeds)[0], run(program.model, feeds)[0])


def test_weights_in_other_files_come_along(tmp_path: Path) -> None:
    program = capture(mlp())
    ir.save(program.model, tmp_path / "far.onnx", external_data="far.bin", size_threshold_bytes=0)
    model = ir.load(tmp_path / "far.onnx")
    (tmp_path / "here").mkdir()
    io.save_model(model, tmp_path / "here" / "m.onnx")
    np.testing.assert_array_equal(
        run(str(tmp_path / "here" / "m.onnx"), program.example)[0], run(program.model, program.example)[0]
    )
    kept = [isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values()]
    assert all(kept)  # the model given is left as it was


def test_equal_models_make_equal_bytes(tmp_path: Path) -> None:
    a, b = tmp_path / "a.onnx", tmp_path / "b.onnx"
    io.save_model(capture(mlp()).model, a)
    io.save_model(capture(mlp()).clone().model, b)
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("width", [1, 8, 64, 300])
def test_serialized_size_is_exact(tmp_path: Path, width: int) -> None:
    program = capture(mlp(width))
    program.graph.initializers["w1"].const_value.doc_string = "documented"  # type: ignore[union-attr]
    io.save_model(program.model, tmp_path / "m.onnx")
    assert io.serialized_size(program.model) == (tmp_path / "m.onnx").stat().st_size


def test_serialized_size_counts_packed_and_odd_types(tmp_path: Path) -> None:
    program = capture(mlp())
    packed = ir.PackedTensor(
        np.zeros(2000, np.uint8), ir.DataType.INT4, shape=ir.Shape([4000]), name="packed"
    )
    half = ir.Tensor(np.zeros(3000, np.uint16), ir.DataType.BFLOAT16, name="half")
    for tensor in (packed, half):
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype))
        program.graph.register_initializer(value)
    io.save_model(program.model, tmp_path / "m.onnx")
    assert io.serialized_size(program.model) == (tmp_path / "m.onnx").stat().st_size


@pytest.mark.usefixtures("big")
def test_big_models_keep_their_weights_beside_them(tmp_path: Path) -> None:
    program = capture(mlp(64))
    path = tmp_path / "model.onnx"
    written = io.save_model(program.model, path)
    assert written == [path, tmp_path / "model.onnx.data"]
    assert sum(p.stat().st_size for p in written) == io.serialized_size(program.model)
    assert io.load(path).fingerprint == program.fingerprint
    np.testing.assert_array_equal(run(str(path), program.example)[0], run(program.model, program.example)[0])


@pytest.mark.usefixtures("big")
def test_saving_over_a_big_model_never_touches_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.onnx"
    old = capture(mlp(64, seed=1))
    io.save_model(old.model, path)
    replace = os.replace

    def dies_at_the_model(source: str, target: object) -> None:
        if str(target).endswith("m.onnx"):
            raise OSError(errno.EIO, "I/O error")
        replace(source, target)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "replace", dies_at_the_model)
    with pytest.raises(OutputError):
        io.save_model(capture(mlp(64, seed=2)).model, path)
    assert io.load(path).fingerprint == old.fingerprint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    monkeypatch.undo()
    monkeypatch.setattr(io, "EXTERNAL_ABOVE", 100)
    new = capture(mlp(64, seed=2))
    io.save_model(new.model, path)
    assert io.load(path).fingerprint == new.fingerprint


@pytest.mark.usefixtures("big")
def test_a_model_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    io.save_model(capture(mlp(64)).model, path)
    mapped = io.load(path)
    io.save_model(mapped.model, path)
    assert io.load(path).fingerprint == capture(mlp(64)).fingerprint


@pytest.mark.parametrize("step", ["fsync", "replace", "fchmod"])
def test_a_failure_at_any_step_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"what was there")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OutputError, match="cannot be written: No space left on device") as caught:
        io.save_model(capture(mlp()).model, path)
    assert caught.value.advice == "free some disk space or choose another folder"
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("kill", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupt_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: type[BaseException]
) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")

    def interrupted(*_: object) -> None:
        raise kill

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(kill):
        io.write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_disk_that_fills_up_while_writing(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")

    def fill(file: object) -> None:
        with full.open("wb", buffering=0) as device:
            device.write(b"x")

    with pytest.raises(OutputError, match="No space left on device"):
        io._write(path, fill)
    assert path.read_bytes() == b"old"


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    model = capture(mlp()).model
    with pytest.raises(OutputError, match="does not exist: create it first"):
        io.save_model(model, tmp_path / "absent" / "m.onnx")
    with pytest.raises(OutputError, match="it is a folder: give the name of a file"):
        io.save_model(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        io.save_model(model, tmp_path / "file" / "m.onnx")


def test_a_folder_without_write_permission(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match="is not writable"):
        io.save_model(capture(mlp()).model, folder / "m.onnx")


def test_text_and_bytes_and_ordinary_permissions(tmp_path: Path) -> None:
    assert io.write_atomic(tmp_path / "a", "grün").read_bytes() == "grün".encode()
    assert io.write_atomic(tmp_path / "b", b"\0\1").read_bytes() == b"\0\1"
    plain = tmp_path / "c"
    plain.write_text("")
    assert (tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_a_link_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    io.write_atomic(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_loading_something_damaged(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"junk")
    with pytest.raises(CaptureError):
        io.load(tmp_path / "m.onnx")
