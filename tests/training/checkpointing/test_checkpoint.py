"""Checkpoints of a run on one device: what is kept, and what happens to damaged ones."""

import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from antransformer.errors import CheckpointError, NewerCheckpointError, WriteError
from antransformer.training.checkpointing import checkpoint
from antransformer.training.checkpointing.sharded_safetensors import LocalShards
from helpers.messages import mentions
from helpers.trainers import command, losses, resume, run_until, start, weights


def damage(path, how):
    if how == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "missing":
        path.unlink()
    else:
        path.write_bytes(b"\x00not json")


def steps_in(folder):
    return sorted(checkpoint.step_of(path) for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("model.safetensors", "truncated"),
        ("model.safetensors", "flipped"),
        ("optimizer.safetensors", "flipped"),
        ("optimizer.safetensors", "missing"),
        ("state.json", "missing"),
        ("state.json", "garbage"),
    ],
)
def test_damaged_newest_checkpoint_is_skipped(corpus, tmp_path, file, how):
    start(corpus, tmp_path / "run").run()
    expected = losses(tmp_path / "run")
    damage(tmp_path / "run/checkpoints/step-00000020" / file, how)
    trainer, notes = resume(corpus, tmp_path / "run")
    damaged, used = notes
    assert mentions(damaged, f"{tmp_path}/run/checkpoints/step-00000020", file)
    assert ("sha256" in damaged) == (how in ("truncated", "flipped"))  # other damage is found without a checksum
    assert mentions(used, f"{tmp_path}/run/checkpoints/step-00000015") and trainer.done == 15
    trainer.run()
    assert losses(tmp_path / "run") == expected
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000020").step == 20


def test_damaged_checkpoint_does_not_count_as_kept(corpus, tmp_path):
    start(corpus, tmp_path / "run").run()
    damage(tmp_path / "run/checkpoints/step-00000020/model.safetensors", "truncated")
    trainer, _ = resume(corpus, tmp_path / "run", keep_checkpoints=1, checkpoint_every=2)
    run_until(trainer, 17)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000016"]
    assert checkpoint.newest(tmp_path / "run/checkpoints", print).step == 16


def test_recent_and_permanent_checkpoints_are_kept(corpus, tmp_path):
    start(corpus, tmp_path / "run", checkpoint_every=4, keep_checkpoints=2, keep_every=6).run()
    assert steps_in(tmp_path / "run") == [6, 12, 18, 20]
    start(corpus, tmp_path / "all", checkpoint_every=5, keep_checkpoints=1, keep_every=5).run()
    assert steps_in(tmp_path / "all") == [5, 10, 15, 20]


def test_training_continues_while_a_checkpoint_is_written(corpus, tmp_path, monkeypatch):
    more = {"tokens": 256 * 12, "checkpoint_every": 5}
    start(corpus, tmp_path / "other", **more).run()
    trainer, may_write = start(corpus, tmp_path / "run", **more), threading.Event()
    write, update = LocalShards.write, trainer.update

    def write_when_allowed(parts, path):
        assert may_write.wait(30), "the run waited for its checkpoint"
        return write(parts, path)

    def update_and_allow_writing(step):
        if step == 9:
            assert steps_in(tmp_path / "run") == [-1]  # the unfinished one has no step
            may_write.set()
        return update(step)

    monkeypatch.setattr(LocalShards, "write", write_when_allowed)
    trainer.update = update_and_allow_writing
    trainer.run()
    assert steps_in(tmp_path / "run") == [5, 10, 12]
    for step in (5, 10, 12):
        assert weights(tmp_path / "run", step) == weights(tmp_path / "other", step)


def test_one_checkpoint_is_written_at_a_time(corpus, tmp_path, monkeypatch):
    write, writing = LocalShards.write, []

    def write_slowly(parts, path):
        writing.append(path)
        time.sleep(0.02)
        assert len(writing) == 1
        writing.pop()
        return write(parts, path)

    monkeypatch.setattr(LocalShards, "write", write_slowly)
    start(corpus, tmp_path / "run", tokens=256 * 6, checkpoint_every=1).run()
    assert steps_in(tmp_path / "run") == [4, 5, 6]


def test_failed_write_stops_the_run_before_the_next(corpus, tmp_path, monkeypatch):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 90, checkpoint_every=45, eval_every=90)
    monkeypatch.setattr(LocalShards, "write", lambda *_: (tmp_path / "no/such/folder").touch())
    with pytest.raises(WriteError, match=os.strerror(errno.ENOENT)) as error:
        trainer.run()
    assert mentions(error.value, 45, tmp_path / "run/checkpoints")
    assert 45 <= trainer.done < 89
    assert steps_in(tmp_path / "run") == []


