"""What METHODS.md (groups 1 and 2) quotes of each paper, held against what was measured here."""

from __future__ import annotations

from collections.abc import Sequence

from tools.studies.metric_trust import claims_redundancy, claims_sensitivity
from tools.studies.metric_trust.claim import Claim, Rows
from tools.studies.metric_trust.summary import Json


def claims(results: Sequence[Json], rows: Rows) -> list[Claim]:
    """One claim an id, in the order of METHODS.md."""
    return [make(results, rows) for make in (*claims_redundancy.CLAIMS, *claims_sensitivity.CLAIMS)]
