"""How programs run: one protocol, one module a backend, one literal list of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lamina.errors import BackendError, BudgetError

if TYPE_CHECKING:
    from lamina.backends.backend import Backend, Target

# (name in a target's text, module, class); other packages add theirs with the entry point group below.
BACKENDS: tuple[tuple[str, str, str], ...] = (
    ("ort", "lamina.backends.onnxruntime", "OnnxRuntime"),
    ("tvm", "lamina.backends.tvm", "Tvm"),
)
ENTRY_POINTS = "lamina.backends"

_EXTRAS = {"tvm": "tvm"}  # backend -> extra that installs what its module imports

__all__ = ["BACKENDS", "get_backend"]


def get_backend(target: Target | str) -> Backend:
    """Return the backend that serves ``target``.

    Raises:
        BudgetError: No backend has the target's name, or it has no such device or option.
        BackendError: The backend is known but what it needs is not installed.
    """
    from lamina.backends.backend import Target

    target = Target.parse(target)
    backend = _load(target)
    check = getattr(backend, "check", None)
    if check is not None:
        check(target)
    return backend


def _load(target: Target) -> Backend:
    for name, module, attribute in BACKENDS:
        if name == target.backend:
            return _construct(name, module, attribute)
    found = _entry_points()
    if target.backend in found:
        made: Backend = found[target.backend].load()()
        return made
    known = ", ".join([name for name, _, _ in BACKENDS] + sorted(found))
    raise BudgetError(
        f"target '{target}' names no backend lamina knows: '{target.backend}'",
        advice=f"known backends: {known}; write the target like ort:cpu?threads=2",
    )


def _construct(name: str, module: str, attribute: str) -> Backend:
    try:
        made: Backend = getattr(importlib.import_module(module), attribute)()
    except ImportError as error:
        extra = _EXTRAS.get(name)
        install = f"pip install 'lamina[{extra}]'" if extra else "pip install --force-reinstall lamina"
        raise BackendError(
            f"backend '{name}' is not installed: {error}", advice=f"install it with: {install}"
        ) from error
    return made


def _entry_points() -> dict[str, Any]:
    from importlib.metadata import entry_points

    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}
