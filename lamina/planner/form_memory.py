"""What was measured about equivalent forms, on disk: a second run on the same machine measures nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lamina.backends import get_backend
from lamina.backends.backend import Target, Workload
from lamina.backends.measure import Ratio
from lamina.errors import LaminaError, OutputError
from lamina.ir.cache import cache_folder
from lamina.ir.io import write_atomic
from lamina.planner.timing import Relative

FORMAT = 1
Record = dict[str, Any]


class FormMemory:
    """Comparisons and decisions of one device, runtime version, thread count and set of shapes.

    Args:
        target: Where models are timed.
        workload: Shapes and weights; what they feed does not count.
        folder: Where the file lies; the cache folder when omitted.
    """

    def __init__(self, target: Target, workload: Workload, folder: Path | None = None) -> None:
        self.identity = _identity(target, workload)
        digest = _digest(json.dumps(self.identity, sort_keys=True))[:16]
        self.path = (folder or cache_folder()) / f"forms-{digest}.json"
        self._records = self._read()
        self._fresh: dict[str, Record] = {}

    def get(self, *key: str) -> Record | None:
        """What is known under ``key``, or None."""
        return self._records.get(_digest("\n".join(key)))

    def put(self, key: Sequence[str], record: Record) -> None:
        """Keep a record and write it; a folder that cannot be written costs the memory, nothing else."""
        label = _digest("\n".join(key))
        self._records[label] = self._fresh[label] = record
        with suppress(OSError, OutputError):
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        merged = {**self._read(), **self._fresh}  # other processes' additions are kept
        text = json.dumps({"format": FORMAT, **self.identity, "records": merged}, indent=1)
        write_atomic(self.path, text)

    def _read(self) -> dict[str, Record]:
        """What the file holds; nothing where it is absent, corrupt or of another format."""
        try:
            raw = json.loads(self.path.read_text())
            if raw["format"] != FORMAT:
                return {}
            return {str(k): dict(v) for k, v in raw["records"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}


def relative_record(relative: Relative) -> Record:
    """``relative`` as JSON."""
    return asdict(relative)


def read_relative(record: Mapping[str, Any]) -> Relative:
    """What :func:`relative_record` wrote.

    Raises:
        KeyError: The record is of something else.
        TypeError: Likewise.
    """
    cases = {str(name): Ratio(**row) for name, row in record["cases"].items()}
    return Relative(float(record["ratio"]), float(record["low"]), float(record["high"]), cases)


def _identity(target: Target, workload: Workload) -> dict[str, Any]:
    try:
        known = get_backend(target).capabilities(target)
    except LaminaError:  # a backend that cannot say what it is still has a name, threads and options
        known = {}
    cases = [
        [case.name, case.weight, {n: [str(a.dtype), *a.shape] for n, a in sorted(case.feeds.items())}]
        for case in workload
    ]
    return {
        "target": str(target),
        "device": known.get("device"),
        "versions": dict(known.get("versions", {})),
        "workload": cases,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]
