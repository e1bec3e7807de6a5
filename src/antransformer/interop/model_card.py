"""The model card of an exported model: how to use it, and how it was trained, from what its run wrote down."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from antransformer.data import Tokenizer
from antransformer.errors import CheckpointError
from antransformer.models import ModelConfig, build
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.config import TrainConfig
from antransformer.training.defaults import parameter_count
from antransformer.training.metrics import read_metrics
from antransformer.training.run_folder import run_folder_of, saved_config, saved_settings

Fact = tuple[str, str]

EVALUATION_FILE = "evaluation.json"  # in a run folder; written by the verb evaluate

PAGE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- antransformer
- {architecture}
---

# {name}

A language model of {parameters:,} parameters, trained with antransformer
([arXiv:2505.22014](https://arxiv.org/abs/2505.22014)). It continues text and follows no instructions.

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)  # or, without it: import antransformer
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```

It has seen sequences of up to {context:,} tokens: nothing stops it past them, but what it writes there will be poor.
In training `{end}` stood between two documents; put its id, {end_id}, before a prompt to say that one begins here.
{bounds}
## Training

| | |
|---|---|
{facts}
{evaluation}{experiment}"""

BOUNDS = """
Its weight vectors were kept at {norm} in training. To keep them so in further training with any optimizer:

```python
import antransformer

antransformer.bind(model, optimizer)  # with transformers.Trainer: Trainer(model, ..., optimizers=(optimizer, None))
```
"""


EVALUATION = """
## Evaluation

| task | metric | value | items |
|---|---|---|---|
{rows}
"""

EXPERIMENT = """
## The experiment that it belongs to

{verdict}
{pictures}"""


def card(
    found: Checkpoint,
    tokenizer: Tokenizer,
    name: str,
    dtype: str,
    verdict: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """The text of README.md; verdict and pictures are those of the experiment that the run belongs to."""
    config, folder = found.model, run_folder_of(found)
    facts = [*model_facts(config, tokenizer, dtype), *training_facts(found, folder)]
    with torch.device("meta"):
        bounds = build(config).bounds()
    norm = "norm 1" if all(bound.strict for bound in bounds) else "a norm of at most 1"
    rows = list(evaluation_rows(folder, found.step))
    shown = "".join(f"\n![{Path(picture).stem}]({picture})\n" for picture in pictures)
    return PAGE.format(
        name=name,
        architecture=config.architecture,
        parameters=parameter_count(config),
        context=config.context,
        end=tokenizer.decode([tokenizer.end_of_text]),
        end_id=tokenizer.end_of_text,
        bounds=BOUNDS.format(norm=norm) if bounds else "",
        facts="\n".join(f"| {label} | {text} |" for label, text in facts),
        evaluation=EVALUATION.format(rows="\n".join(rows)) if rows else "",
        experiment=EXPERIMENT.format(verdict=verdict, pictures=shown) if verdict else "",
    )


def model_facts(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> Iterator[Fact]:
    """What the model is."""
    architecture = get(config.architecture)
    source = f" (arXiv:{architecture.arxiv})" if architecture.arxiv else ""
    yield "architecture", architecture.description + source
    heads = f"{config.heads} heads of width {config.head_dim}"
    yield "size", f"width {config.width}, {config.layers} layers, {heads}, context {config.context:,}"
    yield "weights", dtype
    yield "tokenizer", f"{tokenizer.vocab_size:,} ids"


def training_facts(found: Checkpoint, folder: Path) -> Iterator[Fact]:
    """How it was trained; of imported weights that is not known."""
    if "tokens" not in saved_settings(folder):
        yield "training", "not known here, the weights were imported"
        return
    config = saved_config(folder)
    yield "data", config.data
    if config.init:
        yield "started from", config.init
    yield "tokens", f"{found.step * config.batch_tokens:,}, in {found.step:,} steps of {config.batch_tokens:,}"
    yield "learning rate", learning_rate(config)
    muon = "" if config.muon_lr is None else f"Muon for the blocks' matrices, learning rate {config.muon_lr:g}; else "
    yield "optimizer", f"{muon}Adam, betas {config.beta1} and {config.beta2}, gradients clipped at {config.grad_clip:g}"
    yield "weight decay", f"{config.weight_decay:g}"
    yield "seed", str(config.seed)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] <= found.step and "loss" in line]
    if lines:
        yield "training loss", f"{lines[-1]['loss']:.4f} nats per token"
    evaluated = [line for line in lines if {"val_loss", "bits_per_byte"} <= line.keys()]
    if evaluated:
        yield validation_fact(evaluated[-1], found.step)


def learning_rate(config: TrainConfig) -> str:
    """Peaks and course."""
    warmup = f"warm-up over {config.warmup_fraction:.0%} of the run" if config.warmup_fraction else "no warm-up"
    return f"{config.lr_text}, {warmup}, cosine decay to {config.min_lr_ratio:.0%} of it over {config.tokens:,} tokens"


def validation_fact(line: dict[str, Any], step: int) -> Fact:
    """Loss of the last validation, and where that was if not at the checkpoint."""
    where = "" if line["step"] == step else f" (at step {line['step']:,})"
    return "validation loss", f"{line['val_loss']:.4f} nats per token, {line['bits_per_byte']:.4f} bits per byte{where}"


def evaluation_rows(folder: Path, step: int) -> Iterator[str]:
    """Scores of the last evaluation in the run folder, none if that was of another step.

    Raises:
        CheckpointError: its file is broken.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for result in content["results"] if content["step"] == step else ():
            scores = result["scores"]
            for score in [score for score in scores if score["task"] == result["name"]] or scores:
                if score["value"] is not None:
                    error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
                    yield f"| {score['task']} | {score['metric']} | {score['value']:.4f}{error} | {score['items']:,} |"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is broken: delete it, or evaluate again") from error
