"""What killed or replaced saves leave beside a model, and taking it away when nobody uses it any more.

A file being written carries a lock that the system releases with its process, however that ends: a file
whose lock can be taken has no writer.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import onnx

try:
    import fcntl
except ImportError:  # Windows: no advisory locks, so nothing is ever taken away
    fcntl = None  # type: ignore[assignment]

_RANDOM_PART = r"\.[a-z0-9_]{8}\.tmp"  # what tempfile.mkstemp adds


def lock(descriptor: int) -> None:
    """Mark an open file as being written, until the last copy of its descriptor is closed."""
    if fcntl is not None:
        with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
            fcntl.flock(descriptor, fcntl.LOCK_EX)


def clean(target: Path) -> list[Path]:
    """Remove what earlier saves to ``target`` left: temporary files, and data files no model refers to.

    Only names that a save to ``target`` makes are looked at, and of those only regular files that no process
    is writing. A data file that any other model in the folder names stays.

    Returns:
        What was removed.
    """
    removed = []
    for path in _candidates(target):
        with _taken(path) as mine:
            if mine and (path.name.startswith(".") or not is_referred(path, target)):
                with contextlib.suppress(OSError):
                    path.unlink()
                    removed.append(path)
    return removed


def _candidates(target: Path) -> list[Path]:
    name = re.escape(target.name)
    data = rf"{name}(\.\d+)?\.data"
    wanted = re.compile(rf"{data}|\.{name}{_RANDOM_PART}|\.{data}{_RANDOM_PART}")
    try:
        with os.scandir(target.parent) as entries:
            found = [e.name for e in entries if wanted.fullmatch(e.name) and e.is_file(follow_symlinks=False)]
    except OSError:
        return []
    return [target.with_name(name) for name in sorted(found)]


@contextlib.contextmanager
def _taken(path: Path) -> Iterator[bool]:
    """Whether nobody is writing ``path``; nobody starts to while the block runs."""
    if fcntl is None:
        yield False
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except OSError:
        free = False
    try:
        yield free
    finally:
        os.close(descriptor)


def is_referred(path: Path, target: Path) -> bool:
    """Whether the model at ``target``, as it is now, or another one beside it names ``path`` as its data.

    True as well where that cannot be told.
    """
    if any(_mentions(other, path.name) for other in _neighbours(target)):
        return True
    if not target.exists():
        return False
    try:
        model = onnx.load(target, load_external_data=False)
    except Exception:  # it is no model: nothing is known
        return True
    tensors = [*model.graph.initializer, *(t for f in _constants(model.graph) for t in f)]
    named = {e.value for t in tensors for e in t.external_data if e.key == "location"}
    return path.name in named


def _constants(graph: onnx.GraphProto) -> Iterator[list[onnx.TensorProto]]:
    for node in graph.node:
        for attribute in node.attribute:
            yield [attribute.t, *attribute.tensors]
            for inner in (attribute.g, *attribute.graphs):
                yield list(inner.initializer)
                yield from _constants(inner)


def _neighbours(target: Path) -> list[Path]:
    return [p for p in target.parent.glob("*.onnx") if p.name != target.name]


def _mentions(model: Path, name: str) -> bool:
    try:
        with model.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(name.encode()) >= 0
    except OSError:
        return True
