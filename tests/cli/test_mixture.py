"""Runs on mixtures of data folders: trained, resumed, extended, refused, and read by the other verbs."""

import contextlib
import math
import re
import shutil
from functools import partial

import pytest

import antransformer
from antransformer.cli import main
from antransformer.data import Dataset, prepare
from antransformer.data.mixture import open_mixture
from antransformer.training import run_folder
from antransformer.training.data import training_windows
from antransformer.training.dry_run import NullReporter
from antransformer.training.metrics import read_metrics
from antransformer.training.samples import prompts
from antransformer.training.trackers import numbers
from helpers.commands import TEN_STEPS, refused, write_documents
from helpers.messages import mentions
from helpers.small import SMALL
from helpers.trainers import losses, weights


@pytest.fixture(scope="module")
def code(corpus, tmp_path_factory):
    """Parent of three data folders: ``code``, ``my plays``, and ``bpe`` with another tokenizer."""
    root = tmp_path_factory.mktemp("mixture")
    (root / "code").symlink_to(corpus)
    texts = write_documents(root / "texts")
    (root / "held-out.txt").write_text("whether 'tis nobler in the mind to suffer. " * 60)
    prepare([texts], root / "my plays", val_inputs=[root / "held-out.txt"])
    prepare([texts], root / "bpe", bpe_vocab_size=260, val_inputs=[root / "held-out.txt"])
    return root


@pytest.fixture
def cwd(code, monkeypatch):
    monkeypatch.chdir(code)
    return code


@pytest.fixture(scope="module")
def mixed(code, tmp_path_factory):
    """Run of ten steps on code and plays, with code alone in the last two."""
    folder = tmp_path_factory.mktemp("mixed") / "run"
    words = ["train", "--data", "code:3", "my plays:1", "--data-from", "0.8", "code", "--out", str(folder)]
    with contextlib.chdir(code):
        assert main([*words, *TEN_STEPS, "--sample-every=10"]) == 0
    return folder


def test_validation_is_for_each_source_and_the_first_mixture(mixed, code, corpus):
    config, line = run_folder.saved_config(mixed), read_metrics(mixed / "metrics.jsonl")[-1]
    assert config.data == f"{corpus}:3 '{code}/my plays:1'" and config.data_from == f"0.8 {corpus}"
    by_source = line["val_loss_by_source"]
    assert list(by_source) == [corpus.name, "my plays"] and by_source["my plays"] != by_source[corpus.name]
    assert line["val_loss"] == pytest.approx(0.75 * by_source[corpus.name] + 0.25 * by_source["my plays"])
    splits = [Dataset.open(code / name).split("val") for name in ("code", "my plays")]
    bytes_per_token = sum(
        weight * split.bytes / split.tokens for weight, split in zip((0.75, 0.25), splits, strict=True)
    )
    assert line["bits_per_byte"] == pytest.approx(line["val_loss"] / bytes_per_token / math.log(2))
    assert numbers(line)["val_loss/my plays"] == by_source["my plays"]
    assert len(line["samples"]) == 2


def test_every_step_holds_the_windows_of_its_mixture(mixed):
    config = run_folder.saved_config(mixed)
    dataset = open_mixture(config.data, config.data_from, Dataset.open)
    windows = training_windows(config, dataset)
    plays = dataset.sources["my plays"].split("train").arrays[0]
    text = bytes(token for token in plays.tolist() if token < 256)
    counts = []
    for step in range(10):
        rows = windows.batch(step, config.batch_size)[0].tolist()
        counts.append(sum(bytes(token for token in row if token < 256) in text for row in rows))
    assert config.data_from_step == 8 and counts[8:] == [0, 0] and 8 <= sum(counts[:8]) <= 24


def test_the_other_verbs_read_the_run(mixed, cwd, tmp_path, capsys):
    assert main(["generate", "--checkpoint", str(mixed), "--prompt", "to be", "--max-new-tokens", "4"]) == 0
    assert main(["diagnose", "--checkpoint", str(mixed), "--tokens", "256", "--out", str(tmp_path / "a.png")]) == 0
    assert mentions(capsys.readouterr().out, "my plays")
    words = ["diagnose", "--checkpoint", str(mixed), "--data", "my plays", "--tokens=256"]
    assert main([*words, "--out", str(tmp_path / "b.png")]) == 0
    assert (
        main(["evaluate", "--checkpoint", str(mixed), "--text", "held-out.txt", "--out", str(tmp_path / "e.json")]) == 0
    )
    assert main(["train", "--out", str(mixed), "--resume"]) == 0
    output = capsys.readouterr().out
    by_source = read_metrics(mixed / "metrics.jsonl")[-1]["val_loss_by_source"]
    assert all(mentions(output, name, f"{loss:.4f}") for name, loss in by_source.items())
    assert main(["train", "--data", "code:1", "my plays:1", *TEN_STEPS, "--dry-run"]) == 0
    card = run_folder.saved_config(mixed)
    assert main(["export", "--checkpoint", str(mixed), "--out", str(tmp_path / "hf")]) == 0
    page = (tmp_path / "hf/README.md").read_text()
    share, _, second = card.data_from.partition(" ")
    assert f"{float(share):.0%}" in page
    for mixture in (card.data, second):
        assert "/" in mixture and re.sub(r"[^ ']*/", "", mixture) in page and mixture not in page


