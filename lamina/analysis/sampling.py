"""Which tokens and samples of a batch the costly statistics look at: seeded, even over all the data."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from lamina.analysis.needs import Looks
from lamina.analysis.taps import HALVES, ROWS

# Batches looked at: one of eight, at most so many. What others do not fetch, the runtime does not compute.
_LOOKED_SHARE, _MOST_LOOKED = 8, 8


def looked_at(batches: int) -> tuple[int, ...]:
    """Which of so many batches the costly statistics look at, evenly spread."""
    count = min(_MOST_LOOKED, -(-batches // _LOOKED_SHARE))
    return tuple((2 * i + 1) * batches // (2 * count) for i in range(count))


@dataclass
class BatchView:
    """One batch: its size, its mask and what was drawn from it.

    Attributes:
        rows: Samples.
        start: Number of the first.
        number: Number of the batch.
        batches: Batches in all.
        mask: Boolean ``[rows, t]``, False where a token is padding; None without a mask.
        looks: How much to draw.
    """

    rows: int
    start: int
    number: int
    batches: int
    mask: np.ndarray | None
    looks: Looks
    _drawn: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    def kept(self, groups: int, places: int) -> np.ndarray:
        """Boolean ``[groups, places]``: which vectors are no padding."""
        if self.mask is not None and self.mask.shape == (groups, places):
            return self.mask
        return np.ones((groups, places), dtype=bool)

    def draw(self, which: str, places: int) -> np.ndarray:
        """Flat numbers ``row * places + place`` of this batch's share of ``which``, int64, ascending."""
        key = (which, places)
        if key not in self._drawn:
            if which == "last":
                self._drawn[key] = self._last(places)
            else:
                valid = np.flatnonzero(self.kept(self.rows, places))
                share = self._share(getattr(self.looks, which))
                self._drawn[key] = self._choose(valid, share, which)
        return self._drawn[key]

    def draw_rows(self, which: str) -> np.ndarray:
        """Numbers of the samples looked at as a whole: ``samples``, ``images``, or ``patched`` ones."""
        key = (which, 0)
        if key not in self._drawn:
            amount = getattr(self.looks, which)
            if which == "patched":
                amount = min(amount, -(-self.batches * self.rows // self.looks.patched_of))
            share = self._share(amount)
            self._drawn[key] = self._choose(np.arange(self.rows), share, which)
        return self._drawn[key]

    def draw_vectors(self, which: str, count: int) -> np.ndarray:
        """This batch's share of ``which`` out of ``count`` vectors, ascending."""
        return self._choose(np.arange(count), self._share(getattr(self.looks, which)), which)

    def halves(self, places: int) -> np.ndarray:
        """Weights that average two halves of the tokens of the samples drawn for ``views``.

        float32 ``[n, 2, places]``; padding weighs nothing, and both rows of a sample with fewer than two
        tokens are zero.
        """
        rows = self.draw_rows("views")
        return self._halved(self.kept(self.rows, places)[rows])

    def views_of_images(self) -> np.ndarray:
        """Which of the ``images`` drawn serve as ``views`` too: numbers among them, evenly spread."""
        count = len(self.draw_rows("images"))
        share = min(count, self._share(self.looks.views))
        return (np.arange(share) * 2 + 1) * count // (2 * max(1, share))

    def halves_of_images(self, places: int) -> np.ndarray:
        """As :meth:`halves`, of positions of :meth:`views_of_images`."""
        return self._halved(np.ones((len(self.views_of_images()), places), dtype=bool))

    def feeds(self, names: list[str]) -> Mapping[str, np.ndarray]:
        """The index inputs by name."""
        found = {}
        for name in names:
            which, _, places = name.removeprefix("lamina_").rpartition("_")
            if name.startswith(f"{ROWS}_"):
                found[name] = self.draw_rows(name.removeprefix(f"{ROWS}_"))
            elif which == HALVES:
                found[name] = self.halves(int(places))
            else:
                found[name] = self.draw(which, int(places))
        return found

    def _share(self, amount: int) -> int:
        """This batch's part of an amount that is spread evenly over the batches looked at."""
        looked = looked_at(self.batches)
        if self.number not in looked:
            return 0
        index = looked.index(self.number)
        return (index + 1) * amount // len(looked) - index * amount // len(looked)

    @property
    def looked(self) -> bool:
        """Whether the costly statistics look at this batch."""
        return self.number in looked_at(self.batches)

    def share_of(self, amount: int) -> int:
        """This batch's part of an amount."""
        return self._share(amount)

    def _choose(self, valid: np.ndarray, count: int, which: str) -> np.ndarray:
        if count >= len(valid):
            return valid.astype(np.int64)
        random = np.random.default_rng([self.looks.seed, self.number, zlib.crc32(which.encode())])
        return np.sort(random.choice(valid, count, replace=False)).astype(np.int64)

    def _halved(self, kept: np.ndarray) -> np.ndarray:
        random = np.random.default_rng([self.looks.seed, self.number, zlib.crc32(HALVES.encode())])
        order = np.where(kept, random.random(kept.shape), 2.0)
        ranks = order.argsort(axis=1).argsort(axis=1)
        count = kept.sum(axis=1, keepdims=True)
        middle = count // 2
        first, second = ranks < middle, (ranks >= middle) & (ranks < count) & (middle > 0)
        sizes = np.maximum(1, np.stack([middle, count - middle], axis=1))
        weights: np.ndarray = (np.stack([first, second], axis=1) / sizes).astype(np.float32)
        return weights

    def _last(self, places: int) -> np.ndarray:
        """The last token of each sample that is not padding; samples that are all padding are left out."""
        kept = self.kept(self.rows, places)
        rows = np.flatnonzero(kept.any(axis=1))
        last = places - 1 - np.argmax(kept[rows, ::-1], axis=1)
        return (rows * places + last).astype(np.int64)
