"""Codes learned by gradient: a real weight behind each code is moved as if nothing were rounded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lamina.passes.quantize.coded import Coded
from lamina.passes.quantize.gptq import kept_type
from lamina.passes.quantize.output_search import OutputSearch, Rounded

# A weight's first step in steps of its grid; and a scale's, in its own size, as a share of that.
RATE, _SCALE_RATE = 0.006, 0.1
# Of what rounding took from a weight, the share that it starts from; at most so far from the code it has.
_MEMORY, _FARTHEST = 0.9, 0.45
# Batches of those that are learned from on which the best codes must be better than the start, at most.
_CHECKED = 40
# Parts of a pass after which codes are tried on what is held out.
_LOOKS = 2
# What steps are multiplied by after a part that was no better there; and where all is begun again, because
# it was so many times worse than the start.
_SHYER, _MUCH_SHYER, _LOST = 0.85, 0.5, 1.5
# Decay of the mean of derivatives, and of their squares.
_MEAN, _SQUARE = 0.9, 0.99


def learn(
    search: OutputSearch,
    rounded: Sequence[Rounded],
    *,
    passes: int,
    seconds: float,
    rate: float = RATE,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Coded]:
    """Codes with which the outputs are nearer to the original's than with those given, or the same codes.

    The derivative by a rounded weight moves the real one behind it, where that is inside the grid; scales
    move by the derivative of the rounded quotient. Steps are Adam's, one a batch, in steps of the grid, and
    fall to nothing along half a cosine. A real weight starts on the side of the original weight but inside
    the code it was given, so that codes which were close calls are the first to change. Twice a pass the
    codes are tried on what is held out: where they are much worse than those given it is begun again with
    smaller steps. The best are returned, if they are better on others too.

    Args:
        search: The divergence and its derivatives.
        rounded: The weights.
        passes: Over the data, at most.
        seconds: When they are over the last step has been made; steps fall the faster for it.
        rate: Of the first steps, in steps of the grid.
        progress: Called with percents done, of 100.

    Cost: a run of the program forth and one back over the data a pass. Memory: six float32 copies of the
    weights.

    Source: Bengio et al. 2013, arXiv:1308.3432 (straight through); Esser et al. 2020, arXiv:1902.08153
    (LSQ: derivatives by scales); Kingma and Ba 2014, arXiv:1412.6980 (Adam). Deviates: the aim are the
    outputs of the original, with little weight for labels; other parameters stay; it starts from what
    rounding by operator found.
    """
    made = [r.made for r in rounded]
    others = search.seen[:_CHECKED]
    begun, first = search.divergence(made, search.held), search.divergence(made, others)
    best, least, latents = made, begun, [_Latent.of(r) for r in rounded]
    bold, parts = 1.0, _parts(search.seen)
    clock = _Clock(passes * len(search.seen), seconds)
    while clock.spent() < 1:
        for number in next(parts):
            slopes = search.slopes([latent.made() for latent in latents], [number])[1]
            for latent, slope in zip(latents, slopes, strict=True):
                latent.step(slope.astype(np.float32), rate * bold * clock.share())
            clock.steps += 1
            if progress is not None:
                progress(min(100, int(100 * clock.spent())), 100, "codes")
            if clock.spent() >= 1:
                break
        tried = [latent.made() for latent in latents]
        reached = search.divergence(tried, search.held)
        if reached < least:
            best, least = tried, reached
        elif reached < _LOST * begun:
            bold *= _SHYER
        else:
            bold, latents = bold * _MUCH_SHYER, [_Latent.of(r) for r in rounded]
    return best if best is made or search.divergence(best, others) < first else made


def _parts(numbers: Sequence[int]) -> Iterator[list[int]]:
    """The numbers in parts of a pass, each pass in another order, without end."""
    generator = np.random.default_rng(0)
    while True:
        for part in np.array_split(generator.permutation(numbers), min(_LOOKS, len(numbers))):
            yield part.tolist()


class _Clock:
    """What share of steps or of the time is over, and how large a step then is."""

    def __init__(self, most: int, seconds: float) -> None:
        self.steps, self._most, self._seconds, self._start = 0, most, seconds, time.perf_counter()

    def spent(self) -> float:
        """1 where it is over."""
        return max(self.steps / self._most, (time.perf_counter() - self._start) / self._seconds)

    def share(self) -> float:
        """Half a cosine."""
        return 0.5 * (1 + math.cos(math.pi * self.spent()))


@dataclass
class _Latent:
    """The real weight behind codes, and what Adam remembers of its derivatives and of the scales'."""

    start: Coded
    real: np.ndarray
    scale: np.ndarray
    means: tuple[np.ndarray, np.ndarray]
    squares: tuple[np.ndarray, np.ndarray]
    count: int = 0

    @classmethod
    def of(cls, rounded: Rounded) -> _Latent:
        """Inside the codes given, on the side of the weight they were made for."""
        made, rows = rounded.made, rounded.made.rows()
        step = made.spread(made.scale)
        away = np.divide(rounded.target - rows, step, out=np.zeros_like(rows), where=step != 0)
        real = rows + step * np.clip(_MEMORY * away, -_FARTHEST, _FARTHEST)
        scale = made.scale.astype(np.float32)
        pair = np.zeros(real.shape, np.float32), np.zeros(scale.shape, np.float32)
        return cls(made, real.astype(np.float32), scale, pair, (pair[0].copy(), pair[1].copy()))

    def made(self) -> Coded:
        """The codes the real weight has now."""
        fresh = replace(self.start, scale=kept_type(self.scale, self.start.scale))
        codes = np.clip(np.rint(self._exact(fresh)), fresh.low, fresh.high)
        return replace(fresh, codes=codes.astype(fresh.codes.dtype))

    def step(self, slope: np.ndarray, rate: float) -> None:
        """Move against the derivative by the rounded weight, some ``rate`` of a step of the grid."""
        self.count += 1
        made, size = self.made(), self.start.scale
        exact, zero = self._exact(made), made.spread(made.zero)
        inside = (exact > made.low - 0.5) & (exact < made.high + 0.5)
        # of scale * (round(real / scale + zero) - zero), by scale
        by_scale = slope * (made.codes - np.where(inside, exact, zero))
        blocks = np.add.reduceat(by_scale, np.arange(0, by_scale.shape[1], made.block), axis=1)
        way = self._way(0, np.where(inside, slope, 0))
        self.real -= rate * self.start.spread(size) * way
        self.scale -= rate * _SCALE_RATE * size * self._way(1, blocks)
        # a scale that leaves its neighbourhood has codes that no longer fit it
        np.clip(self.scale, 0.5 * size, 2 * size, out=self.scale)

    def _exact(self, made: Coded) -> np.ndarray:
        step = made.spread(made.scale)
        exact = np.divide(self.real, step, out=np.zeros_like(self.real), where=step != 0)
        return np.asarray(exact + made.spread(made.zero), np.float32)

    def _way(self, which: int, slope: np.ndarray) -> np.ndarray:
        """Adam's: the mean of derivatives over the root of that of their squares, both corrected."""
        mean, square = self.means[which], self.squares[which]
        mean += (1 - _MEAN) * (slope - mean)
        square += (1 - _SQUARE) * (np.square(slope) - square)
        root = np.sqrt(square / (1 - _SQUARE**self.count))
        ahead = mean / (1 - _MEAN**self.count)
        return np.divide(ahead, root, out=np.zeros_like(mean), where=root > 0)
