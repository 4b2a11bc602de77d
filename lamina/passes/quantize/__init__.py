"""Quantization: integer and half-precision forms of weighted operators."""

from __future__ import annotations

from lamina.passes.quantize.transform import FORMS, Quantize

__all__ = ["FORMS", "Quantize"]
