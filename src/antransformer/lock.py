"""Lock that lets only one process at a time work in a folder, or write a new file or folder."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from antransformer.errors import ConfigError, MachineError
from antransformer.files import FULL_DISK, new_parents, read_text, replace_text

LOG = logging.getLogger(__name__)
LOCK_FILE = ".lock"
# A file system without locks: Lustre mounted without flock, NFS without a lock daemon.
UNSUPPORTED = frozenset((errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP))
HOLDER_FILE = ".lock.pid"  # process id of the holder; separate, since opening the lock file may empty it


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is created if it does not exist, and removed again if it cannot be written.

    The operating system releases the lock when the process ends, even if it is killed. On a file system that has no
    locks, a warning is printed and nothing prevents a second process.

    Raises:
        ConfigError: another process holds the lock, or the folder cannot be written.
        MachineError: the disk is full.
    """
    file_lock = FileLock(folder / LOCK_FILE, blocking=False, fallback_to_soft=False)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _acquire(file_lock, folder)
        replace_text(folder / HOLDER_FILE, str(os.getpid()))
    except Timeout as error:
        raise ConfigError(f"{folder} is in use by {_holder(folder)}: wait for it, or choose another --out") from error
    except OSError as error:
        file_lock.release()
        if is_new:
            shutil.rmtree(folder, ignore_errors=True)
        is_full = error.errno in FULL_DISK
        kind, remedy = (MachineError, "free some space, or ") if is_full else (ConfigError, "")
        raise kind(f"{folder} cannot be written: {error.strerror}; {remedy}choose another --out") from error
    try:
        yield
    finally:
        (folder / HOLDER_FILE).unlink(missing_ok=True)
        file_lock.release()


@contextlib.contextmanager
def new_path(target: Path) -> Iterator[Path]:
    """Path in a locked hidden folder next to ``target``; it is renamed to ``target`` when the context ends.

    After an error nothing is left. What a killed process has left, the next one removes.

    Raises:
        ConfigError, MachineError: as in ``lock``, of the hidden folder.
        OSError: the path cannot be renamed.
    """
    hidden = target.with_name(f".partial-{target.name}")
    with new_parents(hidden), lock(hidden):
        partial = hidden / target.name
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.unlink(missing_ok=True)
            yield partial
            partial.replace(target)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)


def _acquire(file_lock: BaseFileLock, folder: Path) -> None:
    try:
        file_lock.acquire()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        LOG.warning("%s: its file system has no locks; make sure that no second process writes to it", folder)


def _holder(folder: Path) -> str:
    try:
        return f"process {read_text(folder / HOLDER_FILE)}"
    except (OSError, ValueError):  # the holder has not written it yet
        return "another process"
