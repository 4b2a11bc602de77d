from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from lamina.backends._frames import Frame, read_frame, write_frame
from lamina.backends.backend import Case, Target
from lamina.backends.load import machine_load
from lamina.backends.measure import (
    LEAST_ROUNDS,
    IsolatedTimer,
    measure,
    measure_rounds,
    paired_ratio,
    peak_memory,
)
from lamina.backends.onnxruntime import OnnxRuntime
from lamina.backends.workers import Worker
from lamina.errors import BackendError

ONE = Target("ort", "cpu", 1)


def save_chain(path: Path, layers: int, width: int = 128, *, initial: int = 0) -> Path:
    """A chain of matrix products: twice the layers, twice the work."""
    rng = np.random.default_rng(initial)
    names = [f"v{i}" for i in range(layers)] + ["y"]
    body = "\n".join(f"{names[i + 1]} = MatMul({names[i]}, w{i})" for i in range(layers))
    text = f"""<ir_version: 10, opset_import: ["" : 21]>
    chain (float[N,{width}] v0, {", ".join(f"float[{width},{width}] w{i}" for i in range(layers))})
      => (float[N,{width}] y) {{ {body} }}"""
    model = ir.from_onnx_text(text)
    for value in list(model.graph.inputs)[1:]:
        assert value.name
        weight = rng.standard_normal((width, width), dtype=np.float32) / np.float32(np.sqrt(width))
        value.const_value = ir.tensor(weight, name=value.name)
        model.graph.register_initializer(value)
    del model.graph.inputs[1:]
    ir.save(model, path)
    return path


def case(rows: int, width: int = 128, name: str | None = None) -> Case:
    x = np.random.default_rng(rows).standard_normal((rows, width), dtype=np.float32)
    return Case(name or f"{rows}x{width}", {"v0": x})


def test_more_work_takes_longer(tmp_path: Path) -> None:
    small, large = save_chain(tmp_path / "a.onnx", 1), save_chain(tmp_path / "b.onnx", 12)
    result = measure([small, large], ONE, (case(1), case(64)), 0.3)
    assert [len(row) for row in result] == [2, 2]
    assert result[1][1].median_s > 3 * result[0][1].median_s
    assert result[0][1].minimum_s > result[0][0].minimum_s
    assert all(latency.samples >= 3 * LEAST_ROUNDS for row in result for latency in row)


def test_the_same_model_twice_has_a_ratio_of_one(tmp_path: Path) -> None:
    path = save_chain(tmp_path / "a.onnx", 8)
    timings = measure_rounds([path, path], ONE, (case(64, name="c"),), 0.6)
    ratio = timings.ratio(0, 1, "c")
    assert ratio.low <= ratio.median <= ratio.high
    assert 0.6 < ratio.median < 1.6  # one core may be shared with other tests
    assert len(timings.samples[0, "c"]) == len(timings.samples[1, "c"]) >= LEAST_ROUNDS


def test_cpu_time_of_one_thread_is_its_latency_without_the_waiting(tmp_path: Path) -> None:
    path, cases = save_chain(tmp_path / "a.onnx", 4), (case(64, name="c"),)
    with IsolatedTimer(ONE, cases) as cpu, IsolatedTimer(ONE, cases) as wall:
        busy = cpu.time(cpu.add_all([path]), None, 0.1, cpu=True).latency(0, "c")
        passed = wall.time(wall.add_all([path]), None, 0.1).latency(0, "c")
    assert 0 < busy.minimum_s < 1.5 * passed.minimum_s
    assert cpu.counts_cpu
    with IsolatedTimer(Target("ort", "cpu", 2), cases) as two:
        assert not two.counts_cpu  # its time is not that of the calling thread


def test_noise_common_to_a_round_cancels() -> None:
    rng = np.random.default_rng(0)
    slow = rng.uniform(1, 10, 20)
    a = [[2.0 * s] * 3 for s in slow]
    b = [[1.0 * s] * 3 for s in slow]
    ratio = paired_ratio(a, b)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))


def test_rounds_out_of_step_are_refused() -> None:
    with pytest.raises(BackendError, match="cannot pair 1 rounds with 2"):
        paired_ratio([[1.0]], [[1.0], [1.0]])


def test_models_join_and_leave(tmp_path: Path) -> None:
    path = save_chain(tmp_path / "a.onnx", 2)
    with IsolatedTimer(ONE, (case(1, name="one"), case(4, name="four"))) as timer:
        first, second = timer.add(path), timer.add(path)
        timer.remove(first)
        third = timer.add(path)
        assert len({first, second, third}) == 3
        timings = timer.time([second, third], ["four"], 0.05)
    assert sorted(timings.samples) == [(second, "four"), (third, "four")]


