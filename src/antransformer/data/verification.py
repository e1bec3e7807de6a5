"""Check of all tokens of a prepared data folder."""

import contextlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

from antransformer.data.checks import DTYPES, check_content, sample_digest
from antransformer.data.dataset import Dataset
from antransformer.data.shards import META_FILE
from antransformer.errors import DataError
from antransformer.files import read_json, replace_text


def verify(path: str | Path, jobs: int = 1, progress: Callable[[int, int], object] | None = None) -> Dataset:
    """Check all of a prepared data folder: sizes, and the SHA-256 and the largest id of every shard.

    Folders of older versions have no checksums of the samples that ``Dataset.open`` checks. They are added to
    ``meta.json``, if it can be written.

    Args:
        path: data folder.
        jobs: number of shards that are read at a time.
        progress: called after every block with (bytes checked, bytes in total), by one thread at a time.

    Raises:
        DataError: a file is missing or damaged, or ``jobs`` is below 1.
    """
    if jobs < 1:
        raise DataError(f"--jobs {jobs}: it must be at least 1")
    dataset = Dataset.open(path)
    itemsize = DTYPES[dataset.dtype].itemsize
    total = sum(shard.tokens for shard in dataset.shards) * itemsize
    lock, stop, done = Lock(), Event(), 0

    def advance(size: int) -> None:
        nonlocal done
        if stop.is_set():
            raise InterruptedError
        with lock:
            done += size
            if progress:
                progress(done, total)

    # Threads suffice: hashlib and file reads release Python's lock.
    with ThreadPoolExecutor(jobs) as pool:
        checks = [
            pool.submit(check_content, shard, dataset.dtype, dataset.max_token, advance) for shard in dataset.shards
        ]
        try:
            for result in checks:
                result.result()
        finally:
            stop.set()  # ends the threads at their next block after an error, since the pool waits for them
            pool.shutdown(cancel_futures=True)
    _add_samples(dataset)
    return dataset


def _add_samples(dataset: Dataset) -> None:
    if all(shard.sample for shard in dataset.shards):
        return
    file = dataset.path / META_FILE
    meta, itemsize = read_json(file), DTYPES[dataset.dtype].itemsize
    for name, split in dataset.splits.items():
        for item, shard in zip(meta["splits"][name]["shards"], split.shards, strict=True):
            item["sample_sha256"] = sample_digest(shard.path, shard.offset or 0, shard.tokens * itemsize, itemsize)
    with contextlib.suppress(OSError):
        replace_text(file, json.dumps(meta, indent=2))
