"""Short runs of the trainer, on twenty modules of the standard library as bytes."""

import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from antransformer.data import Dataset, prepare
from antransformer.errors import MachineError
from antransformer.selftest.checks import Setup
from antransformer.training.config import TrainConfig, resolve_config
from antransformer.training.dry_run import NullReporter
from antransformer.training.metrics import METRICS_FILE, read_metrics

STEPS = 20
SEQUENCES = 8  # in a batch


class CompiledReporter(NullReporter):
    """Reporter that raises if the compiler fails, since the run would continue without it and its losses be right."""

    def log(self, text: str) -> None:
        """Raise MachineError for a message about an exception that is being handled; discard others."""
        if sys.exception():
            raise MachineError(text)


def corpus(setup: Setup) -> Dataset:
    """Data of all short runs, prepared at the first call."""
    folder = setup.folder / "bytes"
    if not folder.exists():
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[10:30]
        prepare(files[4:], folder, tokenizer="byte", val_inputs=files[:4])
    return Dataset.open(folder)


def run_config(setup: Setup, dataset: Dataset, **changes: Any) -> TrainConfig:
    """Settings of a float32 run of ``STEPS`` steps with a checkpoint in the middle."""
    shape = {"width": 64, "layers": 2, "context": 32, "head_dim": 32}
    if not setup.miniature:
        shape = {"width": 256, "layers": 4, "context": 256, "head_dim": 64}
    batch_tokens = SEQUENCES * shape["context"]
    settings = {
        "data": str(dataset.path),
        "device": str(setup.device),
        "model": shape,
        "batch_tokens": batch_tokens,
        "tokens": STEPS * batch_tokens,
        "eval_tokens": batch_tokens,
        "checkpoint_every": STEPS // 2,
        "log_every": 1,
        "precision": "float32",
    }
    return resolve_config({**settings, **changes}, dataset.vocab_size)


def losses(folder: Path) -> list[float]:
    """Training losses of all steps, and then the last validation loss."""
    lines: list[Mapping[str, Any]] = list(read_metrics(folder / METRICS_FILE))
    return [*(line["loss"] for line in lines), lines[-1]["val_loss"]]
