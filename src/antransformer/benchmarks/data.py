"""The speed of data: text to tokens, and tokens to the training loop.

Both are timed by the clock on the wall: what counts is who waits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
import torch

from antransformer.benchmarks.models import ours
from antransformer.benchmarks.timing import Row, alternate, compare, quartiles
from antransformer.data import (
    Prefetcher,
    Shard,
    ShuffledWindows,
    Split,
    load_tokenizer,
    prepare,
    stdlib_files,
    train_bpe,
)
from antransformer.data.batches import Batch
from antransformer.data.shards import DTYPES, dtype_for
from antransformer.data.sources import Corpus
from antransformer.data.stdlib import VOCABULARY
from antransformer.models import ModelConfig
from antransformer.training.device import autocast

SAMPLE_BYTES = 16 << 20  # of text where none is given
HELD_OUT = 0.5  # of the documents, so that a few of them do for both sides
SHARD_TOKENS = 1 << 20  # at least, of the random ones that training is timed on


def sample() -> list[Path]:
    """Files of the standard library's source, 16 MiB of them."""
    sizes = [(path, path.stat().st_size) for path in stdlib_files()]
    behind = np.cumsum([size for _, size in sizes])
    return [path for (path, _), end in zip(sizes, behind, strict=True) if end <= max(SAMPLE_BYTES, sizes[0][1])]


def bench_tokens(text: Sequence[str | Path], names: Sequence[str], rounds: int) -> Iterator[Row]:
    """Time ``prepare``, from files to shards, beside the library ``tokenizers`` on the same text in memory.

    Args:
        text: inputs as ``prepare`` takes them.
        names: tokenizers as it takes them; none for bytes and a BPE that is trained on the text.
        rounds: how many times.

    Raises:
        DataError: as ``prepare``.
    """
    texts = [text for text, _ in Corpus.find(text).documents()]
    with TemporaryDirectory() as folder:
        if not names:
            train_bpe(texts, VOCABULARY).save(Path(folder, f"bpe-{VOCABULARY}.json"))
            names = ["byte", str(Path(folder, f"bpe-{VOCABULARY}.json"))]
        for number, name in enumerate(names):
            words = load_tokenizer(name)
            made = prepare(text, Path(folder, "made", str(number)), tokenizer=name, val_fraction=HELD_OUT)
            tokens = sum(split.tokens for split in made.splits.values())
            library = tokenizers.Tokenizer.from_str(words.to_json())
            calls: dict[str, Callable[[], object]] = {
                "tokenizers": partial(library.encode_batch_fast, texts),
                "prepare": partial(prepared, text, name),
            }
            times = alternate({key: partial(wall, call) for key, call in calls.items()}, rounds)["all"]
            yield from compare({"of": words.name}, times, tokens, "tokenizers")


def prepared(text: Sequence[str | Path], tokenizer: str) -> None:
    """All of ``prepare``, into a folder that is removed."""
    with TemporaryDirectory() as folder:
        prepare(text, Path(folder, "data"), tokenizer=tokenizer, val_fraction=HELD_OUT)


def wall(call: Callable[[], object]) -> dict[str, float]:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return {"all": time.perf_counter() - start}


def bench_loading(shape: ModelConfig, batch: int, rounds: int, device: torch.device, dtype: torch.dtype) -> list[Row]:
    """Time training steps of anGPT on batches that are read when they are needed, and on some that are read ahead."""
    with TemporaryDirectory() as folder:
        windows = ShuffledWindows(random_split(Path(folder), shape), shape.context, seed=0)
        torch.manual_seed(0)
        with device:
            model, _, optimizer = ours(shape, "angpt")

        def step(source: Callable[[int], Batch]) -> dict[str, float]:
            start = time.perf_counter()
            tokens, targets = source(next(numbers))
            waited = time.perf_counter() - start
            with autocast(device, dtype):
                model(tokens.to(device), targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return {"all": time.perf_counter() - start, "waiting": waited}

        numbers = count()
        sources: dict[str, Callable[[int], Batch]] = {
            "in turn": partial(windows.batch, global_batch=batch),
            "ahead": Prefetcher(windows, batch).batch,
        }
        times = alternate({name: partial(step, source) for name, source in sources.items()}, rounds)
    rows = compare({"of": "training"}, times["all"], batch * shape.context, "in turn")
    return [
        replace(row, waiting=quartiles([part / all for part, all in zip(waited, row.seconds, strict=True)]))
        for row, waited in zip(rows, times["waiting"].values(), strict=True)
    ]


def random_split(folder: Path, shape: ModelConfig) -> Split:
    """One shard of random tokens."""
    dtype, size = dtype_for(shape.vocab_size), max(SHARD_TOKENS, 2 * shape.context)
    path = folder / "train-00000.bin"
    np.random.default_rng(0).integers(shape.vocab_size, size=size, dtype=DTYPES[dtype]).tofile(path)
    return Split("train", 1, size, size, dtype, (Shard(path, size, ""),))
