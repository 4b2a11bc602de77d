"""What folds there are: literal tuples of module names, and the loader that turns one into a pass.

A name is a module of this package; the class in it is the name in CamelCase (``fuse_gelu`` -> ``FuseGelu``),
the report name the same with hyphens. A new fold is one module and one line here.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module

from lamina.errors import PassError
from lamina.passes.pass_ import Fold

# Always applied, in this order, until nothing changes: smaller or simpler on any target.
FOLDS: tuple[str, ...] = (
    "lift_constants",
    "eliminate_identities",
    "fold_constant_if",
    "fold_shapes",
    "simplify_local",
    "fold_constants",
    "remove_unused",
    "merge_slices",
    "cancel_transposes",
    "drop_gathered_transpose",
    "merge_views",
    "drop_stacked_transpose",
    "simplify_patterns",
    "pad_into_conv",
    "fold_affine",
    "compose_affine",
    "compose_linear",
    "merge_parallel_linear",
    "fuse_gemm",
    "drop_redundant_relu",
    "chain_residual_sums",
    "deduplicate_initializers",
    "merge_common_subexpressions",
    "drop_attention_bias",
)

# Those of FOLDS that run once, after the forms: what they remove is what a form folds something into.
LAST: tuple[str, ...] = ("drop_attention_bias",)

# Equivalent forms whose worth depends on the target: the caller prices each and keeps what is faster.
# Order matters: fuse_attention absorbs what compose_projections and fuse_rotary leave before it.
# Tried and left out, measured slower at 1 thread: one MatMul on concatenated weights and a Split (1.05 of the
# separate MatMuls at widths 64+32+32 and 172+172, 1 and 128 rows).
FORMS: tuple[str, ...] = (
    "fuse_gelu",
    "fuse_layer_normalization",
    "fuse_rms_normalization",
    "fold_layernorm_mean",
    "fold_norm_affine",
    "split_residual_sum",
    "convolve_shortcut",
    "compose_projections",
    "absorb_residual_bias",
    "fuse_rotary",
    "fuse_attention",
)

# Exact, but worth something only before quantizing: fold(forms=[...]) applies them when asked to, in this
# order and after FORMS.
ON_REQUEST: tuple[str, ...] = ("equalize_layers", "rotate_fold", "sort_channels")

# Form -> the forms it builds on: whoever asks for it gets them too.
FOUNDATIONS: dict[str, tuple[str, ...]] = {
    "rotate_fold": (
        "fuse_layer_normalization",
        "fuse_rms_normalization",
        "fold_layernorm_mean",
        "fold_norm_affine",
    ),
}

# After lossy moves, which leave conversions and dead weights behind.
CLEANUP: tuple[str, ...] = (
    "absorb_scale",
    "merge_qdq",
    "drop_redundant_relu",
    "remove_unused",
)

# What follows the forms in fold(): the linear part of FOLDS that tidies up after a rewrite.
TIDY: tuple[str, ...] = (
    "deduplicate_initializers",
    "merge_common_subexpressions",
    "remove_unused",
)

# Pass -> those after which it need not run again: it reads nothing that they change. Constants stay constants
# when equal things are merged, what nobody reads was equal to nothing, and shared weights are only refused.
UNAFFECTED: dict[str, tuple[str, ...]] = {
    "fold_affine": ("deduplicate_initializers",),
    "compose_affine": ("deduplicate_initializers",),
    "simplify_local": ("deduplicate_initializers",),
    "merge_views": ("deduplicate_initializers",),
    "simplify_patterns": ("deduplicate_initializers",),
    "merge_parallel_linear": ("deduplicate_initializers",),
    "fold_constants": (
        "fold_affine",
        "drop_redundant_relu",
        "deduplicate_initializers",
        "merge_common_subexpressions",
        "remove_unused",
    ),
    "deduplicate_initializers": ("merge_common_subexpressions", "remove_unused"),
    "merge_common_subexpressions": ("remove_unused",),
}


def canonical(name: str) -> str:
    """The module name of a fold, whichever of ``fuse-gelu`` and ``fuse_gelu`` was written.

    Raises:
        PassError: No fold is called that.
    """
    label = name.strip().replace("-", "_")
    known = dict.fromkeys(FOLDS + FORMS + ON_REQUEST + CLEANUP)
    if label not in known:
        raise PassError(f"no fold is called '{name}'", advice=f"choose from: {', '.join(known)}")
    return label


def load(name: str) -> Fold:
    """The fold called ``name``, with its default options; its module is imported now.

    Raises:
        PassError: No fold is called that.
    """
    return _load(canonical(name))


@cache
def _load(label: str) -> Fold:
    module = import_module(f"lamina.passes.fold.{label}")
    found: Fold = getattr(module, label.title().replace("_", ""))()
    return found
