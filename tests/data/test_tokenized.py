"""Data folders of corpora that other programs have tokenized: layouts, splits, counts, links and damage."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from antransformer.cli import main
from antransformer.data import Dataset, ShuffledWindows, byte_tokenizer, prepare_tokenized, tokenized, verify
from antransformer.errors import DataError
from helpers.messages import mentions

TEXTS = [f"dokument {number} ist ä" for number in range(4000)]
IDS = [np.array([*text.encode(), 256]) for text in TEXTS]


def llm_c(path: Path, documents: list[np.ndarray], magic: int = 20240520, dtype: str = "<u2") -> None:
    """The layout of llm.c's dev/data/data_common.py, ``write_datafile``."""
    tokens = np.concatenate(documents).astype(dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, {20240520: 1, 20240801: 7}[magic], len(tokens)
    path.write_bytes(header.tobytes() + tokens.tobytes())


def megatron(path: Path, documents: list[np.ndarray], code: int = 8) -> None:
    """The layout of Megatron-LM's megatron/core/datasets/indexed_dataset.py, ``_IndexWriter``."""
    dtype = np.dtype({4: "<i4", 5: "<i8", 8: "<u2"}[code])
    lengths = np.array([len(document) for document in documents], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths.astype("<i8"))[:-1]]) * dtype.itemsize
    path.write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(lengths) + 1)
    ends = np.arange(len(lengths) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.astype("<i8").tobytes() + ends.tobytes())


def datatrove(path: Path, documents: list[np.ndarray], size: int = 2) -> None:
    """The layout of datatrove 0.10.1, as its ``DocumentTokenizer`` wrote it."""
    tokens = np.concatenate(documents).astype(f"<u{size}")
    path.write_bytes(tokens.tobytes())
    ends = np.cumsum([len(document) for document in documents]).astype("<u8")
    path.with_name(f"{path.name}.index").write_bytes(ends.tobytes())
    path.with_name(f"{path.name}.metadata").write_text(f"byte.json|{size}\n{len(tokens)}\n{len(tokens)} T")


