"""Runs of several processes: the same numbers as those of one."""

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
from antransformer.training import run_folder as run
from antransformer.training.checkpointing import checkpoint
from antransformer.training.distributed.parallel import DistributedContext, make_model
from antransformer.training.metrics import read_metrics
from antransformer.training.trainer import Trainer
from helpers import parallel_worker
from helpers.messages import mentions
from helpers.parallel_worker import ARCHITECTURES, CASES, FAILURES, MORE, config_of, record_windows
from helpers.small import SMALL_OPTIONS, Notes
from helpers.trainers import poison, start

CPU = torch.device("cpu")
WORKER = Path(parallel_worker.__file__)
ROUGH = ("bfloat16", "fp8", "fp8-tensor", "muon-fsdp", "muon-tensor", "skipped", *FAILURES)
HYBRID = [*(f"{architecture}-hsdp" for architecture in ARCHITECTURES), "tensor-hsdp"]
WAYS = [name for name in CASES if name not in ROUGH]


def torchrun(processes, *words, machines=1, **options):
    """Start a job of so many processes; machines are several agents on this one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes // machines)]
    if machines == 1:
        start.append("--standalone")
    return subprocess.run(
        [*start, *map(str, words)], capture_output=True, text=True, timeout=300, env=environment, **options
    )


def trained(corpus, folder, processes, names, **options):
    result = torchrun(processes, WORKER, corpus, folder, *names, **options)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def by_two(corpus, tmp_path_factory):
    """Every case that two processes can train."""
    return trained(corpus, tmp_path_factory.mktemp("two"), 2, CASES)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """The runs of a single process by case; those of the same settings are one."""
    found, folder = {}, tmp_path_factory.mktemp("one")

    def train(name):
        alike = {"parallel": "ddp", "tensor_parallel": 1, "compile": False, "activation_checkpointing": False}
        config = replace(config_of(corpus, name), **alike)
        key = (config.model.architecture, config.precision, config.optimizer, str(config.grad_clip))
        if key not in found:
            dataset = Dataset.open(corpus)
            found[key] = folder / "-".join(key)
            run.create_run_folder(found[key], config, dataset)
            trainer = Trainer(config, dataset, found[key], Notes())
            record_windows(trainer)
            trainer.run()
        return found[key]

    return train


def lines_of(folder):
    return read_metrics(folder / "metrics.jsonl")


def weights(folder):
    return checkpoint.restore(checkpoint.read(folder / "checkpoints/step-00000020"), CPU).state_dict()


def check_equal(shared, single, tolerance):
    """What was written down of 20 steps."""
    lines, expected = lines_of(shared), lines_of(single)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for line, other in zip(lines, expected, strict=True):
        assert line.keys() == other.keys()
        for key in {"loss", "grad_norm", "largest_row_norm", "val_loss", "bits_per_byte", "mean_alpha"} & line.keys():
            if other[key] is not None:
                assert line[key] == pytest.approx(other[key], rel=tolerance), (key, line["step"])


@pytest.mark.parametrize("name", WAYS)
def test_two_processes_compute_what_one_computes(by_two, alone, name):
    check_equal(by_two / name, alone(name), 1e-4)
    shared, single = (weights(folder) for folder in (by_two / name, alone(name)))
    for key, value in shared.items():
        torch.testing.assert_close(value, single[key], rtol=1e-3, atol=1e-4)


def check_nearly_equal(shared, single):
    """In half precision: FSDP rounds the parameters themselves, autocast only what goes into a product."""
    losses = [line["loss"] for line in lines_of(shared)]
    assert losses == pytest.approx([line["loss"] for line in lines_of(single)], rel=2e-2)
    assert {value.dtype for value in weights(shared).values()} == {torch.float32}


@pytest.mark.parametrize("name", ["bfloat16", "fp8", "fp8-tensor"])
def test_in_half_precision_or_less_nearly_so(by_two, alone, name):
    check_nearly_equal(by_two / name, alone(name))


@pytest.mark.parametrize("name", ["muon-fsdp", "muon-tensor"])
def test_so_does_muon_to_what_bfloat16_makes_of_rounding(by_two, alone, name):
    """It orthogonalizes the whole matrix in bfloat16, where the last bit of an averaged gradient can be the first."""
    check_equal(by_two / name, alone(name), 1e-3)


def test_what_happens_to_one_process_ends_all_at_the_same_step(by_two):
    assert lines_of(by_two / "broken")[-1]["step"] == 6  # a loss that is no number is not written down
    for name in ("broken", "unwritten"):
        assert not list((by_two / name / "checkpoints").iterdir())
    for name in ("stopped", "stopped-tensor"):
        assert [path.name for path in (by_two / name / "checkpoints").iterdir()] == ["step-00000007"]


def test_all_skip_the_step_at_which_one_has_no_number(corpus, by_two, tmp_path):
    single = start(corpus, tmp_path / "run", lr=5e-3, max_skipped_steps=2, checkpoint_every=10)
    poison(single, 7)
    single.run()
    check_equal(by_two / "skipped", tmp_path / "run", 1e-4)
    assert ["loss" in line for line in lines_of(by_two / "skipped")] == [step != 7 for step in range(1, 21)]
    assert [line["skipped"] for line in lines_of(by_two / "skipped")] == [int(step >= 7) for step in range(1, 21)]


def test_clipping_was_tested(by_two):
    assert all(line["grad_norm"] > 0.05 for line in lines_of(by_two / "clipped"))


def windows_of(folder):
    """How often each window was in a batch."""
    lines = [json.loads(line) for path in folder.glob("windows-*") for line in path.read_text().splitlines()]
    return Counter(window for _, windows in lines for window in windows)


def go_on_alone(corpus, folder, done):
    trainer = Trainer(
        run.resumed_config(folder, {"tensor_parallel": 1}), Dataset.open(corpus), folder, Notes(), resume=True
    )
    assert trainer.done == done
    record_windows(trainer)
    trainer.run()


@pytest.mark.parametrize("name", ["angpt-fsdp", "angpt-tensor", "gpt+-tensor", "stopped", "stopped-tensor"])
def test_one_process_goes_on_with_the_checkpoint_of_two(corpus, by_two, alone, tmp_path, name):
    """Also with the optimizer's moments, and with no window twice or left out."""
    folder = shutil.copytree(by_two / name, tmp_path / name, ignore=shutil.ignore_patterns("step-00000020"))
    go_on_alone(corpus, folder, 7 if name.startswith("stopped") else 10)
    check_equal(folder, alone(name), 1e-4)
    if name.startswith("stopped"):
        assert windows_of(folder) == windows_of(alone(name))


