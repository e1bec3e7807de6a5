"""Runs with several processes give the same numbers as with one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.training import launch
from antransformer.training import run_folder as run
from antransformer.training.checkpointing import checkpoint
from antransformer.training.distributed.parallel import DistributedContext, make_model
from antransformer.training.metrics import read_metrics
from antransformer.training.trainer import Trainer
from helpers import parallel_worker
from helpers.messages import mentions
from helpers.parallel_worker import (
    ARCHITECTURES,
    CASES,
    FAILURE,
    FAILURES,
    FOUR_PROCESS_CASES,
    SAVED,
    SCHEDULE_CASES,
    STEPS,
    config_of,
    record_windows,
)
from helpers.ranks import fork_ranks
from helpers.small import SMALL_OPTIONS, Notes
from helpers.trainers import lines_as_documents, poison, start

CPU = torch.device("cpu")
LAST = f"step-{STEPS:08d}"  # the last checkpoint of a run
OPTIONS = ["--recipe=paper", "--precision=float32", "--batch-tokens=256", "--lr=5e-3", *SMALL_OPTIONS]
OPTIONS += ["--log-every=1", "--eval-tokens=512", f"--eval-every={SAVED}", f"--checkpoint-every={SAVED}"]
WORKER = Path(parallel_worker.__file__)
ORTHOGONALIZED = ("best-ddp", "muon-fsdp", "muon-tensor", "normuon-fsdp", "normuon-tensor")
INEXACT = ("bfloat16", "fp8", "fp8-tensor", *ORTHOGONALIZED, "skipped", *FAILURES)
HSDP = [*(f"{architecture}-hsdp" for architecture in ARCHITECTURES), "tensor-hsdp", "averaged-hsdp"]
EXACT = [name for name in CASES if name not in INEXACT]


def torchrun(processes, *arguments):
    """Run torchrun on one node and return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += map(str, arguments)
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def ranks(processes, folder, action, words):
    """Run the command line or the worker script on several ranks: forks of this process, where no GPU forbids them."""
    if torch.cuda.is_available():
        script = ["-m", "antransformer"] if action is main else [WORKER]
        return torchrun(processes, *script, *words)
    return fork_ranks(processes, folder, action, [str(word) for word in words])


def train_cases(corpus, folder, processes, names):
    result = ranks(processes, folder, parallel_worker.run, [corpus, folder, *names])
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def two_process_runs(corpus, tmp_path_factory):
    """Return the folder with the runs of all cases for two processes."""
    return train_cases(corpus, tmp_path_factory.mktemp("two"), 2, CASES)


@pytest.fixture(scope="module")
def single_run(corpus, tmp_path_factory):
    """Return a function that trains a case in a single process; cases with equal settings share a run."""
    folders, root = {}, tmp_path_factory.mktemp("one")

    def train(name):
        single = {"parallel": "ddp", "tensor_parallel": 1, "compile": False, "activation_checkpointing": False}
        config = replace(config_of(corpus, name), **single)
        names = ("optimizer", "grad_clip", "ema", "cautious_weight_decay", "document_mask")
        key = (config.model.architecture, config.precision, *(str(getattr(config, name)) for name in names))
        if key not in folders:
            dataset = Dataset.open(corpus)
            folders[key] = root / "-".join(key)
            run.create_run_folder(folders[key], config, dataset)
            trainer = Trainer(config, dataset, folders[key], Notes())
            lines_as_documents(trainer)
            record_windows(trainer)
            trainer.run()
        return folders[key]

    return train


def lines_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def weights(folder):
    return checkpoint.restore(checkpoint.read(folder / "checkpoints" / LAST), CPU).state_dict()


def check_equal(folder, single, tolerance):
    """Compare the metrics of all steps."""
    lines, expected = lines_of(folder), lines_of(single)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in {"loss", "grad_norm", "largest_row_norm", "val_loss", "bits_per_byte", "mean_alpha"} & line.keys():
            if other[key] is not None:
                assert line[key] == pytest.approx(other[key], rel=tolerance), (key, line["step"])


@pytest.mark.parametrize("name", EXACT)
def test_two_processes_equal_one(two_process_runs, single_run, name):
    check_equal(two_process_runs / name, single_run(name), 1e-4)
    expected = weights(single_run(name))
    for key, value in weights(two_process_runs / name).items():
        # Adam divides by the size of the gradient, so rounding may move single coordinates with a gradient near 0 far.
        assert (value - expected[key]).norm() <= 1e-3 * expected[key].norm(), key


@pytest.mark.parametrize("name", ["averaged-ddp", "averaged-fsdp", "averaged-tensor"])
def test_two_processes_write_the_same_samples_as_one(two_process_runs, single_run, name):
    samples, expected = (
        {line["step"]: line["samples"] for line in lines_of(folder) if "samples" in line}
        for folder in (two_process_runs / name, single_run(name))
    )
    assert list(samples) == [3, 6] and samples == expected