LAYOUTS = {
    "llm.c": ("a.bin", llm_c, "uint16", 1024),
    "llm.c of llama 3": ("a.bin", lambda *given: llm_c(*given, 20240801, "<u4"), "uint32", 1024),
    "megatron uint16": ("a.bin", megatron, "uint16", 0),
    "megatron int32": ("a.bin", lambda *given: megatron(*given, 4), "uint32", 0),
    "datatrove": ("a.ds", datatrove, "uint16", 0),
    "datatrove of 4 bytes": ("a.ds", lambda *given: datatrove(*given, 4), "uint32", 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_linked_and_read(tmp_path: Path, layout: str) -> None:
    name, write, dtype, offset = LAYOUTS[layout]
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / name, IDS[:2000])
    write(tmp_path / "in" / f"b{name}", IDS[2000:])
    words = ["prepare", tmp_path / "in", "--tokenized", "--tokenizer", "byte", "--out", tmp_path / "out"]
    assert main([str(word) for word in words]) == 0
    dataset = verify(tmp_path / "out", jobs=2)
    train, val = dataset.split("train"), dataset.split("val")
    assert train.dtype == dtype and train.shards[0].offset == offset
    assert all(shard.path.is_symlink() for shard in dataset.shards)
    found = [np.concatenate(split.arrays) for split in (train, val)]
    assert np.array_equal(np.concatenate(found), np.concatenate(IDS))
    assert found[1][-1] == found[0][-1] == 256  # the cut is after a document
    assert train.documents + val.documents == 4000
    assert train.bytes + val.bytes == sum(len(text.encode()) for text in TEXTS)
    tenth = (train.tokens + val.tokens) // 10
    assert val.tokens <= tenth < val.tokens + 100
    tokens, targets = ShuffledWindows(train, 16, seed=0).batch(0, 8)
    assert bytes(tokens[0].clip(max=255).tolist()) in np.concatenate(IDS).clip(max=255).astype(np.uint8).tobytes()
    assert (tokens[:, 1:] == targets[:, :-1]).all()


def test_separate_validation_files_and_an_explicit_fraction(tmp_path: Path) -> None:
    for number in range(3):
        llm_c(tmp_path / f"{number}.bin", IDS[:100])
    inputs = [tmp_path / "0.bin", tmp_path / "1.bin"]
    dataset = prepare_tokenized(inputs, tmp_path / "a", tokenizer="byte", val_inputs=[tmp_path / "2.bin"])
    assert [len(split.shards) for split in dataset.splits.values()] == [2, 1]
    total = dataset.split("train").tokens
    dataset = prepare_tokenized(inputs, tmp_path / "b", tokenizer="byte", val_fraction=0.7)
    assert [len(split.shards) for split in dataset.splits.values()] == [1, 2]
    assert 0.65 * total < dataset.split("val").tokens <= 0.7 * total
    for fraction in (0, 1, 1e-9):
        with pytest.raises(DataError) as error:
            prepare_tokenized(inputs, tmp_path / "c", tokenizer="byte", val_fraction=fraction)
        assert mentions(error.value, "--val-fraction")
    assert not (tmp_path / "c").exists()


def refusal(folder: Path, *inputs: str | Path, **options: object) -> str:
    with pytest.raises(DataError) as error:
        prepare_tokenized(inputs, folder / "out", tokenizer="byte", **options)
    assert "\n" not in str(error.value) and not (folder / "out").exists()
    return str(error.value)


def test_damaged_and_other_files_are_refused(tmp_path: Path) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    content = (tmp_path / "a.bin").read_bytes()
    for damaged in (content[:-2], content + b"xx", content[:500], b"", b"\0" * 2000):
        (tmp_path / "a.bin").write_bytes(damaged)
        assert mentions(refusal(tmp_path, tmp_path / "a.bin"), tmp_path / "a.bin")
    megatron(tmp_path / "m.bin", IDS, code=5)
    assert mentions(refusal(tmp_path, tmp_path / "m.bin"), tmp_path / "m.idx", 5, 4, 8)
    (tmp_path / "m.idx").write_bytes(b"MMIDIDX\x00\x00\x01")
    assert mentions(refusal(tmp_path, tmp_path / "m.bin"), tmp_path / "m.bin")
    datatrove(tmp_path / "d.ds", IDS)
    for text in ("", "byte|3\n5\n", "byte|2\nx\n", "byte|2\n5\n"):
        (tmp_path / "d.ds.metadata").write_text(text)
        message = refusal(tmp_path, tmp_path / "d.ds")
        assert str(tmp_path / "d.ds") in message
    (tmp_path / "text.txt").write_text("text")
    assert mentions(refusal(tmp_path, tmp_path / "text.txt"), tmp_path / "text.txt")


def test_mixed_sizes_foreign_ids_and_shared_files_are_refused(tmp_path: Path) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    llm_c(tmp_path / "b.bin", IDS, 20240801, "<u4")
    assert mentions(refusal(tmp_path, tmp_path / "a.bin", tmp_path / "b.bin"), "uint16", "uint32")
    llm_c(tmp_path / "c.bin", [*IDS, np.array([257])])
    assert mentions(refusal(tmp_path, tmp_path / "c.bin"), tmp_path / "c.bin", 257, "--tokenizer")
    options = {"val_inputs": [tmp_path / "a.bin"]}
    assert mentions(refusal(tmp_path, tmp_path / "a.bin", **options), tmp_path / "a.bin")


def test_an_interrupted_call_does_not_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenized, "HASH_BYTES", 64)
    llm_c(tmp_path / "a.bin", IDS * 50)
    calls: list[int] = []

    def interrupt(done: int, *_: int) -> None:
        calls.append(done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_tokenized([tmp_path / "a.bin"], tmp_path / "out", tokenizer="byte", progress=interrupt)
    assert len(calls) <= 2 and not list(tmp_path.glob("out*"))


def test_an_output_that_cannot_be_created_is_refused_before_the_files_are_read(tmp_path: Path) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    (tmp_path / "file").write_text("")
    calls: list[int] = []
    with pytest.raises(DataError) as error:
        prepare_tokenized(
            [tmp_path / "a.bin"], tmp_path / "file/out", tokenizer="byte", progress=lambda *call: calls.append(call[0])
        )
    assert mentions(error.value, tmp_path / "file/out") and not calls


def test_a_file_that_changes_or_disappears_is_found(tmp_path: Path) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    prepare_tokenized([tmp_path / "a.bin"], tmp_path / "out", tokenizer="byte")
    content = bytearray((tmp_path / "a.bin").read_bytes())
    content[-1] ^= 1
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(DataError) as error:
        Dataset.open(tmp_path / "out")
    assert mentions(error.value, tmp_path / "out/val-00000.bin")
    (tmp_path / "a.bin").unlink()
    with pytest.raises(DataError) as error:
        Dataset.open(tmp_path / "out")
    assert mentions(error.value, tmp_path / "out/train-00000.bin")


def test_older_versions_refuse_a_folder_of_links(tmp_path: Path) -> None:
    llm_c(tmp_path / "a.bin", IDS)
    dataset = prepare_tokenized([tmp_path / "a.bin"], tmp_path / "out", tokenizer="byte")
    assert json.loads((dataset.path / "meta.json").read_text())["version"] == 2


def test_byte_lengths_are_those_of_the_text() -> None:
    lengths = byte_tokenizer().byte_lengths()
    assert lengths.tolist() == [1] * 256 + [0]