def test_inputs_a_model_lacks_are_left_out(tmp_path: Path) -> None:
    """A dropped attention takes its cache inputs along; the original's feeds still serve."""
    path = save_chain(tmp_path / "a.onnx", 1)
    feeds = {**case(1).feeds, "cache": np.zeros(3, np.int64)}
    assert measure([path], ONE, (Case("c", feeds),), 0.05)[0][0].samples >= 15


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    good, bad = save_chain(tmp_path / "good.onnx", 1), tmp_path / "bad.onnx"
    bad.write_text("not a model")
    with pytest.raises(BackendError, match=r"bad\.onnx.*Protobuf parsing failed"):
        measure([good, bad], ONE, (case(1),), 0.1)


def test_feeds_that_do_not_fit_are_reported_from_the_worker(tmp_path: Path) -> None:
    path = save_chain(tmp_path / "a.onnx", 1)
    with pytest.raises(BackendError, match=r"a\.onnx: the feeds lack inputs \['v0'\]"):
        measure([path], ONE, (Case("c", {"z": np.ones(1)}),), 0.1)
    with pytest.raises(BackendError, match=r"a\.onnx"):
        measure([path], ONE, (case(1, width=7),), 0.1)


def test_a_crash_names_the_model(tmp_path: Path) -> None:
    worker = Worker(ONE, "my.onnx", loader="os:abort")
    with pytest.raises(BackendError, match=r"my\.onnx"):
        worker.open(tmp_path / "my.onnx")
    worker.close()
    dying = Worker(ONE, "my.onnx")
    dying._child._process.kill()
    with pytest.raises(BackendError, match=r"my\.onnx died: signal SIGKILL \(killed"):
        dying.open(tmp_path / "my.onnx")


def test_kernels_are_profiled_a_run_and_inputs_share_memory(tmp_path: Path) -> None:
    path = save_chain(tmp_path / "a.onnx", 3)
    worker = Worker(ONE, "a.onnx")
    worker.feed("c", {"given": case(64).feeds["v0"]}, {"v0": "given"})
    kernels = worker.kernels(path.read_bytes(), "c", runs=5)
    number = worker.open(path)
    whole = min(worker.time(number, "c", 0.01, bound=True))
    worker.close()
    assert list(kernels) == ["MatMul"]
    assert 0.2 * whole < kernels["MatMul"] < 5 * whole


def test_a_worker_that_hangs_is_ended(tmp_path: Path) -> None:
    worker = Worker(ONE, "slow.onnx")
    number = worker.open(save_chain(tmp_path / "a.onnx", 1))
    worker.feed("c", case(1).feeds)
    with pytest.raises(BackendError, match=r"slow\.onnx: no answer to 'time'"):
        worker.time(number, "c", 30.0, timeout=-29.5)
    assert worker._child._process.poll() is not None


def test_closing_leaves_no_process_behind(tmp_path: Path) -> None:
    timer = IsolatedTimer(ONE, (case(1),))
    timer.add(save_chain(tmp_path / "a.onnx", 1))
    ((worker, _),) = timer._workers.values()
    pid = worker._child._process.pid
    timer.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_worker_imports_neither_onnx_nor_torch() -> None:
    heavy = ("onnx", "onnx_ir", "torch", "scipy")
    code = f"import lamina.backends._worker, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_peak_memory_counts_weights_and_not_the_parent(tmp_path: Path) -> None:
    ballast = np.ones(40_000_000)  # a large parent must not show in the child
    small = save_chain(tmp_path / "s.onnx", 1, width=512)
    large = save_chain(tmp_path / "l.onnx", 24, width=512)
    low, high = peak_memory(small, ONE, case(1, 512)), peak_memory(large, ONE, case(1, 512))
    weights = 23 * 512 * 512 * 4
    assert weights < high - low < 6 * weights
    assert high < ballast.nbytes
    assert OnnxRuntime().peak_memory(small, ONE, case(1, 512)) < 50e6


def test_frames_keep_shape_dtype_and_text() -> None:
    arrays = {
        "a": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 4), np.float16),
        "scalar": np.asarray(3.5, np.float32),
        "flag": np.asarray([True, False]),
        "words": np.array([["x", "ä"]], dtype=object),
        "strided": np.arange(10.0)[::2],
    }
    stream = io.BytesIO()
    write_frame(stream, Frame({"do": "x", "n": 1}, arrays, b"blob"))
    stream.seek(0)
    got = read_frame(stream)
    assert got is not None
    assert (got.header, got.blob) == ({"do": "x", "n": 1}, b"blob")
    for name, array in arrays.items():
        np.testing.assert_array_equal(got.arrays[name], array)
        assert got.arrays[name].shape == array.shape
    assert read_frame(stream) is None
    assert read_frame(io.BytesIO(stream.getvalue()[:-3])) is None


def test_machine_load_reads_something_sane() -> None:
    load = machine_load(0.05)
    assert load.cores >= 1
    assert load.busy is None or 0 <= load.busy <= 1
    assert "busy with other work" in str(load)