def test_an_extended_run_keeps_the_start_of_its_second_stage(mixed, tmp_path):
    run = shutil.copytree(mixed, tmp_path / "run")
    assert main(["train", "--out", str(run), "--resume", "--tokens", "5120", "--rewarm", "0.2"]) == 0
    config = run_folder.saved_config(run)
    assert (config.steps, config.data_from_step) == (20, 8)
    assert main(["train", "--out", str(run), "--resume"]) == 0


SETTINGS = {"precision": "float32", "batch_tokens": 256, "tokens": 5120, "log_every": 1, "eval_tokens": 1024}
SETTINGS |= {"checkpoint_every": 4, "model": SMALL, "data_from": [0.5, "my plays:0.9", "code:0.1"]}


class StopBefore(NullReporter):
    """Reporter that ends the process before a step, as a power cut would."""

    def __init__(self, step):
        self.last = step - 1

    def step(self, step):
        if step == self.last:
            raise MemoryError


@pytest.mark.parametrize("stop", [10, 14])
def test_a_run_resumes_exactly_across_a_stage(cwd, tmp_path, stop):
    train = partial(antransformer.train, data=["code:0.7", "my plays:0.3"], **SETTINGS)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    result = train(out=whole).result
    assert set(result.val_loss_by_source) == {"data", "my plays"}
    with pytest.raises(MemoryError):
        train(out=stopped, progress=StopBefore(stop))
    assert max(losses(stopped)) < stop
    antransformer.train(out=stopped, resume=True)
    assert losses(stopped) == losses(whole) and weights(stopped, 20) == weights(whole, 20)


@pytest.mark.slow
def test_two_processes_train_on_the_same_windows(cwd, tmp_path):
    words = ["train", "--data", "code:0.7", "my plays:0.3", "--data-from", "0.5", "my plays", *TEN_STEPS]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--processes", "2"]) == 0
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], rel=1e-4)
    assert two[-1]["val_loss_by_source"] == pytest.approx(one[-1]["val_loss_by_source"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        (["--data", "code:0.7", "my plays"], ["my plays"]),
        (["--data", "code", "my plays"], ["code"]),
        (["--data", "code:1", "other:1"], ["other"]),
        (["--data", "my plays:1", "./my plays:1"], ["my plays", "twice"]),
        (["--data", "code:1", "bpe:1"], ["bpe", "tokenizer"]),
        (["--data", "code:-1", "my plays:2"], ["code", -1]),
        (["--data", "code:1", "texts:1"], ["texts", "prepare"]),
        (["--data", "code", "--data-from", "1.5", "my plays"], ["data_from", 1.5]),
        (["--data", "code", "--data-from", "my plays"], ["data_from"]),
        (["--data", "code", "--data-from", "0.01", "my plays"], ["data_from", 0.01, 10]),
        (["--data", "code", "--data-from", "0.8", "my plays:1", "bpe:1"], ["bpe", "tokenizer"]),
        (["--data", "code:1", "my plays:1", "--model.context=4096", "--batch-tokens=4096", "--tokens=40960"], [4097]),
    ],
)
def test_wrong_mixtures_leave_nothing_behind(cwd, tmp_path, capsys, options, facts):
    assert mentions(refused(["train", "--out", tmp_path / "run", *TEN_STEPS, *options], capsys), *facts)
    assert not list(tmp_path.iterdir())


def test_other_weights_are_refused_on_resume(mixed, cwd, capsys):
    words = ["train", "--out", mixed, "--resume"]
    assert mentions(refused([*words, "--data", "code:1", "my plays:1"], capsys), "data")
    assert mentions(refused([*words, "--data-from", "0.7", "code"], capsys), "data")
    assert main([str(word) for word in (*words, "--data", "code:3", "my plays:1")]) == 0


def test_experiments_train_on_mixtures(cwd, tmp_path, in_process):
    words = ["compare", "--data", "code:0.5", "my plays:0.5", "--budgets", "2560", "--seeds=2", "--lr-trials=1"]
    sizes = [word for word in TEN_STEPS if word.startswith(("--model", "--batch", "--eval", "--precision"))]
    assert main([*words, "--tuning-trials=1", *sizes, "--out", str(tmp_path / "compare")]) == 0
    line = read_metrics(next((tmp_path / "compare").rglob("metrics.jsonl")))[-1]
    assert set(line["val_loss_by_source"]) == {"data", "my plays"}


def test_the_prompts_of_samples_are_text_of_the_first_source(cwd):
    dataset = open_mixture("'my plays:1' code:1", None, Dataset.open)
    assert prompts(dataset, 64) == prompts(Dataset.open("my plays"), 64)
