"""Locks of folders."""

import errno
import fcntl
import os
import subprocess
import sys

import pytest

from antransformer.errors import ConfigError, MachineError
from antransformer.lock import lock, new_path
from helpers.messages import mentions

HOLD = """
import sys
from pathlib import Path
from antransformer.lock import lock, new_path
with {function}(Path(sys.argv[1])) as path:
    if path:
        path.write_text("part")
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(function, path):
    """Process that is inside ``lock`` or ``new_path``."""
    command = [sys.executable, "-c", HOLD.format(function=function), str(path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    return holder


def assert_held(folder, pid):
    with pytest.raises(ConfigError) as error, lock(folder):
        pass
    assert mentions(error.value, folder, pid, "--out")


def test_a_folder_is_locked_until_its_holder_ends(tmp_path):
    folder = tmp_path / "new"
    holder = holding("lock", folder)
    assert_held(folder, holder.pid)
    assert_held(folder, holder.pid)  # the first attempt has not erased the process id
    holder.kill()
    holder.wait()
    with lock(folder):
        assert_held(folder, os.getpid())


def test_an_error_inside_releases_the_lock(tmp_path):
    with pytest.raises(OSError, match="inside"), lock(tmp_path):
        raise OSError("inside")
    with lock(tmp_path):
        pass
    assert not {path.name for path in tmp_path.iterdir()} - {".lock"}


def test_a_link_as_lock_file_is_refused(tmp_path):
    (tmp_path / "target").write_text("content")
    (tmp_path / ".lock").symlink_to(tmp_path / "target")
    with pytest.raises(ConfigError) as error, lock(tmp_path):
        pass
    assert mentions(error.value, tmp_path) and (tmp_path / "target").read_text() == "content"


@pytest.mark.parametrize("name", ["ENOSYS", "ENOLCK", "EOPNOTSUPP"])
def test_a_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog, name):
    def flock(descriptor, operation):
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(2):
        with lock(tmp_path / "run"):
            assert (tmp_path / "run/.lock.pid").read_text() == str(os.getpid())
    assert len(caplog.messages) == 2 and all(mentions(text, tmp_path / "run") for text in caplog.messages)


def test_other_errors_of_locking_are_errors(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(ConfigError) as error, lock(tmp_path):
        pass
    assert mentions(error.value, tmp_path) and os.strerror(errno.EIO) in str(error.value)


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error, lock(tmp_path / "file/below"):
        pass
    assert mentions(error.value, tmp_path / "file/below") and os.strerror(errno.ENOTDIR) in str(error.value)


def test_a_full_disk_is_not_the_mistake_of_the_user(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(MachineError) as error, lock(folder):
            pass
        assert mentions(error.value, folder, "free")  # the folder may hold a run to resume
    assert tmp_path.exists() and not (tmp_path / "new").exists()


def test_a_path_is_written_by_one_process_at_a_time(tmp_path):
    target = tmp_path / "new/model.gguf"
    holder = holding("new_path", target)
    with pytest.raises(ConfigError) as error, new_path(target):
        pass
    assert mentions(error.value, holder.pid, "--out")
    holder.kill()
    holder.wait()
    with new_path(target) as path:
        assert not path.exists()  # what the killed process has written is removed
        path.write_text("whole")
    assert target.read_text() == "whole" and [*target.parent.iterdir()] == [target]


def test_an_error_leaves_no_part_of_a_new_path(tmp_path):
    with pytest.raises(OSError, match="inside"), new_path(tmp_path / "new/folder") as path:
        path.mkdir()
        (path / "file").touch()
        raise OSError("inside")
    assert not list(tmp_path.iterdir())
