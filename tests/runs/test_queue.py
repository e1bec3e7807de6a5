"""The run queue with real worker processes."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.errors import ConfigError, DataError, MachineError
from antransformer.lock import lock
from antransformer.runs import queue
from antransformer.runs.queue import Job, RunQueue, default_devices
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from antransformer.training.resources import available_cores
from antransformer.training.run_folder import create_run_folder, saved_config
from helpers.small import SMALL, SMALL_OPTIONS
from helpers.workers import workers_in_process


class RecordedProgress:
    """Records the callbacks of the queue."""

    def __init__(self):
        self.tokens, self.earlier, self.planned, self.cached = 0, 0, 0, {}

    def plan(self, tokens, runs):
        self.planned += tokens

    def advance(self, tokens, earlier=False):
        self.tokens += tokens
        self.earlier += tokens * earlier

    def done(self, result, cached):
        self.cached[result.name] = cached


def job(name, keep=False, **settings):
    defaults = {"precision": "float32", "tokens": 2560, "batch_tokens": 256, "eval_tokens": 1024, "log_every": 2}
    return Job(name, resolve_config({**defaults, "model": SMALL, **settings}, vocab_size=257), keep)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """Folder, jobs, results and progress of a queue of three runs, one of which diverged."""
    root, progress = tmp_path_factory.mktemp("queue"), RecordedProgress()
    jobs = [job("kept", keep=True), job("short", tokens=1280), job("wild", lr=1e30, architecture="gpt+")]
    results = RunQueue(root, Dataset.open(corpus), ["cpu", "cpu"], progress).run(jobs)
    return root, jobs, results, progress


def test_the_queue_opens_only_the_first_of_the_default_devices_and_leaves_it_current(monkeypatch):
    opened = []
    monkeypatch.setattr(queue, "default_devices", lambda workers: ["cuda:0", "cuda:1"])
    monkeypatch.setattr(queue, "choose_device", opened.append)
    assert queue.available_devices([]) == ["cuda:0", "cuda:1"] and opened == ["cuda:0"]
    assert queue.available_devices(["cuda:2", "cuda:1"]) == ["cuda:2", "cuda:1"]
    assert sorted(opened[1:]) == ["cuda:1", "cuda:2"] and opened[-1] == "cuda:2"


def test_every_run_has_a_result(finished):
    root, _, results, progress = finished
    assert set(results) == {"kept", "short", "wild"} and not any(progress.cached.values())
    assert 0 < results["kept"].loss < math.log(257) and results["kept"].seconds_per_step > 0
    assert results["kept"].parameters > 1000
    lines = read_metrics(root / "kept" / "metrics.jsonl")
    assert lines[-1]["step"] == 10 and lines[-1]["val_loss"] == results["kept"].loss
    assert progress.tokens == progress.planned == 2560 + 1280 + 2560 and progress.earlier == 0


def test_probes_are_written_at_the_steps_of_the_metrics(finished):
    root, *_ = finished
    probes = read_metrics(root / "kept" / "probes.jsonl")
    assert [line["step"] for line in probes] == [2, 4, 6, 8, 10]
    assert len(probes[0]["residual_norm"]) == SMALL["layers"] + 1 and len(probes[0]["alpha"]) == SMALL["layers"]


def test_divergence_is_a_result(finished):
    root, _, results, _ = finished
    assert results["wild"].loss == math.inf
    result = json.loads((root / "wild" / "result.json").read_text())
    assert result["loss"] is None and re.search(r"\b(nan|inf)\b", result["diverged"])


def test_checkpoints_are_deleted_unless_kept(finished):
    root, *_ = finished
    assert checkpoint.newest(root / "kept" / "checkpoints", print).step == 10
    assert not (root / "short" / "checkpoints").exists()


def test_finished_runs_are_not_run_again(finished, corpus):
    root, jobs, results, _ = finished
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    progress = RecordedProgress()
    assert RunQueue(root, Dataset.open(corpus), ["cpu"], progress).run(jobs) == results
    assert all(progress.cached.values()) and progress.tokens == progress.earlier == progress.planned
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_the_steps_before_a_resumed_run_count_as_earlier_work(finished, corpus, tmp_path):
    root, *_ = finished
    shutil.copytree(root / "kept", tmp_path / "kept")
    (tmp_path / "kept" / "result.json").unlink()
    progress = RecordedProgress()
    with workers_in_process():
        RunQueue(tmp_path, Dataset.open(corpus), ["cpu"], progress).run([job("kept", keep=True)])
    assert progress.earlier == progress.tokens == progress.planned == 2560


def test_a_run_without_a_checkpoint_starts_with_the_settings_of_the_new_call(corpus, tmp_path):
    dataset, new = Dataset.open(corpus), job("new", keep=True, micro_batch_size=1)
    create_run_folder(tmp_path / "new", job("new", micro_batch_size=2).config, dataset)
    with workers_in_process():
        RunQueue(tmp_path, dataset, ["cpu"], RecordedProgress()).run([new])
    assert saved_config(tmp_path / "new").micro_batch_size == 1
    # A finished run of another micro-batch size is the same run.
    progress = RecordedProgress()
    RunQueue(tmp_path, dataset, ["cpu"], progress).run([job("new", micro_batch_size=2)])
    assert progress.cached == {"new": True}


def test_a_run_folder_of_other_settings_or_data_is_refused(finished, corpus, tmp_path):
    root, *_ = finished
    dataset = Dataset.open(corpus)
    with pytest.raises(ConfigError) as error:
        RunQueue(root, dataset, ["cpu"], RecordedProgress()).run([job("kept", lr=0.5)])
    assert all(part in str(error.value) for part in (str(root / "kept"), "lr", "0.012", "0.5", "--out"))
    result = root / "short" / "result.json"
    content = result.read_text()
    try:
        result.write_text(content.replace(dataset.digest, "0" * 64))
        with pytest.raises(DataError) as error:
            RunQueue(root, dataset, ["cpu"], RecordedProgress()).run([job("short", tokens=1280)])
        assert all(part in str(error.value) for part in (str(root / "short"), str(corpus), "--out"))
        result.write_text(content[:40])
        with pytest.raises(DataError) as error:
            RunQueue(root, dataset, ["cpu"], RecordedProgress()).run([job("short", tokens=1280)])
        assert str(result) in str(error.value)
    finally:
        result.write_text(content)


def test_a_run_with_a_setting_that_the_new_call_leaves_out_is_refused(corpus, tmp_path):
    dataset = Dataset.open(corpus)
    create_run_folder(tmp_path / "short", job("short", schedule="cosine", decay_fraction=0.2).config, dataset)
    queue = RunQueue(tmp_path, dataset, ["cpu"], RecordedProgress())
    queue.require_settings(tmp_path / "short", job("short", schedule="cosine", decay_fraction=0.2).config)
    with pytest.raises(ConfigError) as error:
        queue.require_settings(tmp_path / "short", job("short", schedule="cosine").config)
    assert all(part in str(error.value) for part in ("decay_fraction", "0.2", "--out"))


def test_the_error_of_a_worker_that_cannot_write_its_result_names_the_run_folder(corpus, tmp_path):
    broken, dataset = job("broken"), Dataset.open(corpus)
    create_run_folder(tmp_path / "broken", broken.config, dataset)
    (tmp_path / "broken" / "result.json.partial").mkdir()
    with workers_in_process(), pytest.raises(MachineError, match=os.strerror(errno.EISDIR)) as error:
        RunQueue(tmp_path, dataset, ["cpu"], RecordedProgress()).run([broken])
    assert str(tmp_path / "broken") in str(error.value)


def test_a_usage_error_in_a_worker_is_a_usage_error_of_the_queue(corpus, tmp_path):
    with pytest.raises(ConfigError, match="tpu") as error:
        RunQueue(tmp_path, Dataset.open(corpus), ["tpu"], RecordedProgress()).run([job("wrong")])
    assert str(tmp_path / "wrong") in str(error.value)


def test_two_signals_at_once_still_stop_the_workers(corpus, tmp_path):
    process, _ = start_comparison(corpus, tmp_path, "1M")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and workers_exit(tmp_path, 5)


def test_a_repeated_signal_does_not_wait_for_the_workers(corpus, tmp_path):
    process, _ = start_comparison(corpus, tmp_path, "1M")
    workers = workers_of(tmp_path)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # as in a step of minutes
    deadline = time.monotonic() + 60
    try:
        while not all(map(is_stopped, workers)):  # a thread that still runs would take the next signal
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert "SIGINT" in process.stderr.readline()
        while not all(has_pending(pid, signal.SIGTERM) for pid in workers):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130 and workers_exit(tmp_path, 5)
    finally:
        for pid in workers_of(tmp_path):
            os.kill(pid, signal.SIGKILL)


def comparison(corpus, out, tokens):
    """Words of the command line of a comparison of two runs."""
    effort = ["--seeds=1", "--lr-trials=1", "--tuning-trials=1", "--recipe=paper", "--workers=2"]
    effort += ["--batch-tokens=256", "--budgets", tokens]
    return ["compare", "--data", str(corpus), "--out", str(out), *effort, *SMALL_OPTIONS]


def start_comparison(corpus, out, tokens):
    """Start a comparison in a process; return it and the folder of its first run when that has trained a step."""
    # A shell ignores SIGINT in its background jobs, which may be these tests.
    program = (
        "import signal, sys; from antransformer.cli import main; "
        "signal.signal(signal.SIGINT, signal.default_int_handler); sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *comparison(corpus, out, tokens)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (folders := [path.parent for path in out.glob("runs/*/metrics.jsonl") if path.read_text()]):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    return process, folders[0]


def workers_of(out):
    """Return the process ids of an experiment's workers, which are known by their command lines."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "runs.worker" in command and str(out) in command:
            pids.append(int(path.parent.name))
    return pids


