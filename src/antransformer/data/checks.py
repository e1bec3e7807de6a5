"""Checks of token shards against ``meta.json``: the size, a sample of the content, or all of it."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from antransformer.errors import DataError

DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
HASH_BYTES = 8 << 20  # block size for checksums
SAMPLE_BLOCKS = 8  # evenly spaced in a shard, so that a truncated copy or a hole is likely found
SAMPLE_BYTES = 4096  # of a block
PREPARE_AGAIN = "remove the folder and prepare the data again"


@dataclass(frozen=True)
class Shard:
    """One file of tokens, or a part of it.

    Attributes:
        path: file.
        tokens: number of tokens.
        sha256: SHA-256 of the tokens, in hexadecimal digits.
        sample: SHA-256 of the blocks that ``read_sample`` returns; None in folders of older versions.
        offset: position of the first token in bytes, in a file that may hold more than the shard. None if the file has
            exactly these tokens.
    """

    path: Path
    tokens: int
    sha256: str
    sample: str | None = None
    offset: int | None = None


def read_sample(file: BinaryIO, offset: int, size: int, itemsize: int) -> bytes:
    """Read ``SAMPLE_BLOCKS`` blocks of the ``size`` bytes after ``offset``, the first and the last block included."""
    if size <= SAMPLE_BLOCKS * SAMPLE_BYTES:
        file.seek(offset)
        return file.read(size)
    blocks = []
    for number in range(SAMPLE_BLOCKS):
        start = (size - SAMPLE_BYTES) * number // (SAMPLE_BLOCKS - 1)
        file.seek(offset + start // itemsize * itemsize)
        blocks.append(file.read(SAMPLE_BYTES))
    return b"".join(blocks)


def sample_digest(path: Path, offset: int, size: int, itemsize: int) -> str:
    """SHA-256 of the blocks that ``read_sample`` returns."""
    with path.open("rb") as file:
        return hashlib.sha256(read_sample(file, offset, size, itemsize)).hexdigest()


def check_size(shard: Shard, dtype: str) -> None:
    """Raise ``DataError`` if a file is missing or has another size than its tokens need."""
    expected = (shard.offset or 0) + shard.tokens * DTYPES[dtype].itemsize
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise DataError(f"{shard.path}: missing ({error.strerror}); {PREPARE_AGAIN}") from error
    if size != expected and (shard.offset is None or size < expected):
        raise DataError(f"{shard.path}: {size:,} bytes instead of {expected:,}; {PREPARE_AGAIN}")


def check_sample(shard: Shard, dtype: str, max_token: int) -> None:
    """Raise ``DataError`` if a sample of the content has another SHA-256 or a token above ``max_token``."""
    itemsize = DTYPES[dtype].itemsize
    try:
        with shard.path.open("rb") as file:
            content = read_sample(file, shard.offset or 0, shard.tokens * itemsize, itemsize)
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    if shard.sample not in (None, hashlib.sha256(content).hexdigest()):
        raise _changed(shard)
    _check_tokens(shard, content, dtype, max_token)


def check_content(shard: Shard, dtype: str, max_token: int, advance: Callable[[int], object]) -> None:
    """Raise ``DataError`` if the content has another SHA-256 or a token above ``max_token``.

    ``advance`` is called with the size of every block that was read.
    """
    digest, left = hashlib.sha256(), shard.tokens * DTYPES[dtype].itemsize
    try:
        with shard.path.open("rb") as file:
            file.seek(shard.offset or 0)
            while block := file.read(min(HASH_BYTES, left)):
                left -= len(block)
                digest.update(block)
                _check_tokens(shard, block, dtype, max_token)
                advance(len(block))
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    if digest.hexdigest() != shard.sha256:
        raise _changed(shard)


def _check_tokens(shard: Shard, content: bytes, dtype: str, max_token: int) -> None:
    # meta.json could be edited to match. This check keeps the embedding's index in range even then.
    largest = int(np.frombuffer(content, dtype=DTYPES[dtype]).max(initial=0))
    if largest > max_token:
        raise DataError(f"{shard.path}: token {largest} exceeds max_token {max_token} in meta.json; {PREPARE_AGAIN}")


def _changed(shard: Shard) -> DataError:
    return DataError(f"{shard.path}: content changed since it was prepared (SHA-256 differs); {PREPARE_AGAIN}")
