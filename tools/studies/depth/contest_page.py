"""docs/depth_contest.md and its plots from what ``python -m tools.studies.depth.contest`` measured.

python -m tools.studies.depth.contest_page kwt1.json stories260k.json --docs docs
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from lamina.report.drawing import svg
from tools.studies.depth.contest import MIX, PAIRS
from tools.studies.depth.contest_plot import plot

Json = Mapping[str, Any]
_INTRO = """# The planner's mix against every single rule

Written by `python -m tools.studies.depth.contest_page` from what `python -m tools.studies.depth.contest`
measured: do not edit. At each share of the folded model's latency every contender looks for the plan of least
damage on selection samples: each rule by its own plans, each transform alone, drops of one kind of branch
alone ("only ..."), and the planner with all of them. What each chose is built; **latency** is CPU time over
the original's on one thread, all plans of a model timed in alternation, weighted over its timed shapes;
**damage** is points of top-1 or Spearman, percent of the loss, on report samples that nothing else saw, with
the 95 % interval of a paired bootstrap. A contender that has no plan within a latency is left out of the row.
*Compensated*: the same plan with its weights refitted, where that lowered the damage on selection samples;
`-` where it did not, or where the plan was not among the few that were tried. Of the planner's compensated
plans it is the one of least damage on selection samples, as in a run.
"""


def page(models: Sequence[Json]) -> str:
    """The whole page, Markdown."""
    lines = [_INTRO]
    lines += ["## The planner and the best single rule or transform", "", *_summary(models), ""]
    lines += ["## Claims", "", *_claims(models), ""]
    lines += [
        "Divergence of the outputs with one branch dropped, on selection samples:",
        "",
        *_kinds(models),
        "",
    ]
    for model in models:
        lines += [*_model(model), ""]
    return "\n".join(lines)


def decided(interval: Sequence[float] | None) -> int:
    """-1 where the first plan does less damage, 1 where it does more, 0 where samples do not tell."""
    if interval is None:
        return 0
    _, low, high = interval
    return -1 if high < 0 else int(low > 0)


def verdict(signs: Sequence[int]) -> str:
    """What comparisons say of a claim that the first does less damage."""
    better, worse = signs.count(-1), signs.count(1)
    if not signs:
        return "not testable"
    if better and not worse:
        return "reproduced"
    if worse:
        return "not reproduced" if not better else "not reproduced: depends on the model"
    return "not told apart"


def _summary(models: Sequence[Json]) -> Iterator[str]:
    yield (
        "| model | share | planner: latency | damage | best other | its latency | its damage "
        "| planner minus it (95 %) | |"
    )
    yield "| " + " | ".join("-" * 9) + " |"
    for model in models:
        for level in model["levels"]:
            plans = {p["name"]: p for p in level["plans"] if p["plan"] is not None}
            others = [p for name, p in plans.items() if name != MIX]
            if MIX not in plans or not others:
                found = "nothing" if MIX not in plans else "a plan, no other contender one"
                yield f"| {model['model']} | {level['share']} | the planner found {found} | | | | | | |"
                continue
            mix = plans[MIX]["plan"]
            best = min(others, key=lambda p: p["plan"]["damage"])
            cells = [
                model["model"],
                f"{level['share']}",
                f"{mix['latency']:.3f}",
                _points(mix["damage"], mix["damage_ci95"]),
                best["name"],
                f"{best['plan']['latency']:.3f}",
                _points(best["plan"]["damage"], best["plan"]["damage_ci95"]),
                _points(best["planner_minus"][0], best["planner_minus"][1:]),
                _word(mix, best),
            ]
            yield "| " + " | ".join(cells) + " |"


def _word(mix: Json, best: Json) -> str:
    if mix["sites"] == best["plan"]["sites"]:
        return "same plan"
    return {-1: "better", 0: "not told apart", 1: "**worse**"}[decided(best["planner_minus"])]


def _claims(models: Sequence[Json]) -> Iterator[str]:
    yield "| does less damage | than | " + " | ".join(m["model"] for m in models) + " | verdict |"
    yield "| " + " | ".join("-" for _ in range(len(models) + 3)) + " |"
    for first, second in PAIRS:
        cells, signs = [], []
        for model in models:
            found = [
                (level["share"], claim["first_minus_second"])
                for level in model["levels"]
                for claim in level["claims"]
                if (claim["first"], claim["second"]) == (first, second)
            ]
            signs += [decided(interval) for _, interval in found]
            cells.append("; ".join(f"{share}: {_points(i[0], i[1:])}" for share, i in found) or "-")
        yield f"| {first} | {second} | " + " | ".join(cells) + f" | {verdict(signs)} |"


def _kinds(models: Sequence[Json]) -> Iterator[str]:
    yield "| model | kind | branches | least | median | most |"
    yield "| - | - | - | - | - | - |"
    for model in models:
        for kind, found in model["alone"].items():
            spread = " | ".join(f"{found[key]:.3g}" for key in ("least", "median", "most"))
            yield f"| {model['model']} | {kind} | {found['n']} | {spread} |"


def _model(model: Json) -> Iterator[str]:
    n = model["n"]
    yield f"## {model['model']}"
    yield ""
    yield (
        f"{model['metric']} {model['original']['report']:.4f} of the original; folding alone is at "
        f"{model['base_latency']:.3f} of its latency. n = {n['calibration']} calibration, "
        f"{n['selection']} selection, {n['report']} report; {model['seconds']:g} s a search."
    )
    yield ""
    yield f"![{model['model']}](figures/depth_contest_{model['model']}.svg)"
    yield ""
    heads = ("share", "contender", "latency (10-90 %)", "damage (95 %)", model["divergence"])
    yield "| " + " | ".join([*heads, "compensated", "moves"]) + " |"
    yield "| - | - | - | - | - | - | - |"
    for level in model["levels"]:
        plans = [p for p in level["plans"] if p["plan"] is not None]
        plans.sort(key=lambda p: (p["plan"]["damage"], p["plan"]["sites"]))
        for _, same in groupby(plans, key=lambda p: p["plan"]["sites"]):
            group = list(same)
            plan = group[0]["plan"]
            low, high = plan["latency_spread"]
            mended = plan.get("compensated")
            cells = [
                f"{level['share']}",
                ", ".join(p["name"] for p in group),
                f"{plan['latency']:.3f} ({low:.2f}-{high:.2f})",
                _points(plan["damage"], plan["damage_ci95"]),
                f"{plan['divergence']:.3g}",
                "-" if mended is None else _points(mended["damage"], mended["damage_ci95"]),
                ", ".join(f"{count} {name}" for name, count in plan["moves"].items()) or "none",
            ]
            yield "| " + " | ".join(cells) + " |"


def _points(value: float, interval: Sequence[float] | None) -> str:
    spread = "" if interval is None else f" ({100 * interval[0]:+.2f} to {100 * interval[1]:+.2f})"
    return f"{100 * value:+.2f}{spread}"


def main() -> None:
    """Write the page and one plot a model."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.studies.depth.contest_page",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", type=Path, help="JSON of the contest")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="where the page goes")
    options = parser.parse_args()
    models = [model for file in options.files for model in json.loads(file.read_text())]
    (options.docs / "figures").mkdir(parents=True, exist_ok=True)
    (options.docs / "depth_contest.md").write_text(page(models))
    for model in models:
        (options.docs / "figures" / f"depth_contest_{model['model']}.svg").write_text(svg(plot(model)))


if __name__ == "__main__":
    main()
