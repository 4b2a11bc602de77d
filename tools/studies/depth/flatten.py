"""Blocks flattened or run in parallel, against dropping as much: damage and latency.

    python -m tools.studies.depth.flatten stories260k kwt1 minilm resnet56 --out flatten.json

Every pair of neighbouring blocks is flattened, as a whole and one kind of branch at a time, at either place;
where nothing stands between the sums the branches of each block, and of each pair, also read one stream. Next
to each stands the drop that takes out as many operators: one of the two blocks, or one of the two branches of
a kind, whichever is missed less. Choices are made by divergence on samples of the selection set; the best
pair of each way is then scored on the report set, with the drop of its own pair and the best such drop of the
model. Latency is the CPU time of the finished model over the original's, one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lamina.ir.branches import Block
from lamina.ir.program import Program
from lamina.passes.drop_branch import apply_drops
from lamina.passes.joining.branch_chains import BranchChain, BranchChains
from lamina.passes.joining.flatten_blocks import flatten_blocks
from lamina.passes.joining.parallel_layers import parallel_layers
from tools.bench.cases import CASES, Case
from tools.studies.depth.scoring import Study

MODELS = ("stories260k", "kwt1", "minilm", "resnet56")
Make = Callable[[Program], Program]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One way to change one place.

    Attributes:
        way: ``flatten``, ``flatten attention``, ``parallel block``, ...
        where: Names of the blocks.
        make: Gives the changed program.
        drops: Sets of branches of which one is dropped instead.
    """

    way: str
    where: str
    make: Make
    drops: tuple[tuple[str, ...], ...]


def trials(program: Program) -> Iterator[Trial]:
    """Everything that is tried on a program."""
    chains = BranchChains(program)
    blocks = chains.found.blocks
    for first, second in pairwise(blocks):
        chain = chains.of_blocks(first, second) if first.run == second.run else "another structure"
        if not isinstance(chain, BranchChain):
            continue
        yield from _flattened(first, second, chain)
        if not chain.norms and len(first.branches) > 1:
            names = [*first.branches, *second.branches]
            drops = (first.branches, second.branches)
            yield Trial("parallel pair", _where(first, second), _parallel(names), drops)
    for block in blocks:
        chain = chains.of_blocks(block)
        if isinstance(chain, BranchChain) and not chain.norms and len(block.branches) > 1:
            drops = tuple((name,) for name in block.branches)
            yield Trial("parallel block", block.name, _parallel(block.branches), drops)


def _where(first: Block, second: Block) -> str:
    return f"{first.name}+{second.name}"


def _flattened(first: Block, second: Block, chain: BranchChain) -> Iterator[Trial]:
    def make(option: str) -> Make:
        return lambda program: flatten_blocks(program, first.name, second.name, option)

    whole = (first.branches, second.branches)
    yield Trial("flatten", _where(first, second), make("flatten"), whole)
    if len(first.branches) > 1:
        for a, b, branch in zip(first.branches, second.branches, chain.branches, strict=False):
            way = f"flatten {branch.kind}"
            for option in (way, f"{way} late"):
                yield Trial(option, _where(first, second), make(option), ((a,), (b,)))


def _parallel(names: Sequence[str]) -> Make:
    return lambda program: parallel_layers(program, names)


@dataclass
class Pages:
    """Divergences of drops, each measured once, and facts of finished models."""

    study: Study
    tell: Tell

    def __post_init__(self) -> None:
        self._drops: dict[tuple[str, ...], float] = {}
        self._facts: dict[tuple[str, ...], dict[str, Any]] = {}

    def dropped(self, names: tuple[str, ...]) -> float:
        """Divergence without some branches, on selection samples."""
        if names not in self._drops:
            self._drops[names] = self.study.order.diverges(apply_drops(self.study.program, names))
        return self._drops[names]

    def facts(self, label: tuple[str, ...], program: Program) -> dict[str, Any]:
        """Score on report samples, and latency."""
        if label not in self._facts:
            found = self.study.report.report(self.study.report(program)) | self.study.latency(program)
            found["operators"] = len(list(program.graph))
            self._facts[label] = found
            self.tell(f"{self.study.case.name} {' '.join(label)}: {json.dumps(found)}")
        return self._facts[label]


