"""Make TVM's tensor intrinsics importable in a fraction of a second instead of half a minute.

``tvm.s_tir.tensor_intrin`` parses some hundred kernels for every device TVM knows, and each parse walks the
Python stack reading source files. MetaSchedule imports it in every build worker, inside the build's timeout:
the first batch of candidates would never finish. Here the package is entered with the x86 kernels alone, and
the stack is walked without source lines.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from pathlib import Path
from typing import Any

_PACKAGE = "tvm.s_tir.tensor_intrin"


def load() -> None:
    """Register the x86 intrinsics and stand in for the package; idempotent, also run in build workers."""
    if _PACKAGE in sys.modules:
        return
    parent: Any = importlib.import_module("tvm.s_tir")
    package: Any = types.ModuleType(_PACKAGE)
    package.__path__ = [str(Path(str(parent.__file__)).parent / "tensor_intrin")]
    sys.modules[_PACKAGE] = package
    whole = inspect.stack
    inspect.stack = _stack_without_source
    try:
        package.x86 = importlib.import_module(f"{_PACKAGE}.x86")
    finally:
        inspect.stack = whole
    parent.tensor_intrin = package


def _stack_without_source(context: int = 0) -> list[Any]:
    return inspect.getouterframes(sys._getframe(1), 0)
