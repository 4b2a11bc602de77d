"""What metrics ask of the instrumented run, and how much of the data each kind of look may take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

# The mask that is found by itself: zero where a token is padding.
DEFAULT_MASK = "attention_mask"


class Need(Enum):
    """One streaming statistic. A run collects the union of what its metrics need and no more.

    Attributes:
        LENGTHS: Vector lengths of skip, body and sum of each branch, token by token: cosines, norms, voids.
        ANGLES: Cosines between any two depths at each sample's last token.
        TOKENS: The same few tokens at every depth, kept whole: moments, histograms, kernels, linear maps.
        SPECTRA: Eigenvalues of token Gram matrices and turning angles, of a few whole samples.
        VIEWS: Mean vectors of two halves of the tokens of a few samples, at every depth.
        ATTENTION: Attention maps of a few samples, reduced to their ranks.
        INPUTS: Uncentred second moments of what each weighted operator reads, float64.
        VECTORS: Some of what each weighted operator reads, kept whole, and the reach of each of its channels;
            what INPUTS holds but for the moments, which take the square of the width.
        EXAMPLES: Mean vector length of each example at each depth.
        DAMAGES: Measured damage of changing one site (:mod:`lamina.analysis.single_site`); like the two that
            follow, no forward run of the model as it is gives it.
        SKIPS: Effect of skipping a branch on each later depth.
        PAIRS: Damage of changing two sites beyond the sum of theirs.
    """

    LENGTHS = "lengths"
    ANGLES = "angles"
    TOKENS = "tokens"
    SPECTRA = "spectra"
    VIEWS = "views"
    ATTENTION = "attention"
    INPUTS = "inputs"
    VECTORS = "vectors"
    EXAMPLES = "examples"
    DAMAGES = "damages"
    SKIPS = "skips"
    PAIRS = "pairs"


# What the instrumented run collects; the rest is measured on changed programs.
FORWARD = frozenset(Need) - {Need.DAMAGES, Need.SKIPS, Need.PAIRS}


@dataclass(frozen=True)
class Looks:
    """How much of the data the costly statistics look at; drawn evenly over all of it.

    Lengths and angles of token streams take every sample. The rest would cost more than the model: a second
    moment of width d takes d^2 multiply-adds a token, as much as the operator it belongs to. It is drawn from
    one batch of eight, at most eight in all; a batch of which nothing is needed is not run.

    Attributes:
        tokens: Tokens kept at every depth.
        inputs: Input vectors of each weighted operator that enter its second moments.
        patched: Samples that the windows of convolutions are taken from; they leave the runtime whole.
        patched_of: At most one sample of so many is.
        kept: Input vectors of each operator kept whole (for errors of activation quantizers).
        samples: Whole samples for spectra and attention maps.
        views: Samples whose halves are compared with each other.
        images: Samples at which convolutional branches are looked at.
        pixels: Positions of an image that are looked at: an even lattice, or windows of a convolution.
        examples: Examples whose lengths are kept.
        seed: Draws the tokens.
    """

    tokens: int = 2048
    inputs: int = 1024
    patched: int = 16
    patched_of: int = 16
    kept: int = 256
    samples: int = 8
    views: int = 64
    images: int = 256
    pixels: int = 64
    examples: int = 4096
    seed: int = 0


class Needy(Protocol):
    """Anything that says what it needs."""

    @property
    def needs(self) -> frozenset[Need]:
        """What it needs."""


def union(metrics: Iterable[Needy]) -> frozenset[Need]:
    """Everything that any of the metrics needs."""
    return frozenset(need for metric in metrics for need in metric.needs)
