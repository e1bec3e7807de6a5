"""Inputs (files, folders, globs) as one stream of documents. Memory holds only a few of them at a time."""

import glob
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from antransformer.data.hub import HubDataset, is_hub
from antransformer.data.readers import (
    COMPRESSED,
    JSON_LINES,
    PARQUET,
    TEXT_FIELD,
    Documents,
    base_ending,
    data_errors,
    read,
    unreadable,
)
from antransformer.errors import DataError
from antransformer.wording import counted

# Endings searched for in folders. Files given by name or matched by a glob may have any ending.
_ENDINGS = """
    .txt .text .md .markdown .rst .adoc .org .tex .log .htm .html .css .csv .tsv .xml .yaml .yml .toml .ini .cfg
    .py .pyi .c .h .cc .cpp .hh .hpp .cu .cuh .cs .java .kt .scala .go .rs .swift .js .jsx .ts .tsx .rb .php .pl .lua
    .r .jl .hs .ml .clj .lisp .el .erl .ex .sh .sql
"""
ENDINGS = frozenset((*_ENDINGS.split(), *JSON_LINES, PARQUET))
NAMED = 3  # skipped files that are named
Skipped = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Source:
    """One input.

    Attributes:
        input: file, folder or glob as the caller wrote it.
        files: number of text files in it, files of earlier inputs not included.
        bytes: size of these files, as stored.
        skipped: by reason, the number of "files" that were left out and the names of the "first" of them.
    """

    input: str
    files: int
    bytes: int
    skipped: Skipped


