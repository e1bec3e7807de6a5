"""Split into training and validation data: documents by a hash of their content, their ends, or separate files.

The hash depends neither on the order of the documents nor on a seed, and equal documents always share a split.
"""

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from antransformer.data.readers import TEXT_FIELD, Documents, read
from antransformer.data.sources import Corpus, Source
from antransformer.errors import DataError

VAL_FRACTION = 0.01
MIN_VAL_BYTES = 1 << 14  # of held-out documents by default; less is too short for a validation at usual contexts
MIN_VAL_DOCUMENTS = 20
MAX_FRACTION = 0.1
WHOLE_READS = 4  # a corpus of this number of samples or fewer is read whole to draw one
SAMPLE_POSITIONS = 256

Inputs = str | Path | Iterable[str | Path]


class Document(NamedTuple):
    """One document.

    Attributes:
        text: content.
        bytes: UTF-8 size of the text.
        hash_bucket: hash of the text, uniform in [0, 1).
        split: "train" or "val".
        bytes_read: bytes of all input files read up to the end of the document.
    """

    text: str
    bytes: int
    hash_bucket: float
    split: str
    bytes_read: int


@dataclass(frozen=True)
class TrainValSplit:
    """Assignment of each document to training or validation; ``TrainValSplit.find`` makes one.

    Attributes:
        corpus: input files.
        val_corpus: input files that are used for validation only, or None.
        val_fraction: documents of ``corpus`` with a hash bucket below this are for validation; 0 with a ``val_corpus``.
        val_tail: fraction of each document, at its end, that is for validation instead; 0 otherwise.
    """

    corpus: Corpus
    val_corpus: Corpus | None
    val_fraction: float
    val_tail: float = 0.0

    @classmethod
    def find(
        cls, inputs: Inputs, val_inputs: Inputs, val_fraction: float | None, text_field: str = TEXT_FIELD
    ) -> "TrainValSplit":
        """Find the files behind ``inputs`` and ``val_inputs``, which may be empty, and choose how to split them.

        Without a fraction, a hundredth of the documents is for validation. Of a small text it is more, and where there
        are few documents, the end of each is held out instead.

        Raises:
            DataError: an input or the fraction is unusable, a file is broken or in both inputs, or the fraction leaves
                a split without documents.
            MissingExtraError: an input needs pyarrow or zstandard, which is not installed.
        """
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise DataError(f"--val-fraction {val_fraction}: it must be between 0 and 1, for example 0.01")
        corpus = Corpus.find(inputs, text_field)
        if val_inputs:
            if val_fraction is not None:
                raise DataError(f"--val-fraction {val_fraction} and --val-inputs exclude each other: omit one")
            val_corpus = Corpus.find(val_inputs, text_field)
            shared = {path.resolve() for path in corpus.files} & {path.resolve() for path in val_corpus.files}
            if shared:
                raise DataError(f"{min(shared)}: an input for both training and validation; remove it from one of them")
            for dataset in val_corpus.hub:
                if dataset in corpus.hub:
                    raise DataError(f"{dataset.url}: for both training and validation; remove it from one of them")
            next(val_corpus.documents())  # raises an error if it is empty, before the training text is tokenized
            return cls(corpus, val_corpus, 0.0)
        if val_fraction is not None:
            _require_both_splits(corpus, val_fraction)
            return cls(corpus, None, val_fraction)
        return cls(corpus, None, *_default_fractions(corpus))

    def part(self, number: int, count: int) -> "TrainValSplit":
        """Return one of ``count`` consecutive parts of the files, about equal in bytes; ``number`` begins with 1."""
        val_corpus = self.val_corpus and self.val_corpus.part(number, count)
        return replace(self, corpus=self.corpus.part(number, count), val_corpus=val_corpus)

    @property
    def bytes(self) -> int:
        """Size of all input files in bytes, as stored."""
        return self.corpus.bytes + (self.val_corpus.bytes if self.val_corpus else 0)

    @property
    def sources(self) -> tuple[Source, ...]:
        """All inputs, those of ``val_corpus`` last."""
        return self.corpus.sources + (self.val_corpus.sources if self.val_corpus else ())

    def documents(self) -> Iterator[Document]:
        """Stream every document.

        Raises:
            DataError: a file is broken.
        """
        yield from self._own_documents()
        if self.val_corpus:
            yield from _assign_splits(self.val_corpus.documents(), 1.0, start=self.corpus.bytes)

    def training_sample(self, limit: int) -> list[str]:
        """Return training documents from everywhere in the corpus, in order, about ``limit`` bytes in total.

        A small corpus is read whole, and the sample has the lowest hash buckets; its size exceeds the limit by less
        than one document. Of a dataset of the hub, the sample has the first documents. From a large corpus, text is
        read at evenly spaced positions. It may then include the text of validation documents that are longer than what
        is read at a position.

        Raises:
            DataError: a file is broken.
        """
        if self.corpus.bytes > WHOLE_READS * limit:
            return self._spaced_sample(limit)
        sample: list[tuple[float, int, Document]] = []  # a heap with the highest bucket on top
        size = 0
        # The number breaks ties, so that the heap never compares documents.
        for number, document in enumerate(self._own_documents()):
            if document.split == "train":
                heapq.heappush(sample, (-document.hash_bucket, number, document))
                size += document.bytes
            while sample and size - sample[0][2].bytes >= limit:
                size -= heapq.heappop(sample)[2].bytes
            if self.corpus.hub and size >= limit:  # all of it would have to be transferred
                break
        return [document.text for _, _, document in sorted(sample, key=lambda entry: entry[1])]

    def _spaced_sample(self, limit: int) -> list[str]:
        sample: list[str] = []
        size, wanted = 0, 0.0
        for path, start, share in self.corpus.positions(SAMPLE_POSITIONS):
            # Summed over the positions: short files leave some of their share to the next ones, and a long document
            # takes some of theirs.
            wanted += limit * share
            if size >= wanted:
                continue
            for document in _assign_splits(read(path, self.corpus.text_field, start), self.val_fraction, self.val_tail):
                if document.split == "train" and not document.text.isspace():
                    sample.append(document.text)
                    size += document.bytes
                if size >= wanted:
                    break
        return sample

    def _own_documents(self) -> Iterator[Document]:
        return _assign_splits(self.corpus.documents(), self.val_fraction, self.val_tail)


