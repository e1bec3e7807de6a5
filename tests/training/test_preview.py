"""The preview of a run: origins of the settings, size, memory and time."""

import re

import pytest

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.models import build
from antransformer.training.config import normalize_settings, resolve_config
from antransformer.training.data import epochs_note
from antransformer.training.preview import preview, settings_with_origins
from helpers.commands import refused
from helpers.messages import mentions
from helpers.small import SMALL, SMALL_OPTIONS


def origins(options, file=None, vocab_size=257):
    options, file = normalize_settings(options, "options"), normalize_settings(file or {}, "file")
    config = resolve_config({**file, **options}, vocab_size)
    return {item.name: item.origin for item in settings_with_origins(config, options, file, "my.yaml")}


def test_every_setting_has_its_origin():
    found = origins({"lr": 1e-3, "model": {"width": 64, "head_dim": 32}}, {"tokens": "1M", "seed": 4})
    assert found["lr"] == found["model.width"] == "option"
    assert found["tokens"] == found["seed"] == "file my.yaml"
    assert found["optimizer"] == "recipe best" and found["model.layers"] == "preset nano"
    assert found["batch_tokens"] == found["beta1"] == "default"
    assert found["model.vocab_size"] == "data" and found["precision"] == "device"


def test_laws_are_the_origin_only_in_their_range():
    found = origins({"preset": "32m", "batch_tokens": "64K"})
    assert found["lr"] == found["tokens"] == "law of the paper" and found["batch_tokens"] == "option"


def test_the_origin_of_the_default_rate_of_muon():
    assert mentions(origins({"preset": "32m"})["muon_lr"], 0.04, "600 steps")
    assert origins({"preset": "32m", "tokens": "10M"})["muon_lr"] == "default"


def test_the_origin_of_a_horizon_that_is_off():
    assert "98 steps" in origins({"tokens": 98 * 2048})["lr_horizon"]
    assert origins({"tokens": "10M"})["lr_horizon"] == "default"
    assert "rate" in origins({"tokens": "10M", "muon_lr": 0.02})["horizon_exponent"]
    assert origins({"lr_horizon": 0})["lr_horizon"] == "option"


def test_numbers_of_a_preview(corpus):
    dataset = Dataset.open(corpus)
    config = resolve_config({"data": str(corpus), "model": SMALL, "batch_tokens": 256, "tokens": 256 * 50}, 257)
    lines = []
    shown = preview(config, dataset, {}, {}, None, lines.append)
    assert len(lines) == 1 and shown.epochs == ""
    assert shown.parameters == build(config.model).parameter_count()
    assert shown.seconds == pytest.approx(50 * shown.seconds_per_step) and shown.seconds > 0
    assert shown.memory > 16 * shown.parameters  # parameters, gradients and two moments in float32


def test_no_step_is_timed_that_does_not_fit(corpus, capsys, monkeypatch):
    monkeypatch.setattr("antransformer.training.preview.free_memory", lambda _: 2.0**20)
    monkeypatch.setattr("antransformer.training.preview.seconds_per_token", None)
    words = ["train", "--data", str(corpus), "--dry-run", "--tokens", "20K", "--batch-tokens", "256", *SMALL_OPTIONS]
    assert main(words) == 0
    assert mentions(capsys.readouterr().out.splitlines()[-1], "GiB", "--micro-batch-size")


def test_a_dry_run_prints_and_writes_nothing(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["train", "--data", str(corpus), "--dry-run", "--tokens", "20K", "--batch-tokens", "256", *SMALL_OPTIONS]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[-1] for line in lines if len(line.split()) > 2}
    assert rows["batch_tokens"] == "option" and rows["beta1"] == "default" and rows["ema"] == "best"
    assert mentions(lines[-1], "GiB") and re.search(r"\d (seconds|hours)\b", lines[-1])
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_fewer_steps_than_are_timed(corpus, capsys):
    words = ["train", "--data", str(corpus), "--dry-run", "--tokens", "512", "--batch-tokens", "256", *SMALL_OPTIONS]
    assert main(words) == 0
    assert re.search(r"\d s a step, \d+ seconds", capsys.readouterr().out)


def test_what_a_dry_run_cannot_do_is_refused(corpus, tmp_path, capsys, monkeypatch):
    words = ["train", "--data", str(corpus), "--dry-run", "--batch-tokens", "256", *SMALL_OPTIONS]
    for more in (["--resume", "--out", str(tmp_path)], ["--processes=2"], ["--profile"], ["--rewarm=0.1"]):
        assert mentions(refused([*words, *more], capsys), more[0].partition("=")[0])
    monkeypatch.setenv("RANK", "0")
    assert mentions(refused(words, capsys), "torchrun")


def test_a_run_longer_than_its_text_says_how_often_it_reads_it(corpus):
    dataset = Dataset.open(corpus)
    tokens = dataset.split("train").tokens
    settings = {"data": str(corpus), "model": SMALL, "batch_tokens": 256}
    longer = resolve_config({**settings, "tokens": 256 * (5 * tokens // 2 // 256)}, 257)
    assert mentions(epochs_note(longer, dataset), 2.5, f"{tokens:,}")
    assert epochs_note(resolve_config({**settings, "tokens": 256 * (tokens // 256)}, 257), dataset) == ""