def check_nearly_equal(folder, single):
    """Compare losses in half precision: FSDP casts all parameters, autocast only the inputs of matrix products."""
    losses = [line["loss"] for line in lines_of(folder)]
    assert losses == pytest.approx([line["loss"] for line in lines_of(single)], rel=2e-2)
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "fp8-tensor"])
def test_two_processes_nearly_equal_one_in_low_precision(two_process_runs, single_run, name):
    check_nearly_equal(two_process_runs / name, single_run(name))


@pytest.mark.parametrize("name", ORTHOGONALIZED)
def test_two_processes_equal_one_with_muon_up_to_bfloat16_rounding(two_process_runs, single_run, name):
    """Muon orthogonalizes in bfloat16, which amplifies rounding differences of the averaged gradients."""
    check_equal(two_process_runs / name, single_run(name), 1e-3)


def test_a_failure_of_one_rank_ends_all_at_the_same_step(two_process_runs):
    assert lines_of(two_process_runs / "broken")[-1]["step"] == FAILURE - 1  # a NaN loss is not logged
    for name in ("broken", "unwritten"):
        assert not list((two_process_runs / name / "checkpoints").iterdir())
    for name in ("stopped", "stopped-tensor"):
        assert [path.name for path in (two_process_runs / name / "checkpoints").iterdir()] == [f"step-{FAILURE:08d}"]


def test_all_ranks_skip_a_step_with_nan_on_one_rank(corpus, two_process_runs, tmp_path):
    length = {"tokens": 256 * STEPS, "checkpoint_every": SAVED, "eval_every": SAVED, "eval_tokens": 512}
    single = start(corpus, tmp_path / "run", lr=5e-3, max_skipped_steps=2, **length)
    poison(single, FAILURE)
    single.run()
    check_equal(two_process_runs / "skipped", tmp_path / "run", 1e-4)
    lines = lines_of(two_process_runs / "skipped")
    assert [line["step"] for line in lines if "loss" not in line] == [FAILURE]
    assert [line["skipped"] for line in lines] == [int(step >= FAILURE) for step in range(1, STEPS + 1)]


def test_the_clipped_case_clips(two_process_runs):
    assert all(line["grad_norm"] > 0.05 for line in lines_of(two_process_runs / "clipped"))


def windows_of(folder):
    """Count how often each window was in a batch."""
    lines = [json.loads(line) for path in folder.glob("windows-*") for line in path.read_text().splitlines()]
    return Counter(window for _, windows in lines for window in windows)


def resume_in_one_process(corpus, folder, done):
    config = run.resumed_config(folder, {"tensor_parallel": 1})
    trainer = Trainer(config, Dataset.open(corpus), folder, Notes(), resume=True)
    assert trainer.done == done
    record_windows(trainer)
    trainer.run()


@pytest.mark.parametrize(
    "name",
    [
        *("angpt-fsdp", "angpt-tensor", "gpt+-tensor", "averaged-ngpt", "averaged-tensor"),
        *("normuon-fsdp", "normuon-tensor", "stopped", "stopped-tensor"),
    ],
)
def test_one_process_resumes_the_run_of_two(corpus, two_process_runs, single_run, tmp_path, name):
    """Optimizer moments are restored, and no window is repeated or skipped."""
    folder = shutil.copytree(two_process_runs / name, tmp_path / name, ignore=shutil.ignore_patterns(LAST))
    resume_in_one_process(corpus, folder, FAILURE if name.startswith("stopped") else SAVED)
    check_equal(folder, single_run(name), 1e-3 if name in ORTHOGONALIZED else 1e-4)
    if name.startswith("stopped"):
        assert windows_of(folder) == windows_of(single_run(name))


def check_resumed_by_two(corpus, runs, names, tmp_path):
    """Resume the runs of two processes from their first checkpoint: last checkpoints and losses must be equal."""
    for name in names:
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns(LAST, "windows-*"))
    train_cases(corpus, tmp_path, 2, names)
    for name in names:
        lines = (tmp_path / name / "windows-2-0.jsonl").read_text().splitlines()
        assert [json.loads(line)[0] for line in lines] == list(range(SAVED + 1, STEPS + 1))
        folders = [root / name / "checkpoints" / LAST for root in (runs, tmp_path)]
        files, again = ({path.name: path.read_bytes() for path in sorted(folder.glob("*.saf*"))} for folder in folders)
        averaged = config_of(corpus, name).ema > 0
        assert len(files) == (6 if averaged else 4) and files == again
        assert lines_of(runs / name)[-1]["val_loss"] == lines_of(tmp_path / name)[-1]["val_loss"]


