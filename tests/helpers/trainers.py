"""Trainers of small runs, and ways to break them off."""

import math

import pytest

from antransformer.data import Dataset
from antransformer.training import run_folder as run
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from antransformer.training.trainer import Trainer
from helpers.small import SMALL, Notes


def settings(corpus, **more):
    model = {**SMALL, **more.pop("model", {})}
    base = {"data": str(corpus), "batch_tokens": 256, "tokens": 256 * 20, "log_every": 1, "eval_tokens": 2048}
    return {**base, "lr": 1e-2, "checkpoint_every": 5, "eval_every": 10, **more, "model": model}


def start(corpus, folder, **more):
    config = resolve_config(settings(corpus, **more), 257)
    dataset = Dataset.open(corpus)
    run.create_run_folder(folder, config, dataset)
    return Trainer(config, dataset, folder, Notes())


def resume(corpus, folder, **more):
    notes = Notes()
    config = run.resumed_config(folder, more)
    return Trainer(config, Dataset.open(corpus), folder, notes, resume=True), notes


def run_until(trainer, step):
    """Break the run off before this step, as a power cut would."""
    update = trainer.update

    def interrupted(number):
        if number == step:
            raise KeyboardInterrupt
        return update(number)

    trainer.update = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


def losses(folder):
    return {line["step"]: line["loss"] for line in read_metrics(folder / "metrics.jsonl")}


def weights(folder, step):
    return (folder / f"checkpoints/step-{step:08d}" / "model.safetensors").read_bytes()


def poison(trainer, *steps, spoil=lambda loss: loss * math.nan):
    """Make the loss of these steps no number."""
    loss, update = trainer.loss, trainer.update

    def poisoned(step):
        trainer.loss = (lambda *batch: spoil(loss(*batch))) if step in steps else loss
        return update(step)

    trainer.update = poisoned
