from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from residual_model import WIDTH, direct, residual_data, residual_program

from lamina.analysis.statistics import BranchProbe, Statistics, collect
from lamina.analysis.streaming import Histogram, RangeAccumulator
from lamina.data import Dataset
from lamina.errors import DataError
from lamina.ir.program import Program

PROBE = BranchProbe("branch", "x", "body", "sum")


@pytest.mark.parametrize(("dtype", "tolerance"), [("FLOAT", 1e-5), ("DOUBLE", 1e-12), ("FLOAT16", 3e-3)])
def test_ranges_are_those_of_the_values(dtype: str, tolerance: float) -> None:
    program = residual_program(dtype)
    data = residual_data(40, ir.DataType[dtype].numpy().name)
    statistics = collect(program, data, ranges=["x", "body", "y"], threads=1)
    for name, expected in direct(program, data).items():
        if name == "sum":
            continue
        stat = statistics.ranges[name]
        assert stat.count == expected.size == stat.histogram.sum()
        assert stat.minimum == pytest.approx(expected.min(), rel=tolerance, abs=tolerance)
        assert stat.maximum == pytest.approx(expected.max(), rel=tolerance, abs=tolerance)
        assert stat.mean == pytest.approx(expected.mean(), abs=tolerance)
        assert stat.variance == pytest.approx(expected.var(), rel=tolerance)
        assert stat.edges[0] <= stat.minimum
        assert stat.edges[-1] >= stat.maximum
    assert statistics.samples == 40
    assert statistics.ranges["y"].zeros == np.count_nonzero(direct(program, data)["y"] == 0)


def test_branch_statistics_are_their_definitions() -> None:
    program, data = residual_program(), residual_data(40)
    stat = collect(program, data, branches=[PROBE], threads=1).branches["branch"]
    v = direct(program, data)
    norm = np.linalg.norm
    cosine = (v["x"] * v["sum"]).sum(-1) / norm(v["x"], axis=-1) / norm(v["sum"], axis=-1)
    assert stat.tokens == 200
    assert stat.samples == 40
    assert stat.cosine == pytest.approx(cosine.mean(), rel=1e-6)
    assert stat.relative_norm == pytest.approx(
        (norm(v["body"], axis=-1) / norm(v["x"], axis=-1)).mean(), rel=1e-6
    )
    assert stat.last_token_angle == pytest.approx(np.arccos(cosine[:, -1]).mean() / np.pi, rel=1e-6)


@pytest.mark.parametrize("place", ["inputs", "extras"])
def test_padded_tokens_are_left_out(place: str) -> None:
    program, data = residual_program(), residual_data(40)
    lengths = np.random.default_rng(5).integers(1, 6, 40)
    mask = (np.arange(5)[None, :] < lengths[:, None]).astype(np.int64)
    data = replace(data, **{place: {**getattr(data, place), "attention_mask": mask}})
    statistics = collect(program, data, ranges=["body"], branches=[PROBE], threads=1)
    v = direct(program, data)
    norm = np.linalg.norm
    cosine = (v["x"] * v["sum"]).sum(-1) / norm(v["x"], axis=-1) / norm(v["sum"], axis=-1)
    stat = statistics.branches["branch"]
    assert stat.tokens == mask.sum()
    assert stat.cosine == pytest.approx(cosine[mask == 1].mean(), rel=1e-6)
    last = cosine[np.arange(40), lengths - 1]
    assert stat.last_token_angle == pytest.approx(np.arccos(last).mean() / np.pi, rel=1e-6)
    assert statistics.ranges["body"].count == mask.sum() * WIDTH
    assert statistics.ranges["body"].mean == pytest.approx(v["body"][mask == 1].mean(), abs=1e-6)


def test_batches_do_not_change_the_result() -> None:
    program, data = residual_program(), residual_data(40)
    one = collect(program, replace(data, batch_size=40), ranges=["body"], branches=[PROBE], threads=1)
    many = collect(program, replace(data, batch_size=3), ranges=["body"], branches=[PROBE], threads=1)
    assert many.branches["branch"].cosine == pytest.approx(one.branches["branch"].cosine, rel=1e-9)
    assert many.ranges["body"].variance == pytest.approx(one.ranges["body"].variance, rel=1e-6)
    assert many.ranges["body"].maximum == pytest.approx(one.ranges["body"].maximum, rel=1e-6)


def test_the_program_is_left_unchanged() -> None:
    program = residual_program()
    weight = program.graph.initializers["w"].const_value
    collect(program, residual_data(8), ranges=["body"], threads=1)
    assert [v.name for v in program.graph.outputs] == ["y"]
    assert program.graph.initializers["w"].const_value is weight


