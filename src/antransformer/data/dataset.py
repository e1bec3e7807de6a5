"""Reader of prepared data folders: opens, verifies and memory-maps the token shards."""

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
from antransformer.files import quoted, read_json

HASH_BYTES = 8 << 20  # block size for checksums
PREPARE_AGAIN = "remove the folder and prepare the data again"

T = TypeVar("T")


@dataclass(frozen=True)
class Shard:
    """One file of tokens, with the size and SHA-256 that ``meta.json`` records."""

    path: Path
    tokens: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """Training or validation data.

    Attributes:
        name: "train" or "val".
        documents: number of documents.
        tokens: number of tokens, one end-of-text token per document included.
        bytes: UTF-8 size of the text, end-of-text tokens not included.
        dtype: dtype of the token ids, "uint16" or "uint32".
        shards: token files in order.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    shards: tuple[Shard, ...]

    @cached_property
    def arrays(self) -> list[NDArray[Any]]:
        """Token ids of each shard, [tokens] each, memory-mapped and read-only."""
        return [np.memmap(shard.path, dtype=DTYPES[self.dtype], mode="r") for shard in self.shards]


@dataclass(frozen=True)
class Dataset:
    """A prepared data folder; ``Dataset.open`` reads one.

    Attributes:
        path: data folder.
        tokenizer_name: name of the tokenizer, such as "byte" or "bpe-4096".
        vocab_size: number of token ids.
        end_of_text: id of the token that ends each document.
        max_token: largest id in the shards.
        splits: the "train" and the "val" split.
    """

    path: Path
    tokenizer_name: str
    vocab_size: int
    end_of_text: int
    max_token: int
    splits: Mapping[str, Split]

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> "Dataset":
        """Read ``meta.json`` and check the shards against it.

        Sizes are always checked. With ``verify``, every shard is also read to check its SHA-256 and largest id.

        Raises:
            DataError: a file is missing, damaged or of a newer format; the message names the file.
        """
        path = Path(path)
        meta, location = _read_meta(path)
        dtype = _field(meta, "dtype", str, location)
        if dtype not in DTYPES:
            raise DataError(f"{location}: dtype {dtype!r} is neither uint16 nor uint32; {PREPARE_AGAIN}")
        splits = _field(meta, "splits", dict, location)
        dataset = cls(
            path=path,
            tokenizer_name=_field(meta, "tokenizer", str, location),
            vocab_size=_count(meta, "vocab_size", location),
            end_of_text=_count(meta, "end_of_text", location),
            max_token=_count(meta, "max_token", location),
            splits={
                name: _parse_split(path, name, _field(splits, name, dict, location), dtype) for name in ("train", "val")
            },
        )
        if max(dataset.max_token, dataset.end_of_text) >= dataset.vocab_size:
            raise DataError(f"{location}: max_token and end_of_text must be below vocab_size; {PREPARE_AGAIN}")
        shards = [shard for split in dataset.splits.values() for shard in split.shards]
        for shard in shards:
            _check_size(shard, dtype)
        if verify:
            # Threads suffice: hashlib and file reads release Python's lock.
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                list(pool.map(lambda shard: _check_content(shard, dtype, dataset.max_token), shards))
        return dataset

    def split(self, name: str) -> Split:
        """Return the "train" or the "val" split; other names raise KeyError."""
        return self.splits[name]

    @property
    def digest(self) -> str:
        """SHA-256 over the names and checksums of all shards; independent of the folder's path."""
        lines = [f"{shard.path.name} {shard.sha256}" for split in self.splits.values() for shard in split.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the data was prepared with.

        Raises:
            DataError: ``tokenizer.json`` is missing, damaged, or contradicts ``meta.json``.
        """
        tokenizer = Tokenizer.load(self.path / "tokenizer.json", self.tokenizer_name)
        if (tokenizer.vocab_size, tokenizer.end_of_text) != (self.vocab_size, self.end_of_text):
            raise DataError(
                f"{self.path / 'tokenizer.json'}: does not match the tokenizer in meta.json; {PREPARE_AGAIN}"
            )
        return tokenizer


def _read_meta(path: Path) -> tuple[dict[str, Any], str]:
    location = str(path / "meta.json")
    try:
        meta = read_json(path / "meta.json")
    except OSError as error:
        if path.is_dir():
            raise DataError(
                f"{path}: not a prepared data folder, since it has no readable meta.json; to prepare the text in it: "
                f"antransformer prepare {quoted(path)} --out DATA"
            ) from error
        if path.exists():
            raise DataError(
                f"{path}: a file, not a prepared data folder; run antransformer prepare on it first"
            ) from error
        raise DataError(f"{path}: no such folder; prepare the data first") from error
    except ValueError as error:
        raise DataError(f"{location}: damaged, not JSON ({error}); {PREPARE_AGAIN}") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise DataError(f"{location}: not the meta.json of a prepared data folder: its format must be {FORMAT!r}")
    version = _count(meta, "version", location)
    if version > VERSION:
        raise DataError(
            f"{location}: format version {version}, but this antransformer reads version {VERSION}; upgrade it"
        )
    return meta, location


def _parse_split(folder: Path, name: str, entry: dict[str, Any], dtype: str) -> Split:
    location = f"{folder / 'meta.json'}, split {name}"
    shards = []
    for item in _field(entry, "shards", list, location):
        file = _field(item, "file", str, location)
        # Accept only names that ShardWriter writes, so that no entry can point outside the folder.
        if not re.fullmatch(rf"{name}-[0-9]+\.bin", file):
            raise DataError(f"{location}: {file!r} is not a shard name; {PREPARE_AGAIN}")
        shards.append(Shard(folder / file, _count(item, "tokens", location), _field(item, "sha256", str, location)))
    split = Split(
        name=name,
        documents=_count(entry, "documents", location),
        tokens=_count(entry, "tokens", location),
        bytes=_count(entry, "bytes", location),
        dtype=dtype,
        shards=tuple(shards),
    )
    counts = [shard.tokens for shard in shards]
    if not split.bytes or not counts or min(counts) == 0 or split.tokens != sum(counts):
        raise DataError(f"{location}: the shards do not add up to {split.tokens:,} tokens; {PREPARE_AGAIN}")
    return split


def _field(entry: Any, key: str, kind: type[T], location: str) -> T:
    if not isinstance(entry, dict) or key not in entry:
        raise DataError(f"{location}: no key {key!r}; {PREPARE_AGAIN}")
    value = entry[key]
    if not isinstance(value, kind) or isinstance(value, bool):  # JSON's true would pass as an int
        raise DataError(f"{location}: {key!r} must be {kind.__name__}, not {type(value).__name__}; {PREPARE_AGAIN}")
    return value


def _count(entry: Any, key: str, location: str) -> int:
    value = _field(entry, key, int, location)
    if value < 0:
        raise DataError(f"{location}: {key!r} must not be negative; {PREPARE_AGAIN}")
    return value


def _check_size(shard: Shard, dtype: str) -> None:
    expected = shard.tokens * DTYPES[dtype].itemsize
    try:
        size = shard.path.stat().st_size
    except OSError as error:
        raise DataError(f"{shard.path}: missing ({error.strerror}); {PREPARE_AGAIN}") from error
    if size != expected:
        raise DataError(f"{shard.path}: {size:,} bytes instead of {expected:,}; {PREPARE_AGAIN}")


def _check_content(shard: Shard, dtype: str, max_token: int) -> None:
    digest, largest = hashlib.sha256(), 0
    try:
        with shard.path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
                largest = max(largest, int(np.frombuffer(block, dtype=DTYPES[dtype]).max()))
    except (OSError, ValueError) as error:
        raise DataError(f"{shard.path}: cannot be read ({error}); {PREPARE_AGAIN}") from error
    # meta.json could be edited to match. The check of the largest id keeps the embedding's index in range even then.
    if digest.hexdigest() != shard.sha256:
        raise DataError(f"{shard.path}: content changed since it was prepared (SHA-256 differs); {PREPARE_AGAIN}")
    if largest > max_token:
        raise DataError(f"{shard.path}: token {largest} exceeds max_token {max_token} in meta.json; {PREPARE_AGAIN}")