def test_two_processes_resume_bit_identically(corpus, two_process_runs, tmp_path):
    check_resumed_by_two(corpus, two_process_runs, ["averaged-ddp", "averaged-ngpt", "best-ddp"], tmp_path)


@pytest.mark.slow
def test_two_processes_resume_bit_identically_with_every_schedule_and_recipe(corpus, tmp_path):
    runs, resumed = tmp_path / "runs", tmp_path / "resumed"
    runs.mkdir()
    resumed.mkdir()
    check_resumed_by_two(corpus, train_cases(corpus, runs, 2, SCHEDULE_CASES), list(SCHEDULE_CASES), resumed)


@pytest.mark.slow
def test_four_then_two_then_one_process_continue_a_run(corpus, tmp_path, single_run):
    """No window is repeated or skipped, and the losses equal an uninterrupted run of one process."""
    names = ["stopped", "stopped-tensor"]
    for processes in (4, 2):
        train_cases(corpus, tmp_path, processes, names)
    for name in names:
        resume_in_one_process(corpus, tmp_path / name, 2 * FAILURE)
        check_equal(tmp_path / name, single_run(name), 1e-4)
        windows = windows_of(tmp_path / name)
        assert windows == windows_of(single_run(name)) and windows.total() == STEPS * 8
        assert len(list((tmp_path / name).glob("windows-*"))) == (7 if name == "stopped" else 4)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("angpt-fsdp", ("model", "optimizer")), ("averaged-fsdp", ("model", "optimizer", "average"))],
)
def test_each_process_writes_its_shards(two_process_runs, name, kinds):
    folder = two_process_runs / name / "checkpoints" / LAST
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {
        "state.json",
        *(f"{kind}-0000{number}-of-00002.safetensors" for kind in kinds for number in (1, 2)),
    }
    for kind in kinds:
        first, second = (sizes[f"{kind}-0000{number}-of-00002.safetensors"] for number in (1, 2))
        assert 0.8 < first / second < 1.25


def test_every_verb_reads_a_sharded_checkpoint(corpus, two_process_runs, tmp_path):
    folder = two_process_runs / "angpt-tensor"
    hf, back = tmp_path / "hf", tmp_path / "back"
    short = ["--tokens=256", "--batch-tokens=256", "--eval-tokens=256", "--device=cpu"]
    for arguments in (
        ["generate", "--checkpoint", folder, "--prompt=def ", "--max-new-tokens=3", "--device=cpu"],
        ["diagnose", "--checkpoint", folder, "--data", corpus, "--tokens=256", "--out", tmp_path / "diagnose.png"],
        ["export", "--checkpoint", folder, "--out", hf],
        ["import", hf, "--out", back],
        ["train", "--init", folder, "--data", corpus, "--out", tmp_path / "tuned", *short],
    ):
        assert main([str(argument) for argument in arguments]) == 0, arguments
    imported = checkpoint.restore(checkpoint.newest(back / "checkpoints", print), CPU).state_dict()
    for name, value in weights(folder).items():
        assert torch.equal(imported[name], value), name


