"""Split of documents into training and validation data: by a hash of their content, or by separate input files.

The hash depends neither on the order of the documents nor on a seed, and equal documents always share a split.
"""

import hashlib
import heapq
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from antransformer.data.sources import Corpus, Source
from antransformer.errors import DataError

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
    """

    corpus: Corpus
    val_corpus: Corpus | None
    val_fraction: float

    @classmethod
    def find(cls, inputs: Inputs, val_inputs: Inputs, val_fraction: float) -> "TrainValSplit":
        """Find the files behind ``inputs`` and ``val_inputs``, which may be empty.

        Raises:
            DataError: an input or the fraction is unusable, or a file is in both inputs.
            MissingExtraError: an input needs pyarrow or zstandard, which is not installed.
        """
        if not 0 < val_fraction < 1:
            raise DataError(f"val_fraction is {val_fraction}: it must be between 0 and 1, for example 0.01")
        corpus = Corpus.find(inputs)
        if not val_inputs:
            return cls(corpus, None, val_fraction)
        val_corpus = Corpus.find(val_inputs)
        shared = {path.resolve() for path in corpus.files} & {path.resolve() for path in val_corpus.files}
        if shared:
            raise DataError(f"{min(shared)}: an input for both training and validation; remove it from one of them")
        return cls(corpus, val_corpus, 0.0)

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
            DataError: a file is broken, or the fraction leaves a split without documents.
        """
        if self.val_corpus:
            yield from _assign_splits(self.corpus, 0.0)
            yield from _assign_splits(self.val_corpus, 1.0, start=self.corpus.bytes)
            return
        counts = {"train": 0, "val": 0}
        lowest, highest = 1.0, 0.0
        for document in _assign_splits(self.corpus, self.val_fraction):
            yield document
            counts[document.split] += 1
            lowest, highest = min(lowest, document.hash_bucket), max(highest, document.hash_bucket)
        for split, name in (("train", "training"), ("val", "validation")):
            if not counts[split]:
                raise DataError(
                    f"no document is left for {name} (documents: {sum(counts.values())}, val_fraction: "
                    f"{self.val_fraction}); {_suggest_fraction(lowest, highest)}mark the end of each document with "
                    "<|endoftext|>, or provide separate validation files"
                )

    def training_sample(self, limit: int) -> list[str]:
        """Return training documents from everywhere in the corpus, in order, ``limit`` bytes in total.

        The total exceeds the limit by less than one document. The sample has the lowest hash buckets. A sampling rate
        is not an option, since the size of the text in compressed files is unknown until the last one is read.

        Raises:
            DataError: a file is broken.
        """
        sample: list[tuple[float, int, Document]] = []  # a heap with the highest bucket on top
        size = 0
        # The number breaks ties, so that the heap never compares documents.
        for number, document in enumerate(_assign_splits(self.corpus, self.val_fraction)):
            if document.split == "train":
                heapq.heappush(sample, (-document.hash_bucket, number, document))
                size += document.bytes
            while sample and size - sample[0][2].bytes >= limit:
                size -= heapq.heappop(sample)[2].bytes
        return [document.text for _, _, document in sorted(sample, key=lambda entry: entry[1])]


def _assign_splits(corpus: Corpus, threshold: float, start: int = 0) -> Iterator[Document]:
    for text, bytes_read in corpus.documents():
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        bucket = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits: all that a float represents exactly
        # A larger threshold only adds validation documents: none of a smaller one returns to training.
        yield Document(text, len(data), bucket, "val" if bucket < threshold else "train", start + bytes_read)


def _suggest_fraction(lowest: float, highest: float) -> str:
    # Both splits get documents if the fraction is above the lowest bucket and at most the highest.
    digit = 10.0 ** (math.floor(math.log10(max(lowest, 1e-9))) - 1)
    fraction = (math.floor(lowest / digit) + 1) * digit
    return f"use val_fraction {fraction:.2g}, " if lowest < fraction <= highest else ""
