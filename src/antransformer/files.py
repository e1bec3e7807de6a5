"""Files from anywhere: reads that do not block on pipes, and atomic writes that do not follow links."""

import contextlib
import errno
import json
import os
import shlex
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from antransformer.errors import ConfigError

FIGURE_FORMATS = (".png", ".pdf", ".svg")
FULL_DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


def quoted(path: str | Path) -> str:
    """Path as a word of a shell command, for commands that are printed."""
    return shlex.quote(str(path))


def as_path(name: str, value: str | Path, kind: str) -> Path:
    """Path of an argument; raises TypeError for a value that is not a path."""
    try:
        return Path(value)
    except TypeError:
        raise TypeError(f"{name} must be the path of {kind}, got {type(value).__name__}") from None


def require_file(path: Path) -> None:
    """Raise OSError if the path does not exist, or is a pipe or a device, which may block a reader or never end."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, not a file", str(path))


@contextlib.contextmanager
def new_parents(path: Path) -> Iterator[None]:
    """After an error, remove the parents of a path that did not exist before, as far as they are empty."""
    # The innermost first. Path.exists would raise an error without permission.
    missing = [parent for parent in path.parents if not os.path.exists(parent)]  # noqa: PTH110
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()
        raise


def read_text(path: Path) -> str:
    """Read a UTF-8 file.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
        ValueError: it is not UTF-8, or the path holds characters that no file name may have.
    """
    require_file(path)
    return path.read_text(encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: as ``read_text``.
        ValueError: it is not JSON, or is nested too deeply.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def flush(path: Path) -> None:
    """Force a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Add the path to the error of a full disk: unlike opening a file, writing to it does not report its name."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL_DISK and error.filename is None:
            error.filename = str(path)
        raise


def is_stream(path: Path) -> bool:
    """Whether a path is a device such as /dev/null, or a pipe."""
    return path.is_char_device() or path.is_fifo()


def write_result(path: Path, text: str) -> None:
    """Write a UTF-8 file that the user has named, as ``replace_text`` does; write into a device or a pipe.

    Replacing /dev/null by a file would break the system.
    """
    if is_stream(path):
        with writing(path):
            path.write_text(text, encoding="utf-8")
    else:
        replace_text(path, text)


def replace_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file atomically and force it to the disk; after an error the old file is intact."""
    partial = path.with_name(f"{path.name}.partial")
    partial.unlink(missing_ok=True)  # left by a killed write, or a link to another file
    try:
        with writing(path), partial.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def check_file_target(option: str, path: Path, endings: tuple[str, ...] = ()) -> None:
    """Check before the work that a file can be written after it.

    Raises:
        ConfigError: the folder does not exist or is not writable, the path is a folder, or the ending is not one of
            ``endings``.
    """
    if endings and path.suffix not in endings:
        raise ConfigError(f"{option} {path}: the file name of a figure must end in {', '.join(endings)}")
    if path.is_dir() or not path.parent.is_dir():
        raise ConfigError(f"{option} {path}: give a file name in an existing folder")
    # A stream is written in place. A file is replaced by a new one in its folder.
    writable = is_stream(path) or os.access(path.parent, os.W_OK)
    if not writable or (path.exists() and not os.access(path, os.W_OK)):
        raise ConfigError(f"{option} {path}: cannot be written: choose another file")


def check_json_target(option: str, path: Path, is_ours: Callable[[dict[str, Any]], bool]) -> None:
    """Check before the work that a JSON file can be written after it, in place of an earlier one of its kind only.

    Raises:
        ConfigError: as ``check_file_target``, or the file exists and is not of this kind.
    """
    check_file_target(option, path)
    if not path.is_file():  # new, or a device such as /dev/stdout
        return
    try:
        content = read_json(path)
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not is_ours(content):
        raise ConfigError(f"{option} {path}: exists and holds something else: choose another file")


def check_folder_target(path: Path, option: str = "--out") -> None:
    """Check before the work that a folder can be created after it.

    Raises:
        ConfigError: the path or one of its parents is a file.
    """
    existing = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    if not existing.is_dir():
        raise ConfigError(f"{existing} is a file: choose another folder for {option}")
