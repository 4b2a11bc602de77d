"""What an analysis says in words, and the command that would act on it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from lamina.report.scores import Scores, redundancy, sensitivity
from lamina.report.text import number, percent, shorten
from lamina.report.tree import whole_time

# Names in a sentence, and cells each may take.
NAMED, NAME_WIDTH = 4, 40
# Below this share of the largest damage dropping a branch is cheap; above it, only the least bad.
CHEAP = 0.1
# Relative squared output error from which an operator is called sensitive.
LARGE_ERROR = 0.01


def reading(
    found: Mapping[str, Any], redundant: Scores | None = None, sensitive: Scores | None = None
) -> list[str]:
    """Two or three sentences: what looks redundant, what is sensitive, what the figures rest on.

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        redundant: :func:`lamina.report.scores.redundancy` of it; None: computed here.
        sensitive: :func:`lamina.report.scores.sensitivity` of it; None: computed here.
    """
    redundant = redundant or redundancy(found)
    sensitive = sensitive or sensitivity(found)
    said = [_redundant(found, redundant), _sensitive(found, sensitive)]
    if not found["samples"]["all"]:
        said = [
            "No samples were given, so there are costs and nothing on redundancy or sensitivity: add --data."
        ]
    elif "output-kl" not in (redundant.source.metric if redundant else "", *found["matrices"]):
        said.append(
            "Both columns are estimates from one run; --damages measures them by really changing the model."
        )
    return [sentence for sentence in said if sentence]


def suggestion(
    found: Mapping[str, Any], model: str, data: str | None, target: str, metric: str | None
) -> list[str]:
    """The ``lamina optimize`` command that would act on the analysis, as quoted words of a shell.

    Args:
        found: What :func:`lamina.inspection.analyze` gives.
        model: Path of the model, as the user wrote it.
        data: Path of the samples, or None.
        target: The target, as the user wrote it.
        metric: A metric that the samples carry what is needed for; None: none is known, so that latency is
            bounded and the divergence of the outputs is kept least.
    """
    words = ["lamina", "optimize", model, "-o", "optimized"]
    words += ["--budget", "drop<=1%" if metric else "latency<=0.7x"]
    if data is not None:
        words += ["--data", data]
    if metric:
        words += ["--metric", metric]
    words += ["--target", target]
    offered = {offer["transform"] for offer in found["offers"]}
    if offered and not offered & {"drop", "direct-matching"}:
        words += ["--transforms", ",".join(sorted(offered))]
    return [shlex.quote(word) for word in words]


def _redundant(found: Mapping[str, Any], scores: Scores | None) -> str:
    if not found["branches"]:
        return "The model has no residual branch, so nothing can be dropped whole; its operators are left."
    if scores is None:
        return f"Its {len(found['branches'])} branches were not rated by any redundancy metric."
    values, names = scores.values, list(scores.marked)
    held = _held(found, names)
    listed = _listed(names, values)
    if scores.source.metric != "output-kl":
        return f"Most redundant by {scores.source.metric} look {listed}{held}."
    unit = _unit(found)
    if values[names[0]] > CHEAP * max(values.values()):
        return f"No branch is cheap to drop: the least harmful cost {listed}, in {unit}."
    cheap = [name for name in names if values[name] <= CHEAP * max(values.values())]
    listed = _listed(cheap, values)
    return f"Cheapest to drop, measured one at a time in {unit}, are {listed}{_held(found, cheap)}."


def _sensitive(found: Mapping[str, Any], scores: Scores | None) -> str:
    if scores is None or not scores.marked:
        return ""
    values, names = scores.values, list(scores.marked)
    largest = values[names[0]]
    if scores.source.metric.startswith("quantization-error"):
        if largest < LARGE_ERROR:
            return (
                f"No operator is sensitive by {scores.source.metric}: even {_listed(names[:1], values)} "
                "changes its output by less than a hundredth of its energy."
            )
        return (
            f"Most sensitive by {scores.source.metric} are {_listed(names, values)}: keep bits there first."
        )
    measured = f", measured in {_unit(found)}," if scores.source.metric.startswith("output-kl") else ""
    share = sum(values[n] for n in names) / (sum(max(v, 0.0) for v in values.values()) or 1.0)
    return (
        f"{len(names)} of {len(values)} operators hold {percent(share)} of the sensitivity by "
        f"{scores.source.metric}{measured} first {_listed(names, values)}: keep bits there."
    )


def _listed(names: Sequence[str], values: Mapping[str, float]) -> str:
    said = [f"{shorten(name, NAME_WIDTH)} ({number(values[name])})" for name in names[:NAMED]]
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(said) + more


def _held(found: Mapping[str, Any], names: Sequence[str]) -> str:
    """What the branches cost together: each node once, as branches nest."""
    nodes = {n for b in found["branches"] if b["name"] in set(names) for n in b["members"]}
    parts = [o for o in found["operators"] if o["name"] in nodes]
    time = whole_time(found)
    parameters = percent(sum(p["parameters"] for p in parts) / (found["totals"]["parameters"] or 1))
    if not time:
        return f", together {parameters} of the parameters"
    share = percent(sum(p["latency_s"] or 0.0 for p in parts) / time)
    return f", together {share} of the time and {parameters} of the parameters"


def _unit(found: Mapping[str, Any]) -> str:
    name = found["damages"].get("metric", "")
    return {"kl": "nats of KL divergence", "cosine": "1 - cosine", "relative-l2": "relative L2"}.get(
        name, name
    )
