"""Batches of token windows. Each is a pure function of (seed, step), so resuming needs no saved sampler state."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antransformer.data.checks import PREPARE_AGAIN
from antransformer.data.dataset import Split
from antransformer.data.shuffle import FeistelPermutation, permutation
from antransformer.errors import ConfigError, DataError
from antransformer.wording import counted

Batch = tuple[Tensor, Tensor]


class Windows(ABC):
    """Source of training batches."""

    def batch(self, step: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return tokens and targets of one rank at a step, int64 [global_batch / world_size, context] each.

        Each step takes the next ``global_batch`` windows of the sequence, and each rank a consecutive slice of them. A
        step therefore sees the same windows with any number of ranks.

        Raises:
            ConfigError: world_size does not divide global_batch, or a number is out of range.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        if global_batch < 1 or global_batch % world_size:
            raise ConfigError(
                f"a batch of {counted(global_batch, 'window')} cannot be divided among {world_size} ranks"
            )
        if step < 0:
            raise ConfigError(f"step is {step}: it must not be negative")
        size = global_batch // world_size
        return self.windows_at(step * global_batch + rank * size + np.arange(size))

    @abstractmethod
    def windows_at(self, numbers: NDArray[np.int64]) -> Batch:
        """Return tokens and targets of the windows with these numbers, int64 [len(numbers), context] each."""


class ShuffledWindows(Windows):
    """Windows of context + 1 tokens at every multiple of ``context`` in a shard, shuffled in each epoch.

    A window never spans two shards. Every token except the first of a shard is a target in exactly one window. The
    tokens after the last complete window of a shard are not used. No window repeats within an epoch. ``len()`` is the
    number of windows in an epoch.
    """

    def __init__(self, split: Split, context: int, seed: int, shuffle: str = "feistel") -> None:
        """Count the windows of ``split``; ``shuffle`` is "feistel" or "argsort", see ``permutation``.

        Raises:
            ConfigError: context is below 1 or seed is below 0.
            DataError: every shard is shorter than a window.
        """
        if context < 1:
            raise ConfigError(f"context is {context}: it must be at least 1 token")
        if seed < 0:
            raise ConfigError(f"seed is {seed}: it must not be negative")
        longest = max(shard.tokens for shard in split.shards)
        if longest <= context:
            raise DataError(
                f"context {context} needs {context + 1} consecutive tokens, but the longest {split.name} shard has "
                f"{longest:,}: choose a shorter context or prepare more text"
            )
        self._context = context
        self._seed = seed
        self._shuffle = shuffle
        self._split = split
        # Index of each shard's first window; the last entry is the total number of windows.
        self._offsets = np.cumsum([0] + [(shard.tokens - 1) // context for shard in split.shards])
        self._epoch_order: tuple[int, FeistelPermutation | NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self._offsets[-1])

    def windows_at(self, numbers: NDArray[np.int64]) -> Batch:
        """Return the windows with these numbers in the sequence of shuffled epochs; shapes as in ``gather``."""
        windows = np.empty_like(numbers)
        # They may straddle epochs, each of which has an order of its own.
        epochs, positions = np.divmod(numbers, len(self))
        for epoch in np.unique(epochs):
            windows[epochs == epoch] = self._order(int(epoch))[positions[epochs == epoch]]
        return self.gather(windows)

    def gather(self, windows: NDArray[np.int64]) -> Batch:
        """Return tokens and targets of the windows with these indices, int64 [len(windows), context] each.

        Raises:
            DataError: a token id is above the largest id that ``meta.json`` records.
        """
        shards = np.searchsorted(self._offsets, windows, side="right") - 1
        starts = (windows - self._offsets[shards]) * self._context
        # torch's embedding and cross-entropy need int64.
        rows = np.empty((len(windows), self._context + 1), dtype=np.int64)
        for shard in np.unique(shards):
            chosen = shards == shard
            rows[chosen] = self._split.read(shard, starts[chosen], self._context + 1)
        # Opening the data checks only a sample of the ids, and on a GPU a wrong index ends the process.
        if self._split.max_token is not None and rows.max(initial=0) > self._split.max_token:
            shard = self._split.shards[shards[rows.max(axis=1).argmax()]]
            raise DataError(
                f"{shard.path}: token {rows.max()} exceeds max_token {self._split.max_token} in meta.json; "
                f"{PREPARE_AGAIN}"
            )
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _order(self, epoch: int) -> FeistelPermutation | NDArray[np.int64]:
        if self._epoch_order is None or self._epoch_order[0] != epoch:
            self._epoch_order = epoch, permutation(self._shuffle, len(self), self._seed, epoch)
        return self._epoch_order[1]


class Prefetcher:
    """Batches of one rank; a thread reads the next batch while the current one is used.

    Args:
        windows: source of the batches.
        global_batch, rank, world_size: as in ``Windows.batch``.
    """

    def __init__(self, windows: Windows, global_batch: int, rank: int = 0, world_size: int = 1) -> None:
        self.windows = windows
        self._read = partial(windows.batch, global_batch=global_batch, rank=rank, world_size=world_size)
        # One thread: the cached epoch order in ShuffledWindows is not safe to share between two.
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """Return the batch of a step; it is already in memory if the previous call was for ``step - 1``.

        Raises:
            ConfigError: as ``Windows.batch``.
        """
        pending_step, future = self._pending or (None, None)
        if future is None or pending_step != step:
            future = self._thread.submit(self._read, step)
        self._pending = step + 1, self._thread.submit(self._read, step + 1)
        return future.result()


def eval_batches(split: Split, context: int, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Return the windows of a split in order: tokens and targets, int64 [at most batch_size, context] each.

    ``max_tokens`` limits the number of targets (at least one window), spread evenly over the split.

    Raises:
        ConfigError: batch_size or context is below 1.
        DataError: every shard is shorter than a window.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1 window")
    windows = ShuffledWindows(split, context, seed=0)
    count = len(windows) if max_tokens is None else min(len(windows), max(1, max_tokens // context))
    # Spread over the split: its documents are in the order of the input files, so the first ones may be of one kind.
    indices = np.arange(count) * len(windows) // count
    return (windows.gather(indices[start : start + batch_size]) for start in range(0, count, batch_size))
