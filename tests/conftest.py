"""Test-wide settings: helpers in this folder are importable, caches never touch the user's."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path_factory.getbasetemp() / "lamina-cache"))


@pytest.fixture(scope="session", autouse=True)
def _drawn(request: pytest.FixtureRequest) -> dict[int, Any]:
    """Where the random generators of test modules stood once everything was imported."""
    modules = {item.module for item in request.session.items if isinstance(item, pytest.Function)}
    return {id(g): copy.deepcopy(g.bit_generator.state) for m in modules for g in _generators(m)}


@pytest.fixture(autouse=True)
def _own_draws(request: pytest.FixtureRequest, _drawn: dict[int, Any]) -> None:
    """A module's random generators start each test alike: what it draws depends on no test before it."""
    for generator in _generators(request.module):
        generator.bit_generator.state = _drawn[id(generator)]


def _generators(module: ModuleType) -> list[np.random.Generator]:
    return [v for v in vars(module).values() if isinstance(v, np.random.Generator)]
