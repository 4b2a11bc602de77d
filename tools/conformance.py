"""All of ONNX's backend models through lamina: the tally, and why each skipped one is skipped.

``python -m tools.conformance`` prints the tally; ``--docs`` also writes ``docs/conformance.md``. The exit
code is 1 when a result changed.
"""

from __future__ import annotations

import argparse
import logging
import platform
import re
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "conformance"), str(ROOT / "tests")]

if TYPE_CHECKING:
    from conformance import Outcome

PAGE = ROOT / "docs" / "conformance.md"
PACKAGES = ("onnx", "onnxruntime", "onnx_ir", "onnxscript", "numpy")
RUNTIMES = {"onnxruntime": "ONNX Runtime", "reference": "reference evaluator"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", action="append", help="run this suite only; may be repeated")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="take every N-th case")
    parser.add_argument("--docs", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    if options.docs and (options.suite or options.every != 1):
        parser.error("--docs wants every case: leave out --suite and --every")
    start = time.monotonic()
    outcomes = run(options.suite or [], options.every)
    page = render(outcomes)
    print(page.split("## Skipped")[0])
    print(f"{time.monotonic() - start:.0f} s")
    if options.docs:
        from lamina.ir.io import write_atomic

        write_atomic(PAGE, page)
    return 1 if any(o.changed for o in outcomes) else 0


def run(suites: Sequence[str], every: int) -> list[Outcome]:
    """Check the chosen cases in all variants, one after the other."""
    from conformance import check
    from onnx_cases import cases, variants

    logging.disable(logging.WARNING)  # onnx_ir and onnxscript say what they skip,
    warnings.simplefilter("ignore")  # the reference evaluator where it divides by zero
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="lamina-conformance-") as folder:
        for position, case in enumerate(cases(*suites)):
            if position % every == 0:
                outcomes += [check(changed, variant, Path(folder)) for variant, changed in variants(case)]
                if position % 200 == 0:
                    print(f"{position + 1} cases", file=sys.stderr, flush=True)
    return outcomes


# -- the page -------------------------------------------------------------------------------------------


def render(outcomes: Sequence[Outcome]) -> str:
    """The whole page; everything in it is counted from ``outcomes``."""
    shipped = [o for o in outcomes if o.variant == "as shipped"]
    parts = [
        _head(outcomes, shipped),
        _tally(outcomes),
        _coverage(outcomes),
        _changes(outcomes),
        "## Skipped\n",
        _refusals(outcomes),
        _nowhere(shipped),
        _elsewhere(shipped),
    ]
    return "\n".join(part for part in parts if part)


def _head(outcomes: Sequence[Outcome], shipped: Sequence[Outcome]) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    changed = sum(bool(o.changed) for o in outcomes)
    compared = sum(o.status in ("same", "changed") for o in outcomes)
    refused = sum(bool(o.refused) for o in shipped)
    undone = sum(bool(o.undone) for o in outcomes)
    return f"""# Conformance

Made by `python -m tools.conformance --docs`; nothing on this page is written by hand.
Measured with {versions}, Python {platform.python_version()}.

**{changed} of {compared} compared results changed.** lamina refused {refused} of {len(shipped)} models.
In {undone} runs a pass failed and was undone.

Every model of the backend suites that ship with the `onnx` package (node, simple, pytorch-operator and
pytorch-converted; {len(shipped)} models) goes through capture, fold, save and load. The saved file then runs
in ONNX Runtime (one thread, its default optimizations) and in onnx's reference evaluator, on the inputs that
ship with the model, wherever the original model itself runs there and gives the outputs that ship with it.
The tolerance is the suite's own (rtol 1e-3 and atol 1e-7 unless a case says otherwise). Each is done twice:
with the folds that always apply, and with every equivalent form that fires on top. Names, order, types, ranks
and dims of inputs and outputs must not change either, nor the caller's model.

The node models have fixed shapes and take their weights as inputs, which leaves the folds little to do. So
each model also runs with all inputs but the first as constants, with all of them as constants, and with the
weights as constants and no input dimension known.
"""


def _tally(outcomes: Sequence[Outcome]) -> str:
    rows: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for outcome in outcomes:
        row = rows[outcome.case.split("/")[0], outcome.variant]
        row[outcome.status] += 1
        row["all"] += 1
        row["touched"] += bool(outcome.fired)
    lines = [
        "| suite | inputs | cases | same | changed | refused | original runs nowhere | a fold fired |",
        "| --- | --- | --: | --: | --: | --: | --: | --: |",
    ]
    keys = ("all", "same", "changed", "refused", "not runnable", "touched")
    for (suite, variant), row in rows.items():
        lines.append(f"| {suite} | {variant} | " + " | ".join(str(row[k]) for k in keys) + " |")
    total = sum(rows.values(), Counter[str]())
    lines.append("| **all** | | " + " | ".join(f"**{total[k]}**" for k in keys) + " |")
    return "\n".join(lines) + "\n"


def _coverage(outcomes: Sequence[Outcome]) -> str:
    lines = ["| runtime | original gives the expected result | so does lamina's |", "| --- | --: | --: |"]
    for runtime, title in RUNTIMES.items():
        runs = [o for o in outcomes if runtime not in o.not_runnable and not o.refused]
        lines.append(f"| {title} | {len(runs)} | {sum(runtime in o.same for o in runs)} |")
    return "\n".join(lines) + "\n"


def _changes(outcomes: Sequence[Outcome]) -> str:
    lines = [
        f"* `{o.case}` ({o.variant}): {_cell(line)}" for o in outcomes for line in (*o.changed, *o.undone)
    ]
    return "\n".join(["## Changed or undone\n", *lines, ""]) if lines else ""


def _refusals(outcomes: Sequence[Outcome]) -> str:
    reasons = {o.case: o.refused for o in outcomes if o.refused}
    if not reasons:
        return "### Refused by lamina\n\nNone.\n"
    lines = [f"| `{case}` | {_cell(reason)} |" for case, reason in reasons.items()]
    return "\n".join(["### Refused by lamina\n", "| case | lamina's error |", "| --- | --- |", *lines, ""])


def _nowhere(shipped: Sequence[Outcome]) -> str:
    lines = [
        "### Not comparable in either runtime\n",
        "These went through capture, fold, save and load too, with their interface checked.\n",
        "| case | ONNX Runtime | reference evaluator |",
        "| --- | --- | --- |",
    ]
    for outcome in shipped:
        if len(outcome.not_runnable) == len(RUNTIMES) and not outcome.refused:
            reasons = " | ".join(_cell(_kind(outcome.not_runnable[r])) for r in RUNTIMES)
            lines.append(f"| `{outcome.case}` | {reasons} |")
    return "\n".join(lines) + "\n"


def _elsewhere(shipped: Sequence[Outcome]) -> str:
    """Grouped by reason: what one runtime does not run and the other does."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for outcome in shipped:
        if len(outcome.not_runnable) == 1:
            ((runtime, reason),) = outcome.not_runnable.items()
            groups[runtime, _kind(reason)].append(outcome.case.removeprefix("node/"))
    lines = [
        "### Compared in one runtime only\n",
        "| the original does not run in | because | cases | which |",
        "| --- | --- | --: | --- |",
    ]
    for (runtime, reason), names in sorted(groups.items(), key=lambda g: (g[0][0], -len(g[1]), g[0][1])):
        listed = ", ".join(f"`{n}`" for n in names)
        lines.append(f"| {RUNTIMES[runtime]} | {_cell(reason)} | {len(names)} | {listed} |")
    return "\n".join(lines) + "\n"


_KINDS = (
    (r"implementation for (\S+?)\(-?\d+\)", r"it has no kernel of \1 for this opset and these types"),
    (r"find kernel for (\S+?)\(-?\d+\)", r"it has no kernel of \1 for this opset and these types"),
    (r"Fatal error: (\S+?)\(-1\) is not a registered", r"it has no operator \1"),
    (r"No registered implementation for operator '(\w+)'", r"it has no operator \1"),
    (r"types of less than a byte", "its Python API does not exchange types of less than a byte"),
    (r"^output '.*", "it answers otherwise than the suite expects"),
    (r"batchwise|Batchwise", "recurrent operators with layout=1 are not supported"),
    (r"name not valid", "the machine has no en_US locale"),
)


def _kind(reason: str) -> str:
    for pattern, text in _KINDS:
        match = re.search(pattern, reason)
        if match:
            return match.expand(text)
    return reason[:160]


def _cell(text: str) -> str:
    """One table cell; no path of the machine that made the page."""
    return re.sub(r"/\S*/", "", text).replace("|", "/").replace("\n", " ").strip()[:300]


if __name__ == "__main__":
    sys.exit(main())
