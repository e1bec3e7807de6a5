"""What several processes print after a mistake, and how often they read what one of them has verified."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.training.checkpointing import checkpoint, sharded_safetensors
from antransformer.training.distributed import launcher
from antransformer.training.trainer import Trainer
from helpers.commands import TEN_STEPS
from helpers.exported import make_run
from helpers.messages import mentions
from helpers.ranks import fork_ranks

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def run(words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def test_a_mistake_of_several_processes_is_one_line(tmp_path):
    words = ["-m", "antransformer", "train", "--processes=2", "--lr=-1", "--out", tmp_path / "run"]
    done = run(words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("antransformer: error: ") and done.stderr.count("\n") == 1
    assert mentions(done.stderr, "lr", -1.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("codes", "told", "expected"),
    [
        ((-15, 2), (0, 1), ("1", 2)),
        ((-15, 1), (0,), ("0", 1)),  # the agent ended rank 0, which had left its message and was closing trackers
        ((-15, -15), (0,), ("0", 143)),
        ((-9, 1), (), ("rank 0", 137)),
    ],
)
def test_the_status_is_of_a_rank_that_the_agent_did_not_end(tmp_path, codes, told, expected):
    failures = {}
    for rank, code in enumerate(codes):
        file = tmp_path / f"{rank}.json"
        if rank in told:
            file.touch()
        failures[rank] = SimpleNamespace(
            timestamp=0, error_file=str(file), exitcode=code, message=f"{rank}", signal_name=str
        )
    message, status = launcher._first_failure(SimpleNamespace(failures=failures))
    assert expected[0] in message and status == expected[1]


@pytest.mark.parametrize(("reason", "status"), [("diverged", 1), ("stopped", 128 + signal.SIGTERM)])
def test_rank_0_closes_its_trackers_before_another_rank_exits(corpus, tmp_path, monkeypatch, reason, status):
    """torchrun ends all ranks at the first exit, also if a single rank has received a signal."""

    def close():
        time.sleep(0.5)
        append(tmp_path / "events", "closed")

    def interrupted(trainer, step, update=Trainer.update):
        if reason == "stopped" and trainer.dist_ctx.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, step)

    def action(words):
        tracker = SimpleNamespace(write=lambda line: None, close=close)
        monkeypatch.setattr("antransformer.training.trainer.open_trackers", lambda *_: [tracker])
        monkeypatch.setattr(Trainer, "update", interrupted)
        try:
            return main(words)
        finally:
            append(tmp_path / "events", "exit")

    rate = "1e38" if reason == "diverged" else "1e-2"
    words = ["train", f"--data={corpus}", f"--out={tmp_path / 'run'}", "--device=cpu", f"--lr={rate}", *TEN_STEPS]
    failed = fork_ranks(2, tmp_path, action, words)
    assert failed.returncode == status and failed.stderr.count("antransformer: ") == 1
    assert (tmp_path / "events").read_text().split() == ["closed", "exit", "exit"]


def test_torchruns_own_summary_has_the_message_of_the_rank(tmp_path):
    done = run([*TORCHRUN, "-m", "antransformer", "train", "--lr=-1", "--out", tmp_path / "run"])
    assert done.returncode != 0 and not list(tmp_path.iterdir())
    summary = done.stderr[done.stderr.index("ChildFailedError") :]
    cause = summary[summary.index("Root Cause") :]
    assert "antransformer: error: " in cause and mentions(cause, "lr", -1.0)
    assert "cli/train.py" not in done.stderr  # torchrun prints a traceback of itself, and none of ours


def test_processes_train_one_run(corpus, tmp_path, capsys):
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    words = ["train", "--processes=2", "--data", corpus, "--out", tmp_path / "run", "--device=cpu", *TEN_STEPS]
    assert main(list(map(str, words))) == 0
    newest = checkpoint.newest(tmp_path / "run/checkpoints", print)
    assert newest.step == 10 and len(newest.files) == 4  # a file of each kind from each rank
    assert "ANTRANSFORMER_QUIET_RANKS" not in os.environ
    # Torch's agent would leave handlers that raise: a pool of processes, started later, can then wait forever.
    assert {number: signal.getsignal(number) for number in handlers} == handlers


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_wrong_number_of_processes_is_refused(number, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"--processes={number}"]) == 2
    error = capsys.readouterr().err
    assert mentions(error, "--processes") and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_processes_and_torchrun_exclude_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "--processes=2"]) == 2
    assert mentions(capsys.readouterr().err, "--processes", 2) and not list(tmp_path.iterdir())


def count_reads(monkeypatch, log):
    """Record the files that this process and its forks read in full."""
    sha256 = sharded_safetensors.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda path: (append(log, path.name), sha256(path))[1])
    check = Dataset.__module__ + ".check_sample"
    monkeypatch.setattr(check, lambda shard, *_: append(log, shard.path.name))


def append(log, name):
    with log.open("a") as file:
        file.write(f"{name}\n")


def test_each_file_is_verified_once_and_a_damaged_one_is_refused_by_all_ranks(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_verified", {})
    make_run(tmp_path / "first", width=64, layers=2, context=32, head_dim=32)
    words = ["train", "--init", tmp_path / "first", "--data", corpus, "--device=cpu", *TEN_STEPS]
    words = [str(word) for word in words if not str(word).startswith("--model")]
    with monkeypatch.context() as patch:
        count_reads(patch, tmp_path / "reads")
        done = fork_ranks(2, tmp_path, main, [*words, "--out", str(tmp_path / "run")])
    assert done.returncode == 0, done.stderr
    read = sorted((tmp_path / "reads").read_text().split())
    assert read == ["model.safetensors", "train-00000.bin", "val-00000.bin"]
    file = tmp_path / "first/checkpoints/step-00000020/model.safetensors"  # verified by rank 0
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    failed = fork_ranks(2, tmp_path, main, [*words, "--out", str(tmp_path / "again")])
    errors = [line for line in failed.stderr.splitlines() if "error" in line]
    assert failed.returncode == 2 and len(errors) == 2 and len(set(errors)) == 1
    assert all(mentions(line, tmp_path / "first/checkpoints") for line in errors)
    assert not (tmp_path / "again").exists()


def test_a_file_that_changes_is_verified_again(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_verified", {})
    make_run(tmp_path / "run")
    folder = tmp_path / "run/checkpoints/step-00000020"
    count_reads(monkeypatch, tmp_path / "reads")
    assert checkpoint.read(folder) == checkpoint.read(folder)
    assert sorted((tmp_path / "reads").read_text().split()) == ["model.safetensors", "optimizer.safetensors"]
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"model\.safetensors"):
        checkpoint.read(folder)