def test_a_constant_batch_size_is_obeyed() -> None:
    seen: list[tuple[int, int]] = []
    statistics = collect(
        residual_program(batch=4),
        residual_data(10),
        ranges=["body"],
        threads=1,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert statistics.samples == 8
    assert seen == [(4, 10), (8, 10)]


def test_memory_does_not_grow_with_samples() -> None:
    program = residual_program()

    def peak(rows: int) -> int:
        data = residual_data(rows, tokens=64)
        tracemalloc.start()
        collect(program, data, ranges=["x", "body", "sum"], branches=[PROBE], threads=1)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(7)
    assert peak(700) < 1.3 * peak(70)


def _refused(program: Program, data: Dataset, **options: object) -> str:
    with pytest.raises(DataError) as error:
        collect(program, data, threads=1, **options)  # type: ignore[arg-type]
    return str(error.value)


def test_nan_in_an_input_names_it() -> None:
    data = residual_data(20)
    data.inputs["x"][9, 0, 0] = np.nan
    message = _refused(residual_program(), data)
    assert message == (
        "input 'x' has 1 values that are NaN or infinite (first kind seen: NaN)\n"
        "  at batch 1 (rows 7 to 13)\n"
        "  remove the samples that cause it, or fix the model"
    )


def test_infinity_in_an_output_names_it() -> None:
    data = residual_data(20, "float16")
    data.inputs["x"][15] = 65504
    program = residual_program("FLOAT16")
    program.model.graph.node("add").replace_input_with(1, program.graph.inputs[0])
    assert "output 'y' has" in (message := _refused(program, data))
    assert "at batch 2 (rows 14 to 19)" in message


def test_missing_input_wrong_dtype_and_wrong_shape_say_so() -> None:
    data = residual_data(4)
    program = residual_program()
    assert _refused(program, Dataset({"z": data.inputs["x"]}, {})).startswith("the data has no input 'x'\n")
    wide = Dataset({"x": data.inputs["x"].astype(np.float64)}, {})
    assert _refused(program, wide).startswith("input 'x' is float64, the model wants float32\n")
    bent = Dataset({"x": data.inputs["x"][..., :3]}, {})
    assert _refused(program, bent).startswith("the program cannot run on these inputs: ")


def test_unknown_and_unfit_names_say_so() -> None:
    program, data = residual_program(), residual_data(4)
    assert _refused(program, data, ranges=["nope"]).startswith("no value is called 'nope'\n")
    assert _refused(program, data, ranges=["w"]).startswith("'w' is a weight, not an activation\n")
    assert _refused(program, data, mask="m").startswith("the data has no mask 'm'\n")
    assert _refused(program, data.rows(slice(0, 0))).startswith("the calibration data is empty\n")


def test_infinite_intermediates_are_counted_not_binned() -> None:
    total = RangeAccumulator()
    total.add(np.array([[-np.inf, 1.0], [2.0, np.nan]], dtype=np.float32))
    stat = total.result()
    assert (stat.minimum, stat.maximum, stat.count, stat.nonfinite) == (1.0, 2.0, 2, 2)


def test_doubling_keeps_every_count() -> None:
    rng = np.random.default_rng(2)
    histogram = Histogram(64)
    parts = [rng.normal(0, 10.0**power, 1000) for power in range(-2, 4)]
    for part in parts:
        histogram.add(part, part.min(), part.max())
    everything = np.concatenate(parts)
    expected, _ = np.histogram(everything, histogram.edges)
    assert histogram.counts.sum() == len(everything)
    # A doubled bin is a union of earlier bins, up to rounding at edges.
    assert np.abs(histogram.counts - expected).sum() <= 4
    assert histogram.edges[0] <= everything.min()
    assert histogram.edges[-1] >= everything.max()
    span = everything.max() - everything.min()
    assert histogram.edges[-1] - histogram.edges[0] <= 4 * span


def test_a_reshaped_skip_is_skipped_with_a_reason() -> None:
    program, data = residual_program(), residual_data(9)
    twice = ir.node("Concat", [program.graph.node("add").outputs[0]] * 2, {"axis": 2}, name="concat")
    twice.outputs[0].name = "wide"
    program.graph.append(twice)
    statistics: Statistics = collect(
        program, data, branches=[BranchProbe("odd", "x", "body", "wide"), PROBE], threads=1
    )
    assert statistics.skipped == {"odd": "skip [3, 5, 8] and output [3, 5, 16] differ"}
    assert list(statistics.branches) == ["branch"]


def test_values_without_a_range_are_skipped_with_a_reason() -> None:
    program, data = residual_program(), residual_data(9)
    shape = ir.node("Shape", [program.graph.inputs[0]], name="shape")
    log = ir.node("Log", [program.graph.node("relu").outputs[0]], name="log")
    shape.outputs[0].name, log.outputs[0].name = "dims", "logarithm"
    program.graph.extend([shape, log])
    program.model.graph.node("add").replace_input_with(0, program.graph.node("add").inputs[1])
    zero = ir.node("Sub", [program.graph.inputs[0]] * 2, name="zero")
    program.graph.insert_before(program.graph.node("matmul"), zero)
    zero.outputs[0].name = "nothing"
    program.graph.node("matmul").replace_input_with(0, zero.outputs[0])
    statistics = collect(program, data, ranges=["dims", "logarithm", "body"], threads=1)
    assert statistics.skipped == {"dims": "int64, not floating", "logarithm": "no finite element"}
    assert list(statistics.ranges) == ["body"]
