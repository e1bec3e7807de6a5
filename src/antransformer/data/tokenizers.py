"""One tokenizer interface over the ``tokenizers`` library: bytes, trained here, or any tokenizer.json."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from antransformer.errors import DataError
from antransformer.files import read_text, replace_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
SMALLEST_BPE = 256 + 1  # every byte, and the end of text
LARGEST_BPE = 2**24  # the library aborts the process where it can not allocate
SAMPLE_BYTES = 64_000_000


class Tokenizer:
    """Text to token ids and back. ``byte_tokenizer``, ``train_bpe`` and ``Tokenizer.load`` make one.

    Text that spells a special token is plain text to it: a document can not end itself.

    Attributes:
        name: what a person calls it ("byte", "bpe-4096", or where it was loaded from).
        vocab_size: number of ids, the largest id + 1.
        end_of_text: id of the token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer, name: str) -> None:
        # A tokenizer.json may carry padding or truncation, which would falsify a corpus.
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        self._library = library
        self.name = name
        self.vocab_size = max(self.vocabulary().values(), default=-1) + 1
        ids = [library.token_to_id(token) for token in END_OF_TEXT_NAMES]
        self.end_of_text: int = next((i for i in ids if i is not None), -1)
        if self.end_of_text < 0:
            raise DataError(f"tokenizer {name}: no end-of-text token; looked for {', '.join(END_OF_TEXT_NAMES)}")

    def encode(self, text: str) -> list[int]:
        """Ids of one text, without an end-of-text token."""
        with _failing(f"tokenizer {self.name} can not read a text"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Ids of many texts, on all cores; the arrays [tokens] are made of them one by one as they are taken."""
        with _failing(f"tokenizer {self.name} can not read a text"):
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return (np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of some ids; special tokens are spelled out, bytes that are no UTF-8 become U+FFFD."""
        with _failing(f"tokenizer {self.name} can not spell its ids"):
            text: str = self._library.decode([int(i) for i in ids], skip_special_tokens=False)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Every token and its id, special tokens too."""
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        return vocabulary

    def to_json(self) -> str:
        """The content of a tokenizer.json file."""
        text: str = self._library.to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write it as a tokenizer.json file, and see it onto the disk."""
        replace_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> "Tokenizer":
        """Read a tokenizer.json file, or the one in a folder; ``name`` defaults to that of the folder or file.

        Raises:
            DataError: there is no such file, it is no tokenizer, or it has no end-of-text token.
        """
        file = Path(os.path.realpath(path))  # Path.resolve raises on a loop of links
        if file.is_dir():
            file /= "tokenizer.json"
        try:
            with _failing(f"{file}: not a tokenizer.json"):
                library = tokenizers.Tokenizer.from_str(read_text(file))
        except OSError as error:
            raise DataError(f"{file}: no tokenizer can be read there ({error.strerror})") from error
        return cls(library, name or (file.parent.name if file.name == "tokenizer.json" else file.stem))


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Turn an error of the library into a ``DataError``; its panics are no ``Exception``, and it exports no type."""
    try:
        yield
    except OSError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{what} ({' '.join(str(error).split())})") from error


class ByteTokenizer(Tokenizer):
    """One whose ids are the bytes of a text, which it reads without the library."""

    def encode(self, text: str) -> list[int]:
        """As any tokenizer's."""
        with _failing(f"tokenizer {self.name} can not read a text"):
            return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """As any tokenizer's."""
        with _failing(f"tokenizer {self.name} can not read a text"):
            encoded = [text.encode() for text in texts]
        return (np.frombuffer(data, dtype=np.uint8).astype(np.uint32) for data in encoded)


def byte_tokenizer() -> Tokenizer:
    """Bytes as tokens: the id of a byte is its value, and 256 ends a text. Round-trips every string."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet spells a printable byte as itself, and the others, in order, with characters past 255.
    same = {ord(character): character for character in alphabet if ord(character) < 256}
    others = iter(sorted(character for character in alphabet if ord(character) >= 256))
    vocabulary = {same.get(byte) or next(others): byte for byte in range(256)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return ByteTokenizer(library, "byte")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level byte-pair encoding with the pre-tokenizer of GPT-2; id 0 ends a text. Same documents, same result.

    Args:
        documents: what to learn from; reading stops after 64 MB of text, so pass a sample if there is more.
        vocab_size: number of ids, at least 257. A text too small to hold so many pairs (seen twice) gives fewer.

    Raises:
        DataError: vocab_size is below 257.
    """
    if vocab_size < SMALLEST_BPE:
        raise DataError(f"a BPE vocabulary of {vocab_size}: it must be at least {SMALLEST_BPE}, to hold every byte")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_first(documents, SAMPLE_BYTES), trainer)
    return Tokenizer(library, f"bpe-{library.get_vocab_size()}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """The tokenizer that a person asked for: "byte", or the path of a tokenizer.json or of a folder with one.

    Raises:
        DataError: there is none there.
    """
    if spec == "byte":
        return byte_tokenizer()
    if not Path(spec).exists():
        raise DataError(f"no tokenizer {str(spec)!r}: give 'byte', a tokenizer.json file, or a folder that holds one")
    return Tokenizer.load(spec)


def _first(documents: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in documents:
        yield text
        size += len(text.encode())
        if size >= limit:
            return
