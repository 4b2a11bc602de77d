"""Spread labels over a graph's axes until every tie holds: indices with one label are cut together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lamina.analysis.coupling_relation import Axis, Relation, Tie

_MOST_WAYS = 8
_CONFLICT = "two factors of one axis would be cut at once"


@dataclass
class Labels:
    """Labels of axes and atoms, -1 where an index stays; labels found equal are merged.

    Attributes:
        axes: Axis -> int [size].
        atoms: (node number, atom) -> int [size].
        chosen: (node number, axis) -> the atom it is cut along.
        stuck: Label -> why it must stay.
    """

    root: np.ndarray
    axes: dict[Axis, np.ndarray] = field(default_factory=dict)
    atoms: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    chosen: dict[tuple[int, Axis], int] = field(default_factory=dict)
    stuck: dict[int, str] = field(default_factory=dict)

    def copy(self) -> Labels:
        """A copy that can go another way."""
        axes = {k: v.copy() for k, v in self.axes.items()}
        atoms = {k: v.copy() for k, v in self.atoms.items()}
        return Labels(self.root.copy(), axes, atoms, dict(self.chosen), dict(self.stuck))

    def of(self, labels: np.ndarray) -> np.ndarray:
        """Labels as merged by now."""
        return np.where(labels < 0, -1, self.root[labels])

    def merge(self, left: np.ndarray, right: np.ndarray) -> None:
        """Make labels equal, pair by pair."""
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            one, other = int(self.root[a]), int(self.root[b])
            if one != other:
                self.root[self.root == other] = one
                if other in self.stuck:
                    self.stuck.setdefault(one, self.stuck[other])

    def stick(self, labels: np.ndarray, reason: str) -> None:
        """Say that labels must stay."""
        for label in np.unique(self.of(labels[labels >= 0])).tolist():
            self.stuck.setdefault(label, reason)


class Search:
    """Spreads labels from a seed.

    Args:
        relations: Of every node, in order.
        sizes: Size of each axis.
    """

    def __init__(self, relations: Sequence[Relation], sizes: Mapping[Axis, int]) -> None:
        self._relations, self._sizes = relations, sizes
        self._readers: dict[Axis, list[int]] = {}
        for number, relation in enumerate(relations):
            for axis in {t.axis for t in relation.ties} | set(relation.choices):
                self._readers.setdefault(axis, []).append(number)

    def spread(self, axis: Axis, positions: np.ndarray) -> Iterator[Labels]:
        """Cut some indices of an axis, each for itself; one result a way of cutting factored axes.

        At most 8 ways are followed; beyond them the outermost factor is taken.
        """
        start = Labels(np.arange(len(positions)))
        labels = np.full(self._sizes[axis], -1)
        labels[positions] = np.arange(len(positions))
        start.axes[axis] = labels
        pending = [(start, list(self._readers.get(axis, ())))]
        ways = 1
        while pending:
            state, queue = pending.pop()
            while True:
                open_choice = self._settle(state, queue)
                if open_choice is None:
                    yield state
                    break
                number, where, atoms = open_choice
                for atom in atoms[1:][::-1]:
                    if ways < _MOST_WAYS:
                        ways += 1
                        other = state.copy()
                        other.chosen[number, where] = atom
                        pending.append((other, [number]))
                state.chosen[number, where] = atoms[0]
                queue = [number]

    # -- one way ------------------------------------------------------------------------------------

    def _settle(self, state: Labels, queue: list[int]) -> tuple[int, Axis, list[int]] | None:
        """Hold every tie; the first choice that is really open, or None."""
        queued = set(queue)
        while queue:
            number = queue.pop()
            queued.discard(number)
            for axis in self._hold(state, number):
                for reader in self._readers[axis]:
                    if reader not in queued:
                        queued.add(reader)
                        queue.append(reader)
        for number in sorted(self._undecided(state)):
            for axis, ties in self._relations[number].choices.items():
                labels = state.axes.get(axis)
                if labels is not None and (labels >= 0).any() and (number, axis) not in state.chosen:
                    fits = [t.atom for t in ties if _fits(state.of(labels), t)]
                    return number, axis, fits[:1] or [t.atom for t in ties]
        return None

    def _undecided(self, state: Labels) -> set[int]:
        return {
            number
            for axis in state.axes
            for number in self._readers.get(axis, ())
            if axis in self._relations[number].choices and (number, axis) not in state.chosen
        }

    def _hold(self, state: Labels, number: int) -> set[Axis]:
        """Hold the ties of one node; the axes whose labels grew."""
        relation = self._relations[number]
        grown: set[Axis] = set()
        changed = True
        while changed:
            changed = False
            for tie in relation.ties:
                changed |= self._hold_tie(state, number, tie, grown)
            for axis, ties in relation.choices.items():
                chosen = self._choose(state, number, axis, ties)
                for tie in ties:
                    if tie.atom == chosen:
                        changed |= self._hold_tie(state, number, tie, grown)
        return grown

    def _choose(self, state: Labels, number: int, axis: Axis, ties: Sequence[Tie]) -> int | None:
        """The factor an axis is cut along, decided where labels come in by an atom."""
        live = [t.atom for t in ties if _any(state.atoms.get((number, t.atom)))]
        chosen = state.chosen.get((number, axis))
        if chosen is None and live:
            chosen = state.chosen[number, axis] = live[0]
        for atom in live:
            if atom != chosen:
                state.stick(state.atoms[number, atom], _CONFLICT)
                if chosen is not None and (number, chosen) in state.atoms:
                    state.stick(state.atoms[number, chosen], _CONFLICT)
        return chosen

    def _hold_tie(self, state: Labels, number: int, tie: Tie, grown: set[Axis]) -> bool:
        """Make the labels of an axis and of an atom agree; whether one of them grew."""
        axis_labels = state.axes.get(tie.axis)
        atom_labels = state.atoms.get((number, tie.atom))
        if axis_labels is None and atom_labels is None:
            return False
        if axis_labels is None:
            axis_labels = state.axes[tie.axis] = np.full(self._sizes[tie.axis], -1)
        if atom_labels is None:
            size = self._relations[number].atoms[tie.atom]
            atom_labels = state.atoms[number, tie.atom] = np.full(size, -1)
        changed = False
        mine = axis_labels[tie.positions]
        give = (mine >= 0) & (atom_labels[tie.index] < 0)
        if give.any():
            atom_labels[tie.index[give]] = mine[give]
            changed = True
        theirs = atom_labels[tie.index]
        both = (mine >= 0) & (theirs >= 0)
        left, right = state.of(mine[both]), state.of(theirs[both])
        apart = left != right
        if apart.any():
            pairs = np.unique(np.stack([left[apart], right[apart]]), axis=1)
            state.merge(pairs[0], pairs[1])
        take = (mine < 0) & (theirs >= 0)
        if take.any():
            axis_labels[tie.positions[take]] = theirs[take]
            grown.add(tie.axis)
            changed = True
        return changed


def _any(labels: np.ndarray | None) -> bool:
    return labels is not None and bool((labels >= 0).any())


def _fits(labels: np.ndarray, tie: Tie) -> bool:
    """Whether labels are a function of one factor already: cutting along it merges and adds nothing."""
    first = np.full(int(tie.index.max()) + 1, -2)
    first[tie.index] = labels[tie.positions]
    return bool((first[tie.index] == labels[tie.positions]).all())
