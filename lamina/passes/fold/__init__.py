"""Exact passes: clean-up to a fixed point, and equivalent forms that a target may run faster.

``FOLDS`` always apply, ``FORMS`` are chosen by measurement, ``CLEANUP`` follows lossy moves; each is a tuple
of module names in :mod:`lamina.passes.fold.catalog`. Libraries behind them load when a pass first runs.
"""

from __future__ import annotations

from lamina.passes.fold.catalog import CLEANUP, FOLDS, FORMS, load
from lamina.passes.fold.pipeline import apply_named, cleanup, fold, form_names

__all__ = ["CLEANUP", "FOLDS", "FORMS", "apply_named", "cleanup", "fold", "form_names", "load"]
