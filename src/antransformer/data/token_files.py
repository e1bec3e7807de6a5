"""Files of token ids that other programs write: where in the file the ids are, and their dtype."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from antransformer.data.checks import DTYPES
from antransformer.data.sources import expand
from antransformer.errors import DataError
from antransformer.files import read_text, require_file

# llm.c and modded-nanogpt: 256 integers of 32 bits, of which the first are this number, a version and the token count.
LLM_C = {20240520: "uint16", 20240801: "uint32"}
LLM_C_HEADER = 1024
# Megatron-LM: the .idx file begins with these bytes, a version, the code of the dtype and the number of sequences.
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_HEADER = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES = {4: "uint32", 8: "uint16"}  # 4 is int32, whose ids are not negative
LAYOUTS = ".bin of llm.c or modded-nanogpt, .bin with .idx of Megatron-LM, .ds of datatrove"


@dataclass(frozen=True)
class TokenFile:
    """A range of token ids in a file.

    Attributes:
        path: file.
        offset: position of the first id in bytes.
        tokens: number of ids.
        dtype: "uint16" or "uint32".
    """

    path: Path
    offset: int
    tokens: int
    dtype: str


def find_token_files(inputs: Iterator[str | Path] | tuple[str | Path, ...], dtype: str) -> list[TokenFile]:
    """Find the files of token ids behind files, folders and globs, in order.

    Args:
        inputs: names of inputs.
        dtype: dtype of files that do not declare it.

    Raises:
        DataError: an input has no such file, or a file is damaged or of another layout.
    """
    files: dict[Path, TokenFile] = {}
    for name in inputs:
        found = [path for path in expand(str(name)) if path.suffix in (".bin", ".ds")]
        if not found:
            raise DataError(f"{name}: no file of tokens ({LAYOUTS})")
        for path in found:
            try:
                require_file(path)
                files.setdefault(path.resolve(), _read_layout(path, dtype))
            except DataError:
                raise
            except (OSError, ValueError, struct.error) as error:
                raise DataError(f"{path}: cannot be read as a file of tokens ({error})") from error
    return list(files.values())


def _read_layout(path: Path, dtype: str) -> TokenFile:
    index = path.with_suffix(".idx")
    if path.suffix == ".ds":
        return _datatrove(path, dtype)
    if index.exists():
        return _megatron(path, index)
    with path.open("rb") as file:
        magic, _, count = struct.unpack("<iii", file.read(12))
    if magic not in LLM_C:
        raise DataError(f"{path}: not a file of tokens of a known layout ({LAYOUTS})")
    return _checked(path, LLM_C_HEADER, count, LLM_C[magic])


def _megatron(path: Path, index: Path) -> TokenFile:
    require_file(index)
    with index.open("rb") as file:
        magic, version, code, sequences, _ = MEGATRON_HEADER.unpack(file.read(MEGATRON_HEADER.size))
        if magic != MEGATRON or version != 1:
            raise DataError(f"{index}: not an index of Megatron-LM, version 1")
        if code not in MEGATRON_DTYPES:
            raise DataError(f"{index}: its dtype has the code {code}, only 4 (int32) and 8 (uint16) can be read")
        if index.stat().st_size < MEGATRON_HEADER.size + 4 * sequences:
            raise DataError(f"{index}: too short for {sequences:,} sequences; was it truncated?")
        tokens = 0
        while sequences:  # their lengths, 32 bits each
            lengths = np.frombuffer(file.read(4 * min(1 << 20, sequences)), "<i4")
            sequences -= len(lengths)
            tokens += int(lengths.sum(dtype=np.int64))
    return _checked(path, 0, tokens, MEGATRON_DTYPES[code])


def _datatrove(path: Path, dtype: str) -> TokenFile:
    metadata = path.with_name(f"{path.name}.metadata")
    if metadata.exists():  # "TOKENIZER|BYTES OF A TOKEN", the token count, and the count for people
        first, count, *_ = read_text(metadata).split("\n")
        size = first.rpartition("|")[2]
        if size not in ("2", "4"):
            raise DataError(f"{metadata}: the size of a token is {size!r} bytes, not 2 or 4")
        return _checked(path, 0, int(count), "uint16" if size == "2" else "uint32")
    return _checked(path, 0, path.stat().st_size // DTYPES[dtype].itemsize, dtype)


def _checked(path: Path, offset: int, tokens: int, dtype: str) -> TokenFile:
    size, expected = path.stat().st_size, offset + tokens * DTYPES[dtype].itemsize
    if tokens < 1 or size != expected:
        raise DataError(f"{path}: {size:,} bytes, but its header needs {expected:,} for {tokens:,} {dtype} tokens")
    return TokenFile(path, offset, tokens, dtype)
