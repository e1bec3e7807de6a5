"""Text to a prepared data folder: stream documents, tokenize them in batches, write shards."""

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from antransformer.data.dataset import Dataset
from antransformer.data.holdout import Document, Inputs, TrainValSplit
from antransformer.data.readers import MAX_CHARACTERS
from antransformer.data.shards import SHARD_TOKENS, ShardWriter, dtype_for, write_meta
from antransformer.data.tokenizers import LARGEST_BPE, SAMPLE_BYTES, SMALLEST_BPE, Tokenizer, load_tokenizer, train_bpe
from antransformer.errors import DataError

# Enough to keep the cores busy, for each of which there are two documents or more of the longest, and little enough for
# memory: the library needs a hundred bytes and more for a token.
BATCH_CHARACTERS = 2 * MAX_CHARACTERS * max(4, os.cpu_count() or 1)
AHEAD = 2  # batches that are encoded at once: where one has work for a few cores only, the next has some for the others

Progress = Callable[[int, int, int, int], object]


def prepare(
    inputs: Inputs,
    out: str | Path,
    *,
    tokenizer: str | Path = "byte",
    bpe_vocab_size: int | None = None,
    val_fraction: float = 0.01,
    val_inputs: Inputs = (),
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress | None = None,
) -> Dataset:
    """Tokenize text into a new folder ``out`` of training and validation shards.

    An end-of-text token follows every document. Work goes on in the sibling folder ``OUT.partial``, which is renamed
    at the very end: whatever interrupts it, ``out`` is whole or not there, and the next call starts afresh.

    Args:
        inputs: files, folders or globs; see ``Corpus.find``.
        out: the folder to make; if it exists it must be empty.
        tokenizer: "byte", or the path of a tokenizer.json or of a folder with one.
        bpe_vocab_size: in place of ``tokenizer``, train a byte-pair encoding of so many ids on the training text first.
        val_fraction: share of the documents that go to validation, chosen by a hash of their content: it does not
            depend on their order, and equal documents stay together.
        val_inputs: what to validate on instead, in the form of ``inputs``.
        shard_tokens: most tokens in one shard file.
        progress: called after every batch with (bytes of input done, bytes in all, documents, tokens).

    Raises:
        DataError: an input, option or tokenizer is unusable, ``out`` is in use or can not be made, or a split would be
            left empty.
        MissingExtraError: an input needs pyarrow or zstandard, which is not installed.
        OSError: the disk is full or can not be written.
    """
    out = Path(os.path.realpath(out))  # Path.resolve raises on a loop of links
    _refuse_in_use(out)
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}: it must be at least 1")
    if bpe_vocab_size is not None and not SMALLEST_BPE <= bpe_vocab_size <= LARGEST_BPE:
        raise DataError(
            f"bpe_vocab_size is {bpe_vocab_size}: it must be at least {SMALLEST_BPE}, to hold every byte, and at most "
            f"{LARGEST_BPE:,}"
        )
    if bpe_vocab_size is not None and tokenizer != "byte":
        raise DataError(
            f"bpe_vocab_size trains a tokenizer, and tokenizer {tokenizer} is another: give only one of them"
        )
    division = TrainValSplit.find(inputs, val_inputs, val_fraction)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{out}: can not be made ({error.strerror}); choose another folder") from error
    try:
        if bpe_vocab_size is None:
            words = load_tokenizer(tokenizer)
        else:
            words = train_bpe(division.training_sample(SAMPLE_BYTES), bpe_vocab_size)
        _write(partial, words, division, shard_tokens, progress)
        _refuse_in_use(out)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Dataset.open(out, verify=False)


def _refuse_in_use(out: Path) -> None:
    if out.is_dir():
        if any(out.iterdir()):
            raise DataError(f"{out}: exists and is not empty; choose another folder or remove it")
    elif os.path.lexists(out):
        raise DataError(f"{out}: is no folder; choose the name of a new one")


def _write(
    folder: Path, words: Tokenizer, division: TrainValSplit, shard_tokens: int, progress: Progress | None
) -> None:
    dtype = dtype_for(words.vocab_size)
    end = np.array([words.end_of_text], dtype=np.uint32)
    with (
        ShardWriter(folder, "train", dtype, shard_tokens) as train,
        ShardWriter(folder, "val", dtype, shard_tokens) as val,
    ):
        for batch, encoded in _encoded(_batches(division.documents()), words):
            for document, ids in zip(batch, encoded, strict=True):
                writer = val if document.split == "val" else train
                writer.write(np.concatenate([ids, end]), document.bytes)
            if progress:
                progress(batch[-1].done, division.bytes, train.documents + val.documents, train.tokens + val.tokens)
    words.save(folder / "tokenizer.json")
    write_meta(
        folder,
        {
            "dtype": dtype,
            "vocab_size": words.vocab_size,
            "end_of_text": words.end_of_text,
            "max_token": max(train.max_token, val.max_token),
            "tokenizer": words.name,
            "splits": {"train": train.meta(), "val": val.meta()},
            "val_fraction": division.val_fraction or None,
            "sources": [asdict(source) for source in division.sources],
        },
    )


def _encoded(
    batches: Iterator[list[Document]], words: Tokenizer
) -> Iterator[tuple[list[Document], Iterator[NDArray[np.uint32]]]]:
    """Each batch with its ids, while the library, which lets others run, is at work on the next ones."""
    with ThreadPoolExecutor(max_workers=AHEAD) as threads:
        coming: deque[tuple[list[Document], Future[Iterator[NDArray[np.uint32]]]]] = deque()
        for batch in batches:
            coming.append((batch, threads.submit(words.encode_batch, [document.text for document in batch])))
            if len(coming) > AHEAD:
                first, ids = coming.popleft()
                yield first, ids.result()
        for rest, ids in coming:
            yield rest, ids.result()


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
