"""The lock of a run folder."""

import errno
import os
import subprocess
import sys

import pytest

from antransformer.errors import ConfigError
from antransformer.training.lock import lock
from helpers.messages import mentions

HOLD = """
import sys
from pathlib import Path
from antransformer.training.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def assert_held(folder, pid):
    with pytest.raises(ConfigError) as error, lock(folder):
        pass
    assert mentions(error.value, folder, pid, "--out")


def test_a_folder_is_locked_until_its_holder_ends(tmp_path):
    folder = tmp_path / "new"
    command = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
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


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error, lock(tmp_path / "file/below"):
        pass
    assert mentions(error.value, tmp_path / "file/below") and os.strerror(errno.ENOTDIR) in str(error.value)
