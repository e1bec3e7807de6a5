"""Resuming an interrupted run, with bit-identical results or a clear refusal."""

import contextlib
import itertools
import json
import random
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import antransformer
from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.errors import CheckpointError, ConfigError, DivergedError, RunStoppedError
from antransformer.training import launch, run_folder
from antransformer.training.config import LEGACY_DEFAULTS
from antransformer.training.metrics import read_metrics
from antransformer.training.run_folder import open_checkpoint, run_folder_of, saved_config
from antransformer.training.stop_signals import StopSignals
from antransformer.training.trainer import Trainer
from helpers.faults import timeless_metrics
from helpers.messages import mentions
from helpers.small import SMALL_OPTIONS, Notes
from helpers.trainers import (
    OPTIMIZED,
    command,
    losses,
    poison,
    resume,
    run_until,
    start,
    train_words,
    wait_for_step,
    weights,
)

STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("options", OPTIMIZED, ids="-".join)
def test_resumed_run_is_bit_identical(corpus, tmp_path, options):
    architecture, optimizer = options
    options = {"model": {"architecture": architecture}, "optimizer": optimizer}
    start(corpus, tmp_path / "uninterrupted", **options).run()
    interrupted = start(corpus, tmp_path / "interrupted", **options)
    run_until(interrupted, 13)
    assert max(losses(tmp_path / "interrupted")) == 12
    trainer, notes = resume(corpus, tmp_path / "interrupted")
    assert len(notes) == 1 and mentions(notes[0], f"{tmp_path}/interrupted/checkpoints/step-00000010")
    trainer.run()
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "uninterrupted")
    assert weights(tmp_path / "interrupted", 20) == weights(tmp_path / "uninterrupted", 20)


@pytest.mark.parametrize("optimizer", ["adam", "normuon"])
def test_resumed_run_with_cautious_decay_is_bit_identical(corpus, tmp_path, optimizer):
    options = {"model": {"architecture": "gpt+"}, "weight_decay": 0.5, "cautious_weight_decay": True}
    start(corpus, tmp_path / "uninterrupted", optimizer=optimizer, **options).run()
    run_until(start(corpus, tmp_path / "interrupted", optimizer=optimizer, **options), 13)
    resume(corpus, tmp_path / "interrupted")[0].run()
    assert losses(tmp_path / "interrupted") == losses(tmp_path / "uninterrupted")
    assert weights(tmp_path / "interrupted", 20) == weights(tmp_path / "uninterrupted", 20)
    start(corpus, tmp_path / "plain", **{**options, "optimizer": optimizer, "cautious_weight_decay": False}).run()
    assert losses(tmp_path / "plain")[20] != losses(tmp_path / "uninterrupted")[20]


