"""Data folders of corpora that are tokenized already: links to the files, which are not copied."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.data.checks import DTYPES, HASH_BYTES, sample_digest
from antransformer.data.dataset import Dataset
from antransformer.data.holdout import VAL_FRACTION
from antransformer.data.shards import LINKED_VERSION, dtype_for, new_folder, require_unused, write_meta
from antransformer.data.token_files import TokenFile, find_token_files
from antransformer.data.tokenizers import Tokenizer, load_tokenizer
from antransformer.errors import DataError

LOG = logging.getLogger(__name__)
MIN_VAL_TOKENS = 1 << 14
MAX_VAL_TOKENS = 10_000_000  # by default: more would only be read by the check of the data

Progress = Callable[[int, int, int, int], object]


def prepare_tokenized(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path,
    end_of_text: str | None = None,
    val_fraction: float | None = None,
    val_inputs: Sequence[str | Path] = (),
    progress: Progress | None = None,
) -> Dataset:
    """Make a data folder of files of token ids, which must not be moved afterwards.

    The files are read once, for checksums, counts and the check that all ids are in the vocabulary. The size of the
    text in bytes is computed from the pieces of the tokenizer. It is exact for byte-level ones.

    Args:
        inputs: files, folders or globs of the layouts in ``token_files``.
        out: folder to create; it may exist if it is empty.
        tokenizer, end_of_text: tokenizer of the files, as in ``load_tokenizer``.
        val_fraction: fraction of the tokens, at the end of the last files, for validation. By default a hundredth, at
            most 10M tokens.
        val_inputs: separate inputs for validation, instead.
        progress: called after every block with (bytes read, bytes in total, documents, tokens).

    Raises:
        DataError: a file or option is unusable, an id is outside the vocabulary, or ``out`` is not empty.
    """
    out = Path(os.path.realpath(out))
    require_unused(out)
    encoder = load_tokenizer(tokenizer, end_of_text)
    files = find_token_files(tuple(inputs), dtype_for(encoder.vocab_size))
    if val_inputs:
        if val_fraction is not None:
            raise DataError(f"--val-fraction {val_fraction} and --val-inputs exclude each other: omit one")
        val = find_token_files(tuple(val_inputs), dtype_for(encoder.vocab_size))
        shared = {file.path.resolve() for file in files} & {file.path.resolve() for file in val}
        if shared:
            raise DataError(f"{min(shared)}: an input for both training and validation; remove it from one of them")
        splits = {"train": files, "val": val}
    else:
        splits = _hold_out_end(files, val_fraction, encoder.end_of_text)
    kinds = {file.dtype for part in splits.values() for file in part}
    if len(kinds) > 1:
        raise DataError(f"{out}: the files have tokens of {' and '.join(sorted(kinds))}; prepare them separately")
    with new_folder(out) as partial:
        counts = _count(splits, encoder, progress)
        _write(partial, encoder, kinds.pop(), splits, counts, [str(name) for name in (*inputs, *val_inputs)])
    return Dataset.open(out, verify=False)


def _hold_out_end(files: list[TokenFile], fraction: float | None, end_of_text: int) -> dict[str, list[TokenFile]]:
    """Split off tokens at the end of the files, from the beginning of a document where there is one."""
    total = sum(file.tokens for file in files)
    if fraction is None:
        left = min(max(int(VAL_FRACTION * total), min(MIN_VAL_TOKENS, total // 10)), MAX_VAL_TOKENS)
    elif 0 < fraction < 1:
        left = int(fraction * total)
    else:
        raise DataError(f"--val-fraction {fraction}: it must be between 0 and 1, for example 0.01")
    if not 0 < left < total:
        raise DataError(
            f"holding out {left:,} of {total:,} tokens leaves a split empty: change --val-fraction or use --val-inputs"
        )
    train, val = list(files), list[TokenFile]()
    while left:
        last = train.pop()
        taken = min(left, last.tokens)
        left -= taken
        if not left and taken < last.tokens:
            taken = last.tokens - _document_start(last, last.tokens - taken, end_of_text)
            train.append(replace(last, tokens=last.tokens - taken))
        offset = last.offset + (last.tokens - taken) * DTYPES[last.dtype].itemsize
        val.insert(0, replace(last, offset=offset, tokens=taken))
    return {"train": train, "val": val}


def _document_start(file: TokenFile, position: int, end_of_text: int) -> int:
    """Return the first beginning of a document in the first half of the tokens from ``position``, or this position."""
    dtype = DTYPES[file.dtype]
    with file.path.open("rb") as content:
        content.seek(file.offset + position * dtype.itemsize)
        ids = np.frombuffer(content.read((file.tokens - position + 1) // 2 * dtype.itemsize), dtype)
    found = np.flatnonzero(ids[:-1] == end_of_text)
    return position + 1 + int(found[0]) if len(found) else position


@dataclass(frozen=True)
class _Counts:
    sha256: str
    sample: str
    max_token: int
    documents: int
    bytes: int


def _count(
    splits: dict[str, list[TokenFile]], tokenizer: Tokenizer, progress: Progress | None
) -> dict[str, list[_Counts]]:
    """Read all files once, several at a time."""
    lengths, lock, stop = tokenizer.byte_lengths(), Lock(), Event()
    total = sum(file.tokens * DTYPES[file.dtype].itemsize for part in splits.values() for file in part)
    done = documents = tokens = 0

    def advance(block: NDArray[Any], ends: int) -> None:
        nonlocal done, documents, tokens
        if stop.is_set():
            raise InterruptedError
        with lock:
            done, documents, tokens = done + block.nbytes, documents + ends, tokens + len(block)
            if progress:
                progress(done, total, documents, tokens)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            return {
                name: list(pool.map(lambda file: _count_file(file, tokenizer.end_of_text, lengths, advance), part))
                for name, part in splits.items()
            }
        except BaseException:
            stop.set()  # ends the threads at their next block, since the pool waits for them
            pool.shutdown(cancel_futures=True)
            raise


def _count_file(
    file: TokenFile, end_of_text: int, lengths: NDArray[np.int64], advance: Callable[[NDArray[Any], int], None]
) -> _Counts:
    dtype = DTYPES[file.dtype]
    digest, largest, documents, size, left = hashlib.sha256(), 0, 0, 0, file.tokens * dtype.itemsize
    with file.path.open("rb") as content:
        content.seek(file.offset)
        while data := content.read(min(HASH_BYTES, left)):
            left -= len(data)
            digest.update(data)
            block = np.frombuffer(data, dtype)
            largest = max(largest, int(block.max()))
            if largest >= len(lengths):
                raise DataError(
                    f"{file.path}: token {largest} is outside the vocabulary of {len(lengths):,}: check --tokenizer"
                )
            ends = int((block == end_of_text).sum())
            documents += ends
            size += int(lengths[block].sum())
            advance(block, ends)
    if left:
        raise DataError(f"{file.path}: ends before its last token; was it truncated?")
    sample = sample_digest(file.path, file.offset, file.tokens * dtype.itemsize, dtype.itemsize)
    return _Counts(digest.hexdigest(), sample, largest, documents, size)


def _write(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: str,
    splits: dict[str, list[TokenFile]],
    counts: dict[str, list[_Counts]],
    inputs: list[str],
) -> None:
    entries: dict[str, Any] = {}
    for name, files in splits.items():
        shards = []
        for number, (file, count) in enumerate(zip(files, counts[name], strict=True)):
            link = folder / f"{name}-{number:05d}.bin"
            link.symlink_to(file.path.resolve())
            shards.append(
                {
                    "file": link.name,
                    "offset": file.offset,
                    "tokens": file.tokens,
                    "sha256": count.sha256,
                    "sample_sha256": count.sample,
                }
            )
        documents = sum(count.documents for count in counts[name])
        if not documents:
            LOG.warning("the %s files have no end-of-text token %d: check --tokenizer", name, tokenizer.end_of_text)
        entries[name] = {
            "documents": documents,
            "tokens": sum(file.tokens for file in files),
            "bytes": sum(count.bytes for count in counts[name]),
            "shards": shards,
        }
    tokenizer.save(folder / "tokenizer.json")
    write_meta(
        folder,
        {
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "max_token": max(count.max_token for part in counts.values() for count in part),
            "tokenizer": tokenizer.name,
            "splits": entries,
            "sources": [{"input": name} for name in inputs],
        },
        version=LINKED_VERSION,
    )
