"""One model at a time: truth, ratings, and a JSON file that holds both."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.studies.metric_trust import ratings, subjects
from tools.studies.metric_trust.ratings import TRACED, Rating, attempt
from tools.studies.metric_trust.truth import measure, variants_of


def run(names: list[str], out: Path, say: Callable[[str], None]) -> None:
    """Study the models that ``out`` does not have yet; what is done is kept if the run is cut off."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = out / f"{name}.json"
        if path.exists():
            say(f"{name}: kept from before")
            continue
        start = time.perf_counter()
        found = study(name, out / f"{name}.parts", say)
        found["seconds"] = time.perf_counter() - start
        temporary = path.with_suffix(".new")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(path)
        say(f"{name}: done in {found['seconds']:.0f} s")


def study(name: str, parts: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Truth and ratings of one model; each kind of change is saved in ``parts`` once it is measured."""
    subject = subjects.load(name)
    told: dict[str, str] = {}
    parts.mkdir(exist_ok=True)
    whole = _kept(parts / "whole.json", lambda: _whole(subject, say))
    found: list[dict[str, Any]] = [*whole["ratings"]]
    told.update(whole["refused"])
    truths: dict[str, Any] = {}
    for kind, variants in variants_of(subject.program, subject.calibration):
        if not variants:
            continue

        def measure_kind(kind: str = kind, variants: Any = variants) -> dict[str, Any]:
            return _kind(subject, kind, variants, say)

        part = _kept(parts / f"{kind}.json", measure_kind)
        truths[kind] = part["truth"]
        found += part["ratings"]
        told.update(part["refused"])
    return {
        "model": name,
        "inputs": subject.inputs,
        "calibration": subject.calibration.samples,
        "plain_run_s": whole["plain_run_s"],
        "truths": truths,
        "ratings": found,
        "refused": told,
    }


def _whole(subject: subjects.Subject, say: Callable[[str], None]) -> dict[str, Any]:
    told: dict[str, str] = {}
    say(f"{subject.name}: forward metrics")
    found = attempt(lambda: ratings.forward(subject), told, "forward metrics")
    say(f"{subject.name}: gradients")
    found += attempt(lambda: ratings.gradients(subject), told, "gradients")
    plain = ratings.plain_run_seconds(subject)
    return {"ratings": [r.plain() for r in found], "refused": told, "plain_run_s": plain}


def _kind(subject: subjects.Subject, kind: str, variants: Any, say: Callable[[str], None]) -> dict[str, Any]:
    told: dict[str, str] = {}
    say(f"{subject.name}: {kind}, {len(variants)} sites on {subject.report.samples} samples")
    truth = measure(subject.program, variants, subject.report, subject.task)
    found: list[Rating] = attempt(lambda: ratings.measured(subject, kind, variants), told, f"measured, {kind}")
    found += ratings.baselines(subject, kind, list(variants))
    if kind in TRACED:
        found += attempt(lambda: ratings.traced(subject, kind, variants), told, f"gradient-trace, {kind}")
    say(f"{subject.name}: {kind} took {truth['seconds']:.0f} s")
    return {"truth": truth, "ratings": [r.plain() for r in found], "refused": told}


def _kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    made = make()
    path.write_text(json.dumps(made))
    return made
