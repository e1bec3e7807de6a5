"""Speed of data: from text to tokens, and from tokens to the training loop.

Both are timed in wall-clock time, because the result is how long someone waits.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tokenizers
import torch

from antransformer.benchmarks.models import our_setup
from antransformer.benchmarks.settings import Settings, require_distinct, require_positive
from antransformer.benchmarks.timing import Benchmark, Quartiles, Row, alternate, make_rows, quartiles
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
from antransformer.data.checks import DTYPES
from antransformer.data.shards import dtype_for
from antransformer.data.sources import Corpus
from antransformer.data.stdlib import VOCABULARY
from antransformer.models import ModelConfig
from antransformer.training.device import autocast

SAMPLE_BYTES = 16 << 20  # size of the default text
VAL_FRACTION = 0.5  # so that a few documents suffice for both splits
MIN_SHARD_TOKENS = 1 << 20

LIBRARY, PREPARE = "tokenizers", "prepare"
SYNCHRONOUS, PREFETCHED = "synchronous", "prefetched"


@dataclass(frozen=True, kw_only=True)
class DataSettings(Settings):
    """Settings of ``bench_data``.

    Attributes:
        text: inputs as ``prepare`` takes them; empty for 16 MiB of the standard library's source.
        tokenizers: tokenizers as ``prepare`` takes them; empty for bytes and a BPE trained on the text.
        batch: number of sequences in a training step.

    Raises:
        ConfigError: a number is less than 1, or a tokenizer is given twice.
    """

    text: tuple[str | Path, ...] = ()
    tokenizers: tuple[str, ...] = ()
    batch: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(batch=self.batch)
        require_distinct(tokenizer=self.tokenizers)


def bench_data(settings: DataSettings, log: Callable[[str], None]) -> Benchmark:
    """Time ``prepare`` and the loading of batches; ``log`` receives progress.

    Raises:
        DataError: a text or tokenizer cannot be read, as in ``prepare``.
    """
    text = settings.text or stdlib_sample()
    rows = [*_time_prepare(text, settings.tokenizers, settings.rounds, log), *_time_loading(settings, log)]
    facts = {"model": settings.model.mapping(), "batch": settings.batch, "dtype": str(settings.dtype)}
    return Benchmark("data", facts, rows)


def stdlib_sample() -> list[Path]:
    """Source files of the standard library, 16 MiB in total."""
    sizes = [(path, path.stat().st_size) for path in stdlib_files()]
    ends = np.cumsum([size for _, size in sizes])
    return [path for (path, _), end in zip(sizes, ends, strict=True) if end <= max(SAMPLE_BYTES, sizes[0][1])]


def _time_prepare(
    text: Sequence[str | Path], names: Sequence[str], rounds: int, log: Callable[[str], None]
) -> Iterator[Row]:
    """Time ``prepare``, from files to shards, against the library tokenizers on the same text in memory."""
    documents = [document for document, _ in Corpus.find(text).documents()]
    with TemporaryDirectory() as folder:
        if not names:
            bpe = Path(folder, f"bpe-{VOCABULARY}.json")
            train_bpe(documents, VOCABULARY).save(bpe)
            names = ["byte", str(bpe)]
        for number, name in enumerate(names):
            tokenizer = load_tokenizer(name)
            dataset = prepare(text, Path(folder, "data", str(number)), tokenizer=name, val_fraction=VAL_FRACTION)
            tokens = sum(split.tokens for split in dataset.splits.values())
            library = tokenizers.Tokenizer.from_str(tokenizer.to_json())
            calls: dict[str, Callable[[], object]] = {
                LIBRARY: partial(library.encode_batch_fast, documents),
                PREPARE: partial(_prepare_and_discard, text, name),
            }
            timers = {key: partial(_wall_seconds, call) for key, call in calls.items()}
            times, problems = alternate(timers, rounds, log)
            yield from make_rows({"workload": tokenizer.name}, times.get("total", {}), tokens, LIBRARY, problems)


def _prepare_and_discard(text: Sequence[str | Path], tokenizer: str) -> None:
    """Run ``prepare`` completely, into a temporary folder."""
    with TemporaryDirectory() as folder:
        prepare(text, Path(folder, "data"), tokenizer=tokenizer, val_fraction=VAL_FRACTION)


def _wall_seconds(call: Callable[[], object]) -> dict[str, float]:
    start = time.perf_counter()
    call()
    return {"total": time.perf_counter() - start}


def _time_loading(settings: DataSettings, log: Callable[[str], None]) -> list[Row]:
    """Time training steps of anGPT with batches read synchronously and with prefetched batches."""
    shape, device = settings.model, settings.device
    with TemporaryDirectory() as folder:
        windows = ShuffledWindows(_random_split(Path(folder), shape), shape.context, seed=0)
        torch.manual_seed(0)
        with device:
            model, _, optimizer = our_setup(shape, "angpt")

        def step(source: Callable[[int], Batch], numbers: Iterator[int]) -> dict[str, float]:
            start = time.perf_counter()
            tokens, targets = source(next(numbers))
            waited = time.perf_counter() - start
            with autocast(device, settings.dtype):
                model(tokens.to(device), targets.to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type != "cpu":
                torch.accelerator.synchronize(device)
            return {"total": time.perf_counter() - start, "waiting": waited}

        sources: dict[str, Callable[[int], Batch]] = {
            SYNCHRONOUS: partial(windows.batch, global_batch=settings.batch),
            PREFETCHED: Prefetcher(windows, settings.batch).batch,
        }
        # Each variant takes consecutive steps, as training does: a thread reads ahead only the step after the last one.
        timers = {name: partial(step, source, count()) for name, source in sources.items()}
        times, problems = alternate(timers, settings.rounds, log)
    tokens = settings.batch * shape.context
    return [
        row if row.problem else replace(row, waiting=_share(times["waiting"][row.variant], row.seconds))
        for row in make_rows({"workload": "training"}, times.get("total", {}), tokens, SYNCHRONOUS, problems)
    ]


def _share(waited: Sequence[float], seconds: Sequence[float]) -> Quartiles:
    return quartiles([wait / total for wait, total in zip(waited, seconds, strict=True)])


def _random_split(folder: Path, shape: ModelConfig) -> Split:
    """Split with one shard of random tokens."""
    dtype, size = dtype_for(shape.vocab_size), max(MIN_SHARD_TOKENS, 2 * shape.context)
    path = folder / "train-00000.bin"
    np.random.default_rng(0).integers(shape.vocab_size, size=size, dtype=DTYPES[dtype]).tofile(path)
    return Split("train", 1, size, size, dtype, (Shard(path, size, ""),))
