"""Batches of token windows, each a pure function of (seed, step): nothing has to be saved to go on with them."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from antransformer.data.dataset import Split
from antransformer.errors import ConfigError, DataError

Batch = tuple[Tensor, Tensor]


class ShuffledWindows:
    """The windows of a split: context + 1 tokens at every multiple of ``context`` inside a shard, never across two.

    Every token but the first of a shard is a target in exactly one window; the few after a shard's last whole window
    are not used. The length is the number of windows, which is that of an epoch.
    """

    def __init__(self, split: Split, context: int, seed: int) -> None:
        """Count the windows of ``split``.

        Raises:
            ConfigError: context is below 1 or seed below 0.
            DataError: no shard is long enough for a window.
        """
        if context < 1:
            raise ConfigError(f"context is {context}: it must be at least 1 token")
        if seed < 0:
            raise ConfigError(f"seed is {seed}: it must not be negative")
        longest = max(shard.tokens for shard in split.shards)
        if longest <= context:
            raise DataError(
                f"context {context} needs {context + 1} tokens in a row, and the longest {split.name} shard has "
                f"{longest:,}: choose a shorter context or prepare more text"
            )
        self._context = context
        self._seed = seed
        self._arrays = split.arrays
        # Number of the first window of every shard, and behind them the number of all.
        self._first = np.cumsum([0] + [(shard.tokens - 1) // context for shard in split.shards])
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, step: int, global_batch: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Tokens and targets of one rank at a step, int64 [global_batch / world_size, context] each.

        Windows come in the order of one shuffled epoch after the other, ``global_batch`` at a step, and the ranks take
        consecutive slices of them. So a step sees the same windows whatever the number of ranks, and no window comes
        again before all others have come.

        Raises:
            ConfigError: world_size does not divide global_batch, or a number is out of range.
        """
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} of {world_size}: ranks count from 0 to world_size - 1")
        if global_batch < 1 or global_batch % world_size:
            raise ConfigError(f"a batch of {global_batch} windows can not be shared evenly by {world_size} processes")
        if step < 0:
            raise ConfigError(f"step is {step}: it must not be negative")
        size = global_batch // world_size
        numbers = step * global_batch + rank * size + np.arange(size)
        epochs, places = np.divmod(numbers, len(self))
        return self.take(np.concatenate([self._epoch(int(e))[places[epochs == e]] for e in np.unique(epochs)]))

    def take(self, windows: NDArray[np.int64]) -> Batch:
        """Tokens and targets of the windows of these numbers, int64 [len(windows), context] each."""
        shards = np.searchsorted(self._first, windows, side="right") - 1
        starts = (windows - self._first[shards]) * self._context
        rows = np.empty((len(windows), self._context + 1), dtype=np.int64)
        for row, shard, start in zip(rows, shards, starts, strict=True):
            row[:] = self._arrays[shard][start : start + self._context + 1]
        both = torch.from_numpy(rows)
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        if self._order is None or self._order[0] != epoch:
            # Raw bit streams stay the same across numpy versions (NEP 19); Generator.permutation may change.
            raw = np.random.PCG64([self._seed, epoch]).random_raw(len(self))
            self._order = epoch, np.argsort(raw, kind="stable")
        return self._order[1]


class Prefetcher:
    """The batches of one rank, the next of which a thread reads while the last one is used: a disk may be slow.

    Args:
        windows: what they are made of.
        global_batch, rank, world_size: as in ``ShuffledWindows.batch``.
    """

    def __init__(self, windows: ShuffledWindows, global_batch: int, rank: int = 0, world_size: int = 1) -> None:
        self.windows = windows
        self._read = partial(windows.batch, global_batch=global_batch, rank=rank, world_size=world_size)
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._coming: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step, read ahead if the last call was for the step before; raises as ``ShuffledWindows``."""
        known, coming = self._coming or (None, None)
        if coming is None or known != step:
            coming = self._thread.submit(self._read, step)
        self._coming = step + 1, self._thread.submit(self._read, step + 1)
        return coming.result()


def eval_batches(split: Split, context: int, batch_size: int, max_tokens: int | None = None) -> Iterator[Batch]:
    """Windows of a split in order, for evaluation: tokens and targets, int64 [at most batch_size, context] each.

    With ``max_tokens`` only so many targets (at least one window), spread evenly over the split.

    Raises:
        ConfigError: batch_size or context is below 1.
        DataError: no shard is long enough for a window.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}: it must be at least 1 window")
    windows = ShuffledWindows(split, context, seed=0)
    count = len(windows) if max_tokens is None else min(len(windows), max(1, max_tokens // context))
    numbers = np.arange(count) * len(windows) // count
    return (windows.take(numbers[at : at + batch_size]) for at in range(0, count, batch_size))
