"""Rotated blocks on a Gaussian grid: the grid is the known one, the rotation exact, two runtimes agree."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator
from quantize_tools import bytes_of, kernels, program, quantize_all, relative_error, run
from test_quantize_weight_only import EVERY

from lamina.passes.quantize import Quantize
from lamina.passes.quantize.coded import nearest
from lamina.passes.quantize.higgs import gaussian_levels, quantize_rotated, rotation

rng = np.random.default_rng(4)
HIGGS = Quantize(forms=("stored-w4", "stored-w3", "stored-w2"), rounding="higgs")


# Max, "Quantizing for minimum distortion", 1960, table I: outermost level and mean squared error
@pytest.mark.parametrize(
    ("bits", "outer", "error"), [(2, 1.510, 0.1175), (3, 2.152, 0.03454), (4, 2.733, 0.009497)]
)
def test_levels_are_those_of_max(bits, outer, error):
    levels = gaussian_levels(bits).astype(np.float64)
    x = np.linspace(-9, 9, 200_001)
    weight = np.exp(-x * x / 2)
    nearest_level = levels[np.abs(x[:, None] - levels).argmin(axis=1)]
    found = float((np.square(x - nearest_level) * weight).sum() / weight.sum())
    assert levels[-1] == pytest.approx(outer, abs=1e-3)
    assert found == pytest.approx(error, rel=2e-3)
    np.testing.assert_array_equal(levels, -levels[::-1])


@pytest.mark.parametrize("block", [8, 32, 128])
def test_rotation_is_orthogonal_and_always_the_same(block):
    matrix = rotation(block).astype(np.float64)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(block), atol=1e-6)
    assert np.ptp(np.abs(matrix)) < 1e-6
    assert len(np.unique(matrix[0])) == 2


def test_it_is_decoding_of_the_formula():
    rows = rng.standard_normal((6, 64)).astype(np.float32)
    made = quantize_rotated(rows, block=32, bits=3)
    parameters = {"weight_bits": 3, "clipping": "mse", "block": 32, "grid": "higgs"}
    found = nearest(rows, parameters, 0).rows()
    for row in range(6):
        for block in range(2):
            part = slice(32 * block, 32 * block + 32)
            turned = gaussian_levels(3)[made.codes[row, part]] * made.scale[row, block]
            np.testing.assert_allclose(found[row, part], turned @ rotation(32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_outliers_cost_less_than_in_even_steps(bits):
    weight = rng.standard_normal((64, 256)).astype(np.float32)
    weight[:, ::32] *= 8
    errors = []
    for grid in ("higgs", "offset"):
        parameters = {"weight_bits": bits, "clipping": "mse", "block": 32, "grid": grid}
        errors.append(np.square(nearest(weight, parameters, 0).rows() - weight).mean())
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("case", ["matmul bias", "gemm transB", "weight left", "conv 1-D"])
@pytest.mark.parametrize("form", HIGGS.forms)
def test_two_runtimes_agree_and_run_what_the_original_runs(case, form):
    build, shape = EVERY[case]
    prog = program(build, shape)
    quantized = quantize_all(prog, form, transform=HIGGS)
    x = rng.standard_normal(shape).astype(np.float32)
    actual = run(quantized, x)
    expected = ReferenceEvaluator(ir.to_proto(quantized.model)).run(None, {"x0": x})[0]
    assert np.abs(actual - expected).max() <= 4e-6 * np.abs(expected).max()
    assert relative_error(actual, run(prog, x)) < {"4": 0.12, "3": 0.23, "2": 0.42}[form[-1]]
    assert kernels(quantized) == kernels(prog)
    assert bytes_of(quantized) < bytes_of(quantize_all(prog, form)) + 32 * 32 * 4 + 600


def test_blocks_that_are_no_power_of_two_keep_even_steps():
    build, shape = EVERY["depthwise"]
    prog = program(build, shape)
    (site,) = (s for s in HIGGS.sites(prog))
    assert [o.parameters["grid"] for o in HIGGS.options(site, prog, None, None)] == [
        "affine",
        "offset",
        "offset",
    ]
