"""The prepared data folder, from the writing side: token shards, and the ``meta.json`` that makes them a whole.

``train-00000.bin``, ``val-00000.bin`` and so on hold little-endian unsigned integers and nothing else: uint16, or
uint32 when the vocabulary has more than 65,536 ids. ``meta.json`` says what must be there, and is written last.
"""

import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

FORMAT = "antransformer-shards"
VERSION = 1
SHARD_TOKENS = 100_000_000
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def dtype_for(vocab_size: int) -> str:
    """Name of the smallest dtype that holds every id of a vocabulary."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Writes the tokens of one split into ``folder``, hashing on the way; a context manager.

    Attributes:
        documents, tokens, bytes: written so far, end-of-text tokens included, bytes of text without them.
        max_token: largest id written so far.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int = SHARD_TOKENS) -> None:
        self.documents = self.tokens = self.bytes = self.max_token = 0
        self._shards: list[dict[str, Any]] = []
        self._folder = folder
        self._split = split
        self._dtype = DTYPES[dtype]
        self._shard_tokens = shard_tokens
        self._file: BinaryIO | None = None
        self._filled = 0
        self._hash = hashlib.sha256()

    def write(self, tokens: NDArray[Any], text_bytes: int) -> None:
        """Append one document: its ids [tokens], on into a next file whenever one is full, and the size of its text.

        Raises:
            ValueError: an id is too large for the dtype.
            OSError: the disk is full, or a file of this name is there already.
        """
        largest = int(tokens.max())
        if largest > np.iinfo(self._dtype).max:
            raise ValueError(f"token {largest} does not fit {self._dtype}")
        self.max_token = max(self.max_token, largest)
        self.documents += 1
        self.tokens += len(tokens)
        self.bytes += text_bytes
        rest = tokens.astype(self._dtype)
        while len(rest):
            # Exclusive creation, so that two processes never write into one file.
            file = self._file = self._file or self._path().open("xb")
            part = rest[: self._shard_tokens - self._filled].tobytes()
            file.write(part)
            self._hash.update(part)
            count = len(part) // self._dtype.itemsize
            self._filled += count
            rest = rest[count:]
            if self._filled == self._shard_tokens:
                self.close()

    def close(self) -> None:
        """Finish the file that is being written, if there is one, and see it onto the disk."""
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        self._shards.append({"file": self._path().name, "tokens": self._filled, "sha256": self._hash.hexdigest()})
        self._filled, self._hash = 0, hashlib.sha256()

    def meta(self) -> dict[str, Any]:
        """What ``meta.json`` says about the split; whole once the context has been left."""
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": self._shards}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        elif self._file is not None:
            self._file.close()

    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self._shards):05d}.bin"


def write_meta(folder: Path, meta: dict[str, Any]) -> None:
    """Write ``meta.json`` with the format's name and version in front, and see it onto the disk."""
    with (folder / "meta.json").open("x", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "version": VERSION} | meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
