import errno
import os
import subprocess
import sys

import pytest

from antransformer.errors import ConfigError
from antransformer.training.lock import lock
from helpers.messages import mentions

pytest.importorskip("fcntl", reason="the system has no such locks")

HOLD = """
import sys
from pathlib import Path
from antransformer.training.lock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_is_one_process_s_at_a_time(tmp_path):
    folder = tmp_path / "new"
    words = [sys.executable, "-c", HOLD, str(folder)]
    holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(ConfigError) as error, lock(folder):
        pass
    assert mentions(str(error.value), *f"{folder} {holder.pid}".split())
    holder.kill()
    holder.wait()
    with lock(folder):
        pass


def test_a_folder_that_can_not_be_made_is_a_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as error, lock(tmp_path / "file/below"):
        pass
    assert mentions(str(error.value), *f"{tmp_path / 'file/below'} {os.strerror(errno.ENOTDIR)}".split())
