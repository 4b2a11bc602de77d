"""Every allocator of bits, in one tuple."""

from __future__ import annotations

from lamina.planner.bits.bisection import bisection_by_order
from lamina.planner.bits.ilp import bits_ilp
from lamina.planner.bits.ladder import Allocator
from lamina.planner.bits.linearity import linearity_dp_bits
from lamina.planner.bits.partition import entropy_partition_ptq
from lamina.planner.bits.two_levels import ordered_two_level_bits

ALLOCATORS: tuple[Allocator, ...] = (
    Allocator("bits-ilp", "Huang et al. 2024, arXiv:2410.06270", bits_ilp),
    Allocator("linearity-dp-bits", "Malinovskii et al. 2024, arXiv:2411.17525", linearity_dp_bits),
    Allocator("ordered-two-level-bits", "Dumitru et al. 2024, arXiv:2406.17415", ordered_two_level_bits),
    Allocator("bisection-by-order", "Schaefer et al. 2023, arXiv:2306.04879", bisection_by_order),
    Allocator("entropy-partition-ptq", "Wang et al. 2024, arXiv:2410.08119", entropy_partition_ptq),
)


def allocator_names() -> tuple[str, ...]:
    """Names of every allocator."""
    return tuple(allocator.name for allocator in ALLOCATORS)
