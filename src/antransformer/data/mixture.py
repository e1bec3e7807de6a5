"""Mixtures of data folders: which window of which source every position of a run holds, in constant memory.

Positions are counted over the run, from 0. They are divided into periods of ``PERIOD`` positions. In each of them every
source has the same number of positions, by its weight, in a random order. A source's positions take its windows in its
own shuffled epochs, so no window is repeated within an epoch of its source. All of this is a function of the position,
so a run resumes exactly, with any number of ranks.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from antransformer.data.batches import Batch, ShuffledWindows, require_share
from antransformer.errors import ConfigError

PERIOD = 10_000  # positions; weights are rounded to multiples of its inverse


@dataclass(frozen=True)
class Part:
    """One source of a mixture.

    Attributes:
        source: folder of prepared data, or the name of built-in data.
        weight: fraction of the training windows, above 0; the weights of a mixture have the sum 1.
    """

    source: str
    weight: float


def parse_mixture(text: str) -> tuple[Part, ...]:
    """Read ``web:0.7 code:0.2 'my books:0.1'``, or the name of a single source.

    Weights may have any positive sum. An existing folder is a single source, whatever its name.

    Raises:
        ConfigError: a weight is missing or not positive, or a source is given twice.
    """
    if Path(text).exists():
        return (Part(text, 1.0),)
    try:
        words = shlex.split(text)
    except ValueError:
        words = [text]
    if len(words) == 1 and _split(words[0])[1] is None:
        return (Part(text, 1.0),)
    pairs = [_split(word) for word in words]
    for (source, weight), word in zip(pairs, words, strict=True):
        if weight is None or not source:
            raise ConfigError(f"data: {word!r} has no weight: a mixture is written as web:0.7 code:0.3")
        if not 0 < weight < float("inf"):
            raise ConfigError(f"data: the weight of {source} must be above 0 and finite, got {weight:g}")
    names = [source for source, _ in pairs]
    if len(set(names)) != len(names):
        raise ConfigError(f"data: a source is given twice in {text}")
    total = sum(weight or 0.0 for _, weight in pairs)
    return tuple(Part(source, (weight or 0.0) / total) for source, weight in pairs)


def format_mixture(parts: Sequence[Part]) -> str:
    """Inverse of ``parse_mixture``: one line of shell words, or the name of a single source."""
    if len(parts) == 1:
        return parts[0].source
    return " ".join(shlex.quote(f"{part.source}:{part.weight:.6g}") for part in parts)


def _split(word: str) -> tuple[str, float | None]:
    """Source and weight of one word of a mixture; without a weight, None."""
    source, colon, weight = word.rpartition(":")
    try:
        return (source, float(weight)) if colon else (word, None)
    except ValueError:
        return word, None


def quotas(weights: Sequence[float]) -> NDArray[np.int64]:
    """Number of positions of each source in a period: weights times ``PERIOD``, rounded to that sum, at least 1.

    Raises:
        ConfigError: there are more sources than positions.
    """
    if len(weights) > PERIOD:
        raise ConfigError(f"a mixture has at most {PERIOD:,} sources, got {len(weights):,}")
    exact = np.asarray(weights) / np.sum(weights) * PERIOD
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    # The largest remainders get what is left; what is too much is taken from the largest quotas.
    order = np.argsort(counts - exact, kind="stable")
    for index in order[: max(0, PERIOD - counts.sum())]:
        counts[index] += 1
    while counts.sum() > PERIOD:
        counts[counts.argmax()] -= 1
    return counts


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


class MixedWindows:
    """Windows of several sources, with the methods of ``ShuffledWindows`` that training needs.

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
        # A source goes on in a stage where it stopped in the stage before.
        self._taken = [np.zeros(len(self._sources), dtype=np.int64)]
        for stage, following in zip(range(len(stages)), stages[1:], strict=False):
            taken = self._taken[-1].copy()
            taken[self._used[stage]] += self._patterns[stage].counts(following.start - stages[stage].start)
            self._taken.append(taken)

    def batch(self, step: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return tokens and targets of one rank at a step; see ``ShuffledWindows.batch``."""
        require_share(step, global_batch, rank, world_size)
        size = global_batch // world_size
        return self.gather_positions(step * global_batch + rank * size + np.arange(size))

    def gather_positions(self, positions: NDArray[np.int64]) -> Batch:
        """Return tokens and targets at these positions of the run, int64 [len(positions), context] each."""
        import torch

        sources, numbers = self.locate(positions)
        batches = {int(source): np.flatnonzero(sources == source) for source in np.unique(sources)}
        parts = [(rows, self._sources[source].windows_at(numbers[rows])) for source, rows in batches.items()]
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
