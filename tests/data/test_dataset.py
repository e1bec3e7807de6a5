"""Prepared data folders: damage is detected, and a one-line error names the file."""

import errno
import hashlib
import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antransformer.cli import main
from antransformer.data import (
    Dataset,
    ShuffledWindows,
    byte_tokenizer,
    checks,
    prepare,
    train_bpe,
    verification,
    verify,
)
from antransformer.data.shards import ShardWriter
from antransformer.errors import DataError
from helpers.messages import mentions

Meta = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text " * 100)
    (tmp_path / "b.txt").write_text("other text")
    return prepare(tmp_path / "a.txt", tmp_path / "out", val_inputs=tmp_path / "b.txt", shard_tokens=400).path


def refusal(folder: Path, verify: bool = True) -> str:
    with pytest.raises(DataError) as caught:
        Dataset.open(folder, verify=verify)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(folder: Path, edit: Callable[[Meta], object]) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    edit(meta)
    (folder / "meta.json").write_text(json.dumps(meta))


def test_arrays_are_read_only_maps(folder: Path) -> None:
    arrays = Dataset.open(folder).split("train").arrays
    assert [len(array) for array in arrays] == [400, 400, 201]
    assert all(isinstance(array, np.memmap) and array.dtype == np.uint16 for array in arrays)
    assert not any(array.flags.writeable for array in arrays)


def flip(shard: Path, position: int) -> None:
    data = bytearray(shard.read_bytes())
    data[position] ^= 1
    shard.write_bytes(data)


