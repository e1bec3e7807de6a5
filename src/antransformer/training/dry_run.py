"""Trainers that write no files and report to nobody, for measurements of single steps."""

import time
from pathlib import Path

import torch

from antransformer.data import Dataset
from antransformer.training.config import TrainConfig
from antransformer.training.metrics import MetricsLine
from antransformer.training.threads import ThreadWatch
from antransformer.training.trainer import Trainer

STEPS = 3  # timed, after one that warms up
INTERVAL = (
    0.1  # seconds between readings of the load; two readings adapt the threads, so at least one step is as in a run
)


def dry_run_trainer(config: TrainConfig, dataset: Dataset) -> Trainer:
    """Trainer for calls of ``update`` only, without a run folder; raises the errors of ``Trainer``."""
    return Trainer(config, dataset, Path(), NullReporter())


def fastest_step(config: TrainConfig, dataset: Dataset) -> float:
    """Seconds of the fastest of ``STEPS`` training steps; raises the errors of ``Trainer``.

    The number of CPU threads adapts to other processes as in a run. The steps before that are slow, so that a mean or a
    median would not be the speed of the run.
    """
    trainer = dry_run_trainer(config, dataset)
    seconds = []
    with ThreadWatch(trainer.device, trainer.reporter.log, INTERVAL) as watch:
        for step in range(1, STEPS + 2):
            started = time.perf_counter()
            trainer.update(step)
            if trainer.device.type != "cpu":
                torch.accelerator.synchronize(trainer.device)
            seconds.append(time.perf_counter() - started)
            watch.update()
    return min(seconds[1:])


class NullReporter:
    """Reporter that discards everything."""

    def step(self, step: int) -> None:
        """Discard the step."""

    def metrics(self, line: MetricsLine) -> None:
        """Discard the metrics."""

    def log(self, text: str) -> None:
        """Discard the message."""
