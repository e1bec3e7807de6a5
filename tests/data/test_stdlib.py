"""Default corpus: the source code of the standard library."""

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from antransformer.data import Dataset, ensure_default, stdlib, stdlib_files
from antransformer.errors import DataError


def test_installed_packages_are_excluded() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    assert {"os.py", "argparse.py", "decoder.py"} <= {path.name for path in files}
    assert len(files) > 300
    assert not [path for path in files if {"site-packages", "dist-packages", "__pycache__"} & set(path.parts)]
    assert not [path for path in files if "torch" in path.parts or path.suffix != ".py"]


def test_only_readable_source_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        stdlib_files()
    for name in ("b.py", "a.py", "note.txt", "site-packages/other.py", "test/c.py", "__pycache__/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    (tmp_path / "latin.py").write_bytes(b"# \xe9\n")
    assert [path.relative_to(tmp_path).as_posix() for path in stdlib_files()] == ["a.py", "b.py", "test/c.py"]


@pytest.fixture
def small_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "source").mkdir()
    files = [tmp_path / "source" / f"{i}.py" for i in range(100)]
    for i, file in enumerate(files):
        file.write_text(f"def function_{i}():\n    return {i}\n")
    monkeypatch.setattr(stdlib, "stdlib_files", lambda: files)
    monkeypatch.setattr(stdlib, "VOCABULARY", 270)


def test_prepared_once(small_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_default(tmp_path / "data")
    assert folder == tmp_path / "data" / "python-stdlib"
    dataset = Dataset.open(folder)
    assert dataset.split("train").documents + dataset.split("val").documents == 100
    assert dataset.vocab_size == 270
    assert [path.name for path in folder.parent.iterdir()] == ["python-stdlib"]
    monkeypatch.setattr(stdlib, "prepare", None)
    assert ensure_default(tmp_path / "data") == folder


def test_damaged_folder_is_not_used(small_corpus: None, tmp_path: Path) -> None:
    folder = ensure_default(tmp_path)
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        ensure_default(tmp_path)


def test_the_result_of_a_faster_process_is_used(
    small_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = stdlib.prepare

    def slow(inputs: Any, out: Path, **options: Any) -> Dataset:
        dataset: Dataset = prepare(inputs, out, **options)
        shutil.copytree(dataset.path, tmp_path / "data" / "python-stdlib")
        (tmp_path / "data" / "python-stdlib" / "winner").touch()
        return dataset

    monkeypatch.setattr(stdlib, "prepare", slow)
    folder = ensure_default(tmp_path / "data")
    assert (folder / "winner").exists()
    assert [path.name for path in folder.parent.iterdir()] == ["python-stdlib"]


def test_a_failure_leaves_nothing(small_corpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(inputs: Any, out: Path, **options: Any) -> Dataset:
        out.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stdlib, "prepare", full)
    with pytest.raises(OSError) as error:
        ensure_default(tmp_path / "data")
    assert error.value.errno == errno.ENOSPC
    assert not list((tmp_path / "data").iterdir())
