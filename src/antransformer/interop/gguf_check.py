"""Check of a GGUF file before llama.cpp loads it, so that a mistake costs one line instead of the engine's log."""

from pathlib import Path

from antransformer.errors import ConfigError
from antransformer.extras import require
from antransformer.files import require_file

MAGIC = b"GGUF"
# What the reader of the gguf package raises on damaged headers.
HEADER_ERRORS = (ValueError, KeyError, IndexError, TypeError, OverflowError, RecursionError, MemoryError)


def check_gguf(file: Path) -> None:
    """Check magic, version and header of a GGUF file, and that its tensors are within the file.

    Raises:
        MissingExtraError: the package gguf is not installed.
        ConfigError: the file is missing or unreadable, is not a GGUF file, or is damaged or truncated.
    """
    gguf = require("gguf", "serve")
    try:
        require_file(file)
        with file.open("rb") as stream:
            magic = stream.read(len(MAGIC))
    except OSError as error:
        raise ConfigError(f"--gguf {file}: cannot be read ({error.strerror})") from error
    if magic != MAGIC:
        raise ConfigError(f"--gguf {file}: not a GGUF file; antransformer export --format gguf writes one")
    try:
        tensors = gguf.GGUFReader(file).tensors
    except HEADER_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"--gguf {file}: damaged or truncated ({reason}); export or copy it again") from error
    if not tensors:
        raise ConfigError(f"--gguf {file}: holds no tensors; antransformer export --format gguf writes a complete file")
