"""Quality metrics: how good a model's outputs are, and how much worse a candidate's got."""

from lamina.quality.choose import METRICS, get_metric
from lamina.quality.evaluation import (
    Run,
    damage_interval,
    evaluate,
    evaluate_each,
    reference_outputs,
    standard_error,
)
from lamina.quality.metric import Metric, Outputs, RatioMetric
from lamina.quality.user import UserMetric

__all__ = [
    "METRICS",
    "Metric",
    "Outputs",
    "RatioMetric",
    "Run",
    "UserMetric",
    "damage_interval",
    "evaluate",
    "evaluate_each",
    "get_metric",
    "reference_outputs",
    "standard_error",
]
