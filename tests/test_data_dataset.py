"""Opening a prepared folder: whatever was changed in it is found, and named in one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antransformer.data import Dataset, byte_tokenizer, prepare, train_bpe
from antransformer.errors import DataError

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
    with pytest.raises(ValueError, match="read-only"):
        arrays[0][0] = 1


def test_changed_content_is_found(folder: Path) -> None:
    shard = folder / "train-00001.bin"
    data = bytearray(shard.read_bytes())
    data[100] ^= 1
    shard.write_bytes(data)
    message = refusal(folder)
    assert "train-00001.bin: its content is not" in message
    assert "prepare the data again" in message
    assert Dataset.open(folder, verify=False).split("train").tokens == 1001


@pytest.mark.parametrize("verify", [True, False])
def test_wrong_size_and_missing_shard_are_found_even_unverified(folder: Path, verify: bool) -> None:
    shard = folder / "val-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "val-00000.bin: 21 bytes instead of 22" in refusal(folder, verify)
    shard.unlink()
    assert "val-00000.bin: missing" in refusal(folder, verify)


def test_token_past_the_maximum_is_found(folder: Path) -> None:
    change(folder, lambda meta: meta.update(max_token=200))
    assert "token 256 is past max_token 200" in refusal(folder)


def test_what_is_no_data_folder(folder: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "not a prepared data folder" in refusal(tmp_path)
    for content, says in ((b"{", "not JSON"), (b"\xff", "not JSON"), (b"[1]", "not the meta.json"), (b"{}", "format")):
        (folder / "meta.json").write_bytes(content)
        assert says in refusal(folder)


def test_newer_format_says_so(folder: Path) -> None:
    change(folder, lambda meta: meta.update(version=2, splits="unheard of"))
    assert "newer antransformer (format version 2, this one reads 1)" in refusal(folder)


@pytest.mark.parametrize("key", ["version", "dtype", "vocab_size", "end_of_text", "max_token", "tokenizer", "splits"])
def test_missing_or_mistyped_keys_are_named(folder: Path, key: str) -> None:
    change(folder, lambda meta: meta.update({key: 1.5}))
    assert f"{key!r} must be" in refusal(folder)
    change(folder, lambda meta: meta.update({key: True}))
    assert f"{key!r} must be" in refusal(folder)
    change(folder, lambda meta: meta.pop(key))
    assert f"no key {key!r}" in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda meta: meta.update(dtype="float32"), "neither uint16 nor uint32"),
        (lambda meta: meta.update(end_of_text=-1), "'end_of_text' must not be negative"),
        (lambda meta: meta.update(vocab_size=256), "must be below vocab_size"),
        (lambda meta: meta["splits"].pop("val"), "no key 'val'"),
        (lambda meta: meta["splits"]["val"].pop("bytes"), "split val: no key 'bytes'"),
        (lambda meta: meta["splits"]["val"].update(shards=[]), "do not add up"),
        (lambda meta: meta["splits"]["val"].update(tokens=10), "do not add up"),
        (lambda meta: meta["splits"]["val"].update(shards=["x"]), "no key 'file'"),
        (lambda meta: meta["splits"]["val"]["shards"][0].update(sha256=None), "'sha256' must be str"),
    ],
)
def test_contradictory_meta(folder: Path, edit: Callable[[Meta], object], says: str) -> None:
    change(folder, edit)
    assert says in refusal(folder)


@pytest.mark.parametrize(
    "name", ["../val-00000.bin", "/etc/passwd", "val-0/../x.bin", "train-00000.bin", "meta.json", ""]
)
def test_shard_names_stay_inside_the_folder(folder: Path, name: str) -> None:
    change(folder, lambda meta: meta["splits"]["val"]["shards"][0].update(file=name))
    assert "is not the name of a shard" in refusal(folder)


def test_tokenizer_must_be_the_one_described(folder: Path) -> None:
    dataset = Dataset.open(folder)
    assert dataset.tokenizer().name == "byte"
    train_bpe(["a"], 257).save(folder / "tokenizer.json")
    with pytest.raises(DataError, match="not the tokenizer that"):
        dataset.tokenizer()
    (folder / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer can be read"):
        dataset.tokenizer()
    byte_tokenizer().save(folder / "tokenizer.json")
    assert dataset.tokenizer().end_of_text == 256
