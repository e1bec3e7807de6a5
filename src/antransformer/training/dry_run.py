"""Trainers that write no files and report to nobody, for measurements of single steps."""

from pathlib import Path

from antransformer.data import Dataset
from antransformer.training.config import TrainConfig
from antransformer.training.metrics import MetricsLine
from antransformer.training.trainer import Trainer


def dry_run_trainer(config: TrainConfig, dataset: Dataset) -> Trainer:
    """Trainer for calls of ``update`` only, without a run folder; raises the errors of ``Trainer``."""
    return Trainer(config, dataset, Path(), NullReporter())


class NullReporter:
    """Reporter that discards everything."""

    def step(self, step: int) -> None:
        """Discard the step."""

    def metrics(self, line: MetricsLine) -> None:
        """Discard the metrics."""

    def log(self, text: str) -> None:
        """Discard the message."""
