"""How far each metric can be trusted, on every model of the reference data.

    python -m tools.studies.metric_trust --out DIR [--models resnet20 kwt1]

For each metric: rank correlation and overlap with the damage measured when each site is really changed, what
it costs, and how well two halves of its data agree. Prints a table; writes ``metric_trust.json`` and
``metric_trust.svg`` into DIR, and docs/metric_trust.md and .svg once DIR has everything. What DIR has from a
run that was cut off is kept; ``--kept`` writes tables and docs from that, says what is missing, and measures
nothing. CPU seconds, one thread. Reads ../shared/data (or $LAMINA_REFERENCE).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from tools.studies.metric_trust import report, study
from tools.studies.metric_trust.subjects import NAMES
from tools.studies.metric_trust.truth import KINDS

DOCS = Path(__file__).resolve().parents[3] / "docs"


def main(arguments: list[str] | None = None) -> None:
    """Measure what is missing, print the table, write what is known."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results and of what is kept")
    parser.add_argument("--models", nargs="*", choices=NAMES, default=list(NAMES))
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="kinds of change")
    parser.add_argument("--kept", action="store_true", help="measure nothing: write what is kept")
    options = parser.parse_args(arguments)
    start = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start:6.0f} s] {text}", flush=True)

    results = study.run(options.models, options.out, say, kinds=options.kinds, measuring=not options.kept)
    print(report.write(results, options.out))
    whole = {r["model"] for r in results} >= set(NAMES) and not any(r["missing"] for r in results)
    if whole or options.kept:
        report.write_docs(results, DOCS)
    else:
        say("not everything: docs/metric_trust.md stays as it is")


if __name__ == "__main__":
    from lamina.ir.fx import require_torch

    require_torch()
    import torch

    torch.set_num_threads(1)
    main()
