"""Tokenizers on top of the ``tokenizers`` library: bytes, a byte-pair encoding trained here, or a tokenizer.json."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from antransformer.data.pad_token import without_pad_token
from antransformer.errors import DataError
from antransformer.files import read_text, replace_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
MIN_BPE_VOCAB = 256 + 1  # all bytes and the end of text
MAX_BPE_VOCAB = 2**24  # the library aborts the process if an allocation fails
SAMPLE_BYTES = 64_000_000  # of text that a byte-pair encoding is trained on


class Tokenizer:
    """Converts text to token ids and back. ``byte_tokenizer``, ``train_bpe`` and ``Tokenizer.load`` make one.

    Special tokens in a text are encoded as plain text, so a document cannot contain an end-of-text token.

    Attributes:
        name: display name, such as "byte", "bpe-4096" or the name of the folder that it was loaded from.
        vocab_size: largest id + 1.
        end_of_text: id of the token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer, name: str) -> None:
        # A tokenizer.json may enable padding or truncation, which would corrupt the training data.
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        self._library = library
        self.name = name
        self.vocab_size = max(self.vocabulary().values(), default=-1) + 1
        ids = [library.token_to_id(token) for token in END_OF_TEXT_NAMES]
        self.end_of_text: int = next((token for token in ids if token is not None), -1)
        if self.end_of_text < 0:
            raise DataError(
                f"tokenizer {name}: has no end-of-text token; expected one of {', '.join(END_OF_TEXT_NAMES)}"
            )

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without an end-of-text token."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Encode texts on all cores and yield an array of ids [tokens] for each, uint32."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return (np.array(encoding.ids, dtype=np.uint32) for encoding in encodings)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens are spelled out, and bytes that are not UTF-8 become U+FFFD."""
        with _library_errors(f"tokenizer {self.name} cannot decode ids"):
            text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=False)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, special tokens included."""
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        return vocabulary

    def to_json(self) -> str:
        """Return the content of a tokenizer.json file."""
        text: str = self._library.to_str(pretty=True)
        return text

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json file and flush it to disk."""
        replace_text(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path, name: str | None = None) -> "Tokenizer":
        """Read a tokenizer.json file, or the one in a folder; ``name`` defaults to the name of the folder or file.

        The pad token of an exported tokenizer is left out: it has the same ids as the tokenizer of the training.

        Raises:
            DataError: the file does not exist, is not a tokenizer, or has no end-of-text token.
        """
        file = Path(os.path.realpath(path))  # Path.resolve raises on a loop of links
        if file.is_dir():
            file /= "tokenizer.json"
        try:
            with _library_errors(f"{file}: not a tokenizer.json"):
                library = without_pad_token(tokenizers.Tokenizer.from_str(read_text(file)))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        return cls(library, name or (file.parent.name if file.name == "tokenizer.json" else file.stem))


@contextmanager
def _library_errors(message: str) -> Iterator[None]:
    """Turn errors of the tokenizers library into a ``DataError``."""
    try:
        yield
    except OSError:
        raise
    except BaseException as error:
        # Panics of the Rust code derive from BaseException, and the library does not export their class.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"{message} ({' '.join(str(error).split())})") from error


class ByteTokenizer(Tokenizer):
    """Tokenizer whose ids are the bytes of the text. It encodes without the library, which is slower."""

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of one text."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Yield the UTF-8 bytes of each text [bytes], uint32."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            encoded = [text.encode() for text in texts]
        return (np.frombuffer(data, dtype=np.uint8).astype(np.uint32) for data in encoded)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer whose ids are byte values, with 256 for the end of text. Every string round-trips."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The byte-level alphabet has printable bytes as themselves and the others, in order, as characters above 255.
    printable = {ord(character): character for character in alphabet if ord(character) < 256}
    others = iter(sorted(character for character in alphabet if ord(character) >= 256))
    vocabulary = {printable.get(byte) or next(others): byte for byte in range(256)}
    library = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.decoder = decoders.ByteLevel()
    library.add_special_tokens([END_OF_TEXT])
    return ByteTokenizer(library, "byte")


def train_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level byte-pair encoding with GPT-2's pre-tokenizer; id 0 is the end of text. Deterministic.

    Args:
        documents: training text. Reading stops after 64 MB, so pass a sample of larger corpora.
        vocab_size: number of ids, at least 257. A small text gives fewer, since a pair must occur twice.

    Raises:
        DataError: vocab_size is below 257.
    """
    if vocab_size < MIN_BPE_VOCAB:
        raise DataError(
            f"a BPE vocabulary of {vocab_size}: it must be at least {MIN_BPE_VOCAB} (256 bytes and end of text)"
        )
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # every byte has an id, also if the sample lacks it
        show_progress=False,
    )
    library.train_from_iterator(_take_bytes(documents, SAMPLE_BYTES), trainer)
    return Tokenizer(library, f"bpe-{library.get_vocab_size()}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Return the byte tokenizer for "byte", or load the tokenizer.json at a path or in a folder.

    Raises:
        DataError: ``spec`` is not "byte", and no usable tokenizer is at this path.
    """
    if spec == "byte":
        return byte_tokenizer()
    if not Path(spec).exists():
        raise DataError(f"no tokenizer {str(spec)!r}: use 'byte', a tokenizer.json file, or a folder that contains one")
    return Tokenizer.load(spec)


def _take_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in documents:
        yield text
        size += len(text.encode())
        if size >= limit:
            return
