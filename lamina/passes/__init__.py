"""What can be done to a program: exact folds, and transforms that offer moves."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from lamina.errors import BudgetError
from lamina.passes.pass_ import Transform

# name -> module:class. A third party adds one through the entry point group "lamina.transforms".
TRANSFORMS: tuple[tuple[str, str], ...] = (
    ("drop", "lamina.passes.drop_branch:DropBranch"),
    ("direct-matching", "lamina.passes.replace_branch:ReplaceBranch"),
    ("merge-conv-chain", "lamina.passes.merge_conv_chain:MergeConvChain"),
    ("share", "lamina.passes.sharing.share:Share"),
    ("flatten-blocks", "lamina.passes.joining.flatten_blocks:FlattenBlocks"),
    ("parallel-layers", "lamina.passes.joining.parallel_layers:ParallelLayers"),
    ("merge-neurons-ot", "lamina.passes.neurons.merge_neurons_ot:MergeNeuronsOt"),
    ("iterative-feature-merging", "lamina.passes.neurons.iterative_feature_merging:IterativeFeatureMerging"),
    ("quantize", "lamina.passes.quantize:Quantize"),
)

# Those a search uses only when they are named: so far none was seen to gain what the others do not gain for
# less (docs/depth.md), and each costs the search time.
ON_REQUEST = frozenset({"share", "flatten-blocks", "parallel-layers", "iterative-feature-merging"})


def transform_names() -> tuple[str, ...]:
    """Names of every transform, ours first."""
    ours = tuple(name for name, _ in TRANSFORMS)
    return ours + tuple(_installed())


def default_transforms() -> tuple[str, ...]:
    """Names of the transforms a search uses when none are named."""
    return tuple(name for name in transform_names() if name not in ON_REQUEST)


@cache
def _installed() -> dict[str, str]:
    """What third parties add, read once: going through every installed package takes milliseconds."""
    return {e.name: e.value for e in entry_points(group="lamina.transforms")}


def get_transform(name: str) -> Transform:
    """The transform called ``name`` with its default options.

    Raises:
        BudgetError: There is none.
    """
    places = _installed() | dict(TRANSFORMS)
    if name not in places:
        raise BudgetError(
            f"there is no transform '{name}'", advice=f"choose from {', '.join(transform_names())}"
        )
    module, _, attribute = places[name].partition(":")
    transform: Transform = getattr(import_module(module), attribute)()
    return transform
