"""One model at a time: truth, ratings and facts, each part kept on disk as soon as it is measured."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lamina.ir.branches import find_branches
from tools.studies.metric_trust import facts, ratings, subjects
from tools.studies.metric_trust.ratings import TRACED, Rating, attempt
from tools.studies.metric_trust.subjects import Subject
from tools.studies.metric_trust.truth import KINDS, Measured, Variants, measure, variants_of

Say = Callable[[str], None]
Json = dict[str, Any]
# Raise it when what is measured changes: parts of other versions are measured again.
VERSION = 1


def run(
    names: Sequence[str], out: Path, say: Say, *, kinds: Sequence[str] = KINDS, measuring: bool = True
) -> list[Json]:
    """Study the models; parts that ``out`` has, of the same model and samples, are not measured again.

    Args:
        names: Of :data:`tools.studies.metric_trust.subjects.NAMES`.
        out: Keeps the parts.
        say: Told what begins.
        kinds: Kinds of change to measure; others are taken where they are kept.
        measuring: Whether anything is measured that is not kept.
    """
    out.mkdir(parents=True, exist_ok=True)
    return [
        study(subjects.load(name), out / "parts" / name, say, kinds=kinds, measuring=measuring)
        for name in names
    ]


def study(
    subject: Subject, folder: Path, say: Say, *, kinds: Sequence[str] = KINDS, measuring: bool = True
) -> Json:
    """Everything measured of one model.

    Args:
        subject: The model and its data.
        folder: Keeps a JSON file a part: a run that is cut off goes on behind the last one.
        say: Told what begins.
        kinds: As for :func:`run`.
        measuring: As for :func:`run`.

    Returns:
        Its name, samples, seconds of a plain run, branches, ratings, truths, facts, refusals, and the parts
        that are ``missing``, by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = _Kept(folder, signature(subject), f"{subject.name}: ", say)
    kept.measuring = measuring
    branches = [[b.name, b.kind] for b in find_branches(subject.program).branches]
    plain = kept("plain run", lambda told: ratings.plain_run_seconds(subject))
    parts = [
        kept("forward", lambda told: [*ratings.forward(subject), *ratings.of_weights(subject)]),
        kept("gradients", lambda told: attempt(lambda: ratings.gradients(subject), told, "gradients")),
    ]
    truths: Json = {}
    for kind in KINDS:
        variants = _Made(subject, kind)
        kept.measuring = measuring and kind in kinds
        part = kept(f"truth {kind}", lambda told, made=variants: _truth(subject, made()))
        if part is None or not part["value"]["sites"]:
            continue
        truths[kind] = part["value"]
        parts.append(kept(f"ratings {kind}", lambda told, made=variants: _ratings(subject, made, told)))
    kept.measuring = measuring
    known = kept("facts", lambda told: facts.facts(subject))
    found = [part for part in parts if part is not None]
    return {
        "model": subject.name,
        "inputs": subject.inputs,
        "task": subject.task,
        "calibration": subject.calibration.samples,
        "report": subject.report.samples,
        "branches": branches,
        "plain_run_s": float("nan") if plain is None else plain["value"],
        "truths": truths,
        "ratings": [rating for part in found for rating in part["value"]],
        "refused": {name: why for part in found for name, why in part["refused"].items()},
        "facts": {"pairs": {}} if known is None else known["value"],
        "missing": kept.missing,
        "seconds": kept.seconds,
    }


def signature(subject: Subject) -> str:
    """Of the model and of the samples: a part measured on others is of no use."""
    digest = hashlib.sha256(f"{VERSION} {subject.program.fingerprint} {subject.task}".encode())
    for data in (subject.calibration, subject.report):
        for name, array in (*data.inputs.items(), *data.extras.items()):
            digest.update(f"{name} {array.shape} {array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class _Kept:
    """Parts on disk; ``seconds`` sums what they took, in this run and in earlier ones.

    While ``measuring`` is off, what is not kept is None and its name ``missing``.
    """

    def __init__(self, folder: Path, signed: str, prefix: str, say: Say) -> None:
        self._folder, self._signed, self._prefix, self._say = folder, signed, prefix, say
        self.seconds, self.measuring = 0.0, True
        self.missing: list[str] = []

    def __call__(self, name: str, make: Callable[[dict[str, str]], Any]) -> Json | None:
        path = self._folder / f"{name.replace(' ', '-')}.json"
        part = _read(path)
        if part is None or part.get("signature") != self._signed:
            if not self.measuring:
                self.missing.append(name)
                return None
            self._say(self._prefix + name)
            start, told = time.perf_counter(), {}
            value = make(told)
            if isinstance(value, list):
                value = [v.plain() if isinstance(v, Rating) else v for v in value]
            took = time.perf_counter() - start
            part = {"signature": self._signed, "value": value, "refused": told, "seconds": took}
            temporary = path.with_suffix(".new")
            temporary.write_text(json.dumps(part))
            temporary.replace(path)
        self.seconds += part["seconds"]
        return part


def _read(path: Path) -> Json | None:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


class _Made:
    """The changed programs of a kind, made once and only if something asks for them."""

    def __init__(self, subject: Subject, kind: str) -> None:
        self._subject, self.kind = subject, kind
        self._variants: Variants | None = None

    def __call__(self) -> Variants:
        if self._variants is None:
            self._variants = variants_of(self._subject.program, self._subject.calibration, self.kind)
        return self._variants


def _truth(subject: Subject, variants: Variants) -> Json:
    """Damage on report samples, which no metric sees."""
    if not variants:
        return {"sites": 0}
    found: Measured = measure(subject.program, variants, subject.report, subject.task)
    return {
        "sites": len(variants),
        "metric": found.metric,
        "samples": found.samples,
        "divergence": found.on(slice(None)),
        "halves": [found.on(slice(0, None, 2)), found.on(slice(1, None, 2))],
        "task": dict(found.task),
        "seconds": found.seconds,
    }


def _ratings(subject: Subject, made: _Made, told: dict[str, str]) -> list[Rating]:
    kind, variants = made.kind, made()
    found = attempt(lambda: ratings.measured(subject, kind, variants), told, f"measured, {kind}")
    found += ratings.baselines(subject, kind, variants)
    if kind in TRACED:
        found += attempt(lambda: ratings.traced(subject, kind, variants), told, f"gradient-trace, {kind}")
    return found
