"""Compute two blocks as one: their attentions side by side, then their MLPs, each as one wide operator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina.errors import PassError
from lamina.ir.program import Program
from lamina.passes.joining.branch_chains import (
    BranchChain,
    BranchChains,
    JoinedBranches,
    apply_written,
    block_pairs,
    not_here,
    written,
)
from lamina.passes.pass_ import Option, Refusal, Site


@dataclass(frozen=True)
class FlattenBlocks(JoinedBranches):
    """Make one block of two: each branch of the second is computed beside its like in the first.

    Branches a1, m1, a2, m2 in a row become ``y = x + (a1 + a2)(x)``, then ``y + (m1 + m2)(y)``, and a1 + a2
    is one attention with the heads of both, m1 + m2 one MLP with the neurons of both: the work of two blocks
    in the operators of one. Gains and shifts of normalizations that differ go into the projections
    behind them, exactly. In post-norm blocks, and where an activation stands behind the sum, what stands
    behind the sums of the second block stays, as it does behind a dropped branch.

    Fires: blocks that repeat, next to each other, whose branches have the same operators: projections by
        MatMul or Gemm, heads split off by Reshape and Transpose or an Attention operator, rotary positions,
        one head without any axis for it, convolutions, gated and plain MLPs.
    Refuses: branches with keys and values at the interface; a value between them that something else reads;
        operators that mix what lies side by side (a normalization inside the MLP).
    Effect: Lossy; exact where the branches of the second block do not depend on what those of the first add.
    Cost: sites O(nodes + weight elements); one emission O(weight elements).
    Source: FlattenGPT. Deviates: heads and neurons are not pruned to the old width, so FLOPs stay; pairs are
        judged by measured damage, not by the similarity of their inputs.
    """

    paper: ClassVar[str] = "FlattenGPT"
    name: ClassVar[str] = "flatten-blocks"

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Pairs of blocks without overlap, in execution order, and why others are none."""
        chains = BranchChains(program)
        tried = []
        for first, second in block_pairs(chains.found.blocks):
            chain = chains.of_blocks(first, second)
            if isinstance(chain, str):
                yield Refusal(self.name, f"{first.name}+{second.name}", chain)
                continue
            site = chain.site(self.name, f"{first.name}+{second.name}", _kind(chain))
            tried.append((site, _options(chain, chains)[0]))
        yield from self.judged(program, tried)

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """``flatten``, and for blocks of several branches each kind alone."""
        chains = BranchChains(program)
        for first, second in block_pairs(chains.found.blocks):
            chain = chains.of_blocks(first, second) if f"{first.name}+{second.name}" == site.name else None
            if isinstance(chain, BranchChain):
                return _options(chain, chains)
        raise not_here(site)


def flatten_blocks(program: Program, first: str, second: str, option: str = "flatten") -> Program:
    """Compute two blocks in a row as one, on a clone.

    Args:
        program: The program; never changed.
        first: Name of a block (:func:`lamina.ir.branches.find_branches`).
        second: Name of the next block of the same run.
        option: Which branches: ``flatten`` for all of them, or another option of :class:`FlattenBlocks`.

    Raises:
        PassError: There are no such blocks, or they cannot be computed side by side.
    """
    chains = BranchChains(program)
    blocks = {b.name: b for b in chains.found.blocks}
    for name in (first, second):
        if name not in blocks:
            raise PassError(f"no block is called '{name}'", advice=f"choose from {', '.join(blocks)}")
    one, two = blocks[first], blocks[second]
    if one.run != two.run or two.index != one.index + 1:
        raise PassError(f"'{second}' is not the block behind '{first}'")
    chain = chains.of_blocks(one, two)
    if isinstance(chain, str):
        raise PassError(f"'{first}' and '{second}' cannot be flattened: {chain}")
    transform = FlattenBlocks()
    options = {o.name: o for o in _options(chain, chains)}
    if option not in options:
        raise PassError(f"there is no option '{option}'", advice=f"choose from {', '.join(options)}")
    site = chain.site(transform.name, f"{first}+{second}", _kind(chain))
    return apply_written(program, transform, site, options[option])


def _kind(chain: BranchChain) -> str:
    return "+".join(dict.fromkeys(b.kind for b in chain.branches))


def _options(chain: BranchChain, chains: BranchChains) -> tuple[Option, ...]:
    """All branches, then each kind alone: at the place of the first block, or of the second."""
    half = len(chain.branches) // 2
    alone = list(range(2 * half))
    found = [("flatten", [*range(half), *range(half)])]
    for i in range(half) if half > 1 else ():
        kind = chain.branches[i].kind
        found.append((f"flatten {kind}", [i if j == half + i else j for j in alone]))
        found.append((f"flatten {kind} late", [half + i if j == i else j for j in alone]))
    return tuple(Option(name, written(into, chain, chains.nodes)) for name, into in found)
