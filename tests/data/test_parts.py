"""Preparation in parts: joined, they equal the folder of one process; interrupted and different parts are noticed."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antransformer.cli import main
from antransformer.data import join_parts, preparation, prepare, prepare_part, train_bpe
from antransformer.errors import DataError
from helpers.messages import mentions


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Seven files of different sizes."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(7):
        documents = [f"{number} {index} " + "word " * (index % 9) for index in range(10 + 40 * (number % 3))]
        (folder / f"{number}.txt").write_text("<|endoftext|>".join(documents))
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("options", [{"val_fraction": 0.2}, {}, {"val_inputs": True}])
def test_joined_parts_equal_one_process(text: Path, tmp_path: Path, count: int, options: dict[str, Any]) -> None:
    if "val_inputs" in options:
        options = {"val_inputs": [text / "6.txt"]}
        text = [text / f"{number}.txt" for number in range(6)]
        count = min(count, 6)
    train_bpe(["word 1 2 3 4 5 6 7 8 9 0 "] * 9, 270).save(tmp_path / "bpe.json")
    options = {"tokenizer": tmp_path / "bpe.json", **options}
    for number in reversed(range(1, count + 1)):
        prepare_part(text, tmp_path / "parts", f"{number}/{count}", **options)
    joined = join_parts(tmp_path / "parts")
    whole = prepare(text, tmp_path / "whole", **options)
    assert files(joined.path) == files(whole.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bpe.json", "parts", "text", "whole"]


def test_shards_roll_over_as_in_one_process(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2, 3):
        prepare_part(text, tmp_path / "parts", f"{number}/3", val_fraction=0.2)
    notes = tmp_path / "parts.parts/notes.txt"
    notes.write_text("the user's")
    joined = join_parts(tmp_path / "parts", shard_tokens=700)
    whole = prepare(text, tmp_path / "whole", val_fraction=0.2, shard_tokens=700)
    assert joined.digest == whole.digest and len(joined.shards) > 4
    assert list(notes.parent.iterdir()) == [notes]


def test_parts_inside_the_input_folder_are_joined(text: Path, tmp_path: Path) -> None:
    whole = prepare(text, tmp_path / "whole", val_fraction=0.2)
    for part in ("1/2", "2/2"):
        prepare_part(text, text / "data", part, val_fraction=0.2)
        (text / f"job-{part[0]}.out").write_text("a log")
    assert prepare_part(text, text / "data", "1/2", val_fraction=0.2) is None
    assert join_parts(text / "data").digest == whole.digest


def test_the_command_line_resumes_and_joins(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", str(text), "--out", str(tmp_path / "out"), "--val-fraction", "0.2", "--part"]
    join = ["prepare", "--out", str(tmp_path / "out"), "--join"]
    assert main(join) == 2
    assert mentions(capsys.readouterr().err, "--part")
    assert main([*words, "1/2"]) == 0
    assert main(join) == 2
    assert mentions(capsys.readouterr().err, 2)
    (tmp_path / "out.parts/part-00002-of-00002.partial").mkdir()  # left by a killed process
    first = tmp_path / "out.parts/part-00001-of-00002/meta.json"
    before = first.stat().st_mtime_ns
    assert main([*words, "1/2"]) == main([*words, "2/2"]) == 0
    assert first.stat().st_mtime_ns == before
    assert main(join) == 0
    assert not (tmp_path / "out.parts").exists()
    assert mentions(capsys.readouterr().out, tmp_path / "out", "byte", 257)
    for wrong in (["--part", "0/2"], ["--part", "3/2"], ["--part", "x"], ["--part", "1/8"], ["--join"], []):
        out = ["--out", str(tmp_path / "other")]
        inputs = [str(text)] if wrong else []
        assert main(["prepare", *inputs, *out, *wrong]) == 2, wrong
        assert mentions(capsys.readouterr().err.replace("/", " ").replace(":", " "), wrong[0] if wrong else "INPUT")
    for option in (["--val-fraction", "0.5"], ["--tokenized"], ["--text-field", "q"], [str(text)]):
        assert main([*join, *option]) == 2
        assert mentions(capsys.readouterr().err, option[0] if option[0].startswith("-") else "INPUT")
    for option in (["--tokenized"], ["--bpe-vocab-size", "300"]):
        assert main([*words, "1/2", *option]) == 2


def test_different_and_damaged_parts_are_refused(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_part(text, out, "1/2", val_fraction=0.2)
    prepare_part(text, out, "2/2", val_fraction=0.3)
    second = tmp_path / "out.parts/part-00002-of-00002"

    def refusal() -> str:
        with pytest.raises(DataError) as error:
            join_parts(out)
        assert not out.exists() and not out.with_name("out.partial").exists()
        return str(error.value)

    assert mentions(refusal(), second, "val_fraction")
    shutil.rmtree(second)
    prepare_part(text, out, "2/2", val_fraction=0.2)
    shard = second / "train-00000.bin"
    content = np.fromfile(shard, "<u2")
    for damaged in (content[::-1].tobytes(), content.tobytes()[:-1], b""):
        shard.write_bytes(damaged)
        assert mentions(refusal(), shard)
    (second / "meta.json").write_text(json.dumps({"format": "antransformer-shards"}))
    assert mentions(refusal(), second)
    prepare_part(text, out, "1/3", val_fraction=0.2)
    assert mentions(refusal(), 2, 3)


def test_an_interrupted_part_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 50)
    with pytest.raises(KeyboardInterrupt):
        prepare_part(text, tmp_path / "out", "1/2", val_fraction=0.2, progress=stop)
    assert not (tmp_path / "out.parts").exists()


def test_a_part_may_have_only_blank_files(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for number in range(8):
        documents = "<|endoftext|>".join(f"{number} {index}" for index in range(50))
        (tmp_path / f"text/{number}.txt").write_text(documents if number > 3 else " \n" * len(documents))
    options = {"val_fraction": 0.5}
    for part in ("1/2", "2/2"):
        prepare_part(tmp_path / "text", tmp_path / "out", part, **options)
    joined = join_parts(tmp_path / "out")
    whole = prepare(tmp_path / "text", tmp_path / "whole", **options)
    assert joined.digest == whole.digest and joined.split("train").tokens > 0


@pytest.mark.parametrize(
    "change", [{"val_fraction": 0.3}, {"tokenizer": "bpe"}, {"inputs": "other"}, {"text_field": "body"}]
)
def test_a_finished_part_of_other_options_is_refused(text: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"inputs": text, "out": tmp_path / "out", "part": "1/2", "val_fraction": 0.2}
    folder = prepare_part(**arguments)
    assert folder and prepare_part(**arguments) is None
    train_bpe(["some text"] * 3, 300).save(tmp_path / "tokenizer.json")
    shutil.copytree(text, tmp_path / "other")
    names = {"tokenizer": tmp_path / "tokenizer.json", "inputs": tmp_path / "other"}
    with pytest.raises(DataError) as error:
        prepare_part(**{**arguments, **{key: names.get(key, value) for key, value in change.items()}})
    assert mentions(error.value, folder)
    assert (folder / "meta.json").exists()
