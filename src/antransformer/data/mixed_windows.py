"""Windows of a mixture: which window of which source every position of a run holds, in constant memory.

Positions are counted over the run, from 0. They are divided into periods of ``PERIOD`` positions. In each of them every
source has the same number of positions, by its weight, in a random order. A source's positions take its windows in its
own shuffled epochs, so no window is repeated within an epoch of its source. All of this is a function of the position,
so a run resumes exactly, with any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from antransformer.data.batches import Batch, ShuffledWindows, Windows
from antransformer.data.mixture import PERIOD, quotas


class Pattern:
    """Sources and their counts at every position of a run.

    Args:
        weights: weights of the sources.
        seed: seed of the order within a period.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.quotas, self._seed = quotas(weights), seed
        self._cached: tuple[int, NDArray[np.int64], NDArray[np.int64]] | None = None

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each position, and how many earlier positions have the same source; int64 [len(positions)]."""
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        periods, offsets = np.divmod(positions, PERIOD)
        for period in np.unique(periods):
            chosen = periods == period
            order, ranks = self._period(int(period))
            sources[chosen] = order[offsets[chosen]]
            numbers[chosen] = period * self.quotas[sources[chosen]] + ranks[offsets[chosen]]
        return sources, numbers

    def counts(self, positions: int) -> NDArray[np.int64]:
        """Number of windows of each source in the first positions of a run."""
        period, offset = divmod(positions, PERIOD)
        order, _ = self._period(period)
        return period * self.quotas + np.bincount(order[:offset], minlength=len(self.quotas))

    def _period(self, period: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources of the positions of a period, and the rank of each among those with the same source."""
        if self._cached is None or self._cached[0] != period:
            sources = np.repeat(np.arange(len(self.quotas)), self.quotas)
            # Raw bit streams and a stable sort stay the same across numpy versions (NEP 19).
            order = sources[np.argsort(np.random.PCG64([self._seed, period]).random_raw(PERIOD), kind="stable")]
            ranks = np.empty_like(order)
            for source, quota in enumerate(self.quotas):
                ranks[order == source] = np.arange(quota)
            self._cached = period, order, ranks
        return self._cached[1:]


@dataclass(frozen=True)
class Stage:
    """A mixture from a position of the run on.

    Attributes:
        start: first position.
        weights: weight of each source, 0 for a source that is not used.
    """

    start: int
    weights: tuple[float, ...]


class MixedWindows(Windows):
    """Windows of several sources.

    Args:
        sources: windows of every source, of one context.
        stages: the mixtures in order; the first starts at 0.
        seed: seed of the order of the sources.
    """

    def __init__(self, sources: Sequence[ShuffledWindows], stages: Sequence[Stage], seed: int) -> None:
        self._sources = list(sources)
        self._starts = np.array([stage.start for stage in stages])
        self._used = [np.flatnonzero(np.array(stage.weights) > 0) for stage in stages]
        self._patterns = [
            Pattern([stage.weights[index] for index in used], seed + number)
            for number, (stage, used) in enumerate(zip(stages, self._used, strict=True))
        ]
        # In each stage, a source continues where it stopped in the stage before.
        self._taken = [np.zeros(len(self._sources), dtype=np.int64)]
        for stage, following in zip(range(len(stages)), stages[1:], strict=False):
            taken = self._taken[-1].copy()
            taken[self._used[stage]] += self._patterns[stage].counts(following.start - stages[stage].start)
            self._taken.append(taken)

    def windows_at(self, numbers: NDArray[np.int64]) -> Batch:
        """Return tokens and targets at these positions of the run, int64 [len(numbers), context] each."""
        sources, of_source = self.locate(numbers)
        batches = {int(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
        parts = [(rows, self._sources[source].windows_at(of_source[rows])) for source, rows in batches.items()]
        order = torch.from_numpy(np.concatenate([rows for rows, _ in parts]).argsort())
        tokens, targets = (torch.cat([batch[index] for _, batch in parts])[order] for index in (0, 1))
        return tokens, targets

    def locate(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Source of each position, and its number among all windows of that source so far."""
        sources, numbers = np.empty_like(positions), np.empty_like(positions)
        stages = np.searchsorted(self._starts, positions, side="right") - 1
        for stage in np.unique(stages):
            chosen = stages == stage
            local, counts = self._patterns[stage].locate(positions[chosen] - self._starts[stage])
            sources[chosen] = self._used[stage][local]
            numbers[chosen] = counts + self._taken[stage][sources[chosen]]
        return sources, numbers
