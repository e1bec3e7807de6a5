"""Inputs (files, folders, globs) as one stream of documents, of which memory never holds more than a few."""

import glob
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from antransformer.data.readers import JSON_LINES, PARQUET, Documents, check, read, reading
from antransformer.errors import DataError

# What a folder is searched for; a file that is named, or matched by a glob, may end in anything.
_ENDINGS = """
    .txt .text .md .markdown .rst .adoc .org .tex .log .htm .html .css .csv .tsv .xml .yaml .yml .toml .ini .cfg
    .py .pyi .c .h .cc .cpp .hh .hpp .cu .cuh .cs .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .rb .php .pl .lua
    .r .jl .hs .ml .clj .lisp .el .erl .ex .sh .sql
"""
ENDINGS = (*_ENDINGS.split(), *JSON_LINES, PARQUET)


@dataclass(frozen=True)
class Source:
    """An input as the caller named it: the files it stands for, their bytes, and how many more were no text."""

    input: str
    files: int
    bytes: int
    skipped: int


@dataclass(frozen=True)
class Corpus:
    """The files behind a list of inputs; ``find`` makes one, ``documents`` streams it."""

    files: tuple[Path, ...]
    sources: tuple[Source, ...]

    @classmethod
    def find(cls, inputs: str | Path | Iterable[str | Path]) -> "Corpus":
        """Look up every input: a file, a folder (all text files below it, hidden ones left out) or a glob.

        A file that two inputs reach counts once. Plain text is read through once to see that it is text, so that a
        bad file is reported before hours of work and not after.

        Raises:
            DataError: an input does not exist, matches nothing, or holds no readable text.
            MissingExtraError: a file needs pyarrow or zstandard, which is not installed.
        """
        found: dict[Path, Path] = {}
        sources = []
        for name in [inputs] if isinstance(inputs, str | Path) else inputs:
            candidates = list(dict.fromkeys(_expand(str(name))))
            readable = [path for path in candidates if check(path)]
            if not readable:
                raise DataError(f"{name}: {_why_nothing(Path(name), candidates)}")
            new = {path.resolve(): path for path in readable if path.resolve() not in found}
            found |= new
            with reading(Path(name)):
                size = sum(path.stat().st_size for path in new)
            sources.append(Source(str(name), len(new), size, len(candidates) - len(readable)))
        if not sources:
            raise DataError("no input: name at least one text file, folder or glob")
        return cls(tuple(found.values()), tuple(sources))

    @property
    def bytes(self) -> int:
        """Size of all files in bytes, as stored: compressed files count compressed."""
        return sum(source.bytes for source in self.sources)

    def documents(self) -> Documents:
        """Yield (document, bytes of all files read so far); documents of nothing but whitespace are left out.

        Raises:
            DataError: a file vanished, changed or is broken, or there is no text at all.
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
            raise DataError(f"{names}: empty; there must be some text to train on")


def walk(folder: Path, without: Collection[str] = ()) -> list[Path]:
    """All files below a folder, sorted; hidden files and folders, and folders named in ``without``, are left out.

    Raises:
        DataError: a folder can not be read.
    """
    found = []
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    # A broken link or a pipe is no file; opening a pipe would wait for ever.
    return sorted(path for path in found if path.is_file())


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: can not be read ({error.strerror}); leave it out, or get access") from error


def _expand(name: str) -> list[Path]:
    path = Path(name)
    if not name:
        raise DataError("the name of an input is empty; name a text file, folder or glob")
    if path.is_file():
        return [path]
    if path.is_dir():
        return [file for file in walk(path) if file.name.lower().endswith(ENDINGS)]
    if path.exists():
        raise DataError(f"{name}: neither a file nor a folder; write its text to a file first")
    if not glob.has_magic(name):
        raise DataError(f"{name}: no such file or folder")
    matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    if not matches:
        raise DataError(f"{name}: no file matches this pattern")
    return [file for match in matches for file in _expand(match)]


def _why_nothing(path: Path, candidates: list[Path]) -> str:
    if path.is_file():
        return "not UTF-8 text; convert it to UTF-8, or leave it out if it is a binary file"
    if candidates:
        return f"not one of its {len(candidates)} files is UTF-8 text (the first is {candidates[0].name})"
    return "no text file in it; it is searched for .txt, .md, .py, .jsonl, .parquet and the like"
