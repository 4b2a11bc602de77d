"""Branches in a row computed side by side: as one wide operator, or from one stream."""

from __future__ import annotations

from lamina.passes.joining.flatten_blocks import FlattenBlocks, flatten_blocks
from lamina.passes.joining.parallel_layers import ParallelLayers, parallel_layers

__all__ = ["FlattenBlocks", "ParallelLayers", "flatten_blocks", "parallel_layers"]
