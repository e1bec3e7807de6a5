"""One file as a stream of documents: plain text, JSON lines (plain, gzip or zstd) and parquet.

Readers yield (document, bytes of the file read so far) and hold at most one block or record in memory. A broken file
raises one ``DataError`` that names the file and, for JSON lines, the line.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from antransformer.errors import DataError
from antransformer.extras import require

SEPARATOR = "<|endoftext|>"
MAX_CHARACTERS = 256 * 1024  # of a document; longer ones are cut into sections
BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 28  # of a line of JSON, after decompression
ZSTD_BYTES = 1 << 10  # compressed bytes per call; they decompress to at most 32 MiB
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"

Documents = Iterator[tuple[str, int]]


def read(path: Path) -> Documents:
    """Stream the documents of one file. The ending selects JSON lines or parquet; other files are plain text.

    In plain text the literal ``<|endoftext|>`` separates documents. A document of more than 256 Ki characters is cut
    into sections, which become separate documents. Cuts are at the end of a paragraph or line where there is one.

    Raises:
        DataError: the file is broken, missing or not text.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    name = path.name.lower()
    with data_errors(path):
        if name.endswith(JSON_LINES):
            yield from _split_long(_json_lines(path))
        elif name.endswith(PARQUET):
            yield from _split_long(_parquet(path))
        else:
            yield from _plain_text(path)


def is_readable(path: Path) -> bool:
    """Return whether ``read`` is expected to work: plain text must be UTF-8, without a NUL in the first block.

    Raises:
        DataError: the file cannot be opened.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    name = path.name.lower()
    if name.endswith(PARQUET):
        require("pyarrow.parquet", "data")
    elif name.endswith(".jsonl.zst"):
        require("zstandard", "data")
    elif not name.endswith(JSON_LINES):
        with data_errors(path):
            try:
                # NUL is valid UTF-8, but in practice a sign of a binary file or of UTF-16.
                return all(number or "\0" not in text for number, (text, _) in enumerate(_blocks(path)))
            except UnicodeDecodeError:
                return False
    return True


@contextmanager
def data_errors(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of codecs into a one-line ``DataError`` that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); was it changed, moved or truncated?") from error


def _blocks(path: Path) -> Documents:
    # Incremental, since a character may span two blocks. utf-8-sig drops a byte order mark.
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield decoder.decode(block), file.tell()
        yield decoder.decode(b"", final=True), file.tell()


def _plain_text(path: Path) -> Documents:
    rest, position = "", 0
    for block, position in _blocks(path):
        *complete, rest = (rest + block).split(SEPARATOR)
        yield from _split_long((text, position) for text in complete)
        # The last characters may be the beginning of a separator, so the cut must leave them in rest.
        while len(rest) > MAX_CHARACTERS + len(SEPARATOR):
            end = _section_end(rest)
            yield rest[:end], position
            rest = rest[end:]
    yield from _split_long(iter([(rest, position)]))


def _split_long(documents: Documents) -> Documents:
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


def _json_lines(path: Path) -> Documents:
    with path.open("rb") as file:
        for number, line in enumerate(_decompressed_lines(path, file), 1):
            if line.strip():
                # The position in the compressed file: progress is measured in bytes as stored.
                yield _parse_record(line, f"{path}, line {number}"), file.tell()


def _decompressed_lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as lines:
            yield from _bounded_lines(path, lines)
    elif name.endswith(".zst"):
        zstandard = require("zstandard", "data")
        try:
            yield from _bounded_lines(path, io.BufferedReader(_ZstdReader(file, zstandard.ZstdDecompressor())))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: not a complete zstd file ({error})") from error
    else:
        yield from _bounded_lines(path, file)


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


def _parse_record(line: bytes, location: str) -> str:
    expected = "every line must be an object with a 'text' field"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{location}: not JSON ({error.msg} at column {error.colno}); {expected}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{location}: not JSON ({error}); {expected}") from error
    if not isinstance(record, dict):
        raise DataError(f"{location}: a JSON {type(record).__name__}; {expected}")
    if "text" not in record:
        raise DataError(f"{location}: no 'text' field, found {list(record)[:10]}; {expected}")
    if not isinstance(record["text"], str):
        raise DataError(f"{location}: 'text' must be a string, not {type(record['text']).__name__}")
    # JSON can spell half of a surrogate pair, which UTF-8 cannot encode.
    return record["text"].encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path) -> Documents:
    pyarrow, parquet = require("pyarrow", "data"), require("pyarrow.parquet", "data")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{path}: no 'text' column, found {names[:10]}; documents must be in 'text'")
            kind = file.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column 'text' must hold strings, not {kind}")
            size, rows = path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                rows += batch.num_rows
                for text in batch.column(0).to_pylist():
                    # Parquet gives no byte position, so progress is estimated from the rows.
                    yield text or "", size * rows // file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a complete parquet file ({' '.join(str(error).split())})") from error
