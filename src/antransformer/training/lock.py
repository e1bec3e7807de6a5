"""One process at a time in a folder."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from antransformer.errors import ConfigError

LOCK_FILE = ".lock"


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """While entered, no other process that asks gets the folder, which is made if need be.

    The system releases the lock of a process that ended in whatever way. Where it knows no such locks (Windows) there
    is none.

    Raises:
        ConfigError: another process holds it, or the folder can not be written.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK_FILE, "a+", encoding="utf-8", opener=_no_link)  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{folder} can not be written: {error.strerror}; choose another --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = f"process {file.read().strip()}"
            raise ConfigError(f"{folder} is in use by {holder}: wait for it, or choose another --out") from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)  # what a link points to is not ours to empty
