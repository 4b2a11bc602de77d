"""lamina: a compiler for trained neural networks.

``lamina.optimize(model, "latency<=0.5x, drop<=1%", data=..., metric=...)`` returns a smaller, faster ONNX
model with its evidence. Everything loads when it is first used, so importing lamina costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.backends.backend import Target
    from lamina.budget import Budget
    from lamina.comparison import compare
    from lamina.driver import apply, optimize
    from lamina.errors import InfeasibleBudget, LaminaError
    from lamina.folding import fold
    from lamina.inspection import analyze
    from lamina.ir.io import load
    from lamina.planner.plan import Plan
    from lamina.quantizing import quantize
    from lamina.result import Result

__all__ = [
    "Budget",
    "InfeasibleBudget",
    "LaminaError",
    "Plan",
    "Result",
    "Target",
    "analyze",
    "apply",
    "compare",
    "fold",
    "load",
    "optimize",
    "quantize",
]

__version__ = "0.1.0"

_HOMES = {
    "Budget": "lamina.budget",
    "InfeasibleBudget": "lamina.errors",
    "LaminaError": "lamina.errors",
    "Plan": "lamina.planner.plan",
    "Result": "lamina.result",
    "Target": "lamina.backends.backend",
    "analyze": "lamina.inspection",
    "apply": "lamina.driver",
    "compare": "lamina.comparison",
    "fold": "lamina.folding",
    "load": "lamina.ir.io",
    "optimize": "lamina.driver",
    "quantize": "lamina.quantizing",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'lamina' has no attribute '{name}'")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_HOMES))
