"""The queue of runs, with real worker processes."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from antransformer.data import Dataset
from antransformer.errors import ConfigError, DataError, MachineError
from antransformer.runs.queue import Job, RunQueue, cores, default_devices
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from helpers.small import SMALL, SMALL_OPTIONS


class Heard:
    """Progress that remembers."""

    def __init__(self):
        self.tokens, self.planned, self.found = 0, 0, {}

    def plan(self, tokens, runs):
        self.planned += tokens

    def advance(self, tokens):
        self.tokens += tokens

    def done(self, outcome, found):
        self.found[outcome.name] = found


def job(name, keep=False, **settings):
    given = {"tokens": 2560, "batch_tokens": 256, "eval_tokens": 1024, "log_every": 2, "model": SMALL, **settings}
    return Job(name, resolve_config(given, vocab_size=257), keep)


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    """A queue that has run three jobs, one of which diverges."""
    root, heard = tmp_path_factory.mktemp("queue"), Heard()
    jobs = [job("kept", keep=True), job("short", tokens=1280), job("wild", lr=1e30, architecture="gpt+")]
    outcomes = RunQueue(root, Dataset.open(corpus), ["cpu", "cpu"], heard).run(jobs)
    return root, jobs, outcomes, heard


def test_every_job_leaves_its_result(finished):
    root, _, outcomes, heard = finished
    assert set(outcomes) == {"kept", "short", "wild"} and not any(heard.found.values())
    assert 0 < outcomes["kept"].loss < math.log(257) and outcomes["kept"].seconds_per_step > 0
    assert outcomes["kept"].parameters > 1000
    lines = read_metrics(root / "kept" / "metrics.jsonl")
    assert lines[-1]["step"] == 10 and lines[-1]["val_loss"] == outcomes["kept"].loss
    assert heard.planned == 2560 + 1280 + 2560 and heard.tokens <= heard.planned


def test_probes_are_taken_beside_the_metrics(finished):
    root, *_ = finished
    probes = read_metrics(root / "kept" / "probes.jsonl")
    assert [line["step"] for line in probes] == [2, 4, 6, 8, 10]
    assert len(probes[0]["residual_norm"]) == SMALL["layers"] + 1 and len(probes[0]["alpha"]) == SMALL["layers"]


def test_divergence_is_a_result(finished):
    root, _, outcomes, _ = finished
    assert outcomes["wild"].loss == math.inf
    result = json.loads((root / "wild" / "result.json").read_text())
    assert result["loss"] is None and re.search(r"\b(nan|inf)\b", result["diverged"])


def test_only_what_is_to_be_kept_keeps_its_checkpoint(finished):
    root, *_ = finished
    assert checkpoint.newest(root / "kept" / "checkpoints", print).step == 10
    assert not (root / "short" / "checkpoints").exists()


def test_what_is_done_is_not_done_again(finished, corpus):
    root, jobs, outcomes, _ = finished
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    heard = Heard()
    assert RunQueue(root, Dataset.open(corpus), ["cpu"], heard).run(jobs) == outcomes
    assert all(heard.found.values()) and heard.tokens == heard.planned
    assert before == {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}


def test_a_folder_of_other_settings_or_data_is_refused(finished, corpus, tmp_path):
    root, *_ = finished
    dataset = Dataset.open(corpus)
    with pytest.raises(ConfigError) as error:
        RunQueue(root, dataset, ["cpu"], Heard()).run([job("kept", lr=0.5)])
    assert all(part in str(error.value) for part in (str(root / "kept"), "lr", "0.012", "0.5", "--out"))
    result = root / "short" / "result.json"
    content = result.read_text()
    try:
        result.write_text(content.replace(dataset.digest, "0" * 64))
        with pytest.raises(DataError) as error:
            RunQueue(root, dataset, ["cpu"], Heard()).run([job("short", tokens=1280)])
        assert all(part in str(error.value) for part in (str(root / "short"), str(corpus), "--out"))
        result.write_text(content[:40])
        with pytest.raises(DataError) as error:
            RunQueue(root, dataset, ["cpu"], Heard()).run([job("short", tokens=1280)])
        assert str(result) in str(error.value)
    finally:
        result.write_text(content)


def test_a_worker_that_can_not_write_its_result_ends_the_queue_with_its_name(corpus, tmp_path):
    broken, dataset = job("broken"), Dataset.open(corpus)
    runs.create_run_folder(tmp_path / "broken", broken.config, dataset)
    (tmp_path / "broken" / "result.json.partial").mkdir()
    with pytest.raises(MachineError, match=os.strerror(errno.EISDIR)) as error:
        RunQueue(tmp_path, dataset, ["cpu"], Heard()).run([broken])
    assert str(tmp_path / "broken") in str(error.value)


def test_a_users_mistake_in_a_worker_is_one_here_too(corpus, tmp_path):
    with pytest.raises(ConfigError, match="tpu") as error:
        RunQueue(tmp_path, Dataset.open(corpus), ["tpu"], Heard()).run([job("wrong")])
    assert str(tmp_path / "wrong") in str(error.value)


def test_two_signals_at_once_still_stop_the_workers(corpus, tmp_path):
    process, _ = begin(corpus, tmp_path, "5M")
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130 and gone(tmp_path, 5)


def begin(corpus, out, tokens):
    """A comparison in a process of its own, and its first run's folder once that trains."""
    command = [sys.executable, "-m", "antransformer", "compare", "--data", str(corpus), "--out", str(out)]
    effort = ["--seeds=1", "--lr-trials=1", "--tuning-trials=1", "--batch-tokens=256", "--workers=2"]
    process = subprocess.Popen(
        [*command, "--budgets", tokens, *effort, *SMALL_OPTIONS],
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
    """Worker processes of an experiment, by their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "runs.worker" in command and str(out) in command:
            found.append(int(path.parent.name))
    return found


def gone(out, seconds=60):
    """Whether the workers end in time."""
    deadline = time.monotonic() + seconds
    while workers_of(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not workers_of(out)


needs_proc = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")


@needs_proc
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_comparison_stops_its_workers_with_their_checkpoints(corpus, tmp_path, sent):
    process, folder = begin(corpus, tmp_path, "5M")
    os.kill(process.pid, sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (143 if sent == signal.SIGTERM else -9)
    assert gone(tmp_path)
    found = checkpoint.newest(folder / "checkpoints", print)
    assert 0 < found.step < 5_000_000 // 256
    assert not (folder / "result.json").exists()
    if sent == signal.SIGTERM:
        assert errors.count("\n") == 1 and "SIGTERM" in errors
        assert {"0", "2"} <= set(re.findall(r"\b\d+\b", errors))  # runs done, and those planned


@needs_proc
def test_a_killed_worker_is_named_and_its_run_goes_on_from_there(corpus, tmp_path):
    process, folder = begin(corpus, tmp_path, "60K")
    for pid in workers_of(tmp_path):
        os.kill(pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and errors.count("\n") == 1
    assert str(tmp_path / "runs") in errors and "SIGKILL" in errors
    process, _ = begin(corpus, tmp_path, "60K")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl")]
    assert steps == sorted(set(steps)) and steps[-1] == 60_000 // 256


def test_a_worker_for_each_core_or_as_many_as_asked_for():
    kind = "cuda:0" if torch.cuda.is_available() else "cpu"
    assert len(default_devices(3)) == 3 and default_devices(1) == [kind]
    assert len(default_devices()) == (torch.cuda.device_count() or min(8, cores()))
