"""Hidden neurons and channels merged into fewer, by transport between them or by like weights."""

from __future__ import annotations

from lamina.passes.neurons.iterative_feature_merging import IterativeFeatureMerging
from lamina.passes.neurons.merge_neurons_ot import MergeNeuronsOt

__all__ = ["IterativeFeatureMerging", "MergeNeuronsOt"]
