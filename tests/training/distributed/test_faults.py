"""What goes wrong in real runs, put there on purpose; ``faults.py`` has the long ones, with counts.

More stand where they belong: signals, broken checkpoints and a disk that is full for one in test_training.py, what
happens to one of two ranks in test_parallel.py, locks in test_lock.py, changed data in test_data_dataset.py, files from
anywhere in test_fuzz.py.
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
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from antransformer.cli import main
from antransformer.errors import DivergedError, MachineError
from antransformer.training.checkpointing import checkpoint
from antransformer.training.distributed.liveness import fresh_store
from antransformer.training.lock import lock
from antransformer.training.metrics import read_metrics
from helpers.faults import Campaign, Job, figures
from helpers.small import SMALL_OPTIONS
from helpers.trainers import losses, poison, resume, run_until, start, weights

# A number that is none, and the step that it spoils


@pytest.mark.parametrize("options", [("angpt", "adam"), ("ngpt", "adam"), ("gpt+", "muon")], ids="-".join)
def test_a_skipped_step_is_as_if_it_had_not_been(corpus, tmp_path, options):
    architecture, optimizer = options
    more = {"model": {"architecture": architecture}, "optimizer": optimizer, "max_skipped_steps": 2}
    spoilt = start(corpus, tmp_path / "spoilt", **more)
    poison(spoilt, 1, 7)
    spoilt.run()
    left_out = start(corpus, tmp_path / "left out", **more)
    update = left_out.update
    left_out.update = lambda step: [] if step in (1, 7) else update(step)
    left_out.run()
    assert losses_where_there_are(tmp_path / "spoilt") == losses_where_there_are(tmp_path / "left out")
    assert weights(tmp_path / "spoilt", 20) == weights(tmp_path / "left out", 20)
    lines = read_metrics(tmp_path / "spoilt/metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if "loss" not in line and "grad_norm" not in line] == [1, 7]
    assert [line["skipped"] for line in lines] == [1] * 6 + [2] * 14
    # A note for each: the step, how many are skipped by now, and how many may be.
    assert [numbers(note) for note in spoilt.reporter] == [["1", "1", "2"], ["2", "2", "7"]]


def numbers(text):
    """All whole numbers in a text, smallest first."""
    return sorted(re.findall(r"\b\d+\b", text), key=int)


def losses_where_there_are(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_a_line_has_the_mean_loss_of_the_steps_that_were_taken(corpus, tmp_path):
    for name, every in (("each", 1), ("some", 5)):
        trainer = start(corpus, tmp_path / name, tokens=256 * 5, max_skipped_steps=1, log_every=every)
        poison(trainer, 3, spoil=lambda loss: loss + math.inf)  # whose gradient is finite
        trainer.run()
    each = losses_where_there_are(tmp_path / "each")
    assert list(each) == [1, 2, 4, 5]
    assert losses(tmp_path / "some") == {5: pytest.approx(sum(each.values()) / 4, rel=1e-6)}


def test_no_more_steps_are_skipped_than_allowed_in_all_of_a_run(corpus, tmp_path):
    broken = start(corpus, tmp_path / "run", max_skipped_steps=1, checkpoint_every=2)
    poison(broken, 1, 2)
    with pytest.raises(DivergedError) as error:
        broken.run()
    assert {"1", "2"} <= set(numbers(str(error.value))) and "step-" not in str(error.value)  # no checkpoint yet
    trainer, _ = resume(corpus, tmp_path / "run", max_skipped_steps=2)
    poison(trainer, 1, 2)  # of which a checkpoint is left in which the optimizer has no moments yet
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


# Processes that end, or hang


def test_a_rank_that_hangs_is_named_and_the_run_comes_back_without_it(corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    size = ["--batch-tokens=256", f"--tokens={256 * 20}", "--lr=1e-2", "--timeout=10", "--log-every=1"]
    every = ["--checkpoint-every=5", "--eval-every=20", "--eval-tokens=2048"]
    words = ["antransformer", "train", "--data", corpus, "--out", out, *size, *every, *SMALL_OPTIONS]
    with Job(words, log, restarts=1) as job:
        ranks = job.started()
        wait_for(lambda: checkpoint.step_folders(out / "checkpoints"), job)
        os.kill(ranks[1], signal.SIGSTOP)
        wait_for(lambda: "error:" in log.read_text(), job)
        os.kill(ranks[1], signal.SIGCONT)  # else torchrun waits half a minute for it to end
        assert job.started(ranks.values())
        assert job.process.wait(300) == 0, log.read_text()
    [error] = [line for line in log.read_text().splitlines() if "error:" in line]
    for part in ("rank 1", ranks[1], socket.gethostname(), "--timeout"):
        assert re.search(rf"(?<!\w){part}\b", error), part
    assert min(map(int, re.findall(rf"{out}/checkpoints/step-(\d+)", log.read_text()))) < 20  # it was resumed
    start(corpus, tmp_path / "alone", checkpoint_every=5, eval_every=20).run()
    found, expected = (read_metrics(folder / "metrics.jsonl") for folder in (out, tmp_path / "alone"))
    assert [line["step"] for line in found] == list(range(1, 21))
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in found] == pytest.approx([line[name] for line in expected], rel=1e-4)
    assert found[-1]["val_loss"] == pytest.approx(expected[-1]["val_loss"], rel=1e-4)


def wait_for(condition, job, seconds=300):
    until = time.monotonic() + seconds
    while not condition():
        assert job.process.poll() is None and time.monotonic() < until
        time.sleep(0.05)


def test_processes_that_start_again_meet_each_other_and_nobody_from_before():
    """In the store that torchrun keeps: at the third of four starts, the second of which was killed half way."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for attempt, delays in enumerate([(0, 0), (0, 3), (0, 0.3), (0.3, 0)]):
        ranks = [forked(meet_and_tell, server.port, rank, attempt, delay) for rank, delay in enumerate(delays)]
        if attempt == 1:
            time.sleep(0.5)
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        assert {status_of(pid) for pid in ranks} == {-signal.SIGKILL if attempt == 1 else 0}


