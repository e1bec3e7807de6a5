"""Runs with ``document_mask``, from the command line on."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from antransformer.cli import main
from antransformer.data import Dataset, eval_batches, prepare, prepare_tokenized
from antransformer.errors import CheckpointError, ConfigError
from antransformer.models import registry
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config
from antransformer.training.metrics import read_metrics
from antransformer.training.run_folder import open_checkpoint
from helpers.messages import mentions
from helpers.trainers import lines_as_documents, losses, resume, run_until, settings, start, train_words, weights

CONTEXT = 32
VALIDATION = [f"document {number} of {number * number}" for number in range(90)]


@pytest.fixture(scope="module")
def short_documents(tmp_path_factory):
    """Data with documents of about 20 tokens."""
    folder = tmp_path_factory.mktemp("short")
    for name, texts in (("train", [f"{text}, and more" for text in VALIDATION * 3]), ("val", VALIDATION)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([folder / "train.jsonl"], folder / "data", tokenizer="byte", val_inputs=[folder / "val.jsonl"])
    return folder / "data"


@pytest.fixture(scope="module")
def runs(short_documents, tmp_path_factory):
    """Run folders with documents apart, and without."""
    folder = tmp_path_factory.mktemp("runs")
    for name, option in (("apart", "--document-mask"), ("mixed", "--no-document-mask")):
        words = train_words(short_documents, folder / name, "--tokens=2560", "--eval-tokens=1M", option)
        assert main(words) == 0
    return folder


def test_the_setting_is_recorded_and_changes_the_run(runs):
    for name, value in (("apart", True), ("mixed", False)):
        assert yaml.safe_load((runs / name / "config.yaml").read_text())["document_mask"] is value
        assert checkpoint.read(runs / name / "checkpoints/step-00000010").extra["settings"]["document_mask"] is value
    assert losses(runs / "apart") != losses(runs / "mixed")


def test_the_validation_loss_is_that_of_the_documents_alone(runs, short_documents):
    saved, tokenizer = open_checkpoint(runs / "apart", print)
    model = checkpoint.restore(saved, torch.device("cpu"))
    total = count = pieces = 0
    for tokens, targets in eval_batches(Dataset.open(short_documents).split("val"), CONTEXT, batch_size=1):
        starts = [*(tokens[0] == tokenizer.end_of_text).nonzero().flatten().tolist(), CONTEXT]
        lengths = [end - start for start, end in pairwise([0, *starts]) if end > start]
        for piece in zip(tokens.split(lengths, 1), targets.split(lengths, 1), strict=True):
            total += model.loss(*piece).item() * piece[0].numel()
        count, pieces = count + CONTEXT, pieces + len(lengths)
    assert pieces > len(VALIDATION)
    assert read_metrics(runs / "apart/metrics.jsonl")[-1]["val_loss"] == pytest.approx(total / count, rel=1e-5)


def test_resumed_and_accumulated_runs_equal_whole_ones(corpus, tmp_path):
    for name, more in (("whole", {}), ("accumulated", {"micro_batch_size": 3}), ("stopped", {})):
        trainer = start(corpus, tmp_path / name, tokens=256 * 10, document_mask=True, **more)
        lines_as_documents(trainer)
        if name == "stopped":
            run_until(trainer, 8)
            trainer, _ = resume(corpus, tmp_path / name)
            lines_as_documents(trainer)
        trainer.run()
    assert weights(tmp_path / "whole", 10) == weights(tmp_path / "stopped", 10)
    assert losses(tmp_path / "accumulated") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)


def test_it_cannot_change_on_resume(corpus, tmp_path):
    start(corpus, tmp_path / "run", tokens=256 * 5).run()
    with pytest.raises(CheckpointError) as error:
        resume(corpus, tmp_path / "run", document_mask=True)
    assert mentions(str(error.value), "document_mask")


def test_an_architecture_that_does_not_declare_it_is_refused(corpus, monkeypatch):
    plain = registry.get("gpt+")
    toy = registry.Architecture(name="toy", label="", description="", cls=plain.cls, options=plain.options)
    monkeypatch.setitem(registry._loaded, "toy", toy)
    with pytest.raises(ConfigError) as error:
        resolve_config(settings(corpus, document_mask=True, model={"architecture": "toy"}), 257)
    assert mentions(str(error.value), "document_mask", "toy", "angpt")


def test_data_without_ends_of_documents_is_refused(tmp_path, capsys):
    header = torch.zeros(256, dtype=torch.int32)
    header[0], header[1], header[2] = 20240520, 1, 4000
    tokens = torch.randint(256, (4000,), dtype=torch.int32).to(torch.uint16)
    Path(tmp_path, "ids.bin").write_bytes(header.numpy().tobytes() + tokens.numpy().tobytes())
    prepare_tokenized([tmp_path / "ids.bin"], tmp_path / "data", tokenizer="byte", val_fraction=0.2)
    assert main(train_words(tmp_path / "data", tmp_path / "run", "--document-mask")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert mentions(lines[-1], "document_mask", tmp_path / "data") and not (tmp_path / "run").exists()
