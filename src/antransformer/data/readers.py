"""One file as a stream of documents: plain text, JSON lines (plain, gzip or zstd) and parquet.

Every reader yields (document, bytes of the file read so far), holds at most one block or record in memory, and turns
what can be wrong with a file into one ``DataError`` that names the file, and the line where there are lines.
"""

import codecs
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from antransformer.errors import DataError, MissingExtraError

SEPARATOR = "<|endoftext|>"
MAX_CHARACTERS = 256 * 1024
BLOCK_BYTES = 1 << 20
LINE_BYTES = 1 << 28
ZSTD_BYTES = 1 << 10  # that are unfolded at once, to 32 MiB at most
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = ".parquet"

Documents = Iterator[tuple[str, int]]


def read(path: Path) -> Documents:
    """Stream one file, read by its ending; whatever is neither JSON lines nor parquet is plain text.

    In plain text the literal ``<|endoftext|>`` separates documents. A document of more than 256 Ki characters is cut,
    where a paragraph or at least a line ends, into sections that are documents of their own.

    Raises:
        DataError: the file is broken, is no text, or vanished.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    name = path.name.lower()
    with reading(path):
        if name.endswith(JSON_LINES):
            yield from _sectioned(_json_lines(path))
        elif name.endswith(PARQUET):
            yield from _sectioned(_parquet(path))
        else:
            yield from _plain(path)


def check(path: Path) -> bool:
    """Whether ``read`` can be expected to work: plain text must be UTF-8 throughout, with no NUL at its beginning.

    Raises:
        DataError: the file can not be opened.
        MissingExtraError: pyarrow or zstandard is needed and not installed.
    """
    name = path.name.lower()
    if name.endswith(PARQUET):
        optional("pyarrow.parquet")
    elif name.endswith(".jsonl.zst"):
        optional("zstandard")
    elif not name.endswith(JSON_LINES):
        with reading(path):
            try:
                return all(number or "\0" not in text for number, (text, _) in enumerate(_blocks(path)))
            except UnicodeDecodeError:
                return False
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the operating system or a codec says against a file into a ``DataError`` of one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: can not be read ({reason}); was it changed, moved or cut short?") from error


def optional(module: str) -> Any:
    """Import a module of the ``data`` extra, or say how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingExtraError(module.partition(".")[0], "data") from None


def _blocks(path: Path) -> Documents:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield decoder.decode(block), file.tell()
        yield decoder.decode(b"", final=True), file.tell()


def _plain(path: Path) -> Documents:
    rest, position = "", 0
    for block, position in _blocks(path):
        *whole, rest = (rest + block).split(SEPARATOR)
        yield from _sectioned((text, position) for text in whole)
        # A separator that is still incomplete lies in the last characters, beyond where this cuts.
        while len(rest) > MAX_CHARACTERS + len(SEPARATOR):
            end = _cut(rest)
            yield rest[:end], position
            rest = rest[end:]
    yield from _sectioned(iter([(rest, position)]))


def _sectioned(documents: Documents) -> Documents:
    for text, position in documents:
        start = 0
        while len(text) - start > MAX_CHARACTERS:
            end = _cut(text, start)
            yield text[start:end], position
            start = end
        yield text[start:], position


def _cut(text: str, start: int = 0) -> int:
    # Only the second half is searched, so that one early blank line does not make a tiny section.
    for mark in ("\n\n", "\n"):
        at = text.rfind(mark, start + MAX_CHARACTERS // 2, start + MAX_CHARACTERS)
        if at >= 0:
            return at + len(mark)
    return start + MAX_CHARACTERS


def _json_lines(path: Path) -> Documents:
    with path.open("rb") as file:
        for number, line in enumerate(_lines(path, file), 1):
            if line.strip():
                yield _text_of(line, f"{path}, line {number}"), file.tell()


def _lines(path: Path, file: BinaryIO) -> Iterator[bytes]:
    name = path.name.lower()
    if name.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as lines:
            yield from _short(path, lines)
    elif name.endswith(".zst"):
        zstandard = optional("zstandard")
        try:
            yield from _short(path, io.BufferedReader(_Zstd(file, zstandard.ZstdDecompressor())))
        except zstandard.ZstdError as error:
            raise DataError(f"{path}: not a whole zstd file ({error})") from error
    else:
        yield from _short(path, file)


class _Zstd(io.RawIOBase):
    """The frames of a zstd file, unfolded; the library's own reader takes one that was cut short for whole."""

    def __init__(self, file: BinaryIO, library: Any) -> None:
        self._file, self._library = file, library
        self._frame: Any = None
        self._packed, self._unfolded = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unfolded:
            packed = self._packed or self._file.read(ZSTD_BYTES)
            if not packed and self._frame:
                raise EOFError("it ends within a frame")
            if not packed:
                return 0
            self._frame = self._frame or self._library.decompressobj()
            self._unfolded, self._packed = memoryview(self._frame.decompress(packed)), b""
            if self._frame.eof:
                self._packed, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._unfolded))
        buffer[:count], self._unfolded = self._unfolded[:count], self._unfolded[count:]
        return count


def _short(path: Path, lines: IO[bytes] | io.BufferedIOBase) -> Iterator[bytes]:
    """Lines that memory holds: a small compressed file can unfold to any length."""
    while line := lines.readline(LINE_BYTES):
        if len(line) == LINE_BYTES:
            raise DataError(f"{path}: a line of more than {LINE_BYTES >> 20} MiB; write one document to a line")
        yield line


def _text_of(line: bytes, where: str) -> str:
    expected = "every line must be an object with a 'text' field"
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); {expected}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {expected}") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: a JSON {type(record).__name__}; {expected}")
    if "text" not in record:
        raise DataError(f"{where}: no 'text' field, only {list(record)[:10]}; {expected}")
    if not isinstance(record["text"], str):
        raise DataError(f"{where}: 'text' is no string but {type(record['text']).__name__}")
    # JSON can spell half of a surrogate pair, which no UTF-8 text can hold.
    return record["text"].encode("utf-8", "replace").decode("utf-8")


def _parquet(path: Path) -> Documents:
    pyarrow, parquet = optional("pyarrow"), optional("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if "text" not in names:
                raise DataError(f"{path}: no 'text' column, only {names[:10]}; it must hold the documents")
            kind = file.schema_arrow.field("text").type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise DataError(f"{path}: column 'text' must hold strings, not {kind}")
            size, done = path.stat().st_size, 0
            for batch in file.iter_batches(batch_size=256, columns=["text"]):
                done += batch.num_rows
                for text in batch.column(0).to_pylist():
                    yield text or "", size * done // file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a whole parquet file ({' '.join(str(error).split())})") from error