@dataclass(frozen=True)
class Corpus:
    """Text files behind a list of inputs; ``find`` makes one, ``documents`` streams it.

    Attributes:
        files: files in the order of the inputs.
        sources: the inputs.
        hub: datasets of the hub, which are streamed after the files.
        text_field: field of JSON lines or column of parquet that holds the text.
        is_part: whether it is a part of a corpus, which may have no text.
    """

    files: tuple[Path, ...]
    sources: tuple[Source, ...]
    text_field: str = TEXT_FIELD
    hub: tuple[HubDataset, ...] = ()
    is_part: bool = False

    @classmethod
    def find(cls, inputs: str | Path | Iterable[str | Path], text_field: str = TEXT_FIELD) -> "Corpus":
        """Find the files of every input: a file, a folder (all text files below it that are not hidden) or a glob.

        An input ``hf://...`` is a dataset of the hub, see ``HubDataset``.

        A file in two inputs counts once. Some blocks of plain text, the first record of JSON lines and of hub datasets,
        and the schema of parquet are checked. Most mistakes are therefore reported before hours of tokenization.

        Raises:
            DataError: an input does not exist, matches nothing, or contains no readable text.
            MissingExtraError: a file needs pyarrow or zstandard, which is not installed.
        """
        files: dict[Path, Path] = {}  # by resolved path
        sources = []
        hub = []
        for name in [inputs] if isinstance(inputs, str | Path) else inputs:
            if is_hub(name):
                hub.append(HubDataset.parse(str(name), text_field))
                if hub[-1] in hub[:-1]:
                    raise DataError(f"{name}: the same records as {hub[hub.index(hub[-1])].url}; remove one of them")
                next(hub[-1].documents(), None)
                sources.append(Source(str(name), 0, 0, {}))
                continue
            skipped: Skipped = {}
            readable = []
            for path, reason in _expand(str(name)):
                reason = reason or unreadable(path, text_field)
                if reason is None:
                    readable.append(path)
                    continue
                entry = skipped.setdefault(reason, {"files": 0, "first": []})
                entry["files"] += 1
                entry["first"] += [path.name] * (entry["files"] <= NAMED)
            if not readable and skipped.keys() != {"empty"}:
                raise DataError(f"{name}: {_explain_no_text(Path(name), skipped)}")
            # By resolved path, so that links and overlapping inputs do not count a file twice.
            resolved = {path.resolve(): path for path in readable}
            added = {target: path for target, path in resolved.items() if target not in files}
            files |= added
            with data_errors(Path(name)):
                size = sum(path.stat().st_size for path in added)
            sources.append(Source(str(name), len(added), size, skipped))
        if not sources:
            raise DataError("no input: give at least one text file, folder or glob")
        if not files and not hub:
            raise _empty(sources)
        return cls(tuple(files.values()), tuple(sources), text_field, tuple(hub))

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
        sources: tuple[Path | HubDataset, ...] = (*self.files, *self.hub)
        for source in sources:
            position = 0
            for text, position in (
                source.documents() if isinstance(source, HubDataset) else read(source, self.text_field)
            ):
                if text and not text.isspace():
                    empty = False
                    yield text, start + position
            start += position
        if empty and not self.is_part:
            raise _empty(self.sources)

    def part(self, number: int, count: int) -> "Corpus":
        """Return one of ``count`` consecutive parts of the files, about equal in bytes; ``number`` begins with 1."""
        start, total, files = 0, max(1, self.bytes), []
        for path in self.files:
            size = path.stat().st_size
            # By the middle of the file, so that each file is in exactly one part.
            if (2 * start + size) * count // (2 * total) == number - 1:
                files.append(path)
            start += size
        return replace(self, files=tuple(files), is_part=True)

    def positions(self, count: int) -> Iterator[tuple[Path, float, float]]:
        """Yield evenly spaced positions in the corpus: file, fraction of the file, share of the corpus to read there.

        Compressed files can only be read from their beginning, so that each of them has at most one position. A file
        without a position has a share of 0: it can continue the text of the files before it.
        """
        start, total, number = 0, max(1, self.bytes), 0
        for path in self.files:
            size = path.stat().st_size
            inside = []
            while number < count and number * total // count < start + size:
                inside.append((number * total // count - start) / size)
                number += 1
            if not inside or path.name.lower().endswith(COMPRESSED):
                yield path, 0.0, len(inside) / count
            else:
                yield from ((path, fraction, 1 / count) for fraction in inside)
            start += size


def expand(name: str) -> list[Path]:
    """Return the files of an input (a file, a folder or a glob), whatever their endings.

    Raises:
        DataError: there is no such input.
    """
    return [path for path, _ in _expand(name)]


def walk(folder: Path, excluded: Collection[str] = ()) -> list[Path]:
    """Return all files below a folder, sorted, except hidden files and folders and folders named in ``excluded``.

    Links to folders are followed, and each folder is read once.

    Raises:
        DataError: a folder cannot be read.
    """
    paths, visited = [], set()
    for parent, folders, files in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        real_path = os.path.realpath(parent)
        if real_path in visited:  # a link to a folder that was read, or to a parent
            folders.clear()
            continue
        visited.add(real_path)
        # Sorted, so that the order does not depend on the file system where a link and its target are both found.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in excluded)
        paths += [Path(parent, name) for name in files if not name.startswith(".")]
    # Skips broken links and pipes; opening a pipe would block forever.
    return sorted(path for path in paths if path.is_file())


def _raise_unreadable(error: OSError) -> None:
    # os.walk would skip the folder silently.
    raise DataError(
        f"{error.filename}: cannot be read ({error.strerror}); exclude it or fix its permissions"
    ) from error


def _expand(name: str) -> Iterator[tuple[Path, str | None]]:
    """Yield the files of an input, each with the reason to skip it, or None."""
    path = Path(name)
    if not name:
        raise DataError("the name of an input is empty; give a text file, folder or glob")
    if path.is_file():
        yield path, None
    elif path.is_dir():
        for file in walk(path):
            yield file, None if base_ending(file) in ENDINGS else "unknown ending"
    elif path.exists():
        raise DataError(f"{name}: neither a file nor a folder; write the text to a file first")
    elif not glob.has_magic(name):
        raise DataError(f"{name}: no such file or folder")
    else:
        matches = sorted(glob.glob(name, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not matches:
            raise DataError(f"{name}: no file matches this pattern")
        found: dict[Path, str | None] = {}
        for path, reason in (file for match in matches for file in _expand(match)):
            found[path] = reason and found.get(path, reason)  # a file that also matches by its name is not skipped
        yield from found.items()


def _empty(sources: Sequence[Source]) -> DataError:
    return DataError(f"{', '.join(source.input for source in sources[:5])}: empty; give files with text")


def _explain_no_text(path: Path, skipped: Skipped) -> str:
    if path.is_file():
        return f"{next(iter(skipped))}; convert it, or exclude it"
    reasons = ", ".join(f"{counted(entry['files'], 'file')}: {reason}" for reason, entry in skipped.items())
    found = f" (it has {reasons}, the first is {next(iter(skipped.values()))['first'][0]})" if skipped else ""
    return f"contains no text file (.txt, .md, .py, .jsonl, .parquet and similar endings){found}"
