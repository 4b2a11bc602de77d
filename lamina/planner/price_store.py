"""Measured prices on disk: one readable JSON file a device, runtime version and thread count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lamina.errors import OutputError
from lamina.ir.cache import cache_folder
from lamina.ir.io import write_atomic

FORMAT = 2


@dataclass(frozen=True)
class Price:
    """One measurement.

    Attributes:
        signature: What was measured, readable.
        seconds: Time of one run of the unit.
        spread: Difference between slowest and fastest burst, in seconds.
        replicas: Copies the micro-model held.
        date: When, ISO 8601.
        quiet: Whether other work on the machine cannot have mattered; else it is measured again when the
            machine is quiet.
    """

    signature: str
    seconds: float
    spread: float
    replicas: int
    date: str
    quiet: bool


class PriceStore:
    """Prices of one device, read once, written atomically; other processes' additions are kept.

    Args:
        identity: Device, versions, threads and options: JSON values that prices depend on.
        folder: Where the file lies; :func:`lamina.ir.cache.cache_folder` when omitted.
    """

    def __init__(self, identity: Mapping[str, Any], folder: Path | None = None) -> None:
        self.identity = dict(identity)
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (folder or cache_folder()) / f"prices-{digest}.json"
        self._prices = self._read()
        self._fresh: dict[str, Price] = {}

    def get(self, signature: str) -> Price | None:
        """The price of a signature, or None."""
        return self._prices.get(_key(signature))

    def put(self, price: Price) -> None:
        """Keep a price in memory; :meth:`save` writes it."""
        self._prices[_key(price.signature)] = price
        self._fresh[_key(price.signature)] = price

    def save(self) -> None:
        """Write what is new; a folder that cannot be written costs the cache, nothing else."""
        if not self._fresh:
            return
        with suppress(OSError, OutputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            merged = {**self._read(), **self._fresh}
            rows = {key: asdict(price) for key, price in sorted(merged.items())}
            text = json.dumps({"format": FORMAT, **self.identity, "prices": rows}, indent=1)
            write_atomic(self.path, text)
            self._fresh.clear()

    def _read(self) -> dict[str, Price]:
        """What the file holds; nothing where it is absent, corrupt or of another format."""
        try:
            raw = json.loads(self.path.read_text())
            if raw["format"] != FORMAT:
                return {}
            found = {key: Price(**row) for key, row in raw["prices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {
            key: p for key, p in found.items() if isinstance(p.seconds, float) and key == _key(p.signature)
        }


def _key(signature: str) -> str:
    return hashlib.sha256(signature.encode()).hexdigest()[:24]
