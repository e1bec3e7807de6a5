"""The verb train with a schedule, and with more tokens for an existing run."""

import shutil

import pytest

from antransformer.cli import main
from antransformer.training import extension, run_folder
from antransformer.training.metrics import read_metrics
from helpers.commands import TEN_STEPS, refused
from helpers.messages import mentions


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_finished_run_is_extended_and_resumed(trained, tmp_path, capsys):
    run = shutil.copytree(trained, tmp_path / "run")
    resume = ["train", "--out", str(run), "--resume"]
    assert main([*resume, "--tokens", "5120", "--rewarm", "0.2"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if mentions(line, 2560, 5120))
    assert mentions(line, 10, 20, 12) and "rate 0." in line
    config, lines = run_folder.saved_config(run), read_metrics(run / "metrics.jsonl")
    assert (config.steps, config.initial_steps, config.rewarm_from, config.rewarm_steps) == (20, 10, 10, 2)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert lines[11]["lr"] == pytest.approx(lines[0]["lr"], rel=0.05) and f"{lines[10]['lr']:.4g}" in line
    before = (run / "metrics.jsonl").read_bytes()
    assert main(resume) == main([*resume, "--tokens=5120"]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before
    for last in (["--dry-run"], ["--out", tmp_path / "again"]):  # a new run cannot repeat the extension
        capsys.readouterr()
        message = refused(["train", "--config", run / "config.yaml", *last], capsys)
        assert mentions(message, *extension.REWARM_SETTINGS) and "checkpoint" not in message
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("--resume --tokens 5120", "--rewarm --out 10"),
        ("--resume --tokens 5120 --rewarm 0", "rewarm 0"),
        ("--resume --tokens 5120 --rewarm 1", "rewarm 1"),
        ("--resume --tokens 5120 --rewarm -0.5", "rewarm -0.5"),
        ("--resume --tokens 5120 --rewarm half", "rewarm half"),
        ("--resume --tokens 1280", "tokens 1280 2560"),
        ("--resume --tokens 2560 --rewarm 0.5", "rewarm tokens 2560"),
        ("--resume --rewarm 0.5", "rewarm tokens 2560"),
        ("--tokens 5120 --rewarm 0.5", "rewarm resume"),
        ("--resume --schedule linear", "schedule cosine linear"),
        ("--resume --decay-fraction 0.5", "decay_fraction 0.5"),
        ("--resume --recipe paper", "recipe best paper"),
        ("--resume --lr-horizon 5", "lr_horizon 0 5"),
    ],
)
def test_wrong_extension_changes_nothing(trained, capsys, options, facts):
    before = contents(trained)
    assert mentions(refused(["train", "--out", trained, *options.split()], capsys), *facts.split())
    assert contents(trained) == before


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("--schedule wds", "schedule wsd wds"),
        ("--schedule wsd", "wsd decay_fraction"),
        ("--decay-fraction 1.5", "decay_fraction 1.5"),
        ("--decay-fraction 0.6 --warmup-fraction 0.5", "decay_fraction warmup_fraction 0.6 0.5"),
        ("--rewarm-from 3", "--rewarm-from"),
        ("--recipe paper --horizon-exponent 0.5", "horizon_exponent lr_horizon"),
    ],
)
def test_wrong_schedule_creates_nothing(corpus, tmp_path, capsys, options, facts):
    train = ["train", "--data", corpus, *TEN_STEPS, "--out", tmp_path / "run", *options.split()]
    assert mentions(refused(train, capsys), *facts.split())
    assert not (tmp_path / "run").exists()
