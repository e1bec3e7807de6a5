"""The micro-batch size that fits into memory."""

import math
from dataclasses import replace

import pytest
import torch

from antransformer.cli import main
from antransformer.data import Dataset
from antransformer.errors import ConfigError
from antransformer.runs import worker
from antransformer.training import micro_batch
from antransformer.training.config import resolve_config
from antransformer.training.defaults import parameter_count
from antransformer.training.distributed.parallel import DistributedContext
from antransformer.training.micro_batch import (
    fit_default_micro_batch,
    fit_micro_batch,
    fitting_micro_batch,
    step_memory,
)
from antransformer.training.run_folder import create_run_folder, save_config, saved_config
from helpers.commands import TEN_STEPS, refused
from helpers.messages import mentions

CPU = torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Function that sets the free memory."""
    return lambda size: monkeypatch.setattr(micro_batch, "free_memory", lambda device: size / micro_batch.USABLE_MEMORY)


@pytest.fixture
def config():
    """A run of 125m with a byte tokenizer, whose logits are small and whose activations are not."""
    return resolve_config({"preset": "125m", "device": "cpu", "precision": "float32"}, 257)


def test_the_default_fits_into_the_memory_of_a_small_machine(config, free):
    assert step_memory(config, CPU) > 100 * 2**30
    free(20 * 2**30)
    fitted = fit_micro_batch(config)
    assert 1 <= fitted.micro_batch_size < config.micro_batch_size
    assert step_memory(fitted, CPU) <= 20 * 2**30
    assert replace(fitted, micro_batch_size=config.micro_batch_size) == config
    free(2**50)
    assert fit_micro_batch(config) == config


def test_on_a_gpu_only_the_memory_limits_the_size(free, monkeypatch):
    config = resolve_config({"preset": "125m", "device": "cpu", "precision": "bfloat16"}, 50304)
    assert config.micro_batch_size == 2
    assert fit_micro_batch(config) == config
    gpu = torch.device("cuda")
    monkeypatch.setattr(micro_batch, "choose_device", lambda *_: gpu)
    free(100 * 2**30)
    size = fitting_micro_batch(config)
    assert step_memory(replace(config, micro_batch_size=size), gpu) <= 100 * 2**30
    passes = -(-config.batch_size // size)
    assert size == -(-config.batch_size // passes) and 20 < size < config.batch_size
    larger = -(-config.batch_size // (passes - 1))
    assert step_memory(replace(config, micro_batch_size=larger), gpu) > 100 * 2**30
    assert fitting_micro_batch(config, sharing=2) < size
    free(2**50)
    assert fitting_micro_batch(config) == config.batch_size


def test_the_default_size_is_fitted_into_the_memory_of_a_gpu(free, monkeypatch):
    monkeypatch.setattr(micro_batch, "choose_device", lambda *_: torch.device("cuda"))
    free(100 * 2**30)
    config = resolve_config({"preset": "125m", "precision": "bfloat16"}, 50304)
    on_cpu, on_gpu = replace(config, device="cpu"), replace(config, device="cuda:0")
    assert fit_default_micro_batch(on_cpu) == on_cpu
    fitted = fit_default_micro_batch(on_gpu)
    assert fitted == replace(on_gpu, micro_batch_size=fitted.micro_batch_size)
    assert fitted.micro_batch_size > fit_default_micro_batch(on_gpu, sharing=8).micro_batch_size
    assert fitted.micro_batch_size > config.micro_batch_size
    chosen = replace(on_gpu, micro_batch_size=3)
    assert fit_default_micro_batch(chosen) == chosen


def test_other_devices_keep_the_default_size(free, monkeypatch):
    monkeypatch.setattr(micro_batch, "choose_device", lambda *_: torch.device("mps"))
    free(math.inf)
    config = resolve_config({"preset": "125m", "precision": "bfloat16"}, 50304)
    assert fitting_micro_batch(config) == config.micro_batch_size < config.batch_size


def test_a_worker_saves_the_size_that_fits_its_device_and_nothing_else(monkeypatch, corpus, tmp_path):
    class StartedError(Exception):
        pass

    def start(*_args, **_kwargs):
        raise StartedError

    def fit(config, sharing):
        assert (config.device, sharing) == ("cuda:1", 2)
        return replace(config, micro_batch_size=3)

    monkeypatch.setattr(worker, "fit_default_micro_batch", fit)
    monkeypatch.setattr(worker, "open_mixture", start)
    config, folder = resolve_config({"preset": "pico"}, 257), tmp_path / "run"
    create_run_folder(folder, config, Dataset.open(corpus))
    with pytest.raises(StartedError):
        worker.train(folder, "data", "cuda:1", 2)
    assert saved_config(folder) == replace(config, micro_batch_size=3)
    save_config(folder, config)
    (folder / "checkpoints" / "step-00000002").mkdir()
    with pytest.raises(StartedError):  # a resumed run keeps its size
        worker.train(folder, "data", "cuda:1", 2)
    assert saved_config(folder) == config


def test_a_model_that_does_not_fit_is_refused(config, free):
    free(2**30)
    assert fitting_micro_batch(config) == 0
    with pytest.raises(ConfigError) as error:
        fit_micro_batch(config)
    assert mentions(error.value, "preset", "micro_batch_size", "--micro-batch-size")


def test_ranks_share_the_memory_of_a_cpu_and_agree_on_the_smallest(config, free, monkeypatch):
    ranks = DistributedContext(0, 4, 0, 4)
    free(60 * 2**30)
    alone = fit_micro_batch(config).micro_batch_size
    others = []

    def all_reduce_max(self, value):
        others.append(-value)
        return max(value, -2)

    monkeypatch.setattr(DistributedContext, "all_reduce_max", all_reduce_max)
    assert fitting_micro_batch(config, ranks) == min(2, others[0]) and others[0] < alone


def test_the_moving_average_needs_memory_too(config):
    extra = step_memory(replace(config, ema=0.1), CPU) - step_memory(replace(config, ema=0.0), CPU)
    assert extra == 4 * parameter_count(config.model)


def test_the_command_records_the_size_and_leaves_a_given_one(corpus, tmp_path, free, capsys):
    words = ["train", "--data", str(corpus), *TEN_STEPS, "--out"]
    free(1.0)
    assert mentions(refused([*words, tmp_path / "none"], capsys), "micro_batch_size")
    assert not (tmp_path / "none").exists()
    assert main([*words, str(tmp_path / "given"), "--micro-batch-size=8"]) == 0
    given = saved_config(tmp_path / "given")
    free(step_memory(replace(given, micro_batch_size=4), CPU))
    assert main([*words, str(tmp_path / "fitted")]) == 0
    assert (given.micro_batch_size, saved_config(tmp_path / "fitted").micro_batch_size) == (8, 4)
