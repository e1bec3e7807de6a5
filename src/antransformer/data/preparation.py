"""Text to a prepared data folder: streams documents, tokenizes them in batches and writes token shards."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from antransformer.data.dataset import Dataset
from antransformer.data.holdout import MIN_VAL_DOCUMENTS, Document, Inputs, TrainValSplit
from antransformer.data.readers import MAX_CHARACTERS, TEXT_FIELD
from antransformer.data.shards import SHARD_TOKENS, ShardWriter, dtype_for, new_folder, require_unused, write_meta
from antransformer.data.tokenizers import (
    MAX_BPE_VOCAB,
    MIN_BPE_VOCAB,
    SAMPLE_BYTES,
    Tokenizer,
    load_encoder,
    train_bpe,
)
from antransformer.errors import DataError
from antransformer.pace import heartbeat
from antransformer.wording import counted

LOG = logging.getLogger(__name__)

# At least two documents of the maximum length per core keep all cores busy. More would cost memory: the tokenizers
# library needs over 100 bytes per token.
BATCH_CHARACTERS = 2 * MAX_CHARACTERS * max(4, os.cpu_count() or 1)
# A batch with one long document uses few cores near its end. The next batch fills the others.
CONCURRENT_BATCHES = 2

Progress = Callable[[int, int, int, int], object]
TokenArrays = Iterator[NDArray[np.uint32]]


def prepare(
    inputs: Inputs,
    out: str | Path,
    *,
    tokenizer: str | Path = "byte",
    bpe_vocab_size: int | None = None,
    end_of_text: str | None = None,
    text_field: str = TEXT_FIELD,
    val_fraction: float | None = None,
    val_inputs: Inputs = (),
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
    notify: Callable[[str], None] = lambda text: None,
) -> Dataset:
    """Tokenize text into a new folder ``out`` of training and validation shards.

    An end-of-text token follows every document. Files are written to the sibling folder ``OUT.partial``, which is
    renamed at the end. After an interruption ``out`` does not exist, and the next call starts from the beginning.

    Args:
        inputs: files, folders or globs; see ``Corpus.find``.
        out: folder to create; it may exist if it is empty.
        tokenizer: "byte", or the path of a tokenizer.json or of a folder that contains one.
        bpe_vocab_size: train a byte-pair encoding with this number of ids on the training text, instead of
            ``tokenizer``.
        end_of_text: special token that ends a document; by default the tokenizer's own.
        text_field: field of JSON lines or column of parquet that holds the text. Dots select inside nested records.
        val_fraction: fraction of the documents for validation, by default 0.01. They are chosen by a hash of their
            content, so the choice does not depend on their order, and equal documents share a split. If the default
            leaves less than 16 KiB, it is raised to at most 0.1. If that leaves fewer than 20 documents, the end of
            every document is held out instead.
        val_inputs: separate inputs for validation, instead of ``val_fraction``.
        shard_tokens: number of tokens in each of the first 64 shards. It doubles after every 64 shards.
        progress: called after every batch with (input bytes read, input bytes in total, documents, tokens).
        notify: called with lines about the training of a byte-pair encoding.

    Raises:
        DataError: an input, option or tokenizer is unusable, ``out`` is not empty or cannot be created, or a split
            would be empty.
        MissingExtraError: an input needs pyarrow or zstandard, which is not installed.
        OSError: the disk is full or not writable.
    """
    out = Path(os.path.realpath(out))  # Path.resolve raises on a loop of links
    require_unused(out)
    _check_options(shard_tokens, tokenizer, bpe_vocab_size, end_of_text)
    # Before the corpus is read, which takes longer than an error should.
    encoder = load_encoder(tokenizer, end_of_text) if bpe_vocab_size is None else None
    split = TrainValSplit.find(inputs, val_inputs, val_fraction, text_field)
    log_left_out(split)
    with new_folder(out) as partial:
        if encoder is None:
            assert bpe_vocab_size is not None
            encoder = _train_bpe(split, bpe_vocab_size, notify)
        meta = write_tokens(partial, encoder, split, shard_tokens, progress)
        require_both(meta)
        write_meta(partial, meta)
    return Dataset.open(out, verify=False)


def _check_options(
    shard_tokens: int, tokenizer: str | Path, bpe_vocab_size: int | None, end_of_text: str | None
) -> None:
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: it must be at least 1")
    if bpe_vocab_size is None:
        return
    if not MIN_BPE_VOCAB <= bpe_vocab_size <= MAX_BPE_VOCAB:
        raise DataError(
            f"bpe_vocab_size is {bpe_vocab_size}: it must be at least {MIN_BPE_VOCAB} (256 bytes and end of text) and "
            f"at most {MAX_BPE_VOCAB:,}"
        )
    if tokenizer != "byte":
        raise DataError(f"bpe_vocab_size trains a tokenizer, but tokenizer {tokenizer} was given too: use only one")
    if end_of_text is not None:
        raise DataError(f"--end-of-text {end_of_text}: a tokenizer trained by bpe_vocab_size has <|endoftext|>")


def log_left_out(split: TrainValSplit) -> None:
    """Print what is not in the training data although it is in the inputs."""
    for source in split.sources:
        for reason, entry in source.skipped.items():
            more = ", ..." if entry["files"] > len(entry["first"]) else ""
            LOG.warning(
                "%s: skipped %s (%s): %s%s",
                source.input,
                counted(entry["files"], "file"),
                reason,
                ", ".join(entry["first"]),
                more,
            )
    if split.val_tail:
        LOG.warning(
            "validation text: the last %.3g%% of every document, since fewer than %s whole documents would be held out",
            100 * split.val_tail,
            MIN_VAL_DOCUMENTS,
        )


def _train_bpe(split: TrainValSplit, vocab_size: int, notify: Callable[[str], None]) -> Tokenizer:
    size = (SAMPLE_BYTES if split.corpus.hub else min(SAMPLE_BYTES, split.bytes)) / 1e6
    with heartbeat(f"training a BPE of {vocab_size:,} ids on up to {size:,.1f} MB of text", notify):
        tokenizer = train_bpe(split.training_sample(SAMPLE_BYTES), vocab_size, progress=True)
    if tokenizer.vocab_size < vocab_size:
        LOG.warning(
            "the BPE has %s ids instead of %s: no other pair occurs twice in the text",
            f"{tokenizer.vocab_size:,}",
            f"{vocab_size:,}",
        )
    return tokenizer


def write_tokens(
    folder: Path, tokenizer: Tokenizer, split: TrainValSplit, shard_tokens: int, progress: Progress | None
) -> dict[str, Any]:
    """Write the shards and tokenizer.json, and return the content of ``meta.json``."""
    dtype = dtype_for(tokenizer.vocab_size)
    end = np.array([tokenizer.end_of_text], dtype=np.uint32)
    with (
        ShardWriter(folder, "train", dtype, shard_tokens) as train,
        ShardWriter(folder, "val", dtype, shard_tokens) as val,
    ):
        for batch, encoded in _encode(_batches(split.documents()), tokenizer):
            for document, ids in zip(batch, encoded, strict=True):
                writer = val if document.split == "val" else train
                writer.write(np.concatenate([ids, end]), document.bytes)
            if progress:
                progress(batch[-1].bytes_read, split.bytes, train.documents + val.documents, train.tokens + val.tokens)
    tokenizer.save(folder / "tokenizer.json")
    return {
        "dtype": dtype,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "max_token": max(train.max_token, val.max_token),
        "tokenizer": tokenizer.name,
        "splits": {"train": train.meta(), "val": val.meta()},
        "val_fraction": split.val_fraction or None,
        "val_tail": split.val_tail or None,
        "sources": [asdict(source) for source in split.sources],
    }


def require_both(meta: Mapping[str, Any]) -> None:
    """Raise ``DataError`` if a split has no tokens."""
    if not all(split["tokens"] for split in meta["splits"].values()):
        raise DataError("too little text to hold some out for validation: add more, or use --val-inputs")


def _encode(batches: Iterator[list[Document]], tokenizer: Tokenizer) -> Iterator[tuple[list[Document], TokenArrays]]:
    """Yield each batch with its token ids. Threads suffice: the tokenizers library releases Python's lock."""
    with ThreadPoolExecutor(max_workers=CONCURRENT_BATCHES) as threads:
        pending: deque[tuple[list[Document], Future[TokenArrays]]] = deque()
        for batch in batches:
            pending.append((batch, threads.submit(tokenizer.encode_batch, [document.text for document in batch])))
            if len(pending) > CONCURRENT_BATCHES:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        for oldest, future in pending:
            yield oldest, future.result()


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
