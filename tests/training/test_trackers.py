"""Trackers and text samples of a run."""

import time
from types import SimpleNamespace

import pytest

from antransformer.cli import main
from antransformer.training.metrics import read_metrics
from helpers.commands import TEN_STEPS
from helpers.messages import mentions
from helpers.trainers import losses, resume, run_until, start


def test_samples_are_repeatable_and_do_not_change_the_run(corpus, tmp_path):
    start(corpus, tmp_path / "plain", tokens=256 * 6, ema=0.5).run()
    for name in ("one", "two"):
        start(corpus, tmp_path / name, tokens=256 * 6, ema=0.5, sample_every=2, log_every=3).run()
    lines = read_metrics(tmp_path / "one" / "metrics.jsonl")
    assert {line["step"]: len(line["samples"]) for line in lines if "samples" in line} == {2: 2, 4: 2, 6: 2}
    again = read_metrics(tmp_path / "two" / "metrics.jsonl")
    assert [line.get("samples") for line in lines] == [line.get("samples") for line in again]
    assert lines[-1]["val_loss"] == read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]["val_loss"]


def test_the_second_sample_continues_the_validation_text(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256, sample_every=1)
    trainer.run()
    beginning = bytes(int(token) for token in trainer.validation.arrays[0][:16]).decode()
    _, continued = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["samples"]
    assert continued.startswith(beginning) and len(continued) > len(beginning)


def test_samples_are_printed(corpus, tmp_path, capsys):
    words = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--sample-every", "5", *TEN_STEPS]
    assert main(["train", *words]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sample at step")]
    assert len(lines) == 4 and mentions(lines[0], 5) and mentions(lines[2], 10)


def test_wandb_keeps_an_offline_run_with_config_numbers_and_samples(corpus, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_until(start(corpus, tmp_path / "run", tokens=256 * 6, checkpoint_every=2, track="wandb", sample_every=3), 4)
    identifier = (tmp_path / "run" / "wandb-id.txt").read_text().strip()
    trainer, _ = resume(corpus, tmp_path / "run")
    trainer.run()
    offline = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identifier}/*.wandb"))
    assert len(offline) == 2
    expected = {b"warmup_fraction", b"val_loss", b"grad_norm", b"sample 1", identifier.encode()}
    deadline = time.monotonic() + 60
    # wandb's own process writes the last records after the run has ended.
    while missing := {part for part in expected if not any(part in path.read_bytes() for path in offline)}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.05)
    assert len(losses(tmp_path / "run")) == 6


def test_wandb_without_an_account_is_refused_before_the_folder_is_made(corpus, tmp_path, monkeypatch, capsys):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setattr(wandb, "login", lambda prompt: False)
    settings = SimpleNamespace(settings=SimpleNamespace(mode="online"))
    monkeypatch.setattr(wandb, "setup", lambda: settings)
    words = ["--data", str(corpus), "--out", str(tmp_path / "run"), "--track", "wandb", *TEN_STEPS]
    assert main(["train", *words]) == 2
    assert mentions(capsys.readouterr().err, "wandb login", "WANDB_MODE=offline")
    assert not (tmp_path / "run").exists()