def test_changed_content_is_found(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    flip(shard, 100)
    assert mentions(refusal(folder), *f"{shard} SHA-256".split())
    assert Dataset.open(folder, verify=False).split("train").tokens == 1001


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with a shard that is larger than its sample."""
    (tmp_path / "a.txt").write_text("some text " * 5000)
    (tmp_path / "b.txt").write_text("other text")
    return prepare(tmp_path / "a.txt", tmp_path / "out", val_inputs=tmp_path / "b.txt").path


@pytest.mark.parametrize(("position", "sampled"), [(0, True), (-1, True), (4200, False)])
def test_opening_checks_a_sample_and_verify_checks_all(large: Path, position: int, sampled: bool) -> None:
    calls: list[tuple[int, int]] = []
    verify(large, jobs=2, progress=lambda *call: calls.append(call))
    assert calls == [(calls[0][0], 100_024), (100_024, 100_024)]
    shard = large / "train-00000.bin"
    flip(shard, position)
    if sampled:
        assert mentions(refusal(large), shard, "SHA-256")
    else:
        Dataset.open(large)
    with pytest.raises(DataError) as error:
        verify(large)
    assert mentions(error.value, shard, "SHA-256")


def test_verify_adds_the_samples_that_older_folders_lack(large: Path) -> None:
    before = json.loads((large / "meta.json").read_text())
    change(large, lambda meta: [meta["splits"][name]["shards"][0].pop("sample_sha256") for name in ("train", "val")])
    digest = Dataset.open(large).digest
    assert verify(large).digest == digest
    assert json.loads((large / "meta.json").read_text()) == before


def test_verify_of_an_older_folder_on_a_read_only_disk(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(large, lambda meta: [meta["splits"][name]["shards"][0].pop("sample_sha256") for name in ("train", "val")])
    digest = Dataset.open(large).digest

    def refuse(path: Path, text: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr(verification, "replace_text", refuse)
    assert verify(large).digest == digest


def test_opening_reads_little_of_large_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("some text " * 50)
    (tmp_path / "b.txt").write_text("other text")
    folder = prepare(tmp_path / "a.txt", tmp_path / "out", val_inputs=tmp_path / "b.txt").path
    zeros = hashlib.sha256(bytes(checks.SAMPLE_BLOCKS * checks.SAMPLE_BYTES)).hexdigest()
    tokens = 10**10  # 20 GB a shard
    names = [f"train-{number:05d}.bin" for number in range(50)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(2 * tokens)
    shards = [{"file": name, "tokens": tokens, "sha256": "", "sample_sha256": zeros} for name in names]
    change(folder, lambda meta: meta["splits"]["train"].update(tokens=tokens * 50, shards=shards))
    read: list[int] = []
    sample = checks.read_sample
    monkeypatch.setattr(checks, "read_sample", lambda *given: read.append(len(sample(*given))) or sample(*given))
    tracemalloc.start()
    try:
        dataset = Dataset.open(folder)
        ShuffledWindows(dataset.split("train"), 1024, seed=0).batch(10**6, 8)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(read) == 32 and sum(read) <= 32 * 2**15
    assert peak < 5_000_000


def test_number_of_shards_grows_with_the_logarithm_of_the_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of them can take minutes on a busy disk
    with ShardWriter(tmp_path, "train", "uint16", shard_tokens=1) as writer:
        writer.write(np.arange(64 * 7 + 5), 1)
    sizes = [shard["tokens"] for shard in writer.meta()["shards"]]
    assert sizes == [1] * 64 + [2] * 64 + [4] * 64 + [5]


def test_verify_prints_the_size_or_one_line(large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(large), "--jobs", "2"]) == 0
    assert mentions(capsys.readouterr().out, large, 2, 50_012)
    assert main(["verify", str(large), "--jobs", "0"]) == 2
    assert mentions(capsys.readouterr().err, "--jobs", 0)
    flip(large / "train-00000.bin", 4200)
    assert main(["verify", str(large)]) == 2
    assert mentions(capsys.readouterr().err, large / "train-00000.bin")


@pytest.mark.parametrize("verify", [True, False])
def test_wrong_size_and_missing_shard_are_found_even_unverified(folder: Path, verify: bool) -> None:
    shard = folder / "val-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert mentions(refusal(folder, verify), *f"{shard} 21 22".split())
    shard.unlink()
    assert mentions(refusal(folder, verify), *f"{shard} {os.strerror(errno.ENOENT)}".split())


def test_a_token_above_max_token_is_found(folder: Path) -> None:
    change(folder, lambda meta: meta.update(max_token=200))
    assert mentions(refusal(folder), *["256", "max_token", "200"])


def test_other_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    assert mentions(refusal(tmp_path / "absent"), *f"{tmp_path / 'absent'}".split())
    assert mentions(refusal(tmp_path), *f"{tmp_path} meta.json".split())
    meta = folder / "meta.json"
    right = json.loads(meta.read_text())["format"]
    for content, fact in ((b"{", "JSON"), (b"\xff", "JSON"), (b"[1]", right), (b"{}", right)):
        meta.write_bytes(content)
        assert mentions(refusal(folder), *f"{meta} {fact}".split())


def test_a_newer_format_version_is_refused(folder: Path) -> None:
    change(folder, lambda meta: meta.update(version=3, splits="of an unknown form"))
    assert mentions(refusal(folder), *f"{folder / 'meta.json'} version 3 2".split())


@pytest.mark.parametrize("key", ["version", "dtype", "vocab_size", "end_of_text", "max_token", "tokenizer", "splits"])
def test_missing_or_mistyped_keys_are_named(folder: Path, key: str) -> None:
    kind = {"dtype": "str", "tokenizer": "str", "splits": "dict"}.get(key, "int")
    change(folder, lambda meta: meta.update({key: 1.5}))
    assert mentions(refusal(folder), *f"{key!r} {kind} float".split())
    change(folder, lambda meta: meta.update({key: True}))
    assert mentions(refusal(folder), *f"{key!r} {kind} bool".split())
    change(folder, lambda meta: meta.pop(key))
    assert mentions(refusal(folder), *f"{folder / 'meta.json'} {key!r}".split())


@pytest.mark.parametrize(
    ("edit", "facts"),
    [
        (lambda meta: meta.update(dtype="float32"), "dtype float32 uint16 uint32"),
        (lambda meta: meta.update(end_of_text=-1), "'end_of_text'"),
        (lambda meta: meta.update(vocab_size=256), "max_token end_of_text vocab_size"),
        (lambda meta: meta["splits"].pop("val"), "'val'"),
        (lambda meta: meta["splits"]["val"].pop("bytes"), "val 'bytes'"),
        (lambda meta: meta["splits"]["val"].update(shards=[]), "val shards 11"),
        (lambda meta: meta["splits"]["val"].update(tokens=10), "val shards 10"),
        (lambda meta: meta["splits"]["val"].update(shards=["x"]), "val 'file'"),
        (lambda meta: meta["splits"]["val"]["shards"][0].update(sha256=None), "val 'sha256' str NoneType"),
    ],
)
def test_contradictory_meta_is_refused(folder: Path, edit: Callable[[Meta], object], facts: str) -> None:
    change(folder, edit)
    assert mentions(refusal(folder), *f"{folder / 'meta.json'} {facts}".split())


@pytest.mark.parametrize(
    "name", ["../val-00000.bin", "/etc/passwd", "val-0/../x.bin", "train-00000.bin", "meta.json", ""]
)
def test_shard_names_stay_inside_the_folder(folder: Path, name: str) -> None:
    change(folder, lambda meta: meta["splits"]["val"]["shards"][0].update(file=name))
    assert mentions(refusal(folder), *f"{folder / 'meta.json'} val {name!r}".split())


def test_tokenizer_must_be_the_one_described(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.tokenizer().name == "byte"
    train_bpe(["a"], 257).save(folder / "tokenizer.json")
    with pytest.raises(DataError) as error:
        dataset.tokenizer()
    assert mentions(str(error.value), *f"{folder / 'tokenizer.json'} meta.json".split())
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError) as error:
        dataset.tokenizer()
    assert mentions(str(error.value), *f"{folder / 'tokenizer.json'} {os.strerror(errno.ENOENT)}".split())
    byte_tokenizer().save(folder / "tokenizer.json")
    assert dataset.tokenizer().end_of_text == 256
