"""Which documents are held out for validation: those of files of their own, or a share chosen by a hash of content.

The hash depends neither on the order of the documents nor on chance, and equal documents never fall on two sides.
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
    """A document with its UTF-8 size, its place in [0, 1), its split, and the bytes of input read up to its end."""

    text: str
    bytes: int
    place: float
    split: str
    done: int


@dataclass(frozen=True)
class TrainValSplit:
    """The documents of a corpus, each given to a split; ``TrainValSplit.find`` makes one.

    Documents placed below ``val_fraction`` are for validation, unless ``held_out`` is there for it.
    """

    corpus: Corpus
    held_out: Corpus | None
    val_fraction: float

    @classmethod
    def find(cls, inputs: Inputs, val_inputs: Inputs, val_fraction: float) -> "TrainValSplit":
        """Look up the inputs, and those for validation if there are any.

        Raises:
            DataError: an input or the fraction is unusable, or a file is on both sides.
            MissingExtraError: an input needs pyarrow or zstandard, which is not installed.
        """
        if not 0 < val_fraction < 1:
            raise DataError(f"val_fraction is {val_fraction}: it must be between 0 and 1, for example 0.01")
        corpus = Corpus.find(inputs)
        if not val_inputs:
            return cls(corpus, None, val_fraction)
        held_out = Corpus.find(val_inputs)
        both = {path.resolve() for path in corpus.files} & {path.resolve() for path in held_out.files}
        if both:
            raise DataError(f"{min(both)}: an input both for training and for validation; leave it out of one")
        return cls(corpus, held_out, 0.0)

    @property
    def bytes(self) -> int:
        """Size of all files in bytes, as stored."""
        return self.corpus.bytes + (self.held_out.bytes if self.held_out else 0)

    @property
    def sources(self) -> tuple[Source, ...]:
        """All inputs, those for validation last."""
        return self.corpus.sources + (self.held_out.sources if self.held_out else ())

    def documents(self) -> Iterator[Document]:
        """Stream every document.

        Raises:
            DataError: a file is broken, or the fraction leaves a split without documents.
        """
        if self.held_out:
            yield from _placed(self.corpus, 0.0)
            yield from _placed(self.held_out, 1.0, start=self.corpus.bytes)
            return
        counts = {"train": 0, "val": 0}
        lowest, highest = 1.0, 0.0
        for document in _placed(self.corpus, self.val_fraction):
            yield document
            counts[document.split] += 1
            lowest, highest = min(lowest, document.place), max(highest, document.place)
        for split, name in (("train", "training"), ("val", "validation")):
            if not counts[split]:
                raise DataError(
                    f"no document is left for {name} (documents: {sum(counts.values())}, val_fraction: "
                    f"{self.val_fraction}); {_fraction_between(lowest, highest)}mark where documents end with "
                    "<|endoftext|> in the text, or give validation files of their own"
                )

    def training_sample(self, limit: int) -> list[str]:
        """Documents for training, ``limit`` bytes of them or one document more, from everywhere in the corpus.

        They are those of the lowest places, since only the last one tells how much text compressed files hold.

        Raises:
            DataError: a file is broken.
        """
        kept: list[tuple[float, int, Document]] = []  # that of the highest place first
        size = 0
        for number, document in enumerate(_placed(self.corpus, self.val_fraction)):
            if document.split == "train":
                heapq.heappush(kept, (-document.place, number, document))
                size += document.bytes
            while kept and size - kept[0][2].bytes >= limit:
                size -= heapq.heappop(kept)[2].bytes
        return [document.text for _, _, document in sorted(kept, key=lambda entry: entry[1])]


def _placed(corpus: Corpus, threshold: float, start: int = 0) -> Iterator[Document]:
    for text, done in corpus.documents():
        data = text.encode()
        digest = hashlib.blake2b(data, digest_size=8).digest()
        place = (int.from_bytes(digest, "big") >> 11) / 2**53  # 53 bits, as many as a float holds
        yield Document(text, len(data), place, "val" if place < threshold else "train", start + done)


def _fraction_between(lowest: float, highest: float) -> str:
    # A fraction leaves something on both sides if it is above the lowest place and not above the highest.
    digit = 10.0 ** (math.floor(math.log10(max(lowest, 1e-9))) - 1)
    fraction = (math.floor(lowest / digit) + 1) * digit
    return f"val_fraction {fraction:.2g} would divide them, or " if lowest < fraction <= highest else ""
