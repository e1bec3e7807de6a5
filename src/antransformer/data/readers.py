"""One file as a stream of documents: plain text, JSON lines and parquet. The first two may be compressed.

Readers yield (document, bytes of the file read so far) and hold at most one block or record in memory. A broken file
raises one ``DataError`` that names the file and, for JSON lines, the line.
"""

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from antransformer.data.parquet import check_parquet, parquet_texts
from antransformer.errors import DataError
from antransformer.extras import require

SEPARATOR = "<|endoftext|>"
MAX_CHARACTERS = 256 * 1024  # of a document; longer ones are cut into sections
BLOCK_BYTES = 1 << 20
CHECKED_BLOCKS = 16  # of a long file of plain text, checked for UTF-8 before the work
CHECKED_BYTES = 1 << 16  # of a block
LINE_BYTES = 1 << 28  # of a line of JSON, after decompression
ZSTD_BYTES = 1 << 10  # compressed bytes per call; they decompress to at most 32 MiB
COMPRESSED = (".gz", ".zst", ".xz", ".bz2")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
TEXT_FIELD = "text"

Documents = Iterator[tuple[str, int]]


def base_ending(path: Path) -> str:
    """Ending of a file name in lower case, without the ending of a compression: ".jsonl" of ``a.JSONL.gz``."""
    name = path.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return os.path.splitext(name)[1]  # noqa: PTH122 (Path.suffix of ".txt" is empty)


def read(path: Path, text_field: str = TEXT_FIELD, start: float = 0.0, whole: bool = False) -> Documents:
    """Stream the documents of one file. The ending selects JSON lines or parquet; other files are plain text.

    In plain text the literal ``<|endoftext|>`` separates documents. A document of more than 256 Ki characters is cut
    into sections, which become separate documents. Cuts are at the end of a paragraph or line where there is one.

    Args:
        path: the file.
        text_field: field of JSON lines or column of parquet that holds the text. Dots select inside nested records.
        start: fraction of the file to skip. The next complete document is the first one. Compressed files cannot be
            skipped into, and are read from their beginning.
        whole: do not cut long documents.

    Raises:
        DataError: the file is broken, missing or not text.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    ending = base_ending(path)
    with data_errors(path):
        if ending == PARQUET:
            records = parquet_texts(path, text_field, start)
            yield from records if whole else split_long(records)
        elif ending in JSON_LINES:
            records = _json_lines(path, text_field, start)
            yield from records if whole else split_long(records)
        else:
            yield from _plain_text(path, start, whole)


def unreadable(path: Path, text_field: str = TEXT_FIELD) -> str | None:
    """Return why ``read`` would find no text in a file, in a few words; None if it is expected to.

    Of plain text only some blocks are read. They must be UTF-8, and the first one must not have a NUL
    or the signature of a PDF. Of JSON lines the first record is read, and of parquet the schema.

    Raises:
        DataError: the file cannot be opened, or does not have the field.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    ending = base_ending(path)
    if path.name.lower().endswith(".zst"):
        require("zstandard", "data")
    with data_errors(path):
        if path.stat().st_size == 0:
            return "empty"
        if ending == PARQUET:
            check_parquet(path, text_field)
        elif ending == ".json":
            return None if _is_json_lines(path, text_field) else f"JSON, but not JSON lines with a {text_field!r} field"
        elif ending in JSON_LINES:
            next(_json_lines(path, text_field), None)
        else:
            return _binary_format(path)
    return None


def is_readable(path: Path) -> bool:
    """Return whether ``read`` is expected to find text in a file; raises the errors of ``unreadable``."""
    return unreadable(path) is None


def _is_json_lines(path: Path, text_field: str) -> bool:
    """Return whether the first line is a record with this field."""
    try:
        next(_json_lines(path, text_field), None)
    except DataError:
        return False
    return True


def _binary_format(path: Path) -> str | None:
    """Return what a file is if it is not plain text, otherwise None."""
    try:
        for number, (block, at_end) in enumerate(_checked_blocks(path)):
            if not number and block.startswith(b"%PDF-"):  # all bytes of a PDF may be ASCII
                return "a PDF, not text"
            codecs.getincrementaldecoder("utf-8")().decode(block, at_end)
            # NUL is valid UTF-8, but in practice a sign of a binary file or of UTF-16.
            if not number and b"\0" in block:
                return "not UTF-8 text"
    except UnicodeDecodeError:
        return "not UTF-8 text"
    return None


