"""Whether channels may change places: a permutation of coupled axes that every operator commutes with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from lamina.analysis.coupling_relation import Axis, Relation, Tie
from lamina.analysis.coupling_result import ChannelGroup


def reordered(group: ChannelGroup, order: np.ndarray) -> dict[Axis, np.ndarray]:
    """Where every index of a group's axes comes from when unit ``order[u]`` moves to the place of unit u.

    Args:
        group: With members of ``k`` indices a unit; the first of one unit takes the place of the other's
            first, and so on.
        order: int ``[units]``, a permutation.

    Returns:
        Axis -> int ``[size]``: ``new[i] = old[found[i]]``.
    """
    found = {}
    for member in group.members:
        source = np.arange(member.size)
        source[member.indices] = member.indices[order]
        found[member.name, member.axis] = source
    return found


def broken_by(relations: Iterable[Relation], sources: Mapping[Axis, np.ndarray]) -> str | None:
    """The first operator that does not commute with a permutation of axes; None where all do.

    An operator computes the same function of permuted axes where each of its index variables (atoms) is
    permuted in one way by all axes that are tied to it. Where many indices of an axis are one index of an
    atom, they must also keep their order, for they differ in what the atom does not tell. Indices that an
    operator freezes must stay. What a permutation does to sums over channels is rounding.

    Args:
        relations: Of all nodes, from :func:`lamina.analysis.coupling_rules.relation_of`.
        sources: As :func:`reordered` gives them; all other axes stay.

    Cost: O(indices of the operators that the axes touch).
    """
    names = {name for name, _ in sources}
    for relation in relations:
        node = relation.node
        if not any(v is not None and v.name in names for v in (*node.inputs, *node.outputs)):
            continue
        if not _commutes(relation, sources):
            return f"{node.op_type} '{node.name}'"
    return None


def _commutes(relation: Relation, sources: Mapping[Axis, np.ndarray]) -> bool:
    for frozen in relation.frozen:
        source = sources.get(frozen.axis)
        if source is not None and (source[frozen.positions] != frozen.positions).any():
            return False
    maps = [np.full(size, -1) for size in relation.atoms]
    if not all(_tied(tie, sources, maps) for tie in relation.ties):
        return False
    return all(_split(axis, ties, sources, maps) for axis, ties in relation.choices.items())


def _tied(tie: Tie, sources: Mapping[Axis, np.ndarray], maps: list[np.ndarray]) -> bool:
    """Whether an axis permutes its atom, in the way that is known already; it is noted in ``maps``."""
    source = sources.get(tie.axis)
    if source is None:
        return _agrees(maps[tie.atom], tie.index, tie.index)
    index_of, rank_of = (np.full(len(source), -1) for _ in range(2))
    index_of[tie.positions] = tie.index
    rank_of[tie.positions] = _ranks(tie)
    moved = source[tie.positions]
    if (index_of[moved] < 0).any() or (rank_of[moved] != rank_of[tie.positions]).any():
        return False
    return _agrees(maps[tie.atom], tie.index, index_of[moved])


def _split(axis: Axis, ties: list[Tie], sources: Mapping[Axis, np.ndarray], maps: list[np.ndarray]) -> bool:
    """Whether an axis of several factors permutes one of them and leaves the others."""
    for chosen in ties:
        trial = [m.copy() for m in maps]
        others = [t for t in ties if t is not chosen]
        if _tied(chosen, sources, trial) and all(_agrees(trial[t.atom], t.index, t.index) for t in others):
            for known, found in zip(maps, trial, strict=True):
                known[:] = found
            return True
    return False


def _ranks(tie: Tie) -> np.ndarray:
    """Of each position: how many before it are the same index of the atom."""
    order = np.lexsort((tie.positions, tie.index))
    index = tie.index[order]
    starts = np.r_[0, np.flatnonzero(np.diff(index)) + 1]
    first = np.repeat(starts, np.diff(np.r_[starts, len(index)]))
    ranks = np.empty(len(index), np.int64)
    ranks[order] = np.arange(len(index)) - first
    return ranks


def _agrees(known: np.ndarray, index: np.ndarray, image: np.ndarray) -> bool:
    """Whether ``index -> image`` is one map, and the one that is known; what is new is noted."""
    told = known[index]
    if ((told >= 0) & (told != image)).any():
        return False
    known[index] = image
    return bool((known[index] == image).all())
