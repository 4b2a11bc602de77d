"""Moves and plans: what was chosen, as data that reproduces the result bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lamina.errors import LaminaError
from lamina.passes.low_rank_path import LowRankPath
from lamina.passes.pass_ import Option, Site
from lamina.passes.quantize.caches import CacheCodes
from lamina.passes.repair import Repair

FORMAT = 1


@dataclass(frozen=True)
class Move:
    """One choice: a transform's option at a site.

    Attributes:
        site: Where.
        option: What.
        reason: Why the planner took it, in words.
        latency_s: Predicted change of the workload's latency in seconds (negative: faster).
        damage: Predicted damage (divergence of the model's output with only this move made), or None.
    """

    site: Site
    option: Option
    reason: str = ""
    latency_s: float = 0.0
    damage: float | None = None


@dataclass(frozen=True)
class Plan:
    """An ordered list of moves for the program with this fingerprint.

    Attributes:
        fingerprint: Fingerprint of the captured (not yet folded) program.
        folds: Names of the exact passes, in the order they were applied, before the moves.
        moves: Lossy moves on the folded program.
        finishing: Names of the exact passes applied after the moves.
        target: The target the plan was made for.
        repairs: Weights fitted anew after the moves (:mod:`lamina.passes.compensate`).
        paths: What was put beside quantized operators after that (:mod:`lamina.passes.low_rank_path`).
        caches: Caches at the interface that hold codes (:mod:`lamina.passes.quantize.cache_edits`); they are
            written before the moves, and the interface changes after all else.
    """

    fingerprint: str
    folds: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    finishing: tuple[str, ...] = ()
    target: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
    repairs: tuple[Repair, ...] = ()
    paths: tuple[LowRankPath, ...] = ()
    caches: tuple[CacheCodes, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the result computes what the original does, but for rounding of floats."""
        return not (self.moves or self.caches)

    def to_json(self) -> str:
        """The plan as JSON text; floats survive exactly."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1, sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read what :meth:`to_json` wrote.

        Raises:
            LaminaError: The text is not a plan, or of another format.
        """
        try:
            raw = json.loads(text)
            if raw["format"] != FORMAT:
                raise LaminaError(
                    f"plan format {raw['format']} is not {FORMAT}",
                    advice="make the plan again with this version",
                )
            moves = tuple(
                Move(
                    site=_site(m["site"]),
                    option=_option(m["option"]),
                    reason=m["reason"],
                    latency_s=m["latency_s"],
                    damage=m["damage"],
                )
                for m in raw["moves"]
            )
            return Plan(
                raw["fingerprint"],
                tuple(raw["folds"]),
                moves,
                tuple(raw["finishing"]),
                raw["target"],
                raw["extra"],
                tuple(Repair(**r) for r in raw.get("repairs", ())),
                tuple(LowRankPath(**p) for p in raw.get("paths", ())),
                tuple(CacheCodes(**{**c, "scale": tuple(c["scale"])}) for c in raw.get("caches", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise LaminaError(f"not a lamina plan: {error}", advice="give a result's plan.json") from error


def _option(raw: Mapping[str, Any]) -> Option:
    return Option(**{**raw, "borrows": tuple(raw.get("borrows", ()))})


def _site(raw: Mapping[str, Any]) -> Site:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Site(**fields)