def _checked_blocks(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield blocks that begin with a character, and whether the file ends with the block."""
    with path.open("rb") as file:
        if path.name.lower().endswith(COMPRESSED):
            with _decompressed(path, file) as content:
                yield content.read(CHECKED_BYTES), False
            return
        size = path.stat().st_size
        count = CHECKED_BLOCKS if size > CHECKED_BLOCKS * CHECKED_BYTES else 1
        length = CHECKED_BYTES if count > 1 else size
        for number in range(count):
            file.seek((size - length) * number // max(1, count - 1))
            block = file.read(length)
            yield _from_character(block) if number else block, number == count - 1


def _from_character(block: bytes) -> bytes:
    """Return a block from the beginning of its first complete UTF-8 character."""
    begin = next((number for number, byte in enumerate(block[:4]) if byte & 0xC0 != 0x80), 0)
    return block[begin:]


@contextmanager
def data_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of codecs into a one-line ``DataError`` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text; convert it to UTF-8, or exclude it") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder: give the files inside") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); was it changed, moved or truncated?") from error


@contextmanager
def _decompressed(path: Path, file: BinaryIO) -> Iterator[IO[bytes] | io.BufferedIOBase]:
    """Open the content of a file, whose ending selects the decompression."""
    name = path.name.lower()
    if name.endswith(".zst"):
        zstandard = require("zstandard", "data")
        try:
            yield io.BufferedReader(_ZstdReader(file, zstandard.ZstdDecompressor()))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: not a complete zstd file ({error})") from error
    elif name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as content:
            yield content
    elif name.endswith(".bz2"):
        with bz2.BZ2File(file) as content:
            yield content
    elif name.endswith(".xz"):
        with lzma.LZMAFile(file) as content:
            yield content
    else:
        yield file


def _skip(path: Path, file: BinaryIO, start: float) -> bool:
    """Move to a fraction of an uncompressed file; return whether the position changed."""
    if start and not path.name.lower().endswith(COMPRESSED):
        file.seek(int(path.stat().st_size * start))
    return file.tell() > 0


def _blocks(path: Path, start: float) -> Documents:
    # Incremental, since a character may span two blocks. utf-8-sig drops a byte order mark.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        skipped = _skip(path, file, start)
        with _decompressed(path, file) as content:
            while block := content.read(BLOCK_BYTES):
                text = decoder.decode(_from_character(block) if skipped else block)
                if skipped:
                    # Without a separator the document began in an earlier block and continues in the next.
                    text = text.partition(SEPARATOR)[2] or text.partition("\n")[2] or text
                    skipped = False
                yield text, file.tell()
        yield decoder.decode(b"", final=True), file.tell()


def _plain_text(path: Path, start: float, whole: bool) -> Documents:
    sections = iter if whole else split_long
    rest, position = "", 0
    for block, position in _blocks(path, start):
        # Only the new text is searched: a document may be many blocks long, and += extends a string in place.
        begin = max(0, len(rest) - len(SEPARATOR))
        rest += block
        if rest.find(SEPARATOR, begin) >= 0:
            *complete, rest = rest.split(SEPARATOR)
            yield from sections((text, position) for text in complete)
        # The last characters may be the beginning of a separator, so the cut must leave them in rest.
        while not whole and len(rest) > MAX_CHARACTERS + len(SEPARATOR):
            end = _section_end(rest)
            yield rest[:end], position
            rest = rest[end:]
    yield from sections(iter([(rest, position)]))


def split_long(documents: Documents) -> Documents:
    """Cut documents of more than ``MAX_CHARACTERS`` into sections."""
    for text, position in documents:
        start = 0
        while len(text) - start > MAX_CHARACTERS:
            end = _section_end(text, start)
            yield text[start:end], position
            start = end
        yield text[start:], position


def _section_end(text: str, start: int = 0) -> int:
    # Search only the second half, so that an early blank line does not make a tiny section.
    for mark in ("\n\n", "\n"):
        position = text.rfind(mark, start + MAX_CHARACTERS // 2, start + MAX_CHARACTERS)
        if position >= 0:
            return position + len(mark)
    return start + MAX_CHARACTERS


def _json_lines(path: Path, text_field: str, start: float = 0.0) -> Documents:
    with path.open("rb") as file:
        skipped = _skip(path, file, start)
        with _decompressed(path, file) as content:
            lines = _bounded_lines(path, content)
            if skipped:
                next(lines, None)
            for number, line in enumerate(lines, 1):
                if line.strip():
                    # The position in the compressed file: progress is measured in bytes as stored.
                    yield _parse_record(line, text_field, f"{path}, line {number}"), file.tell()


class _ZstdReader(io.RawIOBase):
    """Decompressed content of a zstd file; unlike the library's own reader it raises EOFError on a truncated file."""

    def __init__(self, file: BinaryIO, library: Any) -> None:
        self._file, self._library = file, library
        self._frame: Any = None
        self._compressed, self._decompressed = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._decompressed:
            compressed = self._compressed or self._file.read(ZSTD_BYTES)
            if not compressed and self._frame:
                raise EOFError("the file ends within a frame")
            if not compressed:
                return 0
            # A file may hold several frames, one after the other.
            self._frame = self._frame or self._library.decompressobj()
            self._decompressed, self._compressed = memoryview(self._frame.decompress(compressed)), b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._decompressed))
        buffer[:count], self._decompressed = self._decompressed[:count], self._decompressed[count:]
        return count


def _bounded_lines(path: Path, lines: IO[bytes] | io.BufferedIOBase) -> Iterator[bytes]:
    """Yield lines of limited length, since a small compressed file can decompress to a line of any size."""
    while line := lines.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise DataError(f"{path}: a line is longer than {LINE_BYTES >> 20} MiB; write one document per line")
        yield line


def _parse_record(line: bytes, text_field: str, location: str) -> str:
    expected = f"every line must be an object with a {text_field!r} field (--text-field)"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{location}: not JSON ({error.msg} at column {error.colno}); {expected}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); {expected}") from error
    return select_text(record, text_field, location)


def select_text(record: Any, text_field: str, location: str) -> str:
    """Return the text in a field of a record, where dots in the name select inside nested records.

    The text of a null, also in place of a nested record, is empty.

    Raises:
        DataError: there is no such field, or it has no text; ``location`` begins the message.
    """
    expected = f"every record must be an object with a {text_field!r} field (--text-field)"
    value = record
    # A name with a dot may also be the name of a field.
    for name in [text_field] if isinstance(record, dict) and text_field in record else text_field.split("."):
        if value is None and value is not record:
            return ""
        if not isinstance(value, dict):
            raise DataError(f"{location}: a JSON {type(value).__name__}; {expected}")
        if name not in value:
            raise DataError(f"{location}: no {text_field!r} field, found {list(value)[:10]}; {expected}")
        value = value[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{location}: {text_field!r} must be a string, not {type(value).__name__}; {expected}")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot encode.
    return value.encode("utf-8", "replace").decode("utf-8")