def meet_and_tell(port, rank, attempt, delay):
    time.sleep(delay)
    store = fresh_store(dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False), rank, 2)
    store.set(f"{rank}", str(attempt))
    return int(store.get(f"{1 - rank}").decode() != str(attempt))


@pytest.mark.slow
def test_ranks_killed_at_random_moments(tmp_path):
    campaign = Campaign(tmp_path, 600, 1, (0, 30), 4, None, random.Random(0))
    campaign.go()
    assert len(campaign.kills) >= 4 and not campaign.faults, campaign.report()


@pytest.mark.slow
def test_two_machines_lose_a_rank_and_come_back_and_save_when_they_have_to_go(corpus, tmp_path):
    """An agent each on this one, that meet at a port; in the end all is as in a run that nothing happened to."""
    run = tmp_path / "run"
    with started(corpus, run) as agents:
        ranks = {rank: pid for agent in agents for rank, pid in agent.started().items()}
        wait_for(lambda: checkpoint.step_folders(run / "checkpoints"), agents[0])
        os.kill(ranks[0], signal.SIGKILL)
        wait_for(lambda: f"{run}/checkpoints/step-" in printed(run), agents[0])
        step = max(losses(run))
        wait_for(lambda: max(losses(run)) > step + 2, agents[0])
        for agent in agents:
            agent.process.terminate()
        assert all(agent.process.wait(60) for agent in agents)
    assert checkpoint.newest(run / "checkpoints", pytest.fail).step == max(losses(run)) < 1000
    for folder in (run, tmp_path / "unbroken"):
        with started(corpus, folder) as agents:
            assert [agent.process.wait(300) for agent in agents] == [0, 0], printed(folder)
    assert figures(run) == figures(tmp_path / "unbroken")
    assert [line["step"] for line in figures(run)] == list(range(1, 1001))


@contextlib.contextmanager
def started(corpus, folder):
    """Two machines of one rank that share a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = ["--batch-tokens=256", f"--tokens={256 * 1000}", "--lr=1e-2", "--log-every=1", "--parallel=hsdp"]
    every = ["--checkpoint-every=50", "--eval-every=1000", "--eval-tokens=2048"]
    words = ["antransformer", "train", "--data", corpus, "--out", folder, *size, *every, *SMALL_OPTIONS]
    with (
        Job(words, folder.with_suffix(".0"), restarts=3, place=(2, port)) as one,
        Job(words, folder.with_suffix(".1"), restarts=3, place=(2, port)) as other,
    ):
        yield one, other


def printed(folder):
    """By both of them."""
    return "".join(folder.with_suffix(ending).read_text() for ending in (".0", ".1"))


def test_what_torchrun_starts_again_has_to_have_a_folder(corpus, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(["train", "--data", str(corpus)]) == 2
    message = capsys.readouterr().err
    assert "--max-restarts" in message and "--out" in message


def test_the_same_command_begins_a_run_and_goes_on_with_it(corpus, tmp_path, monkeypatch, capsys):
    """Also where what was asked for is not what it was rounded to."""
    command = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), *SMALL_OPTIONS, "--batch-tokens=250"]
    command += ["--tokens=1K", "--eval-tokens=1K"]
    assert main(command) == 0
    assert main(command) == 2  # taken
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert main(command) == 0
    assert read_metrics(tmp_path / "run/metrics.jsonl") == lines  # times too: resumed, not trained again
    capsys.readouterr()
    assert main([*command, "--seed=1"]) == 2
    message = capsys.readouterr().err.replace(str(tmp_path / "run"), "")
    assert re.search(r"\bseed\b", message) and numbers(message) == ["0", "1"]


# Folders and files


def in_child(action, *arguments):
    """Run something in a process of its own that has all of this one's memory; returns its status."""
    return status_of(forked(action, *arguments))


