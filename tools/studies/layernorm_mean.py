"""What fold-layernorm-mean and fold-norm-affine change in the latency of pre-norm encoders.

    python -m tools.studies.layernorm_mean

Encoders exported by torch, random weights, ONNX Runtime's default session at one thread. Each row gives the
CPU time of a form relative to the same encoder with the plain folds only (median, 10th and 90th percentile
over alternating rounds), and the largest difference of outputs relative to the largest output.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lamina.backends import get_backend
from lamina.backends.backend import Target
from lamina.ir.capture import capture
from lamina.ir.program import Program
from lamina.passes.fold import fold
from lamina.planner.timing import Stopwatch
from lamina.workload import parse_workload

SIZES = ((64, 6, 16), (64, 6, 128), (128, 6, 16), (128, 6, 128), (256, 6, 16), (256, 6, 128), (512, 4, 128))
FORMS: Mapping[str, tuple[str, ...]] = {
    "norm-affine": ("fold_norm_affine",),
    "layernorm-mean": ("fold_layernorm_mean",),
    "both": ("fold_layernorm_mean", "fold_norm_affine"),
    "both, sums split": ("fold_layernorm_mean", "fold_norm_affine", "split_residual_sum"),
    "sums split only": ("split_residual_sum",),
}


class _Encoder(nn.Module):
    def __init__(self, width: int, depth: int, length: int) -> None:
        super().__init__()
        self.table, self.positions = nn.Embedding(1000, width), nn.Parameter(torch.randn(1, length, width))
        layer = nn.TransformerEncoderLayer(
            width, width // 32, 4 * width, batch_first=True, norm_first=True, activation="relu"
        )
        self.encoder = nn.TransformerEncoder(
            layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, 10)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.encoder(self.table(ids) + self.positions)[:, 0])
        return found


def encoder(width: int, depth: int, length: int) -> Program:
    """A pre-norm encoder with random weights, gains and biases."""
    torch.manual_seed(0)
    net = _Encoder(width, depth, length).eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.2)
    return capture(net, example_inputs=(torch.randint(0, 1000, (1, length)),))


def difference(first: Program, second: Program) -> float:
    """The largest difference of outputs, relative to the largest output."""
    target = Target.parse("ort:cpu?threads=1")
    run, other = (get_backend(target).compile(p.model, target).run for p in (first, second))
    (port,) = first.inputs
    feed = {
        port.name: np.random.default_rng(1).integers(
            0, 1000, [d if isinstance(d, int) else 1 for d in port.shape]
        )
    }
    name = first.outputs[0].name
    expected, got = run(feed)[name], other(feed)[name]
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def rows(seconds: float, forms: tuple[str, ...]) -> Iterator[str]:
    """One line a size and form."""
    target = Target.parse("ort:cpu?threads=1")
    for width, depth, length in SIZES:
        program = encoder(width, depth, length)
        plain, _, _ = fold(program, forms=forms)
        others = {label: fold(program, forms=(*forms, *names))[0] for label, names in FORMS.items()}
        workload = parse_workload(None, plain, None)
        with (
            tempfile.TemporaryDirectory() as folder,
            Stopwatch(get_backend(target), target, workload, plain.model, Path(folder)) as stopwatch,
        ):
            found = stopwatch.compare([p.model for p in others.values()], seconds=seconds)
        for (label, other), relative in zip(others.items(), found, strict=True):
            error = difference(program, other)
            spread = f"{relative.ratio:.3f} ({relative.low:.3f} to {relative.high:.3f})"
            yield f"| {width} x {depth}, {length} tokens | {label} | {spread} | {error:.1e} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size")
    parser.add_argument("--forms", nargs="*", default=["fuse_gelu"], help="forms that every row has")
    arguments = parser.parse_args()
    print("| encoder | form | CPU time | error |\n| --- | --- | --- | --- |")
    for row in rows(arguments.seconds, tuple(arguments.forms)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
