"""Write docs/metrics.md from the registry of metrics.

    python -m tools.metrics_page

A test fails where the page is not what this would write.
"""

from __future__ import annotations

from pathlib import Path

from lamina.analysis.descriptions import metric_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
_INTRO = """# Metrics

Written by `python -m tools.metrics_page` from `lamina/analysis/metrics.py` and `descriptions.py`: do not
edit.

x is what enters a branch, f(x) what the branch adds, x_l the stream at depth l, t a token, E a mean over
samples, L2 the length of a vector, F the Frobenius norm, ' transpose, W the weight of an operator and dW its
rounding error. A *depth* is named by the branch it enters (`end`: what leaves the last). *of* says what is
rated; *high says* what a high value means: `redundant` (can go), `important` (should stay), `sensitive`
(wants bits), with LOW end where it is the low values. Padding (`attention_mask`) is left out everywhere.

*needs* are the statistics that a metric reads. All but damages, skips and pairs come from one instrumented
run that collects the union of what is asked for and no more; those three are measured on changed programs by
`lamina.passes.measured.measured`. *exact or sampled* says what the number is computed from, with the default
`Looks`: "exact" over all samples; else so many, drawn evenly with a seed from one batch in eight, at most
eight. A mean over n draws is off by its spread over the root of n: a metric from {samples} samples orders
only what differs clearly.

`quantization-error-w8` and `-w4` are no ids of METHODS.md: they are the quantization error per operator and
option that the analysis owes, the option in the id. `lamina.analysis.weight_error.quantization_errors` has
every width, for weights alone (`weight`), relative to the output over the calibration distribution
(`output`), and for activations (`activation`).

"""


def page() -> str:
    """The text of the page."""
    from lamina.analysis.needs import Looks

    return _INTRO.format(samples=Looks().samples) + metric_table()


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
