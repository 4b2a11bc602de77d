"""The FX bridge on ONNX's own backend suites: every covered model answers as it should, a pinned number."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "conformance"))
from fx_cases import difference, reason
from onnx_cases import VARIANTS, cases, variants

torch = pytest.importorskip("torch", reason="the torch extra is not installed")

STRIDE = 6  # the default run takes every sixth case; LAMINA_SLOW=1 takes all
SAMPLE_COVERED = 264
# Pinned exactly: a number that changes is a form won or lost, and docs/fx.md says so too.
COVERED = 1591
NOT_COVERED = {
    "element type": 255,
    "operator without a form": 83,
    "sequence or optional": 29,
    "control flow": 28,
    "domain": 24,
    "random": 12,
    "training": 2,
}


# Functions that compute with numbers on the host on purpose, and move what they found to the inputs' device.
_ON_HOST = {"_places", "_taps", "attention"}
_FACTORIES = {torch.arange, torch.empty, torch.eye, torch.full, torch.ones, torch.tensor, torch.zeros}


class _Homeless(torch.overrides.TorchFunctionMode):
    """Notes which forms make a tensor without saying on which device: those that would break on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _FACTORIES and "device" not in (kwargs or {}):
            caller = traceback.extract_stack(limit=2)[0]
            if "fx_operators" in caller.filename:
                self.found.add(caller.name)
        return function(*args, **(kwargs or {}))


def _judge(step: int) -> tuple[int, Counter[str], list[str]]:
    covered, why, wrong = 0, Counter[str](), []
    for case in islice(cases(), 0, None, step):
        kind = reason(case)
        if kind:
            why[kind] += 1
            continue
        covered += 1
        with _Homeless() as homeless:
            found = difference(case)
        strays = homeless.found - _ON_HOST
        if strays:
            wrong.append(f"{case.label}: {', '.join(strays)} ignores the device")
        if found is not None:
            wrong.append(f"{case.label}: {found}")
    return covered, why, wrong


def test_every_sixth_case_answers_as_shipped() -> None:
    covered, _, wrong = _judge(STRIDE)
    assert not wrong, "\n".join(wrong)
    assert covered == SAMPLE_COVERED


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_every_sixth_case_answers_as_shipped_on_cuda() -> None:
    # products there may be taken in TF32, with ten bits, and kernels sum in other orders
    chosen = [case for case in islice(cases(), 0, None, STRIDE) if not reason(case)]
    found = {case.label: difference(case, "cuda", rtol=2**-8, atol=2**-10) for case in chosen}
    assert {k: v for k, v in found.items() if v is not None} == {}


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LAMINA_SLOW"), reason="takes a minute: set LAMINA_SLOW=1")
def test_every_case_answers_as_shipped() -> None:
    covered, why, wrong = _judge(1)
    assert not wrong, "\n".join(wrong)
    assert covered == COVERED
    assert dict(why) == NOT_COVERED


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("LAMINA_SLOW"), reason="takes minutes: set LAMINA_SLOW=1")
def test_every_variant_answers_as_shipped() -> None:
    # with constants for inputs, which become parameters, buffers and literals, and with no dimension known
    counts, wrong = Counter[str](), []
    for case in cases():
        for variant, form in variants(case):
            if variant == VARIANTS[0] or reason(form):
                continue
            counts[variant] += 1
            found = difference(form)
            if found is not None:
                wrong.append(f"{case.label} ({variant}): {found}")
    assert not wrong, "\n".join(wrong)
    assert counts == {"all constant": 1591, "dynamic dims": 1573, "weights constant": 1092}


def test_the_page_states_the_pinned_numbers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "fx.md").read_text()
    stated = dict(re.findall(r"^\| ([a-z ]+) \| (\d+) \|", page, re.MULTILINE))
    assert {k: int(v) for k, v in stated.items()} == {"covered and equal": COVERED, **NOT_COVERED}