def _assign_splits(documents: Documents, threshold: float, tail: float = 0.0, start: int = 0) -> Iterator[Document]:
    for text, bytes_read in documents:
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        bucket = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: all that a float represents exactly
        position = start + bytes_read
        if tail and (cut := _tail_start(text, tail)) < len(text):
            for part, split in ((text[:cut], "train"), (text[cut:], "val")):
                yield Document(part, len(part.encode()), bucket, split, position)
            continue
        # A larger threshold only adds validation documents: none of a smaller one returns to training.
        yield Document(text, len(data), bucket, "val" if bucket < threshold else "train", position)


def _tail_start(text: str, tail: float) -> int:
    """Return where the held-out end of a document begins: after a line, a word or any character, in this order."""
    begin = len(text) - max(1, round(len(text) * tail))
    middle = (begin + len(text)) // 2
    for mark in ("\n", " "):
        cut = text.find(mark, begin, middle) + 1
        if cut:
            break
    else:
        cut = begin
    return cut if text[:cut].strip() and text[cut:].strip() else len(text)


def _default_fractions(corpus: Corpus) -> tuple[float, float]:
    """Return the fraction of documents to hold out, and the fraction of each document; one of them is 0.

    A hundredth of the documents is held out if it is enough text. Otherwise the fraction is larger. Where it would be
    a few documents only, the same fraction of each document is held out.
    """
    buckets, train, val, total = list[float](), 0, 0, 0
    for document in _assign_splits(corpus.documents(), VAL_FRACTION):
        buckets.append(document.hash_bucket)
        total += document.bytes
        if document.split == "val":
            val += document.bytes
        else:
            train += 1
        if train and val >= MIN_VAL_BYTES:  # usually after some megabytes
            return VAL_FRACTION, 0.0
    fraction = min(MAX_FRACTION, max(VAL_FRACTION, MIN_VAL_BYTES / total))
    held_out = sum(bucket < fraction for bucket in buckets)
    return (fraction, 0.0) if MIN_VAL_DOCUMENTS <= held_out < len(buckets) else (0.0, fraction)


def _require_both_splits(corpus: Corpus, val_fraction: float) -> None:
    counts = {"train": 0, "val": 0}
    lowest, highest = 1.0, 0.0
    for document in _assign_splits(corpus.documents(), val_fraction):
        counts[document.split] += 1
        lowest, highest = min(lowest, document.hash_bucket), max(highest, document.hash_bucket)
        if all(counts.values()):  # usually after some hundreds of documents
            return
    missing = "training" if not counts["train"] else "validation"
    raise DataError(
        f"--val-fraction {val_fraction} leaves no document for {missing} (documents: {sum(counts.values())}); "
        f"{_suggest_fraction(lowest, highest)}omit it to hold out the end of each document, or use --val-inputs"
    )


def _suggest_fraction(lowest: float, highest: float) -> str:
    # Both splits get documents if the fraction is above the lowest bucket and at most the highest.
    digit = 10.0 ** (math.floor(math.log10(max(lowest, 1e-9))) - 1)
    fraction = (math.floor(lowest / digit) + 1) * digit
    return f"use --val-fraction {fraction:.2g}, " if lowest < fraction <= highest else ""
