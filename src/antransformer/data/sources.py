"""Inputs (files, folders, globs) as one stream of documents. Memory holds only a few of them at a time."""

import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from antransformer.data.readers import JSON_LINES, PARQUET, Documents, data_errors, is_readable, read
from antransformer.errors import DataError

# Endings searched for in folders. Files given by name or matched by a glob may have any ending.
_ENDINGS = """
    .txt .text .md .markdown .rst .adoc .org .tex .log .htm .html .css .csv .tsv .xml .yaml .yml .toml .ini .cfg
    .py .pyi .c .h .cc .cpp .hh .hpp .cu .cuh .cs .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .rb .php .pl .lua
    .r .jl .hs .ml .clj .lisp .el .erl .ex .sh .sql
"""
ENDINGS = (*_ENDINGS.split(), *JSON_LINES, PARQUET)


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        input: file, folder or glob as the caller wrote it.
        files: number of text files in it, files of earlier inputs not included.
        bytes: size of these files, as stored.
        skipped: number of files that are not text.
    """

    input: str
    files: int
    bytes: int
    skipped: int


@dataclass(frozen=True)
class Corpus:
    """Text files behind a list of inputs; ``find`` makes one, ``documents`` streams it."""

    files: tuple[Path, ...]
    sources: tuple[Source, ...]

    @classmethod
    def find(cls, inputs: str | Path | Iterable[str | Path]) -> "Corpus":
        """Find the files of every input: a file, a folder (all text files below it that are not hidden) or a glob.

        A file in two inputs counts once. Plain text is decoded once in advance, so that a broken file is reported
        before hours of tokenization and not after.

        Raises:
            DataError: an input does not exist, matches nothing, or contains no readable text.
            MissingExtraError: a file needs pyarrow or zstandard, which is not installed.
        """
        files: dict[Path, Path] = {}  # by resolved path
        sources = []
        for name in [inputs] if isinstance(inputs, str | Path) else inputs:
            candidates = list(dict.fromkeys(_expand(str(name))))
            readable = [path for path in candidates if is_readable(path)]
            if not readable:
                raise DataError(f"{name}: {_explain_no_text(Path(name), candidates)}")
            # By resolved path, so that links and overlapping inputs do not count a file twice.
            added = {path.resolve(): path for path in readable if path.resolve() not in files}
            files |= added
            with data_errors(Path(name)):
                size = sum(path.stat().st_size for path in added)
            sources.append(Source(str(name), len(added), size, len(candidates) - len(readable)))
        if not sources:
            raise DataError("no input: give at least one text file, folder or glob")
        return cls(tuple(files.values()), tuple(sources))

    @property
    def bytes(self) -> int:
        """Size of all files in bytes, as stored: the compressed size of compressed files."""
        return sum(source.bytes for source in self.sources)

    def documents(self) -> Documents:
        """Yield (document, bytes of all files read so far), without documents that are only whitespace.

        Raises:
            DataError: a file is missing, changed or broken, or all files are empty.
        """
        start, empty = 0, True
        for path in self.files:
            position = 0
            for text, position in read(path):
                if text and not text.isspace():
                    empty = False
                    yield text, start + position
            start += position
        if empty:
            names = ", ".join(source.input for source in self.sources[:5])
            raise DataError(f"{names}: empty; there is no text to train on")


def walk(folder: Path, excluded: Collection[str] = ()) -> list[Path]:
    """Return all files below a folder, sorted, except hidden files and folders and folders named in ``excluded``.

    Raises:
        DataError: a folder cannot be read.
    """
    paths = []
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in excluded]
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    # Skips broken links and pipes; opening a pipe would block forever.
    return sorted(path for path in paths if path.is_file())


def _raise_unreadable(error: OSError) -> None:
    # os.walk would skip the folder silently.
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); exclude it or fix its permissions"
    ) from error


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if not name:
        raise DataError("the name of an input is empty; give a text file, folder or glob")
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in walk(path) if file.name.lower().endswith(ENDINGS)]
    if path.exists():
        raise DataError(f"{name}: neither a file nor a folder; write the text to a file first")
    if not glob.has_magic(name):
        raise DataError(f"{name}: no such file or folder")
    matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not matches:
        raise DataError(f"{name}: no file matches this pattern")
    return [file for match in matches for file in _expand(match)]


def _explain_no_text(path: Path, candidates: list[Path]) -> str:
    if path.is_file():
        return "not UTF-8 text; convert it to UTF-8, or exclude it if it is a binary file"
    if candidates:
        return f"none of its {len(candidates)} files is UTF-8 text (the first is {candidates[0].name})"
    return "contains no text file (.txt, .md, .py, .jsonl, .parquet and similar endings)"
