"""Datasets of the hub, tested on a repository in a local folder, which the same library reads."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from antransformer.cli import main
from antransformer.data import Dataset, preparation, prepare
from antransformer.data.hub import HubDataset, _explain
from antransformer.data.sources import Corpus
from antransformer.errors import DataError
from helpers.messages import mentions

pytest.importorskip("datasets")
CARD = """---
configs:
- config_name: notes
  data_files:
  - split: train
    path: lines/train.jsonl.zst
  - split: test
    path: lines/test.jsonl.zst
---
"""


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tables")
    table = pa.table({"text": ["one", "two"], "meta": [{"body": "x"}, {"body": "y"}]})
    pq.write_table(table, root / "train-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lines")
    (root / "lines").mkdir()
    for name, texts in (("train", ["three", "four"]), ("test", ["five"])):
        content = "".join(json.dumps({"content": text}) + "\n" for text in texts).encode()
        (root / f"lines/{name}.jsonl.zst").write_bytes(zstandard.compress(content))
    (root / "README.md").write_text(CARD)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def texts(url: str, text_field: str = "text") -> list[str]:
    return [text for text, _ in Corpus.find([url], text_field).documents()]


def test_configurations_splits_and_fields(tables: Path, lines: Path) -> None:
    assert texts(f"hf://{tables}") == ["one", "two"]
    assert texts(f"hf://{tables}?field=meta.body") == ["x", "y"]
    assert texts(f"hf://{lines}?name=notes&field=content") == ["three", "four"]
    assert texts(f"hf://{lines}?name=notes&split=test", "content") == ["five"]


def test_prepare_streams_a_dataset(tables: Path, lines: Path, tmp_path: Path) -> None:
    train, val = (f"hf://{lines}?name=notes&split={split}&field=content" for split in ("train", "test"))
    words = ["prepare", train, "--val-inputs", val, "--out", str(tmp_path / "out"), "--bpe-vocab-size", "260"]
    assert main(words) == 0
    dataset = Dataset.open(tmp_path / "out")
    assert [split.documents for split in dataset.splits.values()] == [2, 1]
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert [source["input"] for source in meta["sources"]] == [train, val]
    default = prepare(f"hf://{tables}", tmp_path / "tails")
    assert default.split("val").documents == 2


def test_a_malformed_address_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "hf://[x", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("query", "fact"),
    [("?split=dev", "dev"), ("?name=other", "other"), ("?field=body", "'body'")],
)
def test_wrong_parameters_are_one_line(
    tables: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], query: str, fact: str
) -> None:
    assert main(["prepare", f"hf://{tables}{query}", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and fact in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["split=none", "field=none"])
def test_a_wrong_validation_dataset_is_found_before_any_text_is_tokenized(
    tables: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setattr(preparation, "write_tokens", lambda *arguments: pytest.fail("the text was tokenized"))
    with pytest.raises(DataError) as caught:
        prepare([f"hf://{tables}"], tmp_path / "out", val_inputs=[f"hf://{tables}?{wrong}"])
    assert mentions(str(caught.value), wrong, "none")


def test_the_same_records_twice_are_refused(tables: Path, tmp_path: Path) -> None:
    url, other = f"hf://{tables}", f"hf://{tables}?split=train&field=text"
    for arguments in (([url, other], tmp_path / "out"), ([url], tmp_path / "out", "--val-inputs", other)):
        inputs, out, *words = arguments
        assert main(["prepare", *inputs, "--out", str(out), *words]) == 2
        with pytest.raises(DataError) as error:
            prepare(inputs, out, val_inputs=words[1:])
        assert other in str(error.value) and not out.exists()


@pytest.mark.parametrize("url", ["hf://", "hf://a/b?spilt=train", "hf://a/b?split=", "hf://?split=train"])
def test_wrong_urls_are_refused(url: str) -> None:
    with pytest.raises(DataError) as error:
        HubDataset.parse(url, "text")
    assert str(error.value).startswith(url)


def test_missing_and_unreachable_datasets_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", f"hf://{tmp_path}/absent", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    assert main(["prepare", "hf://some/dataset", "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "hf://some/dataset" in message
    gated = _explain(OSError("Dataset 'a/b' is a gated dataset on the Hub."), "a/b")
    assert mentions(gated, "huggingface.co/datasets/a/b")
