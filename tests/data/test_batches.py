"""Batches: each window once per epoch, independent of the number of ranks, from (seed, step) alone."""

import math
import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from antransformer.data import Prefetcher, Shard, ShuffledWindows, Split, eval_batches, prepare
from antransformer.data.shuffle import FeistelPermutation
from antransformer.errors import ConfigError, DataError
from helpers.messages import mentions


def make_split(folder: Path, *lengths: int) -> Split:
    """Shards of consecutive numbers. Shard i begins at 1000 * i, so a token identifies its position."""
    shards = []
    for number, length in enumerate(lengths):
        path = folder / f"train-{number:05d}.bin"
        np.arange(1000 * number, 1000 * number + length, dtype="<u2").tofile(path)
        shards.append(Shard(path, length, ""))
    return Split("train", len(lengths), sum(lengths), 0, "uint16", tuple(shards))


@pytest.fixture
def split(tmp_path: Path) -> Split:
    return make_split(tmp_path, 41, 9, 30, 42)  # at context 8: 5, 1, 3 and 5 windows


def starts(windows: ShuffledWindows, steps: range, batch: int, world: int = 1) -> list[int]:
    """First token of each window of the steps, rank after rank."""
    return [
        int(token)
        for step in steps
        for rank in range(world)
        for token in windows.batch(step, batch, rank, world)[0][:, 0]
    ]


FIRST = [0, 11, 9, 6, 7, 3, 5, 8, 2, 13, 4, 10, 12, 1]
EVERY = [0, 8, 16, 24, 32, 1000, 2000, 2008, 2016, 3000, 3008, 3016, 3024, 3032]


def test_targets_are_the_next_tokens(split: Split) -> None:
    tokens, targets = ShuffledWindows(split, 8, seed=0).batch(0, 14)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape == (14, 8)
    assert torch.equal(targets, tokens + 1)  # consecutive at the ends too: no window spans two shards
    assert tokens.is_contiguous() and targets.is_contiguous()


def test_prefetched_batches_are_equal_in_any_order_of_steps(split: Split) -> None:
    prefetcher = Prefetcher(ShuffledWindows(split, 8, seed=3), 4, rank=1, world_size=2)
    for step in (0, 1, 2, 9, 10, 3, 3, 4, 0):  # across epochs, backwards, and a repeated step
        expected = ShuffledWindows(split, 8, seed=3).batch(step, 4, 1, 2)
        assert all(map(torch.equal, prefetcher.batch(step), expected))


def test_the_next_batch_is_read_before_it_is_requested(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, windows = [], ShuffledWindows(split, 8, seed=3)
    batch = windows.batch
    monkeypatch.setattr(windows, "batch", lambda step, **options: steps.append(step) or batch(step, **options))
    prefetcher = Prefetcher(windows, 2)
    for step in range(3):
        prefetcher.batch(step)
    prefetcher._pending[1].result()
    assert steps == [0, 1, 2, 3]


def test_an_error_in_the_prefetch_thread_is_raised_to_the_caller(split: Split) -> None:
    with pytest.raises(ConfigError) as error:
        Prefetcher(ShuffledWindows(split, 8, seed=3), 3, world_size=2).batch(0)
    assert mentions(str(error.value), *["3", "2"])


def test_every_window_occurs_once_per_epoch(split: Split) -> None:
    windows = ShuffledWindows(split, 8, seed=3)
    assert len(windows) == 14
    epochs = [starts(windows, range(7 * epoch, 7 * epoch + 7), 2) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == EVERY
        assert epoch != EVERY
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_straddle_epochs_without_repeating_or_skipping(split: Split) -> None:
    windows = ShuffledWindows(split, 8, seed=3)
    sequence = starts(windows, range(28), 5)  # 140 windows, ten epochs
    assert Counter(sequence) == dict.fromkeys(EVERY, 10)
    assert all(sorted(sequence[at : at + 14]) == EVERY for at in range(0, 140, 14))
    assert starts(windows, range(4), 35) == sequence  # a batch may hold several epochs


@pytest.mark.parametrize("world", [2, 3, 4, 6])
def test_ranks_share_the_same_windows(split: Split, world: int) -> None:
    windows = ShuffledWindows(split, 8, seed=5)
    for step in range(8):
        steps = range(step, step + 1)
        assert starts(windows, steps, 12, world) == starts(windows, steps, 12)


def test_batches_are_a_pure_function_of_seed_and_step(split: Split) -> None:
    windows = ShuffledWindows(split, 8, seed=1)
    forward = starts(windows, range(12), 4)
    backward = [starts(ShuffledWindows(split, 8, seed=1), range(step, step + 1), 4) for step in reversed(range(12))]
    assert forward == [start for step in reversed(backward) for start in step]
    assert starts(ShuffledWindows(split, 8, seed=2), range(12), 4) != forward


def test_old_order_never_changes(split: Split) -> None:
    # Resumed runs rely on this order across versions of numpy and of this package. The expected values were computed
    # independently: the windows in EVERY sorted by np.random.PCG64([seed, epoch]).random_raw(14).
    first = [3016, 24, 3032, 16, 8, 2016, 2000, 0, 2008, 32, 3008, 3024, 1000, 3000]
    second = [2008, 3008, 32, 3016, 3024, 1000, 8, 3000, 2016, 3032, 2000, 16, 0, 24]
    assert starts(ShuffledWindows(split, 8, seed=0, shuffle="argsort"), range(2), 14) == first + second


def transcribed(count: int, seed: int, epoch: int) -> list[int]:
    """The Feistel order from its definition, with Python's integers."""
    bits = max(2, math.ceil(math.log2(count)))
    small, large = bits // 2, bits - bits // 2
    keys = [int(key) for key in np.random.PCG64([seed, epoch]).random_raw(8)]

    def mix(value: int) -> int:
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    def permute(value: int) -> int:
        left, right = divmod(value, 2**small)
        for index, key in enumerate(keys):
            if index % 2 == 0:
                right ^= mix((left + key) % 2**64) % 2**small
            else:
                left ^= mix((right + key) % 2**64) % 2**large
        return left * 2**small + right

    order = []
    for value in range(count):
        value = permute(value)
        while value >= count:
            value = permute(value)
        order.append(value)
    return order


@pytest.mark.parametrize("count", [1, 2, 3, 14, 16, 17, 1000])
def test_feistel_order_never_changes(count: int) -> None:
    for seed, epoch in ((0, 0), (2**62, 5)):
        order = FeistelPermutation(count, seed, epoch)[np.arange(count)]
        assert order.tolist() == transcribed(count, seed, epoch)
        assert sorted(order.tolist()) == list(range(count))
    assert transcribed(14, 0, 0) == FIRST  # so that no change of both goes unnoticed


def test_feistel_order_is_uniform() -> None:
    orders = np.array([FeistelPermutation(12, seed, 0)[np.arange(12)] for seed in range(6000)])
    # Element by position, and pairs of elements at neighbouring positions: chi-squared within five standard deviations.
    for codes, cells in (
        ((orders * 12 + np.arange(12)).ravel(), 144),
        ((orders[:, 0] * 12 + orders[:, 1])[orders[:, 0] != orders[:, 1]], 144),
    ):
        counts = np.bincount(codes, minlength=cells)
        counts = counts[counts > 0]
        expected = counts.sum() / len(counts)
        statistic = ((counts - expected) ** 2 / expected).sum()
        assert len(counts) in (132, 144) and abs(statistic - len(counts)) < 5 * math.sqrt(2 * len(counts))


def test_an_epoch_of_any_length_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        order = FeistelPermutation(10**12, 1, 0)[np.arange(10**11, 10**11 + 1000)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(set(order.tolist())) == 1000 and order.min() >= 0 and order.max() < 10**12
    assert peak < 1_000_000


def test_an_id_above_the_largest_is_refused_and_its_shard_named(split: Split) -> None:
    windows = ShuffledWindows(replace(split, max_token=3020), 8, seed=0)
    with pytest.raises(DataError) as error:
        windows.batch(0, 14)
    assert mentions(error.value, split.shards[3].path, 3040, 3020)


def test_a_file_that_shrinks_during_training_is_named(split: Split) -> None:
    windows = ShuffledWindows(split, 8, seed=0)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:-4]), Path.unlink):
        damage(split.shards[3].path)
        with pytest.raises(DataError) as error:
            windows.batch(0, 14)
        assert mentions(error.value, split.shards[3].path)


