"""The prepared data folder, from the reading side: open it, verify it, and map its shards into memory."""

import hashlib
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from antransformer.data.shards import DTYPES, FORMAT, VERSION
from antransformer.data.tokenizers import Tokenizer
from antransformer.errors import DataError
from antransformer.files import read_json

HASH_BYTES = 8 << 20
AGAIN = "remove the folder and prepare the data again"

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file of tokens: its path, number of tokens and SHA-256."""

    path: Path
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """One side of the data: its counts (``bytes`` is the UTF-8 size of its text) and its shards."""

    name: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    shards: tuple[Shard, ...]

    @cached_property
    def arrays(self) -> list[NDArray[Any]]:
        """Token ids of every shard, [tokens] each, read-only and mapped into memory."""
        return [np.memmap(shard.path, dtype=DTYPES[self.dtype], mode="r") for shard in self.shards]


@dataclass(frozen=True)
class Dataset:
    """A prepared folder that was found whole; ``Dataset.open`` makes one."""

    path: Path
    tokenizer_name: str
    vocab_size: int
    end_of_text: int
    max_token: int
    splits: Mapping[str, Split]

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Dataset":
        """Read ``meta.json`` and compare the shards with it: their sizes always, their content only if ``verify``.

        Raises:
            DataError: something is missing, damaged, or of another format; the message names the file.
        """
        path = Path(path)
        meta, where = _read_meta(path)
        dtype = _field(meta, "dtype", str, where)
        if dtype not in DTYPES:
            raise DataError(f"{where}: dtype {dtype!r} is neither uint16 nor uint32; {AGAIN}")
        splits = _field(meta, "splits", dict, where)
        dataset = cls(
            path=path,
            tokenizer_name=_field(meta, "tokenizer", str, where),
            vocab_size=_count(meta, "vocab_size", where),
            end_of_text=_count(meta, "end_of_text", where),
            max_token=_count(meta, "max_token", where),
            splits={name: _split(path, name, _field(splits, name, dict, where), dtype) for name in ("train", "val")},
        )
        if max(dataset.max_token, dataset.end_of_text) >= dataset.vocab_size:
            raise DataError(f"{where}: max_token and end_of_text must be below vocab_size; {AGAIN}")
        shards = [shard for split in dataset.splits.values() for shard in split.shards]
        for shard in shards:
            _check_size(shard, dtype)
        if verify:
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(lambda shard: _check_content(shard, dtype, dataset.max_token), shards))
        return dataset

    def split(self, name: str) -> Split:
        """The "train" or the "val" split; any other name is a KeyError."""
        return self.splits[name]

    @property
    def digest(self) -> str:
        """One SHA-256 for the whole content: equal for equal shards, wherever the folder lies."""
        parts = [f"{shard.path.name} {shard.sha256}" for split in self.splits.values() for shard in split.shards]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the data was prepared with.

        Raises:
            DataError: ``tokenizer.json`` is missing, damaged, or not the one that ``meta.json`` describes.
        """
        tokenizer = Tokenizer.load(self.path / "tokenizer.json", self.tokenizer_name)
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (self.vocab_size, self.end_of_text):
            raise DataError(f"{self.path / 'tokenizer.json'}: not the tokenizer that meta.json describes; {AGAIN}")
        return tokenizer


def _read_meta(path: Path) -> tuple[dict[str, Any], str]:
    where = str(path / "meta.json")
    try:
        meta = read_json(path / "meta.json")
    except OSError as error:
        if path.is_dir():
            raise DataError(f"{path}: not a prepared data folder, it has no readable meta.json") from error
        if path.exists():
            raise DataError(f"{path}: a file; make a data folder of it with antransformer prepare") from error
        raise DataError(f"{path}: no such folder; prepare the data first") from error
    except ValueError as error:
        raise DataError(f"{where}: damaged, not JSON ({error}); {AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{where}: not the meta.json of a prepared data folder (its format must be {FORMAT!r})")
    version = _count(meta, "version", where)
    if version > VERSION:
        raise DataError(
            f"{where}: written by a newer antransformer (format version {version}, this one reads {VERSION}); upgrade"
        )
    return meta, where


def _split(folder: Path, name: str, entry: dict[str, Any], dtype: str) -> Split:
    where = f"{folder / 'meta.json'}, split {name}"
    shards = []
    for item in _field(entry, "shards", list, where):
        file = _field(item, "file", str, where)
        # Only what a writer would have named, so that no entry can point outside the folder.
        if not re.fullmatch(rf"{name}-[0-9]+\.bin", file):
            raise DataError(f"{where}: {file!r} is not the name of a shard; {AGAIN}")
        shards.append(Shard(folder / file, _count(item, "tokens", where), _field(item, "sha256", str, where)))
    split = Split(
        name=name,
        documents=_count(entry, "documents", where),
        tokens=_count(entry, "tokens", where),
        bytes=_count(entry, "bytes", where),
        dtype=dtype,
        shards=tuple(shards),
    )
    if (
        not split.bytes
        or not shards
        or min(shard.tokens for shard in shards) == 0
        or split.tokens != sum(s.tokens for s in shards)
    ):
        raise DataError(f"{where}: its shards do not add up to its {split.tokens:,} tokens; {AGAIN}")
    return split


def _field(entry: Any, key: str, kind: type[T], where: str) -> T:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{where}: no key {key!r}; {AGAIN}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DataError(f"{where}: {key!r} must be {kind.__name__}, not {type(value).__name__}; {AGAIN}")
    return value


def _count(entry: Any, key: str, where: str) -> int:
    value = _field(entry, key, int, where)
    if value < 0:
        raise DataError(f"{where}: {key!r} must not be negative; {AGAIN}")
    return value


def _check_size(shard: Shard, dtype: str) -> None:
    expected = shard.tokens * DTYPES[dtype].itemsize
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise DataError(f"{shard.path}: missing ({error.strerror}); {AGAIN}") from error
    if size != expected:
        raise DataError(f"{shard.path}: {size:,} bytes instead of {expected:,}; {AGAIN}")


def _check_content(shard: Shard, dtype: str, max_token: int) -> None:
    digest, largest = hashlib.sha256(), 0
    try:
        with shard.path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, dtype=DTYPES[dtype]).max()))
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: can not be read ({error}); {AGAIN}") from error
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"{shard.path}: its content is not what was prepared (SHA-256 differs); {AGAIN}")
    if largest > max_token:
        raise DataError(f"{shard.path}: token {largest} is past max_token {max_token} of meta.json; {AGAIN}")
