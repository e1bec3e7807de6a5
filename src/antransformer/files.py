"""Files that may come from anywhere: read without surprise, written without following a link."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any


def require_file(path: Path) -> None:
    """Raise OSError where there is nothing, or a pipe, which would be waited for without end."""
    if stat.S_ISFIFO(path.stat().st_mode):
        raise OSError(errno.EINVAL, "a pipe and no file", str(path))


def read_text(path: Path) -> str:
    """The text of a file of UTF-8.

    Raises:
        OSError: it can not be read, or is no file.
        ValueError: it is not UTF-8, or its name is none that a system can have.
    """
    require_file(path)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: as ``read_text``.
        ValueError: it is not JSON, or nested too deeply.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def flush(path: Path) -> None:
    """See a file, or a folder's entries, onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a file of UTF-8, and see it onto the disk; it is there whole, or as it was before."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # what a killed write left, or a link to somewhere else
    with partial.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
