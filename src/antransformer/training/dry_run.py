"""Training steps that are only looked at: nothing is written, and nobody is told."""

from pathlib import Path
from typing import Any

from antransformer.data import Dataset
from antransformer.training.config import TrainConfig
from antransformer.training.trainer import Trainer


def dry_run_trainer(config: TrainConfig, dataset: Dataset) -> Trainer:
    """A trainer for ``update`` alone; raises as ``Trainer``."""
    return Trainer(config, dataset, Path(), NullReporter())


class NullReporter:
    """A reporter to nobody."""

    def step(self, step: int) -> None:
        """Nothing."""

    def line(self, line: dict[str, Any]) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""
