"""Let branches in a row read the same stream: ``x + f(x) + g(x)`` for ``y = x + f(x)``, ``y + g(y)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lamina.errors import PassError
from lamina.ir.branches import Block
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

_NORMS = "a normalization or activation stays between the sums, so the branches would share nothing"


@dataclass(frozen=True)
class ParallelLayers(JoinedBranches):
    """Let all branches of a block, or of two blocks in a row, read what the first of them reads.

    The first-order terms of the composition: what is lost is ``g(x + f(x)) - g(x)``. The branches then share
    one normalization, whose gains and shifts go into the projections behind it, exactly; branches of the same
    operators become one wide operator as in :mod:`lamina.passes.joining.flatten_blocks`.

    Fires: pre-norm blocks of at least two branches, and pairs of neighbours.
    Refuses: post-norm blocks: their normalizations stay between the sums, so nothing would be shared; what
        flatten-blocks refuses.
    Effect: Lossy; exact where no branch depends on what the branches before it add.
    Cost: sites O(nodes + weight elements); one emission O(weight elements).
    Source: Sun et al. 2024, "Transformer Layers as Painters", arXiv:2407.09298; "Make Deep Networks Shallow
        Again", arXiv:2309.08414. Deviates: outputs are added, not averaged; measured damage says where.
    """

    paper: ClassVar[str] = "arXiv:2407.09298"
    name: ClassVar[str] = "parallel-layers"

    def sites(self, program: Program) -> Iterator[Site | Refusal]:
        """Pairs of blocks without overlap and single blocks, in execution order, and why others are none."""
        chains = BranchChains(program)
        tried = []
        for span in _spans(chains):
            chain = _chain(chains, span)
            if isinstance(chain, str):
                if chain != _NORMS or len(span) == 1:  # of pairs it is said once, for each block
                    yield Refusal(self.name, _name(span), chain)
            else:
                tried.append((chain.site(self.name, _name(span), "span"), _option(chain, chains)))
        yield from self.judged(program, tried)

    def options(self, site: Site, program: Program, statistics: Any, target: Any) -> Sequence[Option]:
        """The one option: ``parallel``."""
        chains = BranchChains(program)
        for span in _spans(chains):
            chain = _chain(chains, span) if _name(span) == site.name else None
            if isinstance(chain, BranchChain):
                return (_option(chain, chains),)
        raise not_here(site)


def parallel_layers(program: Program, branches: Sequence[str]) -> Program:
    """Let branches in a row read what the first of them reads, on a clone.

    Args:
        program: The program; never changed.
        branches: Names (:func:`lamina.ir.branches.find_branches`), in execution order. Behind the sums of
            post-norm branches the normalizations stay, one behind the other.

    Raises:
        PassError: There are no such branches, or they are not in a row.
    """
    chains = BranchChains(program)
    known = {b.name: b for b in chains.found.branches}
    for name in branches:
        if name not in known:
            raise PassError(f"no branch is called '{name}'", advice=f"choose from {', '.join(known)}")
    chain = chains.chain([known[name] for name in branches])
    if isinstance(chain, str):
        raise PassError(f"{', '.join(branches)} cannot read the same stream: {chain}")
    transform = ParallelLayers()
    site = chain.site(transform.name, "+".join(branches), "span")
    return apply_written(program, transform, site, _option(chain, chains))


def _spans(chains: BranchChains) -> Iterator[tuple[Block, ...]]:
    blocks = chains.found.blocks
    yield from block_pairs(blocks)
    yield from ((block,) for block in blocks if len(block.branches) > 1)


def _name(span: Sequence[Block]) -> str:
    return "+".join(block.name for block in span)


def _chain(chains: BranchChains, span: Sequence[Block]) -> BranchChain | str:
    chain = chains.of_blocks(*span)
    if isinstance(chain, BranchChain) and chain.norms:
        return _NORMS
    return chain


def _option(chain: BranchChain, chains: BranchChains) -> Option:
    into = [0] * len(chain.branches)
    return Option("parallel", written(into, chain, chains.nodes, wide=False))