def save_and_be_killed(moment, folder, trainer):
    """Save a checkpoint, and be killed at the given access to a file of the folder."""
    touched = []

    def watch(event, arguments):
        if any(str(folder) in str(argument) for argument in arguments):
            touched.append(event)
            if len(touched) == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    with checkpoint.CheckpointWriter(folder, keep=1) as writer:
        writer.save(10, trainer.model, trainer.optimizer, {})


def test_kill_during_a_write_leaves_no_damaged_checkpoint(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run", tokens=256 * 5)
    trainer.run()
    moment, code, steps = 0, None, []
    while code != 0:
        moment += 1
        folder = shutil.copytree(tmp_path / "run/checkpoints", tmp_path / str(moment))
        process = multiprocessing.get_context("fork").Process(target=save_and_be_killed, args=(moment, folder, trainer))
        process.start()
        process.join(60)
        code = process.exitcode
        assert code in (0, -signal.SIGKILL)
        for path in checkpoint.step_folders(folder):
            checkpoint.read(path)
        steps.append(checkpoint.newest(folder, print).step)
        checkpoint.save(folder, 15, trainer.model, trainer.optimizer, {}, keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-00000015"]
    assert steps == sorted(steps) and set(steps) == {5, 10}
    assert steps.count(5) > 5 and steps.count(10) > 3


def test_only_damaged_checkpoints_are_an_error(corpus, tmp_path):
    start(corpus, tmp_path / "run", keep_checkpoints=1).run()
    damage(tmp_path / "run/checkpoints/step-00000020/model.safetensors", "truncated")
    with pytest.raises(CheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, tmp_path / "run/checkpoints/step-00000020", "model.safetensors", "sha256")


def test_interrupted_write_is_not_a_checkpoint(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 10).run()
    folder = tmp_path / "run/checkpoints"
    (folder / "step-00000010").rename(folder / ".partial-step-00000010")
    assert checkpoint.newest(folder, print).step == 5
    trainer, _ = resume(corpus, tmp_path / "run")
    trainer.run()
    assert not list(folder.glob(".partial*"))


def test_newer_checkpoint_is_not_skipped(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", tokens=256 * 5).run().checkpoint
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "version": checkpoint.VERSION + 1}))
    with pytest.raises(NewerCheckpointError) as error:
        resume(corpus, tmp_path / "run")
    assert mentions(error.value, path, checkpoint.VERSION + 1, checkpoint.VERSION)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 0},
        {"step": 5.5},
        {"step": -1},
        {"model": {"width": 64}},
        {"extra": None},
        {"sha256": {}},
        {"sha256": {"model.safetensors": ""}},
        {"sha256": {"model-00001-of-00002.safetensors": "", "optimizer-00001-of-00002.safetensors": ""}},
        {"sha256": {"../model.safetensors": "", "optimizer.safetensors": ""}},
    ],
)
def test_edited_state_is_refused(corpus, tmp_path, change):
    path = start(corpus, tmp_path / "run", tokens=256 * 5).run().checkpoint
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, **change}))
    with pytest.raises(CheckpointError) as error:
        checkpoint.read(path)
    assert type(error.value) is CheckpointError and mentions(error.value, path, "state.json")


def test_checkpoint_files_follow_the_umask(corpus, tmp_path):
    path = start(corpus, tmp_path / "run", tokens=256).run().checkpoint
    (tmp_path / "plain").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))


def test_full_disk_leaves_the_older_checkpoint_intact(corpus, tmp_path):
    trainer = start(corpus, tmp_path / "run")
    run_until(trainer, 7)
    # The resumed run has a limit on file sizes that its weights exceed.
    resumed = [*command(corpus, tmp_path / "run"), "--resume"]
    second = subprocess.run(resumed, capture_output=True, text=True, preexec_fn=limit_file_size)
    assert second.returncode == 1
    complaint = second.stderr.strip()
    assert "\n" not in complaint and mentions(complaint, 10, f"{tmp_path}/run/checkpoints/step-00000005")
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000005"]
    assert checkpoint.read(tmp_path / "run/checkpoints/step-00000005").step == 5


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(corpus, tmp_path, monkeypatch):
    """NFS keeps a deleted file that another process reads, and its folder is then not empty."""

    def rmtree(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    start(corpus, tmp_path / "run", checkpoint_every=5, keep_checkpoints=1).run()
    assert [checkpoint.step_of(path) for path in checkpoint.step_folders(tmp_path / "run/checkpoints")] == [20]