def test_the_command_line_resumes_a_run_of_two_processes(corpus, tmp_path, single_run):
    options = ["--data", corpus, "--out", tmp_path / "run", *OPTIONS]
    options += [f"--tokens={256 * STEPS}"]
    first = ranks(2, tmp_path, main, ["train", *options, "--parallel=fsdp"])
    assert first.returncode == 0, first.stderr
    val_loss = f"{lines_of(tmp_path / 'run')[-1]['val_loss']:.4f}"
    assert first.stdout.count(f"{STEPS}/{STEPS}") == first.stdout.count(val_loss) == 1
    assert any(mentions(line, *["angpt", "cpu", "1", "fsdp"]) for line in first.stdout.splitlines())
    check_equal(tmp_path / "run", single_run("angpt-fsdp"), 1e-4)
    broken = tmp_path / "run/checkpoints" / LAST / "model-00002-of-00002.safetensors"  # verified by rank 1
    os.truncate(broken, broken.stat().st_size - 1)
    lines = lines_of(tmp_path / "run")
    del lines[SAVED - 1]["val_loss"], lines[SAVED - 1]["bits_per_byte"]  # as after a stop at this step
    (tmp_path / "run/metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    again = ranks(2, tmp_path, main, ["train", "--resume", "--out", tmp_path / "run", "--tensor-parallel=2"])
    assert again.returncode == 0, again.stderr
    assert mentions(again.stdout, *f"{broken.name} {tmp_path / 'run/checkpoints' / f'step-{SAVED:08d}'}".split())
    check_equal(tmp_path / "run", single_run("angpt-fsdp"), 1e-4)
    repeated = ranks(2, tmp_path, main, ["train", *options])
    assert repeated.returncode != 0
    (error,) = re.findall(r"^antransformer: .*", repeated.stderr, re.M)
    assert mentions(error, *f"{tmp_path / 'run'} --out --resume".split())
    assert "cli/train.py" not in repeated.stderr  # no traceback of ours; torchrun prints its own


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process with a GPU cannot be forked")
def test_all_ranks_resume_a_restarted_run_that_one_of_them_sees(corpus, tmp_path, monkeypatch):
    command = ["train", "--data", corpus, "--out", tmp_path / "run", *OPTIONS, f"--tokens={256 * STEPS}"]
    assert main([str(word) for word in command]) == 0
    finished = lines_of(tmp_path / "run")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr(launch, "is_restart", lambda folder: os.environ["RANK"] == "0")
    result = fork_ranks(2, tmp_path, main, [str(word) for word in command])
    assert result.returncode == 0, result.stderr
    assert lines_of(tmp_path / "run") == finished


def test_two_processes_extend_a_run(corpus, tmp_path):
    """They equal one process, and resume bit for bit if interrupted before the first new checkpoint."""
    options = ["--data", corpus, f"--tokens={256 * SAVED}", *OPTIONS]
    single, folder = tmp_path / "one", tmp_path / "two"
    for out in (single, folder):
        assert main([str(word) for word in ("train", "--out", out, *options)]) == 0
    extension = ["train", "--resume", f"--tokens={256 * STEPS}", "--rewarm=0.2", "--out"]
    assert main([*extension, str(single)]) == 0
    refused = ranks(2, tmp_path, main, [*extension[:3], "--out", folder])
    assert refused.returncode != 0 and len(re.findall(r"^antransformer: .*--rewarm", refused.stderr, re.M)) == 1
    extended = ranks(2, tmp_path, main, [*extension, folder])
    assert extended.returncode == 0, extended.stderr
    assert sum(mentions(line, 256 * SAVED, 256 * STEPS, SAVED, STEPS) for line in extended.stdout.splitlines()) == 1
    check_equal(folder, single, 1e-4)
    new = folder / "checkpoints" / LAST
    files = {path.name: path.read_bytes() for path in new.glob("*.safetensors")}
    shutil.rmtree(new)
    resumed = ranks(2, tmp_path, main, ["train", "--resume", "--out", folder])
    assert resumed.returncode == 0, resumed.stderr
    assert {path.name: path.read_bytes() for path in new.glob("*.safetensors")} == files


def test_a_batch_that_cannot_be_divided_is_refused(corpus):
    with pytest.raises(ConfigError) as error:
        make_model(config_of(corpus, "angpt-fsdp"), DistributedContext(world_size=3), CPU, torch.float32)
    assert mentions(str(error.value), *["8", "3", "batch_tokens"])


@pytest.mark.parametrize(
    ("config", "dist_ctx", "facts"),
    [
        ({}, DistributedContext(world_size=3), "3 tensor_parallel 2 --processes --nproc-per-node"),
        ({}, DistributedContext(), "1 tensor_parallel 2"),
        ({"parallel": "hsdp"}, DistributedContext(world_size=6, local_world_size=3), "3 tensor_parallel 2"),
        ({}, DistributedContext(world_size=6), "8 3 2 batch_tokens"),
    ],
)
def test_a_model_that_cannot_be_split_is_refused(corpus, config, dist_ctx, facts):
    config = replace(config_of(corpus, "angpt-tensor"), **config)
    with pytest.raises(ConfigError) as error:
        make_model(config, replace(dist_ctx, tensor_parallel=2), CPU, torch.float32)
    assert mentions(str(error.value), *facts.split())


@pytest.mark.slow
def test_four_processes_equal_one(corpus, tmp_path, single_run):
    names = [*EXACT, *(name for name in FOUR_PROCESS_CASES if name not in HSDP)]
    train_cases(corpus, tmp_path, 4, names)
    for name in names:
        if name.endswith("bfloat16"):
            check_nearly_equal(tmp_path / name, single_run(name))
        else:
            check_equal(tmp_path / name, single_run(name), 1e-4)


@pytest.mark.slow
def test_two_nodes_of_two_processes(corpus, tmp_path, single_run):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=2", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=localhost:29611", "--rdzv-id=test", "--max-restarts=0", str(WORKER), str(corpus)]
    agents = [
        subprocess.Popen([*command, str(tmp_path), *HSDP], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for agent in agents:
            _, errors = agent.communicate(timeout=300)
            assert agent.returncode == 0, errors[-3000:]
    finally:
        for agent in agents:
            agent.send_signal(signal.SIGKILL)
    for name in HSDP:
        check_equal(tmp_path / name, single_run(name), 1e-4)
