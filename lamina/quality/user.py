"""Metrics of the user's own: a function of all outputs and all data."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lamina.data import Dataset
from lamina.errors import BudgetError, DataError
from lamina.quality.metric import Metric, Outputs, Percent

Function = Callable[[dict[str, np.ndarray], dict[str, np.ndarray]], Any]
ADVICE = "write f(outputs, data) -> number or one number a sample; pass (f, 'min') where less is better"


@dataclass(frozen=True)
class UserMetric(Metric):
    """A function ``f(outputs, data)`` of all samples: higher is better unless it says otherwise.

    ``outputs`` and ``data`` map names to arrays over all samples. A number is the score; an array with one
    entry a sample is averaged, and only then is there a confidence interval.

    A percent of drop means points where the original scores within -1..1, else (and for ``min``) a share of
    the original's score; the function's attribute ``percent`` ("points" or "relative") decides otherwise.

    Attributes:
        function: What the user gave.
        name: How reports call it.
        higher_is_better: Direction.
        fixed_percent: What the user said a percent means, or None.
    """

    function: Function
    name: str = "metric"
    higher_is_better: bool = True
    fixed_percent: Percent | None = None
    whole = True

    def unit(self, original: float) -> Percent:
        """Points for bounded scores, relative for the rest."""
        if self.fixed_percent is not None:
            return self.fixed_percent
        return "points" if self.higher_is_better and abs(original) <= 1 else "relative"

    def features(self, outputs: Outputs, batch: Dataset, reference: Outputs | None = None) -> np.ndarray:
        """One row a sample where the function says that much, else one row in all."""
        data = {**batch.inputs, **batch.extras}
        try:
            result = np.asarray(self.function(dict(outputs), data), dtype=np.float64)
        except Exception as error:
            # Foreign code: whatever it raises is the user's to see, with the metric's name on it.
            what = f"metric '{self.name}' raised {type(error).__name__}: {error}"
            raise DataError(what, advice=ADVICE) from error
        if result.ndim > 1 or (result.ndim == 1 and len(result) not in (1, batch.samples)):
            what = f"metric '{self.name}' returned an array of shape {list(result.shape)}"
            raise DataError(what, advice=ADVICE)
        if not np.isfinite(result).all():
            what = f"metric '{self.name}' returned NaN or an infinite value"
            raise DataError(what, advice="check it on the original model's outputs")
        return result.reshape(-1, 1)

    def score(self, features: np.ndarray) -> float:
        """The mean over samples, or the one number."""
        return float(features.mean())

    def scores(self, features: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weighted means."""
        return np.asarray((weights @ features)[:, 0] / weights.sum(axis=1))


def user_metric(function: Any, direction: str | None = None, name: str | None = None) -> UserMetric:
    """Wrap a callable; its ``direction``, ``higher_is_better`` and ``percent`` attributes are honoured.

    Raises:
        BudgetError: It is not callable, or the direction is neither ``max`` nor ``min``.
    """
    if not callable(function):
        raise BudgetError(f"{type(function).__name__} is not a metric", advice=ADVICE)
    name = name or str(getattr(function, "__name__", type(function).__name__))
    given = direction or getattr(function, "direction", None)
    if given is None:
        given = "max" if getattr(function, "higher_is_better", True) else "min"
    percent = getattr(function, "percent", None)
    if given not in ("max", "min"):
        raise BudgetError(f"direction '{given}' of metric '{name}' is not max or min", advice=ADVICE)
    if percent not in (None, "points", "relative"):
        what = f"percent '{percent}' of metric '{name}' is not points or relative"
        raise BudgetError(what, advice="leave the attribute out, or choose one of the two")
    return UserMetric(function, name, given == "max", percent)


def imported_metric(text: str) -> UserMetric:
    """The metric ``module:function`` or ``file.py:function``; modules are looked up from here first.

    Raises:
        BudgetError: The module or function does not exist, or fails on import.
    """
    module_name, _, attribute = text.rpartition(":")
    where = f"metric '{text}'"
    try:
        module = _load(module_name)
    except Exception as error:
        # Foreign code again: an import can raise anything.
        what = f"'{module_name}' cannot be imported: {type(error).__name__}: {error}"
        advice = "give module:function or file.py:function, as seen from the current directory"
        raise BudgetError(what, where=where, advice=advice) from error
    target: Any = module
    for part in attribute.split("."):
        if not hasattr(target, part):
            has = ", ".join(k for k, v in vars(module).items() if callable(v) and not k.startswith("_"))
            what = f"'{module_name}' has no '{attribute}'"
            raise BudgetError(what, where=where, advice=f"it has {has or 'no functions'}")
        target = getattr(target, part)
    return user_metric(target, name=text)


def _load(module_name: str) -> Any:
    if module_name.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(module_name).stem, module_name)
        if spec is None or spec.loader is None or not Path(module_name).is_file():
            raise FileNotFoundError(module_name)
        module = importlib.util.module_from_spec(spec)
        # Registered first, as an ordinary import does: dataclasses and pickling look it up.
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
