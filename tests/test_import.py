"""Importing lamina costs next to nothing: what is heavy loads when it is used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lamina

HEAVY = (
    "torch",
    "tvm",
    "onnxruntime",
    "onnxscript",
    "onnx",
    "onnx_ir",
    "numpy",
    "scipy",
    "plotly",
    "rich",
    "typer",
)


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_import_loads_nothing_heavy():
    assert loaded_after("import lamina") & set(HEAVY) == set()


def test_optimize_is_found_without_torch_tvm_or_plotly():
    found = loaded_after("import lamina; lamina.optimize; lamina.apply; lamina.compare")
    assert "lamina.driver" in found
    assert found & {"torch", "tvm", "plotly", "onnxruntime", "onnxscript", "scipy"} == set()


def test_command_line_help_loads_no_runtime():
    found = loaded_after("import lamina.cli")
    assert found & {"torch", "tvm", "plotly", "onnxruntime", "onnxscript", "scipy", "onnx"} == set()


@pytest.mark.parametrize("name", lamina.__all__)
def test_public_name_resolves(name):
    assert getattr(lamina, name).__name__ == name
    assert name in dir(lamina)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lamina' has no attribute 'optimise'"):
        _ = lamina.optimise
