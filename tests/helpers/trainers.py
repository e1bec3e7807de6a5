"""Trainers of small runs, and ways to interrupt them."""

import math
import sys
import time

import pytest

from antransformer.data import Dataset
from antransformer.training import run_folder
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from antransformer.training.trainer import Trainer
from helpers.small import SMALL, SMALL_OPTIONS, Notes

ARCHITECTURES = ["angpt", "ngpt", "gpt+"]
OPTIMIZED = [*((name, "adam") for name in ARCHITECTURES), ("angpt", "muon"), ("gpt+", "muon"), ("angpt", "normuon")]


def settings(corpus, **more):
    model = {**SMALL, **more.pop("model", {})}
    base = {
        "recipe": "paper",
        "precision": "float32",
        "data": str(corpus),
        "batch_tokens": 256,
        "tokens": 256 * 20,
        "log_every": 1,
        "eval_tokens": 2048,
    }
    return {**base, "lr": 1e-2, "checkpoint_every": 5, "eval_every": 10, **more, "model": model}


def start(corpus, folder, **more):
    config = resolve_config(settings(corpus, **more), 257)
    dataset = Dataset.open(corpus)
    run_folder.create_run_folder(folder, config, dataset)
    return Trainer(config, dataset, folder, Notes())


def resume(corpus, folder, **more):
    notes = Notes()
    config = run_folder.resumed_config(folder, more)
    return Trainer(config, Dataset.open(corpus), folder, notes, resume=True), notes


def lines_as_documents(trainer):
    """Let every line of the text be a document in a run with ``document_mask``, since the corpus has few others."""
    if trainer.config.document_mask:
        assert trainer.model.end_of_text == trainer.dataset.end_of_text
        trainer.model.end_of_text = ord("\n")


def run_until(trainer, step):
    """Interrupt the run before a step, as a power cut would."""
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


def weights(folder, step, kind="model"):
    return (folder / f"checkpoints/step-{step:08d}" / f"{kind}.safetensors").read_bytes()


def poison(trainer, *steps, spoil=lambda loss: loss * math.nan):
    """Replace the loss of these steps, by default with NaN."""
    loss, update = trainer.loss, trainer.update

    def poisoned(step):
        trainer.loss = (lambda *batch: spoil(loss(*batch))) if step in steps else loss
        return update(step)

    trainer.update = poisoned


def train_words(corpus, folder, *more):
    """Words of the command line that trains such a run."""
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings(corpus).items() if name != "model"]
    return ["train", "--out", str(folder), *options, *SMALL_OPTIONS, *more]


def command(corpus, folder, *more):
    # One thread, as in this process, since bits depend on the order of summation.
    code = (
        "import sys, torch; torch.set_num_threads(1); from antransformer.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    return [sys.executable, "-c", code, *train_words(corpus, folder, *more)]


def wait_for_step(folder, step, process):
    until = time.monotonic() + 60
    while max(losses(folder), default=0) < step:
        assert process.poll() is None and time.monotonic() < until, "the run ended too early"
        time.sleep(0.005)
