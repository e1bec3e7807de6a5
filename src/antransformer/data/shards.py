"""Writer of prepared data folders: token shards and ``meta.json``.

The shards (``train-00000.bin``, ``val-00000.bin``, ...) are arrays of little-endian token ids without a header: uint16,
or uint32 if the vocabulary has more than 65,536 ids. ``meta.json`` lists them with checksums and is written last.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from antransformer.data.checks import DTYPES, sample_digest
from antransformer.errors import DataError
from antransformer.files import new_parents, writing
from antransformer.lock import HOLDER_FILE, LOCK_FILE, lock

FORMAT = "antransformer-shards"
VERSION = 1
LINKED_VERSION = 2  # of folders whose shards are parts of other files
SHARD_TOKENS = 100_000_000  # of each of the first shards
META_FILE = "meta.json"
OWN_FILE = re.compile(r"((train|val)-\d+\.bin|meta\.json|tokenizer(_config)?\.json)(\.partial)?")
LOCK_FILES = (HOLDER_FILE, LOCK_FILE)
SHARDS_OF_A_SIZE = 64


def dtype_for(vocab_size: int) -> str:
    """Name of the smallest dtype for the ids of a vocabulary: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class ShardWriter:
    """Context manager that writes the tokens of one split to shards in ``folder`` and computes their checksums.

    The first 64 shards have ``shard_tokens`` tokens, the next 64 twice that number, and so on. A trillion tokens are
    therefore in about 500 files.

    Attributes:
        documents: number of documents written.
        tokens: number of tokens written, end-of-text tokens included.
        bytes: UTF-8 size of the text written, end-of-text tokens not included.
        max_token: largest id written.
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
        """Append the ids [tokens] of one document and count the UTF-8 size of its text. A document may span shards.

        Raises:
            ValueError: an id is too large for the dtype.
            OSError: the disk is full, or the shard exists already.
        """
        largest = int(tokens.max())
        if largest > np.iinfo(self._dtype).max:
            raise ValueError(f"token {largest} does not fit {self._dtype}")
        self.add(tokens, largest, 1, text_bytes)

    def add(self, tokens: NDArray[Any], max_token: int, documents: int, text_bytes: int) -> None:
        """Append ids [tokens] that have been counted before; raises OSError as ``write``."""
        self.max_token = max(self.max_token, max_token)
        self.documents += documents
        self.tokens += len(tokens)
        self.bytes += text_bytes
        rest = tokens.astype(self._dtype)
        while len(rest):
            capacity = self._shard_tokens << len(self._shards) // SHARDS_OF_A_SIZE
            # Exclusive creation: two processes must not write to one file.
            file = self._file = self._file or self._path().open("xb")
            part = rest[: capacity - self._filled].tobytes()
            file.write(part)
            self._hash.update(part)
            count = len(part) // self._dtype.itemsize
            self._filled += count
            rest = rest[count:]
            if self._filled == capacity:
                self.close()

    def close(self) -> None:
        """Flush the current shard to disk and record its checksum."""
        if self._file is None:
            return
        # Flushed to disk before meta.json exists, so that a power failure cannot leave complete metadata without data.
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        itemsize = self._dtype.itemsize
        self._shards.append(
            {
                "file": self._path().name,
                "tokens": self._filled,
                "sha256": self._hash.hexdigest(),
                "sample_sha256": sample_digest(self._path(), 0, self._filled * itemsize, itemsize),
            }
        )
        self._filled, self._hash = 0, hashlib.sha256()

    def meta(self) -> dict[str, Any]:
        """Entry of the split in ``meta.json``; complete after the context manager has exited."""
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "shards": self._shards}

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, error_type: type | None, *_: object) -> None:
        if error_type is None:
            self.close()
        elif self._file is not None:  # after an error the folder is removed, so there is nothing to record
            self._file.close()

    def _path(self) -> Path:
        return self._folder / f"{self._split}-{len(self._shards):05d}.bin"


def require_unused(out: Path) -> None:
    """Raise ``DataError`` unless a folder can be created here: the path is free, or an empty folder."""
    if os.path.ismount(out):  # Path.is_mount would raise an error without permission
        raise DataError(f"{out}: a mount point, which cannot be replaced; choose a folder inside it")
    if out.is_dir():
        if any(out.iterdir()):
            raise DataError(f"{out}: exists and is not empty; choose another folder or remove it")
    elif os.path.lexists(out):
        raise DataError(f"{out}: exists and is not a folder; choose another name")


def _is_own(path: Path) -> bool:
    return path.name.removesuffix(".partial") in LOCK_FILES or bool(OWN_FILE.fullmatch(path.name))


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Enter the sibling ``OUT.partial``, which is renamed to ``out`` at the end and removed after an error.

    Raises:
        ConfigError: another process writes the folder.
        DataError: ``out`` is in use or cannot be created, or ``OUT.partial`` holds files that prepare did not write.
        MachineError, OSError: the disk is full.
    """
    require_unused(out)
    partial = out.with_name(out.name + ".partial")
    if partial.is_symlink() or (partial.is_dir() and not all(map(_is_own, partial.iterdir()))):
        raise DataError(f"{partial}: not written by prepare: move it, or choose another folder")
    with new_parents(partial):
        try:
            with suppress(FileExistsError):
                partial.mkdir(parents=True)
                partial.rmdir()  # the lock creates it again, and removes it if the disk is full
        except OSError as error:
            raise DataError(f"{out}: cannot be created ({error.strerror}); choose another folder") from error
        with lock(partial), _filled(partial, out):
            yield partial


@contextmanager
def _filled(partial: Path, out: Path) -> Iterator[None]:
    """Empty a folder that this process has locked; rename it at the end, or remove it after an error."""
    try:
        for path in partial.iterdir():
            if path.name not in LOCK_FILES:
                path.unlink()  # left by a killed process
        with writing(out):
            yield
        require_unused(out)  # it may have been filled during the hours that tokenizing can take
        if out.exists():
            out.rmdir()
        partial.rename(out)  # with the lock, so that no other process can take the folder before
        for name in LOCK_FILES:
            (out / name).unlink(missing_ok=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_meta(folder: Path, meta: dict[str, Any], version: int = VERSION) -> None:
    """Write ``meta.json``, with the name and version of the format first, and flush it to disk."""
    with (folder / META_FILE).open("x", encoding="utf-8") as file:
        json.dump({"format": FORMAT, "version": version} | meta, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