def is_stopped(pid):
    """Return whether all threads of a process are stopped."""
    return all("\nState:\tT" in path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/status"))


def has_pending(pid, number):
    """Return whether a stopped process has received a signal."""
    (mask,) = re.findall(r"ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(mask, 16) >> (number - 1) & 1)


def workers_exit(out, seconds=60):
    """Wait for the workers to exit; return whether they did in time."""
    deadline = time.monotonic() + seconds
    while workers_of(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not workers_of(out)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc")


@needs_proc
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_workers_of_a_stopped_comparison_save_checkpoints_and_exit(corpus, tmp_path, sent):
    process, folder = start_comparison(corpus, tmp_path, "1M")
    os.kill(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if sent == signal.SIGTERM else -9)
    assert workers_exit(tmp_path)
    saved = checkpoint.newest(folder / "checkpoints", print)
    assert 0 < saved.step < 1_000_000 // 256
    assert not (folder / "result.json").exists()
    if sent == signal.SIGTERM:
        assert errors.count("\n") == 2 and errors.count("SIGTERM") == 2
        assert {"0", "2"} <= set(re.findall(r"\b\d+\b", errors))  # finished and planned runs


def test_a_run_that_another_worker_has_not_left_yet_is_not_started(corpus, tmp_path):
    dataset, kept = Dataset.open(corpus), job("kept", keep=True)
    create_run_folder(tmp_path / "kept", kept.config, dataset)
    queue = RunQueue(tmp_path, dataset, ["cpu"], RecordedProgress())
    with workers_in_process():
        with lock(tmp_path / "kept"), pytest.raises(ConfigError, match=str(os.getpid())):
            queue.run([kept])
        assert not checkpoint.step_folders(tmp_path / "kept" / "checkpoints")
        assert RunQueue(tmp_path, dataset, ["cpu"], RecordedProgress()).run([kept])["kept"].loss < math.log(257)


@needs_proc
def test_the_error_of_a_killed_worker_names_the_run_which_then_resumes(corpus, tmp_path):
    process, folder = start_comparison(corpus, tmp_path, "20K")
    for pid in workers_of(tmp_path):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert str(tmp_path / "runs") in errors and "SIGKILL" in errors
    with workers_in_process():
        assert main(comparison(corpus, tmp_path, "20K")) == 0
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 20_000 // 256


def test_workers_share_the_cores_up_to_the_number_that_the_user_chose(monkeypatch):
    monkeypatch.setattr(queue, "available_cores", lambda: 8)
    for variable, threads in (("", [8, 2, 1]), ("3", [3, 2, 1]), ("16", [8, 2, 1])):
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
        assert [queue.threads_per_worker(workers) for workers in (1, 4, 9)] == threads


def test_default_devices_are_one_per_core_or_the_requested_number():
    kind = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert len(default_devices(3)) == 3 and default_devices(1) == [kind]
    assert len(default_devices()) == (torch.cuda.device_count() or min(8, available_cores()))
