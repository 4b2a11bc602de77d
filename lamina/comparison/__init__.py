"""Are two models the same function? Structure, outputs on the same inputs, and where they part."""

from lamina.comparison.functions import compare, damage, same_interface
from lamina.comparison.verdict import Comparison, Divergence, OutputDifference, Structure

__all__ = [
    "Comparison",
    "Divergence",
    "OutputDifference",
    "Structure",
    "compare",
    "damage",
    "same_interface",
]
