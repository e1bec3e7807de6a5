"""Trainers that write and report nothing, for measurements of single steps."""

import time
from dataclasses import replace
from pathlib import Path

import torch

from antransformer.data import Dataset
from antransformer.models import build
from antransformer.settings import Count
from antransformer.training.config import TrainConfig
from antransformer.training.device import choose_device, release_memory
from antransformer.training.metrics import MetricsLine
from antransformer.training.threads import ThreadWatch
from antransformer.training.trainer import Trainer

STEPS = 3  # timed, after one that warms up
# Seconds between readings of the load. Two readings adapt the threads, so at least one step is as in a run.
INTERVAL = 0.1
CPU_TOKENS = 8192  # largest batch of a timed step on a CPU, where larger batches are hardly faster per token
CPU_FLOPS = 5e11  # of a timed step on a CPU: a few seconds, or one sequence
LONG = 10.0  # seconds after which no further step is timed


def dry_run_trainer(config: TrainConfig, dataset: Dataset) -> Trainer:
    """Trainer for calls of ``update`` only, without a run folder; raises the errors of ``Trainer``."""
    return Trainer(config, dataset, Path(), NullReporter())


def seconds_per_token(config: TrainConfig, dataset: Dataset) -> float:
    """Seconds per token of the fastest of ``STEPS`` training steps or fewer; raises the errors of ``Trainer``.

    On a CPU the steps have a batch of at most ``CPU_TOKENS``, and of fewer for a large model. The number of CPU threads
    adapts to other processes as in a run. The steps before that are slow, so that a mean or a median would not be the
    speed of the run.
    """
    batch: int = config.batch_tokens
    if choose_device(config.device).type == "cpu":
        with torch.device("meta"):
            tokens = min(CPU_TOKENS, int(CPU_FLOPS / (6 * build(config.model).parameter_count())))
        batch = min(batch, max(1, tokens // config.model.context) * config.model.context)
    trainer = dry_run_trainer(replace(config, batch_tokens=Count(batch)), dataset)
    seconds = []
    with ThreadWatch(trainer.device, trainer.reporter.log, INTERVAL, config.compile is True) as watch:
        for step in range(1, STEPS + 2):
            started = time.perf_counter()
            trainer.update(step)
            if trainer.device.type != "cpu":
                torch.accelerator.synchronize(trainer.device)
            seconds.append(time.perf_counter() - started)
            watch.update()
            if step > 1 and sum(seconds) > LONG:
                break
    device = trainer.device
    del trainer
    release_memory(device)
    return min(seconds[1:]) / batch


class NullReporter:
    """Reporter that discards everything."""

    def step(self, step: int) -> None:
        """Discard the step."""

    def metrics(self, line: MetricsLine) -> None:
        """Discard the metrics."""

    def log(self, text: str) -> None:
        """Discard the message."""
