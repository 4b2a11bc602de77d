"""Weight sharing: a branch runs the matrices of another one of its structure."""

from __future__ import annotations

from lamina.passes.sharing.share import Share, apply_shares

__all__ = ["Share", "apply_shares"]
