"""GGUF files that cannot be served: each is one line and status 2, before llama.cpp sees the file."""

import os
import shlex
import struct

import pytest

from antransformer.cli import main
from antransformer.errors import ConfigError
from antransformer.interop.export import export
from antransformer.interop.gguf_check import check_gguf
from antransformer.training.run_folder import open_checkpoint
from helpers.commands import refused
from helpers.exported import make_run
from helpers.messages import mentions

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Bytes of an exported model."""
    folder = tmp_path_factory.mktemp("gguf")
    make_run(folder / "run", layers=1)
    export(*open_checkpoint(folder / "run"), folder / "model.gguf", format="gguf")
    return (folder / "model.gguf").read_bytes()


def test_a_complete_file_passes(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    check_gguf(tmp_path / "model.gguf")


def test_the_command_printed_after_an_export_serves_the_file(tmp_path, capsys):
    make_run(tmp_path / "run", layers=1)
    file = str(tmp_path / "two words.gguf")
    assert main(["export", "--checkpoint", str(tmp_path / "run"), "--format", "gguf", "--out", file]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[1:] == ["antransformer", "serve", "--gguf", file]


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_export_is_refused_on_the_command_line(content, tmp_path, capsys, kept):
    pytest.importorskip("xllamacpp")
    (tmp_path / "model.gguf").write_bytes(content[: int(kept * len(content))])
    line = refused(["serve", "--gguf", tmp_path / "model.gguf", "--port", 0], capsys)
    assert mentions(line, "--gguf") and str(tmp_path / "model.gguf") in line


def test_every_truncation_of_the_header_is_refused(content, tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    start = gguf.GGUFReader(file).data_offset
    for length in range(0, start, start // 100):
        file.write_bytes(content[:length])
        with pytest.raises(ConfigError) as error:
            check_gguf(file)
        assert str(file) in str(error.value), length


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<4sIQQ", b"GGUF", 99, 0, 0),  # unknown version
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 0),  # no tensors
        struct.pack("<4sIQQ", b"GGUF", 3, 2**63, 2**63),  # counts that the file cannot hold
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 2**62) + b"name",  # a key longer than the file
        # an array in an array in an array ...
        struct.pack("<4sIQQQ", b"GGUF", 3, 0, 1, 1) + b"a" + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 20_000,
        b"PK\x03\x04",
    ],
)
def test_a_file_of_another_kind_is_refused(header, tmp_path):
    (tmp_path / "model.gguf").write_bytes(header)
    with pytest.raises(ConfigError, match="gguf"):
        check_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["missing.gguf", "folder.gguf", "pipe.gguf"])
def test_a_path_without_a_file_is_refused(name, tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    os.mkfifo(tmp_path / "pipe.gguf")  # reading it would wait forever
    with pytest.raises(ConfigError) as error:
        check_gguf(tmp_path / name)
    assert name in str(error.value)
