"""Reader of prepared data folders: opens and checks it, and reads tokens from the shards."""

import hashlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from antransformer.data.checks import DTYPES, PREPARE_AGAIN, Shard, check_sample, check_size
from antransformer.data.shards import FORMAT, LINKED_VERSION, META_FILE
from antransformer.data.tokenizers import Tokenizer
from antransformer.errors import DataError
from antransformer.files import quoted, read_json

SAMPLED_SHARDS = 32  # of a folder, evenly spaced: the time of opening does not depend on the size of the data
THREADS = 8  # for checks at opening, whose time is mostly latency of the file system

T = TypeVar("T")


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
        max_token: largest id in the shards, if it is known.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    dtype: str
    shards: tuple[Shard, ...]
    max_token: int | None = None

    @property
    def arrays(self) -> list[NDArray[Any]]:
        """Token ids of each shard, [tokens] each, memory-mapped and read-only. Each holds a file descriptor."""
        return [
            np.memmap(shard.path, dtype=DTYPES[self.dtype], mode="r", offset=shard.offset or 0, shape=(shard.tokens,))
            for shard in self.shards
        ]

    def read(self, shard: int, starts: NDArray[np.int64], count: int) -> NDArray[Any]:
        """Read ``count`` tokens of one shard from each of these positions, [len(starts), count].

        Reads of the exact ranges are much faster than a memory map, around which the system reads ahead, and hold no
        file descriptor afterwards.

        Raises:
            DataError: the file is missing or too short.
        """
        path, offset, dtype = self.shards[shard].path, self.shards[shard].offset or 0, DTYPES[self.dtype]
        try:
            with path.open("rb", buffering=0) as file:
                size = count * dtype.itemsize
                rows = bytearray()
                for start in starts:
                    file.seek(offset + int(start) * dtype.itemsize)
                    rows += file.read(size)
            return np.frombuffer(rows, dtype).reshape(len(starts), count)
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read ({error}); was it changed, moved or truncated?") from error


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

        Sizes are always checked. With ``verify``, a sample of the content is checked too: 32 KiB of each of at most
        ``SAMPLED_SHARDS`` shards. ``verification.verify`` checks all of it.

        Raises:
            DataError: a file is missing, damaged or of a newer format; the message names the file.
        """
        path = Path(path)
        meta, location = _read_meta(path)
        dtype = _field(meta, "dtype", str, location)
        if dtype not in DTYPES:
            raise DataError(f"{location}: dtype {dtype!r} is neither uint16 nor uint32; {PREPARE_AGAIN}")
        splits = _field(meta, "splits", dict, location)
        max_token = _count(meta, "max_token", location)
        dataset = cls(
            path=path,
            tokenizer_name=_field(meta, "tokenizer", str, location),
            vocab_size=_count(meta, "vocab_size", location),
            end_of_text=_count(meta, "end_of_text", location),
            max_token=max_token,
            splits={
                name: _parse_split(path, name, _field(splits, name, dict, location), dtype, max_token)
                for name in ("train", "val")
            },
        )
        if max(dataset.max_token, dataset.end_of_text) >= dataset.vocab_size:
            raise DataError(f"{location}: max_token and end_of_text must be below vocab_size; {PREPARE_AGAIN}")
        shards = dataset.shards
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda shard: check_size(shard, dtype), shards))
            if verify:
                count = min(SAMPLED_SHARDS, len(shards))
                sampled = [shards[(len(shards) - 1) * number // max(1, count - 1)] for number in range(count)]
                list(pool.map(lambda shard: check_sample(shard, dtype, max_token), sampled))
        return dataset

    @property
    def dtype(self) -> str:
        """Dtype of the token ids, "uint16" or "uint32"."""
        return self.splits["train"].dtype

    @property
    def shards(self) -> list[Shard]:
        """Shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def split(self, name: str) -> Split:
        """Return the "train" or the "val" split; other names raise KeyError."""
        return self.splits[name]

    @property
    def sources(self) -> Mapping[str, "Dataset"]:
        """Datasets that this one consists of, by label: itself, or the sources of a ``Mixture``."""
        return {self.path.name: self}

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each source in training; their sum is 1."""
        return (1.0,)

    @property
    def name(self) -> str:
        """Value of the setting ``data`` that opens this dataset."""
        return str(self.path)

    @property
    def digest(self) -> str:
        """SHA-256 over the names and checksums of all shards; independent of the folder's path."""
        lines = [f"{shard.path.name} {shard.sha256}" for shard in self.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the data was prepared with.

        Raises:
            DataError: ``tokenizer.json`` is missing, damaged, or contradicts ``meta.json``.
        """
        tokenizer = Tokenizer.load(self.path / "tokenizer.json", self.tokenizer_name, self.end_of_text)
        if tokenizer.vocab_size != self.vocab_size or not tokenizer.has_end_of_text():
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
    if version > LINKED_VERSION:
        raise DataError(
            f"{location}: format version {version}, but this antransformer reads {LINKED_VERSION} and older; upgrade it"
        )
    return meta, location


def _parse_split(folder: Path, name: str, entry: dict[str, Any], dtype: str, max_token: int) -> Split:
    location = f"{folder / META_FILE}, split {name}"
    shards = []
    for item in _field(entry, "shards", list, location):
        file = _field(item, "file", str, location)
        # Accept only names that ShardWriter writes, so that no entry can point outside the folder.
        if not re.fullmatch(rf"{name}-[0-9]+\.bin", file):
            raise DataError(f"{location}: {file!r} is not a shard name; {PREPARE_AGAIN}")
        shards.append(
            Shard(
                folder / file,
                _count(item, "tokens", location),
                _field(item, "sha256", str, location),
                _field(item, "sample_sha256", str, location) if "sample_sha256" in item else None,
                _count(item, "offset", location) if "offset" in item else None,
            )
        )
    split = Split(
        name=name,
        documents=_count(entry, "documents", location),
        tokens=_count(entry, "tokens", location),
        bytes=_count(entry, "bytes", location),
        dtype=dtype,
        shards=tuple(shards),
        max_token=max_token,
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