def test_run_killed_at_a_random_step_resumes_bit_identically(corpus, tmp_path, capfd):
    length = ["--tokens", str(256 * 200), "--checkpoint-every", "20", "--eval-every", "200"]
    assert main(train_words(corpus, tmp_path / "uninterrupted", *length)) == 0
    kill_at = random.SystemRandom().randrange(1, 120)
    process = subprocess.Popen(command(corpus, tmp_path / "killed", *length), stdout=subprocess.PIPE)
    wait_for_step(tmp_path / "killed", kill_at, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    reached = max(losses(tmp_path / "killed"))
    assert reached < 200
    capfd.readouterr()
    assert main([*train_words(corpus, tmp_path / "killed", *length), "--resume"]) == 0
    output = capfd.readouterr().out
    steps = [int(step) for step in re.findall(r"step-(\d{8})", output)]  # where it resumes, and its last checkpoint
    assert any(step <= reached for step in steps) or reached < 25, (kill_at, output)
    assert losses(tmp_path / "killed") == losses(tmp_path / "uninterrupted"), kill_at
    assert weights(tmp_path / "killed", 200) == weights(tmp_path / "uninterrupted", 200), kill_at


@pytest.mark.parametrize("number", STOPS)
def test_signal_saves_a_checkpoint_and_prints_the_command_to_resume(corpus, tmp_path, number):
    process = subprocess.Popen(
        command(corpus, tmp_path / "run", "--tokens", "2M", "--checkpoint-every", "100000", "--eval-every", "100000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # ignored where tests run under nohup
    )
    wait_for_step(tmp_path / "run", 7, process)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    steps = losses(tmp_path / "run")
    step = max(steps)
    announced, complaint = complaint.splitlines()
    assert mentions(announced, number.name)
    assert mentions(complaint, step, number.name, f"{tmp_path}/run/checkpoints/step-{step:08d}")
    assert f" train --out {tmp_path}/run --resume" in complaint
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == step


class SignalError(Exception):
    """Raised by a signal that would end a run."""


def raise_error(*_):
    raise SignalError


@pytest.fixture
def raising_signals():
    before = [(number, signal.signal(number, raise_error)) for number in STOPS]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.usefixtures("raising_signals")
@pytest.mark.parametrize("variable", [None, "RANK", "ANTRANSFORMER_FORWARDED_SIGNALS"])
def test_signals_that_follow_in_the_same_stop_are_ignored(variable, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    ignored = {"SIGINT": ["SIGHUP"], "SIGTERM": ["SIGHUP"], "SIGHUP": ["SIGHUP", "SIGTERM"]}
    if variable:
        ignored["SIGTERM"] = ["SIGHUP", "SIGTERM"]
    for first, second in itertools.product(STOPS, repeat=2):
        stops = second.name not in ignored[first.name]
        with pytest.raises(SignalError) if stops else contextlib.nullcontext(), StopSignals() as signals:
            signal.raise_signal(first)
            signal.raise_signal(second)
        assert signals.received is first
        assert all(signal.getsignal(number) is raise_error for number in STOPS)


def test_hangup_stays_ignored_under_nohup():
    received = []
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGHUP)
            received.append(signals.received)
        assert received == [None] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, previous)


@pytest.mark.usefixtures("raising_signals")
@pytest.mark.parametrize("step", [10, 15])
def test_validation_and_samples_that_a_stop_left_out_are_made_up(corpus, tmp_path, monkeypatch, step):
    options = {"eval_every": 10, "sample_every": 5}
    start(corpus, tmp_path / "uninterrupted", **options).run()
    stopped = start(corpus, tmp_path / "stopped", **options)
    update = stopped.update
    stopped.update = lambda number: (signal.raise_signal(signal.SIGTERM) if number == step else None, update(number))[1]
    with pytest.raises(RunStoppedError):
        stopped.run()
    last = read_metrics(tmp_path / "stopped/metrics.jsonl")[-1]
    assert last["step"] == step and not {"val_loss", "samples"} & last.keys()
    tracked = []
    tracker = SimpleNamespace(write=tracked.append, close=lambda: None)
    monkeypatch.setattr("antransformer.training.trainer.open_trackers", lambda *_: [tracker])
    resume(corpus, tmp_path / "stopped")[0].run()
    assert timeless_metrics(tmp_path / "stopped") == timeless_metrics(tmp_path / "uninterrupted")
    assert [line["step"] for line in tracked] == list(range(step, 21))
    assert tracked[0].keys() == {"step", "samples", *(["val_loss", "bits_per_byte"] if step == 10 else [])}


@pytest.mark.parametrize("saved", [0, 5])
def test_a_second_signal_stops_at_once_and_names_the_newest_checkpoint(corpus, tmp_path, saved):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 20, checkpoint_every=5)
    update = trainer.update
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # test workers ignore it

    def interrupted(step):
        if step == saved + 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        return update(step)

    trainer.update = interrupted
    try:
        with pytest.raises(RunStoppedError) as error:
            trainer.run()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert error.value.status == 130
    folders = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")]
    assert folders == (["step-00000005"] if saved else [])
    assert mentions(error.value, *folders, *(["--resume"] if saved else []))


def test_a_second_signal_while_the_checkpoint_is_written_reports_it(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 20, checkpoint_every=20)
    wait, update = trainer.writer.wait, trainer.update
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(step):
        if step == 3:
            signal.raise_signal(signal.SIGINT)
        return update(step)

    def interrupted_wait():
        if trainer.done == 3 and trainer.writer._pending is not None:
            signal.raise_signal(signal.SIGINT)
        wait()

    trainer.update, trainer.writer.wait = interrupted, interrupted_wait
    try:
        with pytest.raises(RunStoppedError) as error:
            trainer.run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000003"]
    assert "no checkpoint" not in str(error.value) and mentions(error.value, "step-00000003", "--resume")


def test_the_folder_of_the_checkpoints_opens_as_its_run_does(corpus, tmp_path, monkeypatch):
    path = start(corpus, tmp_path / "run", tokens=512, batch_tokens=256, checkpoint_every=1).run().checkpoint
    assert open_checkpoint(path.parent)[0].path == open_checkpoint(tmp_path / "run")[0].path == path
    monkeypatch.chdir(path.parent)
    assert run_folder_of(open_checkpoint(Path())[0]) == tmp_path / "run"