def test_more_shards_than_a_process_may_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them can take minutes on a busy disk
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from antransformer.data import Dataset, ShuffledWindows\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))\n"
        "split = Dataset.open(sys.argv[1]).split('train')\n"
        "tokens, targets = ShuffledWindows(split, 4, seed=0).batch(0, 4096)\n"
        "assert len(split.shards) > 128 and len({tuple(row) for row in tokens.tolist()}) > 1000\n"
    )
    (tmp_path / "a.txt").write_text("".join(f"{number} " for number in range(2000)))
    (tmp_path / "b.txt").write_text("held out")
    prepare(tmp_path / "a.txt", tmp_path / "out", val_inputs=tmp_path / "b.txt", shard_tokens=10)
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=True)


def test_numbers_out_of_range_are_refused(split: Split) -> None:
    windows = ShuffledWindows(split, 8, seed=0)
    for arguments in ((0, 5, 0, 2), (0, 0), (-1, 4), (0, 4, 2, 2), (0, 4, -1, 2), (0, 4, 0, 0)):
        with pytest.raises(ConfigError):
            windows.batch(*arguments)
    for call, facts in (
        (lambda: ShuffledWindows(split, 0, seed=0), "context 0"),
        (lambda: ShuffledWindows(split, 8, seed=-1), "seed -1"),
        (lambda: eval_batches(split, 8, 0), "batch_size 0"),
    ):
        with pytest.raises(ConfigError) as error:
            call()
        assert mentions(str(error.value), *facts.split())


def test_a_context_longer_than_every_shard_is_refused(split: Split) -> None:
    assert len(ShuffledWindows(split, 41, seed=0)) == 1
    with pytest.raises(DataError):
        ShuffledWindows(split, 42, seed=0)
    with pytest.raises(DataError) as error:
        ShuffledWindows(split, 43, seed=0)
    assert mentions(str(error.value), *["context", "43", "44", "train", "42"])


def test_eval_batches_are_in_order_and_the_last_may_be_smaller(split: Split) -> None:
    batches = list(eval_batches(split, 8, 4))
    assert [len(tokens) for tokens, _ in batches] == [4, 4, 4, 2]
    assert torch.cat([tokens[:, 0] for tokens, _ in batches]).tolist() == EVERY
    assert all(torch.equal(targets, tokens + 1) for tokens, targets in batches)


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (8, 1), (39, 4), (56, 7), (10_000, 14)])
def test_limited_eval_batches_are_spread_evenly(split: Split, limit: int, count: int) -> None:
    first = torch.cat([tokens[:, 0] for tokens, _ in eval_batches(split, 8, 3, max_tokens=limit)]).tolist()
    positions = [EVERY.index(start) for start in first]
    assert len(positions) == count
    gaps = np.diff([*positions, len(EVERY)])
    assert gaps.min() >= len(EVERY) // count and gaps.max() <= -(-len(EVERY) // count)
