"""Faults of real runs, provoked: NaN losses, dead and hung ranks, kills during writes, full disks, permissions.

Long campaigns with counts are in helpers/faults.py. Other faults are tested next to their code: signals, damaged
checkpoints and a full disk in training/test_trainer.py, failures of one rank in test_parallel.py, locks in
test_lock.py, changed data in data/test_dataset.py, malformed files in test_fuzz.py.
"""

import contextlib
import errno
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from antransformer.cli import main
from antransformer.errors import DivergedError, MachineError
from antransformer.lock import lock
from antransformer.training.checkpointing import checkpoint
from antransformer.training.distributed.liveness import fresh_store
from antransformer.training.metrics import read_metrics
from helpers.faults import Campaign, Job, timeless_metrics
from helpers.ranks import fork, status_of
from helpers.small import SMALL_OPTIONS
from helpers.trainers import losses, poison, resume, run_until, start, weights

# Steps with a loss or gradient that is not finite


@pytest.mark.parametrize("options", [("angpt", "adam"), ("ngpt", "adam"), ("gpt+", "muon")], ids="-".join)
def test_a_skipped_step_changes_nothing(corpus, tmp_path, options):
    architecture, optimizer = options
    settings = {"model": {"architecture": architecture}, "optimizer": optimizer, "max_skipped_steps": 2}
    poisoned = start(corpus, tmp_path / "poisoned", **settings)
    poison(poisoned, 1, 7)
    poisoned.run()
    expected = start(corpus, tmp_path / "expected", **settings)
    update = expected.update
    expected.update = lambda step: [] if step in (1, 7) else update(step)
    expected.run()
    assert finite_losses(tmp_path / "poisoned") == finite_losses(tmp_path / "expected")
    assert weights(tmp_path / "poisoned", 20) == weights(tmp_path / "expected", 20)
    lines = read_metrics(tmp_path / "poisoned/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if "loss" not in line and "grad_norm" not in line] == [1, 7]
    assert [line["skipped"] for line in lines] == [1] * 6 + [2] * 14
    # Each note has the step, the number of skipped steps and the maximum.
    assert [numbers(note) for note in poisoned.reporter] == [["1", "1", "2"], ["2", "2", "7"]]


def numbers(text):
    """Return all integers in a text as strings, smallest first."""
    return sorted(re.findall(r"\b\d+\b", text), key=int)


def finite_losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_a_metrics_line_has_the_mean_loss_of_the_steps_not_skipped(corpus, tmp_path):
    for name, every in (("each", 1), ("some", 5)):
        trainer = start(corpus, tmp_path / name, tokens=256 * 5, max_skipped_steps=1, log_every=every)
        poison(trainer, 3, spoil=lambda loss: loss + math.inf)  # the gradient stays finite
        trainer.run()
    each = finite_losses(tmp_path / "each")
    assert list(each) == [1, 2, 4, 5]
    assert losses(tmp_path / "some") == {5: pytest.approx(sum(each.values()) / 4, rel=1e-6)}


def test_the_limit_of_skipped_steps_is_for_the_entire_run(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", max_skipped_steps=1, checkpoint_every=2)
    poison(trainer, 1, 2)
    with pytest.raises(DivergedError) as error:
        trainer.run()
    assert {"1", "2"} <= set(numbers(str(error.value))) and "step-" not in str(error.value)  # no checkpoint yet
    trainer, _ = resume(corpus, tmp_path / "run", max_skipped_steps=2)
    poison(trainer, 1, 2)  # leaves a checkpoint without optimizer moments
    run_until(trainer, 4)
    trainer, _ = resume(corpus, tmp_path / "run", max_skipped_steps=2, checkpoint_every=20)
    poison(trainer, 8)
    with pytest.raises(DivergedError) as error:
        trainer.run()
    path = str(tmp_path / "run/checkpoints/step-00000002")
    assert path in str(error.value) and {"2", "8"} <= set(numbers(str(error.value).replace(path, "")))
    trainer, _ = resume(corpus, tmp_path / "run", max_skipped_steps=3)
    assert (trainer.done, trainer.skipped) == (2, 2)
    poison(trainer, 8)
    trainer.run()
    assert read_metrics(tmp_path / "run/metrics.jsonl")[-1]["skipped"] == 3


# Dead and hung ranks


def test_a_hung_rank_is_named_and_the_job_restarts(corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    size = ["--batch-tokens=256", f"--tokens={256 * 20}", "--lr=1e-2", "--timeout=10", "--log-every=1"]
    every = ["--checkpoint-every=5", "--eval-every=20", "--eval-tokens=2048"]
    arguments = [
        "antransformer",
        "train",
        "--recipe=paper",
        "--precision=float32",
        "--data",
        corpus,
        "--out",
        out,
        *size,
        *every,
        *SMALL_OPTIONS,
    ]
    with Job(arguments, log, restarts=1) as job:
        ranks = job.wait_for_ranks()
        wait_for(lambda: checkpoint.step_folders(out / "checkpoints"), job)
        os.kill(ranks[1], signal.SIGSTOP)
        wait_for(lambda: "error:" in log.read_text(), job)
        os.kill(ranks[1], signal.SIGCONT)  # a stopped process ignores SIGTERM, and torchrun would wait 30 s
        assert job.wait_for_ranks(ranks.values())
        assert job.process.wait(300) == 0, log.read_text()
    [error] = [line for line in log.read_text().splitlines() if "error:" in line]
    for fact in ("rank 1", ranks[1], socket.gethostname(), "--timeout"):
        assert re.search(rf"(?<!\w){fact}\b", error), fact
    assert min(map(int, re.findall(rf"{out}/checkpoints/step-(\d+)", log.read_text()))) < 20  # it was resumed
    start(corpus, tmp_path / "single", checkpoint_every=5, eval_every=20).run()
    lines, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, tmp_path / "single"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4)
    assert lines[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-4)


def wait_for(condition, job, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert job.process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_restarted_ranks_do_not_meet_ranks_of_an_earlier_start():
    """Four starts share one store, as under torchrun; the second is killed before all ranks have met."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, delays in enumerate([(0, 0), (0, 3), (0, 0.3), (0.3, 0)]):
        # No rank connects before all are forked: the server's thread looks up their names, and a fork meanwhile would
        # copy a lock that nothing releases.
        gate, forked = os.pipe()
        ranks = [
            fork(exchange_attempts, server.port, rank, attempt, delay, gate, forked)
            for rank, delay in enumerate(delays)
        ]
        os.close(forked)
        os.close(gate)
        if attempt == 1:
            time.sleep(0.5)
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        assert {status_of(pid) for pid in ranks} == {-signal.SIGKILL if attempt == 1 else 0}


def exchange_attempts(port, rank, attempt, delay, gate, forked):
    os.close(forked)
    os.read(gate, 1)  # until the parent has closed its end too
    time.sleep(delay)
    store = fresh_store(dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), rank, 2)
    store.set(f"{rank}", str(attempt))
    return int(store.get(f"{1 - rank}").decode() != str(attempt))


@pytest.mark.slow
def test_ranks_killed_at_random_moments(tmp_path):
    campaign = Campaign(tmp_path, 600, 1, (0, 30), 4, None, random.Random(0))
    campaign.run()
    assert len(campaign.kills) >= 4 and not campaign.faults, campaign.report()


@pytest.mark.slow
def test_two_nodes_lose_a_rank_restart_and_save_on_sigterm(corpus, tmp_path):
    """Two agents on this machine act as nodes. The metrics must equal an uninterrupted run."""
    run = tmp_path / "run"
    with two_node_job(corpus, run) as agents:
        ranks = {rank: pid for agent in agents for rank, pid in agent.wait_for_ranks().items()}
        wait_for(lambda: checkpoint.step_folders(run / "checkpoints"), agents[0])
        os.kill(ranks[0], signal.SIGKILL)
        wait_for(lambda: f"{run}/checkpoints/step-" in output_of(run), agents[0])
        step = max(losses(run))
        wait_for(lambda: max(losses(run)) > step + 2, agents[0])
        for agent in agents:
            agent.process.terminate()
        assert all(agent.process.wait(60) for agent in agents)
    assert checkpoint.newest(run / "checkpoints", pytest.fail).step == max(losses(run)) < 1000
    for folder in (run, tmp_path / "uninterrupted"):
        with two_node_job(corpus, folder) as agents:
            assert [agent.process.wait(300) for agent in agents] == [0, 0], output_of(folder)
    assert timeless_metrics(run) == timeless_metrics(tmp_path / "uninterrupted")
    assert [line["step"] for line in timeless_metrics(run)] == list(range(1, 1001))


@contextlib.contextmanager
def two_node_job(corpus, folder):
    """Start two nodes of one rank that share a run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # any free port
        port = probe.getsockname()[1]
    size = ["--batch-tokens=256", f"--tokens={256 * 1000}", "--lr=1e-2", "--log-every=1", "--parallel=hsdp"]
    every = ["--checkpoint-every=50", "--eval-every=1000", "--eval-tokens=2048"]
    arguments = ["antransformer", "train", "--data", corpus, "--out", folder, *size, *every, *SMALL_OPTIONS]
    with (
        Job(arguments, folder.with_suffix(".0"), restarts=3, rendezvous=(2, port)) as first,
        Job(arguments, folder.with_suffix(".1"), restarts=3, rendezvous=(2, port)) as second,
    ):
        yield first, second


def output_of(folder):
    """Return the output of both nodes."""
    return "".join(folder.with_suffix(ending).read_text() for ending in (".0", ".1"))


def test_a_job_with_restarts_needs_out(corpus, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["train", "--data", str(corpus)]) == 2
    message = capsys.readouterr().err
    assert "--max-restarts" in message and "--out" in message


def test_the_same_command_starts_and_resumes_a_run(corpus, tmp_path, monkeypatch, capsys):
    """The settings include a number that is rounded, and two that are recorded as other values."""
    command = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *SMALL_OPTIONS, "--batch-tokens=250"]
    command += ["--tokens=1K", "--eval-tokens=1K", "--precision=auto", "--horizon-exponent=0.3"]
    assert main(command) == 0
    assert main(command) == 2  # the folder is not empty
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(command) == 0
    assert read_metrics(tmp_path / "run/metrics.jsonl") == lines  # equal times: it was not trained again
    capsys.readouterr()
    assert main([*command, "--seed=1"]) == 2
    message = capsys.readouterr().err.replace(str(tmp_path / "run"), "")
    assert re.search(r"\bseed\b", message) and numbers(message) == ["0", "1"]


# Folders and files


def run_in_fork(action, *arguments):
    """Run an action in a fork of this process and return its exit status."""
    return status_of(fork(action, *arguments))


def test_a_kill_at_any_moment_of_a_write_keeps_the_last_checkpoint(corpus, tmp_path):
    """Kill before each change of a file or folder, in a run that resumes from step 5, evaluates and saves at 10."""
    start(corpus, tmp_path / "begun", tokens=256 * 10, eval_every=10, keep_checkpoints=1, log_every=2)
    trainer, _ = resume(corpus, tmp_path / "begun")
    run_until(trainer, 6)
    loss, norm = torch.tensor(2.0), torch.tensor(1.0)
    status, moment = -signal.SIGKILL, 0
    while status == -signal.SIGKILL:
        moment += 1
        run = tmp_path / f"run-{moment}"
        shutil.copytree(tmp_path / "begun", run)
        trainer, _ = resume(corpus, run)
        trainer.update = lambda step: [(loss, norm)]
        status = run_in_fork(run_to_kill, trainer, run, moment)
        latest = checkpoint.newest(run / "checkpoints", pytest.fail)  # fails if any is damaged
        assert latest.step in (5, 10), moment
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert len(read_metrics(run / "metrics.jsonl")) == len(lines) >= 2
        assert resume(corpus, run)[0].done == latest.step
        shutil.rmtree(run)
    assert (status, latest.step) == (0, 10) and moment > 15


def run_to_kill(trainer, folder, moment):
    writes = 0

    def count_writes(event, arguments):
        nonlocal writes
        name = str(arguments[0]) if arguments else ""
        opened = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if name.startswith(str(folder)) and (opened or event.startswith(("os.", "shutil."))):
            writes += 1
            if writes == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_writes)
    trainer.run()
    return 0


def test_a_full_disk_for_a_metrics_line(corpus, tmp_path):
    start(corpus, tmp_path / "uninterrupted").run()
    run_until(start(corpus, tmp_path / "run"), 7)
    trainer, _ = resume(corpus, tmp_path / "run", checkpoint_every=100)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(MachineError, match=r"run/metrics\.jsonl") as error:
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert os.strerror(errno.EFBIG) in str(error.value)
    assert 5 < max(losses(tmp_path / "run")) < 20
    assert checkpoint.newest(tmp_path / "run/checkpoints", pytest.fail).step == 5
    resume(corpus, tmp_path / "run")[0].run()
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "uninterrupted", 20)


