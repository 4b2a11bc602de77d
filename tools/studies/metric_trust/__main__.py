"""How far each metric can be trusted, on every model of the reference data.

    python -m tools.studies.metric_trust --out DIR [--models resnet20 kwt1]   measure; goes on where it stopped
    python -m tools.studies.metric_trust --out DIR --docs                     tables and plot for docs/

For each metric: rank correlation and overlap with the damage measured when each site is really changed, the
seconds it costs on one thread, and the samples after which its ranks settle. Reads ../shared/data (or
$LAMINA_REFERENCE).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tools.studies.metric_trust import report, study
from tools.studies.metric_trust.subjects import NAMES


def main() -> None:
    """Measure, or write what was measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results, one file a model")
    parser.add_argument("--models", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--docs", action="store_true", help="write docs/metric_trust.md and .svg from --out")
    arguments = parser.parse_args()
    if arguments.docs:
        report.write(arguments.out, Path(__file__).resolve().parents[3] / "docs")
        return
    start = time.perf_counter()
    study.run(
        arguments.models,
        arguments.out,
        lambda text: print(f"[{time.perf_counter() - start:6.0f} s] {text}", flush=True),
    )


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    main()
