"""Tokenizers on top of the ``tokenizers`` library: bytes, a byte-pair encoding trained here, or a tokenizer.json."""

import json
import re
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from antransformer.data.pad_token import without_pad_token
from antransformer.errors import DataError
from antransformer.files import read_json, read_text, replace_text

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>")
CONFIG_FILE = "tokenizer_config.json"
MIN_BPE_VOCAB = 256 + 1  # all bytes and the end of text
MAX_BPE_VOCAB = 2**24  # the library aborts the process if an allocation fails
LONG_RUN = re.compile(r"(\S{64}|\s{64})")
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")  # one byte of a character that has no piece
CUT_CHARACTERS = 8_000_000  # of texts with such runs
SAMPLE_BYTES = 64_000_000  # of text that a byte-pair encoding is trained on


class Tokenizer:
    """Converts text to token ids and back. ``byte_tokenizer``, ``train_bpe`` and ``Tokenizer.load`` make one.

    Special tokens in a text are encoded as plain text, so a document cannot contain an end-of-text token.

    Attributes:
        name: display name, such as "byte", "bpe-4096" or the name of the folder that it was loaded from.
        vocab_size: largest id + 1.
        end_of_text: id of the token that ends a document.
    """

    def __init__(self, library: tokenizers.Tokenizer, name: str, end_of_text: str | int | None = None) -> None:
        """Wrap a tokenizer of the library.

        Args:
            library: the tokenizer.
            name: display name.
            end_of_text: token that ends a document, or its id. By default the first of ``END_OF_TEXT_NAMES`` that is a
                special token, or else any token.

        Raises:
            DataError: there is no such token.
        """
        # A tokenizer.json may enable padding or truncation, which would corrupt the training data.
        library.no_padding()
        library.no_truncation()
        library.encode_special_tokens = True
        self._library = library
        self.name = name
        self.vocab_size = max(self.vocabulary().values(), default=-1) + 1
        if not isinstance(end_of_text, int):
            end_of_text = _find_end_of_text(library, name, end_of_text)
        self.end_of_text = end_of_text

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text, without an end-of-text token."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            ids: list[int] = self._library.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[NDArray[np.uint32]]:
        """Encode texts on all cores and yield an array of ids [tokens] for each, uint32."""
        with _library_errors(f"tokenizer {self.name} cannot encode a text"):
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        # array converts a list of integers three times as fast as NumPy.
        return (np.frombuffer(array("I", encoding.ids), dtype=np.uint32) for encoding in encodings)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens are spelled out, and bytes that are not UTF-8 become U+FFFD."""
        with _library_errors(f"tokenizer {self.name} cannot decode ids"):
            text: str = self._library.decode([int(token) for token in ids], skip_special_tokens=False)
        return text

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, special tokens included."""
        vocabulary: dict[str, int] = self._library.get_vocab(with_added_tokens=True)
        return vocabulary

    @property
    def end_of_text_token(self) -> str | None:
        """Token that ends a document, as it is in the vocabulary; ``decode`` may give another text."""
        token: str | None = self._library.id_to_token(self.end_of_text)
        return token

    def has_end_of_text(self) -> bool:
        """Return whether ``end_of_text`` is a special token, or one with a usual name, as in data of older versions."""
        return self.end_of_text_token in END_OF_TEXT_NAMES or self.end_of_text in self.special_tokens().values()

    def special_tokens(self) -> dict[str, int]:
        """Return the ids of the special tokens, which no text is encoded to."""
        return _special_tokens(self._library)

    def byte_pieces(self) -> set[int]:
        """Return the ids of the pieces <0x00> to <0xFF>. Each is one byte of a character that has no piece."""
        ids = (self._library.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return {number for number in ids if number is not None}

    def byte_lengths(self) -> NDArray[np.int64]:
        """Return the UTF-8 size of the text of each id, int64 [vocab_size]; that of special tokens is 0.

        It is exact for byte-level tokenizers, and for others as far as the text of a piece does not depend on others.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = "ByteLevel" in json.dumps(json.loads(self.to_json()).get("decoder"))
        for piece, number in self.vocabulary().items():
            if byte_level or BYTE_PIECE.fullmatch(piece):
                lengths[number] = len(piece) if byte_level else 1
            else:
                lengths[number] = len(piece.replace("\u2581", " ").encode())
        lengths[list(self.special_tokens().values())] = 0
        lengths[self.end_of_text] = 0
        return lengths

    def to_json(self) -> str:
        """Return the content of a tokenizer.json file."""
        text: str = self._library.to_str(pretty=True)
        return text

    def encoding_rules(self) -> dict[str, Any]:
        """Return the parts of tokenizer.json that decide the ids of a text, and the id of the end-of-text token."""
        content = json.loads(self.to_json())
        rules = {name: content.get(name) for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        return {**rules, "end_of_text": self.end_of_text}

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json file and flush it to disk.

        A tokenizer_config.json next to it names the end-of-text token, if that is not the one of ``END_OF_TEXT_NAMES``.
        """
        path = Path(path)
        replace_text(path, self.to_json())
        token = self.end_of_text_token
        if token is not None and token != _usual_end_of_text(self._library):
            replace_text(path.parent / CONFIG_FILE, json.dumps({"eos_token": token}))

    @classmethod
    def load(cls, path: str | Path, name: str | None = None, end_of_text: str | int | None = None) -> "Tokenizer":
        """Read a tokenizer.json file, or the one in a folder.

        Args:
            path: file or folder.
            name: display name; by default the name of the folder or file.
            end_of_text: as in the constructor; by default the ``eos_token`` in tokenizer_config.json or
                special_tokens_map.json next to the file, if there is one.

        The pad token of an exported tokenizer is left out, as in the training, unless tokens were added after it.

        Raises:
            DataError: the file does not exist, is not a tokenizer, or has no end-of-text token.
        """
        # Links are not followed: in a hub cache the file is a link, and its companions are next to the link.
        file = Path(path).absolute()
        if file.is_dir():
            file /= "tokenizer.json"
        try:
            with _library_errors(f"{file}: not a tokenizer.json"):
                library = without_pad_token(tokenizers.Tokenizer.from_str(read_text(file)))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror})") from error
        if end_of_text is None:
            end_of_text = _declared_end_of_text(file.parent)
        return cls(library, name or (file.parent.name if file.name == "tokenizer.json" else file.stem), end_of_text)