@pytest.fixture
def public_folder(corpus):
    """Return a folder with data that every user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(corpus, Path(folder, "data"))
        yield Path(folder)


def main_as_nobody(arguments, errors):
    """Run the command line without root rights, since permissions do not apply to root."""
    if os.getuid() == 0:
        os.setuid(65534)
    with os.fdopen(errors, "w", closefd=False) as file, contextlib.redirect_stderr(file):
        return main(arguments)


def test_a_read_only_folder_is_a_one_line_error(public_folder):
    run = public_folder / "run"
    command = ["train", "--data", str(public_folder / "data"), "--tokens=1K", "--batch-tokens=256", "--eval-tokens=1K"]
    assert main([*command, "--out", str(run), *SMALL_OPTIONS]) == 0
    for path in (*run.rglob("*"), run, public_folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    messages = []
    for arguments in (
        [*command, "--out", str(public_folder / "new"), *SMALL_OPTIONS],
        ["train", "--out", str(run), "--resume"],
    ):
        with tempfile.TemporaryFile() as errors:
            assert run_in_fork(main_as_nobody, arguments, errors.fileno()) == 2
            errors.seek(0)
            messages.append(errors.read().decode())
    for path in (public_folder, run, run / "checkpoints", *(run / "checkpoints").iterdir()):
        path.chmod(0o755)
    assert [text.count("\n") for text in messages] == [1, 1]
    for text, folder in zip(messages, (public_folder / "new", run), strict=True):
        assert all(fact in text for fact in (str(folder), os.strerror(errno.EACCES), "--out"))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_locked_folder_is_refused_with_the_pid_of_its_holder(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    with lock(tmp_path / "run"):
        assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "run") in message and re.search(rf"\b{os.getpid()}\b", message) and "--out" in message


def test_changed_data_is_refused_on_resume(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "data")
    start(tmp_path / "data", tmp_path / "run", tokens=256 * 5).run()
    shard = tmp_path / "data/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "train-00000.bin" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused_on_resume(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    start(corpus, tmp_path / "other", tokens=256 * 5, model={"layers": 1}).run()
    path = tmp_path / "run/checkpoints/step-00000005"
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "other/checkpoints/step-00000005", path)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and "config.yaml" in message


def test_a_clock_that_runs_backwards_has_no_effect(corpus, tmp_path, monkeypatch):
    start(corpus, tmp_path / "uninterrupted").run()
    year = 365 * 24 * 3600
    now = time.time()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - next(clock) * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: int((now - next(clock) * 3600) * 1e9))
    run_until(start(corpus, tmp_path / "run"), 18)
    for age, path in enumerate(sorted((tmp_path / "run").rglob("*"))):  # ages in reverse order
        os.utime(path, (now - age * year, now - age * year))
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == 15
    trainer.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "uninterrupted")
    assert all(
        line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in read_metrics(tmp_path / "run/metrics.jsonl")
    )
