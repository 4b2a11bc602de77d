"""What the libraries below log about a model's faults, kept from the user: lamina raises or mends them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

_CHATTY = ("onnx_ir", "onnxscript")
_MODULES = r"(onnx|onnx_ir|onnxscript)(\.|$)"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' logs and warnings to themselves; what matters comes out as an error."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_MODULES)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