def _special_tokens(library: tokenizers.Tokenizer) -> dict[str, int]:
    """Ids of the special tokens, which no text is encoded to."""
    added = library.get_added_tokens_decoder()
    return {token.content: number for number, token in added.items() if token.special}


def _usual_end_of_text(library: tokenizers.Tokenizer) -> str | None:
    """Return the first of the usual names that is a special token, or else any token."""
    special = _special_tokens(library)
    names = (*(name for name in END_OF_TEXT_NAMES if name in special), *END_OF_TEXT_NAMES)
    return next((name for name in names if library.token_to_id(name) is not None), None)


def _find_end_of_text(library: tokenizers.Tokenizer, name: str, token: str | None) -> int:
    token = token or _usual_end_of_text(library)
    number = None if token is None else library.token_to_id(token)
    if number is None:
        expected = ", ".join(END_OF_TEXT_NAMES) if token is None else token
        special = ", ".join(list(_special_tokens(library))[:10])
        raise DataError(
            f"tokenizer {name}: has no end-of-text token {expected}; choose one of its special tokens with "
            f"--end-of-text ({special or 'it has none'})"
        )
    return int(number)


def _declared_end_of_text(folder: Path) -> str | None:
    """Return the ``eos_token`` that the files next to a tokenizer.json declare, or None."""
    for name in (CONFIG_FILE, "special_tokens_map.json"):
        try:
            content = read_json(folder / name)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / name}: cannot be read ({error}); repair or remove it") from error
        token = content.get("eos_token") if isinstance(content, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            return token
    return None


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


def train_bpe(documents: Iterable[str], vocab_size: int, progress: bool = False) -> Tokenizer:
    """Train a byte-level byte-pair encoding with GPT-2's pre-tokenizer; id 0 is the end of text. Deterministic.

    Args:
        documents: training text. Reading stops after 64 MB, so pass a sample of larger corpora.
        vocab_size: number of ids, at least 257. A small text gives fewer, since a pair must occur twice.
        progress: whether to show bars on standard error, if it is a terminal.

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
        show_progress=progress and sys.stderr.isatty(),
    )
    library.train_from_iterator(_cut_runs(_take_bytes(documents, SAMPLE_BYTES)), trainer)
    return Tokenizer(library, f"bpe-{library.get_vocab_size()}")


def load_tokenizer(spec: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Return the byte tokenizer for "byte", or load the tokenizer.json at a path or in a folder.

    ``end_of_text`` is the special token that ends a document; its default is as in ``Tokenizer.load``.

    Raises:
        DataError: ``spec`` is not "byte", and no usable tokenizer is at this path.
    """
    if spec == "byte":
        if end_of_text not in (None, END_OF_TEXT):
            raise DataError(f"--end-of-text {end_of_text}: the byte tokenizer has only {END_OF_TEXT}")
        return byte_tokenizer()
    if not Path(spec).exists():
        raise DataError(f"no tokenizer {str(spec)!r}: use 'byte', a tokenizer.json file, or a folder that contains one")
    tokenizer = Tokenizer.load(spec, end_of_text=end_of_text)
    special = tokenizer.special_tokens()
    if tokenizer.end_of_text not in special.values():
        raise DataError(
            f"tokenizer {spec}: the end-of-text token {tokenizer.end_of_text_token} is not a special "
            f"token, so that it may occur in a text; choose one with --end-of-text ({', '.join(list(special)[:10])})"
        )
    return tokenizer


def load_encoder(spec: str | Path, end_of_text: str | None = None) -> Tokenizer:
    """Load a tokenizer as ``load_tokenizer`` does, and check that no text is encoded to its end-of-text token.

    Raises:
        DataError: a text is, since the token is also a piece of a Unigram model, for example; or as there.
    """
    tokenizer = load_tokenizer(spec, end_of_text)
    token = tokenizer.end_of_text_token
    if tokenizer.end_of_text in tokenizer.encode(f"{token} a{token}b"):
        raise DataError(
            f"tokenizer {spec}: a text with {token} is encoded to the end-of-text token {tokenizer.end_of_text}; "
            f"choose another one with --end-of-text ({', '.join(list(tokenizer.special_tokens())[:10])})"
        )
    return tokenizer


def _cut_runs(documents: Iterable[str]) -> Iterator[str]:
    """Yield documents, cut where a run of characters has no space, or spaces only.

    Training takes time quadratic in the length of a run. No merge that is worth an id is as long as a piece. The pieces
    hardly repeat, as words do, and each different one takes time and memory, so that only some of them are used.
    """
    cut = 0
    for text in documents:
        if not LONG_RUN.search(text):
            yield text
        elif cut < CUT_CHARACTERS:
            cut += len(text)
            yield from LONG_RUN.sub(r"\1\0", text).split("\0")


def _take_bytes(documents: Iterable[str], limit: int) -> Iterator[str]:
    size = 0
    for text in documents:
        yield text
        size += len(text.encode())
        if size >= limit:
            return