def status_of(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def forked(action, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads: pytest's, which the child does not need
        child = os.fork()
    if child:
        return child
    status = 99
    try:
        status = action(*arguments)
    finally:
        os._exit(status)


def test_a_kill_at_any_moment_of_a_write_leaves_what_was_whole(corpus, tmp_path):
    """Before each change of a file or a folder, of a run that goes on from step 5, validates and saves at 10."""
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
        status = in_child(run_to_kill, trainer, run, moment)
        found = checkpoint.newest(run / "checkpoints", pytest.fail)  # which is told of any that is broken
        assert found.step in (5, 10), moment
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert len(read_metrics(run / "metrics.jsonl")) == len(lines) >= 2
        assert resume(corpus, run)[0].done == found.step
        shutil.rmtree(run)
    assert (status, found.step) == (0, 10) and moment > 15


def run_to_kill(trainer, folder, moment):
    seen = 0

    def hear(event, arguments):
        nonlocal seen
        name = str(arguments[0]) if arguments else ""
        written = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if name.startswith(str(folder)) and (written or event.startswith(("os.", "shutil."))):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hear)
    trainer.run()
    return 0


def test_a_disk_that_has_no_room_for_a_metrics_line(corpus, tmp_path):
    start(corpus, tmp_path / "unbroken").run()
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
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    assert weights(tmp_path / "run", 20) == weights(tmp_path / "unbroken", 20)


@pytest.fixture
def open_to_all(corpus):
    """A folder with data that every user can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        shutil.copytree(corpus, Path(folder, "data"))
        yield Path(folder)


def as_nobody(words, errors):
    """The command line, for a user whom permissions hold for."""
    if os.getuid() == 0:
        os.setuid(65534)
    with os.fdopen(errors, "w", closefd=False) as file, contextlib.redirect_stderr(file):
        return main(words)


def test_a_folder_that_can_only_be_read_is_a_mistake_in_one_line(open_to_all):
    run = open_to_all / "run"
    command = ["train", "--data", str(open_to_all / "data"), "--tokens=1K", "--batch-tokens=256", "--eval-tokens=1K"]
    assert main([*command, "--out", str(run), *SMALL_OPTIONS]) == 0
    for path in (*run.rglob("*"), run, open_to_all):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    complaints = []
    for words in (
        [*command, "--out", str(open_to_all / "new"), *SMALL_OPTIONS],
        ["train", "--out", str(run), "--resume"],
    ):
        with tempfile.TemporaryFile() as errors:
            assert in_child(as_nobody, words, errors.fileno()) == 2
            errors.seek(0)
            complaints.append(errors.read().decode())
    for path in (open_to_all, run, run / "checkpoints", *(run / "checkpoints").iterdir()):
        path.chmod(0o755)
    assert [text.count("\n") for text in complaints] == [1, 1]
    for text, folder in zip(complaints, (open_to_all / "new", run), strict=True):
        assert all(part in text for part in (str(folder), os.strerror(errno.EACCES), "--out"))
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}


def test_a_second_run_is_told_who_holds_the_folder(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    with lock(tmp_path / "run"):
        assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "run") in message and re.search(rf"\b{os.getpid()}\b", message) and "--out" in message


def test_data_that_changed_between_two_runs_is_not_trained_on(corpus, tmp_path, capsys):
    shutil.copytree(corpus, tmp_path / "data")
    start(tmp_path / "data", tmp_path / "run", tokens=256 * 5).run()
    shard = tmp_path / "data/train-00000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    assert "train-00000.bin" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_not_gone_on_with(corpus, tmp_path, capsys):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    start(corpus, tmp_path / "other", tokens=256 * 5, model={"layers": 1}).run()
    path = tmp_path / "run/checkpoints/step-00000005"
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "other/checkpoints/step-00000005", path)
    assert main(["train", "--out", str(tmp_path / "run"), "--resume"]) == 2
    message = capsys.readouterr().err
    assert str(path) in message and "config.yaml" in message


def test_a_clock_that_goes_back_is_nobody_s_concern(corpus, tmp_path, monkeypatch):
    start(corpus, tmp_path / "unbroken").run()
    year = 365 * 24 * 3600
    now = time.time()
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "time", lambda: now - next(clock) * 3600)
    monkeypatch.setattr(time, "time_ns", lambda: int((now - next(clock) * 3600) * 1e9))
    run_until(start(corpus, tmp_path / "run"), 18)
    for age, path in enumerate(sorted((tmp_path / "run").rglob("*"))):  # the later the older
        os.utime(path, (now - age * year, now - age * year))
    trainer, _ = resume(corpus, tmp_path / "run")
    assert trainer.done == 15
    trainer.run()
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    assert all(
        line["seconds"] > 0 and line["tokens_per_second"] > 0 for line in read_metrics(tmp_path / "run/metrics.jsonl")
    )