def test_a_run_resumes_in_another_working_directory(corpus, tmp_path, monkeypatch):
    words = ["train", "--tokens", "1280", "--batch-tokens", "256", "--eval-tokens", "256", *SMALL_OPTIONS]
    monkeypatch.chdir(corpus.parent)
    assert main([*words, "--data", corpus.name, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--out", "run", "--resume"]) == 0
    monkeypatch.chdir(corpus.parent)
    (tmp_path / "linked").symlink_to(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--data", str(corpus), "--init", "linked", "--out", "tuned"]) == 0
    assert saved_config(tmp_path / "tuned").init == str(tmp_path / "run")


def test_printed_commands_are_words_of_a_shell(corpus, tmp_path, capsys):
    out = tmp_path / "a run; of mine"
    words = ["train", "--tokens", "256", "--batch-tokens", "256", "--eval-tokens", "256", *SMALL_OPTIONS]
    assert main([*words, "--data", str(corpus), "--out", str(out)]) == 0
    command = capsys.readouterr().out.splitlines()[-1].removeprefix("next: ")
    assert shlex.split(command)[-1] == str(out)
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_any_of_the_newer_settings_resumes(corpus, tmp_path):
    old = LEGACY_DEFAULTS
    path = start(corpus, tmp_path / "run", **old, tokens=256 * 5).run().checkpoint
    state, file = json.loads((path / "state.json").read_text()), tmp_path / "run/config.yaml"
    config = yaml.safe_load(file.read_text())
    for settings in (state["extra"]["settings"], config):
        assert {name: settings.pop(name) for name in old if name in settings}.items() <= old.items()
    assert not old.keys() & config.keys()
    (path / "state.json").write_text(json.dumps(state))
    file.write_text(yaml.safe_dump(config))
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == 5 and {name: getattr(trainer.config, name) for name in old} == old
    assert {group["initial_lr"] for group in trainer.optimizer.param_groups} == {1e-2}
    with pytest.raises(ConfigError, match="paper"):
        antransformer.train(config=file, recipe="best", out=tmp_path / "other")
    repeated = antransformer.train(config=file, out=tmp_path / "repeated")
    assert {name: getattr(saved_config(tmp_path / "repeated"), name) for name in old} == old
    assert weights(tmp_path / "repeated", 5) == weights(tmp_path / "run", 5) and repeated.result.checkpoint


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lr: 0.01", "lr: 0.02"),
        ("lr_width: 128", "lr_width: 0"),
        ("seed: 0", "seed: 1"),
        ("tokens: 1280", "tokens: 768"),
        ("optimizer: adam", "optimizer: muon"),
    ],
)
def test_edited_config_is_refused(corpus, tmp_path, old, new):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    text = (tmp_path / "run/config.yaml").read_text()
    assert old in text
    (tmp_path / "run/config.yaml").write_text(text.replace(old, new))
    with pytest.raises(CheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, tmp_path / "run", old.partition(":")[0], "config.yaml")


def test_incomplete_run_folder_can_be_used(corpus, tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/tokenizer.json").write_text("{")
    assert start(corpus, tmp_path / "run", tokens=256).run().step == 1


def test_resuming_refuses_changes_of_the_result(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    for change, parts in (
        ({"architecture": "gpt+"}, ("model.architecture", "angpt", "gpt+")),
        ({"model": {"width": 128}}, ("model.width", 64, 128)),
        ({"lr": 0.5}, ("lr", 0.01, 0.5)),
        ({"seed": 9}, ("seed", 0, 9)),
    ):
        with pytest.raises(CheckpointError) as error:
            resume(corpus, tmp_path / "run", **change)
        assert mentions(error.value, tmp_path / "run", "--out", *parts)
    trainer, _ = resume(corpus, tmp_path / "run", log_every=2, keep_checkpoints=1)
    assert trainer.config.log_every == 2 and trainer.config.lr == 0.01


def test_resuming_refuses_other_data(corpus, tmp_path):
    from antransformer.data import prepare

    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    (tmp_path / "text").mkdir()
    for name in "abcdefgh":
        (tmp_path / "text" / f"{name}.txt").write_text(f"{name} other words " * 200)
    prepare([tmp_path / "text"], tmp_path / "other", tokenizer="byte", val_fraction=0.6)
    config = run_folder.resumed_config(tmp_path / "run", {"data": str(tmp_path / "other")})
    with pytest.raises(CheckpointError) as error:
        Trainer(config, Dataset.open(tmp_path / "other"), tmp_path / "run", Notes(), resume=True)
    assert mentions(error.value, tmp_path / "run", tmp_path / "other")


def test_data_with_another_tokenizer_is_refused_before_the_first_checkpoint_too(corpus, tmp_path):
    """The tokenizer in the run folder would decode such data wrongly."""
    from antransformer.data import prepare

    shutil.copytree(corpus, tmp_path / "data")
    run_until(start(tmp_path / "data", tmp_path / "run"), 3)
    for folder in (tmp_path / "data", tmp_path / "text"):
        shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / f"text/{number}.txt").write_text(f"{number} other words of another text " * 40)
    prepare([tmp_path / "text"], tmp_path / "data", bpe_vocab_size=257)
    with pytest.raises(CheckpointError) as error:
        antransformer.train(out=tmp_path / "run", resume=True)
    assert mentions(error.value, tmp_path / "run", tmp_path / "data", "tokenizer", "--out")
    assert not run_folder.has_started(tmp_path / "run")


def test_a_run_that_another_process_ends_meanwhile_is_not_repeated(corpus, tmp_path, monkeypatch):
    """The lock is taken before the checkpoint is read, since the process that holds it may write one more."""
    run_until(start(corpus, tmp_path / "run"), 13)
    shutil.copytree(tmp_path / "run", tmp_path / "ended")
    resume(corpus, tmp_path / "ended")[0].run()
    free = launch.lock

    @contextlib.contextmanager
    def lock_after_the_end(folder):
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "ended", folder)
        with free(folder):
            yield

    monkeypatch.setattr(launch, "lock", lock_after_the_end)
    lines = (tmp_path / "ended/metrics.jsonl").read_text()
    trained = antransformer.train(out=tmp_path / "run", resume=True)
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines
    assert trained.result.checkpoint.name == "step-00000020"
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "ended", 20)


def test_a_run_without_its_checkpoints_keeps_its_old_metrics(corpus, tmp_path):
    start(corpus, tmp_path / "run").run()
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    shutil.rmtree(tmp_path / "run/checkpoints")
    for _ in range(2):
        run_until(resume(corpus, tmp_path / "run")[0], 3)
    assert (tmp_path / "run/metrics.jsonl.old").read_text() == lines


def test_a_finished_run_without_its_metrics_can_be_resumed(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    (tmp_path / "run/metrics.jsonl").unlink()
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 0
    assert not (tmp_path / "run/loss.png").exists()


def test_changed_settings_are_recorded_for_the_next_resume(corpus, tmp_path):
    run_until(start(corpus, tmp_path / "run", checkpoint_every=5, keep_checkpoints=1), 7)
    before = (tmp_path / "run/config.yaml").read_text()
    for options, steps in (
        ({}, [20]),
        ({"keep_every": 2, "tokens": 256 * 30, "rewarm": 0.5}, [20, 22, 24, 26, 28, 30]),
    ):
        antransformer.train(out=tmp_path / "run", resume=True, **options)
        folders = (tmp_path / "run/checkpoints").glob("step-*")
        assert sorted(int(path.name[5:]) for path in folders) == steps
        assert ((tmp_path / "run/config.yaml").read_text() == before) == (not options)
    assert saved_config(tmp_path / "run").keep_every == 2


def test_fewer_skipped_steps_than_before_may_be_allowed(corpus, tmp_path):
    run = start(corpus, tmp_path / "run", max_skipped_steps=5, checkpoint_every=5)
    poison(run, 2, 3, 4)
    run_until(run, 7)
    run, _ = resume(corpus, tmp_path / "run", max_skipped_steps=2)
    poison(run, 8)
    with pytest.raises(DivergedError) as error:
        run.run()
    assert mentions(error.value, 8, 2)


def test_the_micro_batch_may_change_when_a_run_resumes(corpus, tmp_path):
    start(corpus, tmp_path / "whole").run()
    run_until(start(corpus, tmp_path / "run"), 13)
    antransformer.train(out=tmp_path / "run", resume=True, micro_batch_size=1)
    assert run_folder.saved_config(tmp_path / "run").micro_batch_size == 1
    ends = [losses(tmp_path / name)[20] for name in ("run", "whole")]
    assert ends[0] == pytest.approx(ends[1], abs=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device exists")
def test_a_missing_device_is_found_before_the_data_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "open_mixture", lambda *_: pytest.fail("the data was opened"))
    with pytest.raises(ConfigError, match="cuda"):
        antransformer.train(device="cuda", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
