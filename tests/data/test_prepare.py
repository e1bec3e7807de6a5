"""Data preparation: splits, shards and checks; an interrupted run leaves no folder that looks complete."""

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers

from antransformer.cli import main
from antransformer.data import Dataset, Split, preparation, prepare, readers
from antransformer.data.holdout import TrainValSplit
from antransformer.data.shards import ShardWriter, dtype_for
from antransformer.errors import ConfigError, DataError, MachineError
from helpers.messages import mentions


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two files with 205 short documents, five of which occur twice."""
    documents = [f"Document {i}: " + "ö word " * (i % 7) for i in range(200)] + [
        f"Document {i}: " for i in range(0, 35, 7)
    ]
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("<|endoftext|>".join(documents[:90]), encoding="utf-8")
    (folder / "b.txt").write_text("<|endoftext|>".join(documents[90:]), encoding="utf-8")
    return folder


def tokens(split: Split) -> np.ndarray[Any, Any]:
    return np.concatenate(split.arrays)


def documents(dataset: Dataset, name: str) -> list[str]:
    *texts, rest = dataset.tokenizer().decode(tokens(dataset.split(name))).split("<|endoftext|>")
    assert rest == ""
    return texts


def refusal(*args: Any, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(*args, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def name_of(descriptor: int) -> str:
    """Name of an open file, without the ending of an unfinished one."""
    return Path(f"/proc/self/fd/{descriptor}").readlink().name.removesuffix(".partial")


def test_round_trip_and_counts(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([corpus], tmp_path / "out", val_fraction=0.2)
    train, val = documents(dataset, "train"), documents(dataset, "val")
    expected = [text for name in "ab" for text in (corpus / f"{name}.txt").read_text("utf-8").split("<|endoftext|>")]
    assert sorted(train + val) == sorted(expected)
    assert 20 <= len(val) <= 62  # 0.2 of 205, within 3.5 standard deviations
    for name, texts in (("train", train), ("val", val)):
        split = dataset.split(name)
        size = sum(len(text.encode()) for text in texts)
        assert (split.documents, split.bytes, split.tokens) == (len(texts), size, size + len(texts))
    assert (dataset.vocab_size, dataset.end_of_text, dataset.max_token) == (257, 256, 256)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["sources"] == [
        {"input": str(corpus), "files": 2, "bytes": sum(len(data) for data in files(corpus).values()), "skipped": {}}
    ]
    assert meta["val_fraction"] == 0.2


def test_split_depends_on_content_alone(corpus: Path, tmp_path: Path) -> None:
    one = prepare([corpus / "a.txt", corpus / "b.txt"], tmp_path / "one", val_fraction=0.2)
    two = prepare([corpus / "b.txt", corpus / "a.txt"], tmp_path / "two", val_fraction=0.2)
    for name in ("train", "val"):
        assert sorted(documents(one, name)) == sorted(documents(two, name))
    # Five documents occur twice. A split by position would likely separate a pair.
    assert not set(documents(one, "train")) & set(documents(one, "val"))
    again = prepare([corpus / "a.txt", corpus / "b.txt"], tmp_path / "again", val_fraction=0.2)
    assert files(one.path) == files(again.path)


def test_a_larger_fraction_keeps_the_validation_documents_of_a_smaller_one(corpus: Path, tmp_path: Path) -> None:
    small = prepare([corpus], tmp_path / "small", val_fraction=0.1)
    large = prepare([corpus], tmp_path / "large", val_fraction=0.3)
    assert set(documents(small, "val")) < set(documents(large, "val"))


def test_separate_validation_files(corpus: Path, tmp_path: Path) -> None:
    dataset = prepare([corpus / "a.txt"], tmp_path / "out", val_inputs=[corpus / "b.txt"])
    assert documents(dataset, "train") == (corpus / "a.txt").read_text("utf-8").split("<|endoftext|>")
    assert documents(dataset, "val") == (corpus / "b.txt").read_text("utf-8").split("<|endoftext|>")
    assert mentions(refusal([corpus], tmp_path / "no", val_inputs=[corpus / "b.txt"]), *f"{corpus / 'b.txt'}".split())


def test_shards_roll_over_without_changing_the_tokens(corpus: Path, tmp_path: Path) -> None:
    single = prepare([corpus], tmp_path / "single", val_fraction=0.2).split("train")
    sharded = prepare([corpus], tmp_path / "sharded", val_fraction=0.2, shard_tokens=1000).split("train")
    assert [shard.tokens for shard in sharded.shards[:-1]] == [1000] * (single.tokens // 1000)
    assert [shard.path.name for shard in sharded.shards[:2]] == ["train-00000.bin", "train-00001.bin"]
    assert np.array_equal(tokens(single), tokens(sharded))
    assert Dataset.open(tmp_path / "sharded").split("train").tokens == single.tokens


def test_progress_counts_up(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 500)
    calls: list[tuple[int, int, int, int]] = []
    dataset = prepare([corpus], tmp_path / "out", val_fraction=0.2, progress=lambda *call: calls.append(call))
    size = sum(len(data) for data in files(corpus).values())
    assert len(calls) > 5
    assert calls == sorted(calls)
    assert calls[-1] == (size, size, 205, dataset.split("train").tokens + dataset.split("val").tokens)


def test_bpe_is_trained_on_the_training_text(corpus: Path, tmp_path: Path) -> None:
    (corpus / "c.txt").write_text("<|endoftext|>".join(f"{i} quixotic" for i in range(40)))
    dataset = prepare([corpus / "a.txt"], tmp_path / "out", bpe_vocab_size=270, val_inputs=[corpus / "c.txt"])
    tokenizer = dataset.tokenizer()
    assert (tokenizer.name, dataset.vocab_size, dataset.end_of_text) == ("bpe-270", 270, 0)
    assert len(tokenizer.encode(" word")) == 1
    assert len(tokenizer.encode(" quixotic")) > 3
    assert documents(dataset, "val")[3] == "3 quixotic"


@pytest.mark.parametrize("name", ["fields.jsonl", "fields.ndjson", "columns.parquet", "blank.txt"])
def test_mistakes_in_later_inputs_are_found_before_any_text_is_tokenized(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(preparation, "write_tokens", lambda *arguments: pytest.fail("the text was tokenized"))
    for ending in ("jsonl", "ndjson"):
        (tmp_path / f"fields.{ending}").write_text('\n{"content": "one"}\n')
    pq.write_table(pa.table({"content": ["one"]}), tmp_path / "columns.parquet")
    (tmp_path / "blank.txt").write_text(" \n")
    assert mentions(refusal([corpus], tmp_path / "out", val_inputs=[tmp_path / name]), name)
    if name != "blank.txt":
        assert mentions(refusal([corpus, tmp_path / name], tmp_path / "out"), name, "'content'")


def test_tokenizer_sample_is_spread_over_the_training_documents(corpus: Path) -> None:
    split = TrainValSplit.find([corpus], (), 0.2)
    train = [document.text for document in split.documents() if document.split == "train"]
    assert split.training_sample(10**9) == train
    limit = sum(len(text.encode()) for text in train) // 2
    half = split.training_sample(limit)
    assert set(half) < set(train)
    assert 0 <= sum(len(text.encode()) for text in half) - limit < max(len(text.encode()) for text in train)
    assert 0.35 < len(half) / len(train) < 0.65
    positions = [train.index(text) for text in half]
    assert min(positions) < len(train) // 10 and max(positions) > len(train) * 9 // 10


def test_tokenizer_sample_is_spread_over_compressed_files(tmp_path: Path) -> None:
    texts = [f"{i} " + "word " * 100 for i in range(500)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    sample = TrainValSplit.find([tmp_path / "a.jsonl.gz"], (), 0.01).training_sample(len(lines) // 5)
    positions = [texts.index(text) for text in sample]
    assert positions == sorted(positions) and 80 < len(positions) < 120
    assert positions[0] < 50 and positions[-1] > 450


@pytest.mark.parametrize(("count", "words"), [(2000, 50), (3, 100_000)])
def test_tokenizer_sample_of_short_files_and_long_documents_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: int
) -> None:
    monkeypatch.setattr(readers, "MAX_CHARACTERS", 4096)
    for number in range(count):
        (tmp_path / f"{number:04}.txt").write_text(" ".join(f"слово {number * words + word}" for word in range(words)))
    split = TrainValSplit.find([tmp_path], (), 0.01)
    limit = split.bytes // 5
    sample = split.training_sample(limit)
    assert 0 <= sum(len(text.encode()) for text in sample) - limit <= 2 * readers.MAX_CHARACTERS


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to name an open file")
def test_all_files_are_flushed_to_disk_before_the_rename(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append(name_of(number)))
    dataset = prepare([corpus], tmp_path / "out", val_fraction=0.2, shard_tokens=2000)
    assert sorted(synced) == sorted([*files(dataset.path), ".lock.pid"])
    assert synced[-1] == "meta.json"


def test_a_vocabulary_too_large_for_uint16(tmp_path: Path) -> None:
    vocabulary = {f"w{i}": i for i in range(70_000)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(["<|endoftext|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("w69999 w1")
    (tmp_path / "b.txt").write_text("w65536")
    options = {"tokenizer": tmp_path / "tokenizer.json", "val_inputs": tmp_path / "b.txt"}
    dataset = prepare(tmp_path / "a.txt", tmp_path / "out", **options)
    assert dataset.split("train").dtype == "uint32"
    assert tokens(dataset.split("train")).tolist() == [69_999, 1, 70_000]
    assert (tmp_path / "out" / "val-00000.bin").read_bytes() == bytes([0, 0, 1, 0, 0x70, 0x11, 1, 0])
    assert Dataset.open(tmp_path / "out").max_token == 70_000


def test_dtype_and_its_limit(tmp_path: Path) -> None:
    assert (dtype_for(65_536), dtype_for(65_537)) == ("uint16", "uint32")
    with ShardWriter(tmp_path, "train", "uint16") as writer, pytest.raises(ValueError) as error:
        writer.write(np.array([65_536]), 1)
    assert mentions(str(error.value), *["65536", "uint16"])


def test_unusable_options_are_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        assert mentions(refusal([corpus], out, val_fraction=fraction), *f"--val-fraction {fraction}".split())
    assert mentions(refusal([corpus], out, bpe_vocab_size=256), *["bpe_vocab_size", "256", "257"])
    assert mentions(
        refusal([corpus], out, bpe_vocab_size=300, tokenizer="own.json"), *["bpe_vocab_size", "tokenizer", "own.json"]
    )
    assert mentions(refusal([corpus], out, tokenizer="gpt2"), *["gpt2", "byte", "tokenizer.json"])
    assert mentions(refusal([corpus], out, shard_tokens=0), *["shard_tokens", "0", "1"])
    assert mentions(refusal([tmp_path / "absent"], out), *f"{tmp_path / 'absent'}".split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_a_folder_with_files_is_not_overwritten(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prepare([corpus], tmp_path / "out", val_fraction=0.2)  # an empty folder is accepted
    before = files(tmp_path / "out")
    assert mentions(refusal([corpus], tmp_path / "out", val_fraction=0.2), *f"{tmp_path / 'out'}".split())
    assert files(tmp_path / "out") == before
    assert mentions(refusal([corpus], corpus / "a.txt"), *f"{corpus / 'a.txt'}".split())


def test_a_folder_that_cannot_be_created(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "train_bpe", None)  # the error must come before any training
    (tmp_path / "loop").symlink_to("loop")
    for out, code in ((corpus / "a.txt" / "out", errno.ENOTDIR), (tmp_path / "loop" / "out", errno.ELOOP)):
        for options in ({"bpe_vocab_size": 300}, {}):
            assert mentions(refusal([corpus], out, **options), *f"{out} {os.strerror(code)}".split())
    assert mentions(refusal([corpus], tmp_path / "loop"), *f"{tmp_path / 'loop'}".split())


def fractions(message: str) -> list[float]:
    """Values of --val-fraction in a message."""
    return [float(number) for number in re.findall(r"--val-fraction\W*(\d[\d.e-]*)", message)]


def test_empty_validation_names_a_fraction_that_works(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join("abcde"))
    for fraction, split in ((1e-6, "val"), (1 - 1e-6, "train")):
        message = refusal([path], tmp_path / "out", val_fraction=fraction)
        assert mentions(message, "5", "--val-inputs")
        assert re.search(rf"\b{split}[a-z]*\b", message)  # training, validation
        current, suggested = fractions(message)
        assert current == fraction
        dataset = prepare([path], tmp_path / split, val_fraction=suggested)
        assert dataset.split("val").documents >= 1
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("files_and_words", [(1, 20_000), (41, 300)])
def test_the_default_always_leaves_a_validation_split(tmp_path: Path, files_and_words: tuple[int, int]) -> None:
    count, words = files_and_words
    for number in range(count):
        text = "\n".join(f"line {index} of text {number}" for index in range(words // 5))
        (tmp_path / f"{number:02d}.txt").write_text(text)
    dataset = prepare(sorted(tmp_path.glob("*.txt")), tmp_path / "out")
    train, val = documents(dataset, "train"), documents(dataset, "val")
    assert len(train) == len(val) == count
    joined = [head + tail for head, tail in zip(train, val, strict=True)]
    assert joined == [path.read_text() for path in sorted(tmp_path.glob("*.txt"))]
    assert all(tail.startswith("line ") for tail in val)  # cut after a line
    sizes = [dataset.split(name).bytes for name in ("train", "val")]
    assert sizes[1] > 0.5 * min(1 << 14, sum(sizes) / 10)
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["val_fraction"] is None and meta["val_tail"] == min(0.1, (1 << 14) / sum(sizes))


def test_the_default_holds_out_documents_where_they_suffice(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("<|endoftext|>".join(f"{number} " + "word " * 400 for number in range(3000)))
    default = prepare(path, tmp_path / "default")
    assert files(default.path) == files(prepare(path, tmp_path / "explicit", val_fraction=0.01).path)


def test_of_many_short_documents_more_are_held_out_by_default(tmp_path: Path) -> None:
    texts = [f"line {number} of the log" for number in range(2000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dataset = prepare(tmp_path / "a.jsonl", tmp_path / "out")
    assert sorted(documents(dataset, "train") + documents(dataset, "val")) == sorted(texts)
    assert 150 < dataset.split("val").documents < 250
    assert json.loads((tmp_path / "out/meta.json").read_text())["val_fraction"] == 0.1


def test_an_explicit_fraction_fails_before_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    monkeypatch.setattr(preparation, "write_tokens", None)
    assert mentions(refusal(tmp_path / "a.txt", tmp_path / "out", val_fraction=1e-6), "--val-fraction")
    options = {"val_fraction": 0.5, "val_inputs": tmp_path / "a.txt"}
    assert mentions(refusal(tmp_path / "a.txt", tmp_path / "out", **options), "--val-fraction", "--val-inputs")


def test_a_single_character_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    assert mentions(refusal(tmp_path / "a.txt", tmp_path / "out"), "--val-inputs")
    assert not (tmp_path / "out").exists()


def test_a_bpe_on_a_large_corpus_samples_by_seeking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{number} " + "word " * 100 for number in range(2000)]
    (tmp_path / "a.txt").write_text("<|endoftext|>".join(texts))
    split = TrainValSplit.find([tmp_path / "a.txt"], (), 0.1)
    train = {document.text for document in split.documents() if document.split == "train"}
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    sample = split.training_sample(100_000)
    positions = [texts.index(text) for text in sample if text in texts]
    assert set(sample) <= train
    assert 100_000 <= sum(map(len, sample)) < 300_000
    assert positions == sorted(positions) and positions[0] < 50 and positions[-1] > 1900


def test_skipped_files_and_small_vocabularies_are_printed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("some words " * 100)
    (tmp_path / "text/b.npz").write_bytes(b"x")
    words = ["prepare", str(tmp_path / "text"), "--out", str(tmp_path / "out"), "--bpe-vocab-size", "4096"]
    assert main(words) == 0
    skipped, tails, small = caplog.messages
    assert mentions(skipped, tmp_path / "text", 1, "b.npz") and mentions(tails.replace("%", " "), 10)
    dataset = Dataset.open(tmp_path / "out")
    assert dataset.vocab_size < 4096 and mentions(small, dataset.vocab_size, 4096)
    (source,) = json.loads((tmp_path / "out/meta.json").read_text())["sources"]
    assert list(source["skipped"].values()) == [{"files": 1, "first": ["b.npz"]}]


def test_a_single_document_cannot_be_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one document")
    assert fractions(refusal([path], tmp_path / "out", val_fraction=0.0001)) == [0.0001]  # no other value would work


def test_a_failure_removes_the_parents_that_it_created(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "old").mkdir()
    refusal([tmp_path / "one.txt"], tmp_path / "old/new/newer/out")
    assert (tmp_path / "old").exists() and not (tmp_path / "old/new").exists()


def test_a_mount_point_is_refused_before_the_work(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: path == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    calls: list[int] = []
    with pytest.raises(DataError) as error:
        prepare([corpus], tmp_path / "volume", progress=lambda *call: calls.append(call[0]))
    assert mentions(error.value, tmp_path / "volume") and not calls
    assert prepare([corpus], tmp_path / "volume/data", val_fraction=0.2).split("train").tokens


def test_an_exception_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 500)

    def stop(done: int, total: int, documents: int, tokens: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([corpus], tmp_path / "out", val_fraction=0.2, progress=stop)
    assert not list(tmp_path.glob("out*"))


def test_a_full_disk_leaves_nothing(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        if name_of(descriptor).endswith(".bin"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        prepare([corpus], tmp_path / "out", val_fraction=0.2)
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_is_full_from_the_start_leaves_nothing(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("antransformer.lock.replace_text", full)
    with pytest.raises(MachineError):
        prepare([corpus], tmp_path / "new/out", val_fraction=0.2)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_another_process_writes_is_refused(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def second(*_: int) -> None:
        with pytest.raises(ConfigError) as error:
            prepare([corpus], out, val_fraction=0.2)
        assert mentions(error.value, tmp_path / "out.partial", os.getpid())

    first = prepare([corpus], out, val_fraction=0.2, progress=second)
    assert files(out) == files(first.path) and not (tmp_path / "out.partial").exists()


def test_a_killed_run_looks_incomplete_and_the_next_one_succeeds(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"val_fraction": 0.2, "shard_tokens": 500}
    script = (
        "import os, signal, sys\n"
        "from antransformer.data import preparation\n"
        "preparation.BATCH_CHARACTERS = 500\n"
        "kill = lambda done, total, *_: done > total // 2 and os.kill(os.getpid(), signal.SIGKILL)\n"
        f"preparation.prepare([sys.argv[1]], sys.argv[2], progress=kill, **{options})\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(corpus), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    partial = tmp_path / "out.partial"
    assert (partial / "train-00001.bin").exists()
    assert not out.exists()
    for folder in (out, partial):
        with pytest.raises(DataError):
            Dataset.open(folder)
    (partial / "train-00099.bin").write_bytes(b"stale")
    (partial / "notes.txt").write_text("the user's")
    with pytest.raises(DataError) as error:
        prepare([corpus], out, **options)
    assert mentions(error.value, partial) and (partial / "notes.txt").read_text() == "the user's"
    (partial / "notes.txt").unlink()
    prepare([corpus], out, **options)
    assert not partial.exists()
    uninterrupted = prepare([corpus], tmp_path / "uninterrupted", **options)
    assert files(out) == files(uninterrupted.path)


def test_memory_does_not_grow_with_the_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100_000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1 << 16)
    path = tmp_path / "a.txt"
    with path.open("w") as file:
        for i in range(1500):
            file.write(f"{i} " * 1000 + "<|endoftext|>")
    tracemalloc.start()
    try:
        dataset = prepare([path], tmp_path / "out")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert dataset.split("train").bytes > 6_000_000
    assert peak < 3_000_000
