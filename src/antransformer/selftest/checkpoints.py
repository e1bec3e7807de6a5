"""Runs that are stopped and resumed, and checkpoints of the device on a CPU."""

import contextlib
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from antransformer.data import Dataset
from antransformer.errors import MachineError, RunStoppedError
from antransformer.selftest.checks import Check, Setup, at_most, equal, largest, only_on_cuda
from antransformer.selftest.runs import STEPS, CompiledReporter, corpus, losses, run_config
from antransformer.training import run_folder
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import TrainConfig
from antransformer.training.dry_run import NullReporter
from antransformer.training.trainer import Trainer

RUNS: dict[str, dict[str, Any]] = {
    "recipe best, averaged": {"recipe": "best", "ema": 0.2},
    "recipe paper": {"recipe": "paper"},
}


class StopAt(CompiledReporter):
    """Reporter that interrupts the run, as Ctrl-C does, before the step after ``last``."""

    def __init__(self, last: int) -> None:
        self.last = last

    def step(self, step: int) -> None:
        """Send the signal after the last step."""
        if step == self.last:
            signal.raise_signal(signal.SIGINT)


def resume(setup: Setup, name: str) -> Iterator[Check]:
    """Weights and optimizer state of a run that was stopped and resumed, against a run without interruption."""
    dataset = corpus(setup)
    config = run_config(setup, dataset, **RUNS[name])
    with TemporaryDirectory(dir=setup.folder) as scratch, _deterministic():
        whole, stopped = Path(scratch, "whole"), Path(scratch, "stopped")
        _train(config, dataset, whole)
        _stop_and_resume(config, dataset, stopped)
        yield equal(f"resumed run, {name}: weights and optimizer", _digests(whole) == _digests(stopped))


def compiled(setup: Setup) -> Iterator[Check]:
    """Losses of compiled runs, which replay CUDA graphs, against those of an eager run; one is stopped and resumed."""
    if setup.miniature:
        yield only_on_cuda("compiled run")
        return
    dataset = corpus(setup)
    counters = torch._dynamo.utils.counters["inductor"]  # of the process; the compiler only logs skipped graphs
    before = counters["cudagraph_skips"]
    with TemporaryDirectory(dir=setup.folder) as scratch:
        eager, whole, stopped = (Path(scratch, name) for name in ("eager", "whole", "stopped"))
        config = run_config(setup, dataset, compile=True, **RUNS["recipe best, averaged"])
        _train(replace(config, compile=False), dataset, eager)
        _train(config, dataset, whole)
        _stop_and_resume(config, dataset, stopped)
        for name, folder in (("compiled run", whole), ("compiled run, resumed", stopped)):
            pairs = zip(losses(eager), losses(folder), strict=True)
            yield at_most(f"{name}: largest difference of the losses", largest(abs(a - b) for a, b in pairs), 1e-3)
        yield at_most("compiled runs: skipped CUDA graphs", counters["cudagraph_skips"] - before, 0)


def on_cpu(setup: Setup) -> Iterator[Check]:
    """Loss of a checkpoint on a CPU, against the loss that the device computed."""
    dataset = corpus(setup)
    config = run_config(setup, dataset)
    with TemporaryDirectory(dir=setup.folder) as scratch:
        _train(config, dataset, Path(scratch, "run"))
        yield loss_on_cpu("checkpoint loaded on a CPU", Path(scratch, "run"), config, dataset)


def loss_on_cpu(name: str, folder: Path, config: TrainConfig, dataset: Dataset) -> Check:
    """Check the validation loss of the newest checkpoint, computed on a CPU, against the one in the metrics."""
    newest = checkpoint.newest(folder / run_folder.CHECKPOINTS, lambda _: None)
    assert newest is not None
    model = checkpoint.restore(newest, torch.device("cpu"))
    trainer = Trainer(replace(config, device="cpu"), dataset, folder, NullReporter())
    trainer.model.load_state_dict(model.state_dict())
    return at_most(f"{name}: difference of the loss", abs(trainer.evaluate()["val_loss"] - losses(folder)[-1]), 1e-4)


def _stop_and_resume(config: TrainConfig, dataset: Dataset, folder: Path) -> None:
    with contextlib.suppress(RunStoppedError):
        _train(config, dataset, folder, StopAt(STEPS // 2))
        raise MachineError("a run did not stop at a signal")
    _train(config, dataset, folder, resuming=True)


def _train(
    config: TrainConfig, dataset: Dataset, folder: Path, reporter: NullReporter | None = None, resuming: bool = False
) -> None:
    if not resuming:
        run_folder.create_run_folder(folder, config, dataset)
    Trainer(config, dataset, folder, reporter or CompiledReporter(), resume=resuming).run()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Use deterministic algorithms, and no fused attention: with ``warn_only`` its gradient is summed in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of the tensor files of the last checkpoint."""
    state = folder / run_folder.CHECKPOINTS / f"step-{STEPS:08d}" / checkpoint.STATE_FILE
    digests: dict[str, str] = json.loads(state.read_text(encoding="utf-8"))["sha256"]
    return digests