@pytest.mark.slow
def test_what_four_saved_two_go_on_with_and_then_one(corpus, tmp_path, alone):
    """No window is repeated or skipped, and the losses are those of one process that was never stopped."""
    names = ["stopped", "stopped-tensor"]
    for processes in (4, 2):
        trained(corpus, tmp_path, processes, names)
    for name in names:
        go_on_alone(corpus, tmp_path / name, 14)
        check_equal(tmp_path / name, alone(name), 1e-4)
        windows = windows_of(tmp_path / name)
        assert windows == windows_of(alone(name)) and windows.total() == 20 * 8
        assert len(list((tmp_path / name).glob("windows-*"))) == (7 if name == "stopped" else 4)


def test_each_process_writes_a_part(by_two):
    folder = by_two / "angpt-fsdp/checkpoints/step-00000020"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(sizes) == {
        "state.json",
        *(f"{kind}-0000{number}-of-00002.safetensors" for kind in ("model", "optimizer") for number in (1, 2)),
    }
    for kind in ("model", "optimizer"):
        first, second = (sizes[f"{kind}-0000{number}-of-00002.safetensors"] for number in (1, 2))
        assert 0.8 < first / second < 1.25


def test_every_verb_reads_what_two_processes_wrote(corpus, by_two, tmp_path):
    made = by_two / "angpt-tensor"
    hf, back = tmp_path / "hf", tmp_path / "back"
    short = ["--tokens=256", "--batch-tokens=256", "--eval-tokens=256", "--device=cpu"]
    for words in (
        ["generate", "--checkpoint", made, "--prompt=def ", "--max-new-tokens=3", "--device=cpu"],
        ["diagnose", "--checkpoint", made, "--data", corpus, "--tokens=256", "--out", tmp_path / "diagnose.png"],
        ["export", "--checkpoint", made, "--out", hf],
        ["import", hf, "--out", back],
        ["train", "--init", made, "--data", corpus, "--out", tmp_path / "tuned", *short],
    ):
        assert main([str(word) for word in words]) == 0, words
    imported = checkpoint.restore(checkpoint.newest(back / "checkpoints", print), CPU).state_dict()
    for name, value in weights(made).items():
        assert torch.equal(imported[name], value), name


