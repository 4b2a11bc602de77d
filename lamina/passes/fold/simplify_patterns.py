"""Apply the pattern rules of onnxscript that hold for every input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lamina.passes.fold.library import LibraryFold
from lamina.passes.pass_ import Effect, Rounding

# Left out on purpose: successive_clip and min/max rules (disjoint ranges give another value), slice_split
# (odd sizes split elsewhere), flatten_to_reshape and reshape-matmul-reshape rules (nothing gained, empty
# batches break), matmul_add_to_gemm, affine_conv and expand rules (need shapes that may be unknown).
RULES: tuple[str, ...] = (
    "mul_by_1_rule",
    "add_0_rule",
    "sub_0_rule",
    "div_by_1_rule",
    "dropout_zero_rule",
    "dropout_inference_rule",
    "cast_cast_rule",
    "no_op_cast_rule",
    "no_op_expand_rule",
    "no_op_transpose_rule",
    "transpose_transpose_rule",
    "unsqueeze_unsqueeze_rule",
    "reshape_reshape_rule",
    "squeeze_reshape_1d_rule",
    "collapse_slice_rule",
    "collapse_slice2_rule",
    "materialize_reshape_shape_rule",
    "successive_relu_rule",
    "normalize_pad_format_conv_rule",
    "fuse_pad_into_conv_rule",
    "fuse_batchnorm_into_conv_rule",
    "fuse_batchnorm_into_conv_transpose_rule",
    "fuse_batchnorm_into_gemm_rule",
    "remove_optional_bias_from_conv_rule",
    "remove_optional_bias_from_conv_transpose_rule",
    "remove_optional_bias_from_gemm_rule",
)


@dataclass(frozen=True)
class SimplifyPatterns(LibraryFold):
    """Remove no-ops, merge chains of reshapes and casts, fold BatchNormalization and Pad into convolutions.

    Refuses: BatchNormalization and Dropout in training mode (fenced).
    Effect: Rounding, <= 8 ulps of max|y|: folding a normalization reassociates one multiply and one add.
    Cost: superlinear in the nodes (the library's matcher); the pipeline leaves it out for large graphs.
    Source: onnxscript.rewriter.rules.common; Jacob et al. 2018, arXiv:1712.05877, sec. 3.2.
    """

    effect: ClassVar[Effect] = Rounding(ulps=8)

    def run(self, model: ir.Model) -> None:
        """Call the library."""
        from onnxscript.rewriter import RewritePass
        from onnxscript.rewriter.rules import common

        # trap: this rule writes allowzero, which Reshape has since opset 14
        skipped = {"materialize_reshape_shape_rule"} if model.opset_imports.get("", 1) < 14 else set()
        rules = [getattr(common, name) for name in RULES if name not in skipped]
        commuted = [r for rule in rules[:2] for r in rule.commute()]
        RewritePass([*commuted, *rules[2:]])(model)
