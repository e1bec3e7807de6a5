"""Lock that lets only one process at a time work in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from antransformer.errors import ConfigError
from antransformer.files import read_text, replace_text

LOCK_FILE = ".lock"
HOLDER_FILE = ".lock.pid"  # process id of the holder; separate, since opening the lock file may empty it


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist.

    The operating system releases the lock when the process ends, even if it is killed.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
    """
    file_lock = FileLock(folder / LOCK_FILE, blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file_lock.acquire()
        replace_text(folder / HOLDER_FILE, str(os.getpid()))
    except Timeout as error:
        raise ConfigError(f"{folder} is in use by {_holder(folder)}: wait for it, or choose another --out") from error
    except OSError as error:
        file_lock.release()
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; choose another --out") from error
    try:
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        file_lock.release()


def _holder(folder: Path) -> str:
    try:
        return f"process {read_text(folder / HOLDER_FILE)}"
    except (OSError, ValueError):  # the holder has not written it yet
        return "another process"
