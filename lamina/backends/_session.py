"""ONNX Runtime sessions, made in one place; imports no more than a timing worker needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}


def make_options(
    threads: int,
    *,
    level: str = "all",
    spin: str | None = None,
    entries: Mapping[str, str] | None = None,
) -> Any:
    """Session options: one sequential session, quiet, its threads counted.

    Args:
        threads: Intra-operator threads.
        level: Key of :data:`LEVELS`.
        spin: ``"0"`` or ``"1"``; None leaves ONNX Runtime's default.
        entries: Further session configuration entries.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = 4
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, LEVELS[level])
    if spin is not None:
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    return options


def make_session(model: bytes | str | Path, options: Any) -> Any:
    """A CPU session; without :func:`quiet` the runtime still logs while it starts."""
    import onnxruntime as ort

    ort.set_default_logger_severity(4)
    source = model if isinstance(model, bytes) else str(model)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run_session(session: Any, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> list[Any]:
    """Run once on arrays; their dtypes must be the model's own."""
    result: list[Any] = session.run(list(names), dict(feeds))
    return result


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its status classes have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    found = [v for v in vars(state).values() if isinstance(v, type) and issubclass(v, Exception)]
    return (*found, RuntimeError, ValueError, TypeError, OSError)


_NODE = (
    re.compile(r"implementation for (?P<op>\S+?)(?:\(\d+\))? node with name '(?P<node>[^']*)'"),
    re.compile(r"running (?P<op>\S+) node\. Name:\s?'(?P<node>[^']*)'"),
    re.compile(r"Node ?\((?P<node>[^)]*)\) Op \((?P<op>[^)]*)\)"),
    re.compile(r'In Node, \("(?P<node>[^"]*)", (?P<op>\w+),'),
    re.compile(r"Node:(?P<node>\S+) .*?Op(?:erator)?:? ?\(?(?P<op>\w+)"),
    re.compile(r"(?P<op>[\w.]+:\w+)\(-?\d+\) is not a registered function/op"),
    re.compile(r"No Op registered for (?P<op>\w+)"),
)


def explain(error: BaseException) -> tuple[str, str | None]:
    """ONNX Runtime's message without its wrapping, and the operator and node it names (or None)."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ?", "", str(error)).strip()
    text = re.sub(r"\S*/onnxruntime/\S+?\.(?:cc|h):\d+ ", "", text)
    for pattern in _NODE:
        match = pattern.search(text)
        if match:
            groups = match.groupdict()
            node = f" '{groups['node']}'" if groups.get("node") else ""
            return text, f"{groups['op']}{node}"
    return text, None