def test_two_processes_on_the_command_line_stop_and_go_on(corpus, tmp_path, alone):
    words = ["--data", corpus, "--out", tmp_path / "run", "--batch-tokens=256", "--tokens=5120", "--lr=5e-3"]
    words += ["--log-every=1", "--eval-tokens=2048", "--eval-every=10", "--checkpoint-every=10", *SMALL_OPTIONS]
    first = torchrun(2, "-m", "antransformer", "train", *words, "--parallel", "fsdp")
    assert first.returncode == 0, first.stderr
    val_loss = f"{lines_of(tmp_path / 'run')[-1]['val_loss']:.4f}"
    assert first.stdout.count("20/20") == first.stdout.count(val_loss) == 1
    assert any(mentions(line, *["angpt", "cpu", "1", "fsdp"]) for line in first.stdout.splitlines())
    check_equal(tmp_path / "run", alone("angpt-fsdp"), 1e-4)
    broken = tmp_path / "run/checkpoints/step-00000020/model-00002-of-00002.safetensors"  # the second looks at it
    os.truncate(broken, broken.stat().st_size - 1)
    again = torchrun(2, "-m", "antransformer", "train", "--resume", "--out", tmp_path / "run", "--tensor-parallel=2")
    assert again.returncode == 0, again.stderr
    assert mentions(again.stdout, *f"{broken.name} {tmp_path / 'run/checkpoints/step-00000010'}".split())
    check_equal(tmp_path / "run", alone("angpt-fsdp"), 1e-4)
    taken = torchrun(2, "-m", "antransformer", "train", *words)
    assert taken.returncode != 0
    (complaint,) = re.findall(r"^antransformer: .*", taken.stderr, re.M)
    assert mentions(complaint, *f"{tmp_path / 'run'} --out --resume".split())
    assert "cli/train.py" not in taken.stderr  # torchrun has a traceback of its own, we have none


def test_a_batch_that_can_not_be_shared_is_said(corpus):
    with pytest.raises(ConfigError) as error:
        make_model(config_of(corpus, "angpt-fsdp"), DistributedContext(size=3), CPU, torch.float32)
    assert mentions(str(error.value), *["8", "3", "batch_tokens"])


@pytest.mark.parametrize(
    ("config", "world", "facts"),
    [
        ({}, DistributedContext(size=3), "3 tensor_parallel 2 --nproc-per-node"),
        ({}, DistributedContext(), "1 tensor_parallel 2"),
        ({"parallel": "hsdp"}, DistributedContext(size=6, local_size=3), "3 tensor_parallel 2"),
        ({}, DistributedContext(size=6), "8 3 2 batch_tokens"),
    ],
)
def test_a_model_that_can_not_be_split_is_said(corpus, config, world, facts):
    config = replace(config_of(corpus, "angpt-tensor"), **config)
    with pytest.raises(ConfigError) as error:
        make_model(config, replace(world, tensor=2), CPU, torch.float32)
    assert mentions(str(error.value), *facts.split())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [4])
def test_four_processes_compute_what_one_computes(corpus, tmp_path, alone, processes):
    names = [*WAYS, *(name for name in MORE if name not in HYBRID)]
    trained(corpus, tmp_path, processes, names)
    for name in names:
        if name.endswith("bfloat16"):
            check_nearly_equal(tmp_path / name, alone(name))
        else:
            check_equal(tmp_path / name, alone(name), 1e-4)


@pytest.mark.slow
def test_two_machines_of_two(corpus, tmp_path, alone):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--nnodes=2", "--rdzv-backend=c10d"]
    start += ["--rdzv-endpoint=localhost:29611", "--rdzv-id=test", "--max-restarts=0", str(WORKER), str(corpus)]
    agents = [
        subprocess.Popen([*start, str(tmp_path), *HYBRID], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for agent in agents:
            _, complaint = agent.communicate(timeout=300)
            assert agent.returncode == 0, complaint[-3000:]
    finally:
        for agent in agents:
            agent.send_signal(signal.SIGKILL)
    for name in HYBRID:
        check_equal(tmp_path / name, alone(name), 1e-4)