def study(case: Case, options: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """What was measured on one reference model."""
    about = Study.of(case, options.order_samples, options.report_samples, options.forms)
    pages = Pages(about, tell)
    tried: dict[str, list[dict[str, Any]]] = {}
    for trial in trials(about.program):
        drop = min(trial.drops, key=pages.dropped)
        entry = {"where": trial.where, "divergence": about.order.diverges(trial.make(about.program))}
        tried.setdefault(trial.way, []).append(
            {**entry, "drop": list(drop), "drop_divergence": pages.dropped(drop), "trial": trial}
        )
    rows = []
    for way, entries in tried.items():
        best = min(entries, key=lambda e: float(e["divergence"]))
        model = min(entries, key=lambda e: float(e["drop_divergence"]))
        own, any_drop = tuple(best["drop"]), tuple(model["drop"])
        rows.append(
            {
                "way": way,
                "where": best["where"],
                "changed": pages.facts((way, best["where"]), best["trial"].make(about.program)),
                "drop": {"branches": own, **pages.facts(own, apply_drops(about.program, own))},
                "best_drop": {
                    "branches": any_drop,
                    **pages.facts(any_drop, apply_drops(about.program, any_drop)),
                },
                "pairs": [{k: v for k, v in e.items() if k != "trial"} for e in entries],
            }
        )
    return {
        "model": case.name,
        "metric": case.metric,
        "divergence": about.report.divergence.name,
        "operators": len(list(about.program.graph)),
        "forms": list(options.forms),
        "n": {"order": about.order.samples, "report": about.report.samples},
        "original": about.report.report(about.report.original),
        "rows": rows,
    }


def table(model: dict[str, Any]) -> Iterator[str]:
    """One Markdown table a model."""
    yield f"### {model['model']}" + (f", with {', '.join(model['forms'])}" if model["forms"] else "")
    yield ""
    yield (
        f"{model['metric']} {model['original']['report']:.4f} of the original, "
        f"{model['operators']} operators; n = {model['n']['order']} for the choice, "
        f"{model['n']['report']} report."
    )
    yield ""
    yield "| way, best pair | changed | drop in that pair | best such drop | better than the drop |"
    yield "| - | - | - | - | - |"
    for row in model["rows"]:
        wins = sum(p["divergence"] < p["drop_divergence"] for p in row["pairs"])
        cells = [_cell(row[k]) for k in ("changed", "drop", "best_drop")]
        cells[1] += f" ({', '.join(row['drop']['branches'])})"
        cells[2] += f" ({', '.join(row['best_drop']['branches'])})"
        yield f"| {row['way']}, {row['where']} | {' | '.join(cells)} | {wins} of {len(row['pairs'])} pairs |"
    yield ""


def _cell(facts: dict[str, Any]) -> str:
    """Latency, damage with its interval, and divergence."""
    low, high = facts["damage_ci95"] or (float("nan"), float("nan"))
    damage = f"{100 * facts['damage']:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"
    return f"{facts['latency']:.3f}; {damage}; {facts['divergence']:.3g}; {facts['operators']} operators"


def main() -> None:
    """Study the models named on the command line, write JSON, print tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.flatten",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("models", nargs="*", help="reference models; all with branches if none")
    parser.add_argument("--order-samples", type=int, default=64, help="selection samples choices are made on")
    parser.add_argument("--report-samples", type=int, help="report samples, evenly; all if not given")
    parser.add_argument("--forms", nargs="*", default=[], help="exact forms to fold with")
    parser.add_argument("--out", type=Path, default=Path("flatten.json"))
    options = parser.parse_args()
    done: list[dict[str, Any]] = []
    for case in CASES:
        if case.name in (options.models or MODELS):
            done.append(study(case, options, lambda note: print(note, flush=True)))
            options.out.write_text(json.dumps(done, indent=1))
            print("\n".join(table(done[-1])), flush=True)


if __name__ == "__main__":
    main()
