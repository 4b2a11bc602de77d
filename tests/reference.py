"""Where the reference models and data lie, for tests that want real ones; they skip where absent."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

_ROOT = Path(os.environ.get("LAMINA_REFERENCE", Path(__file__).resolve().parents[2] / "shared" / "data"))
models_dir = _ROOT / "models"
sets_dir = _ROOT / "sets"
zoo_dir = _ROOT / "zoo"

needs_reference = pytest.mark.skipif(
    not models_dir.is_dir(), reason="no reference models: set LAMINA_REFERENCE to the folder that holds them"
)
