"""Model card of an exported model: how to use it and how it was trained, from the files of its run."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from antransformer.data import Tokenizer
from antransformer.data.mixture_spec import Part, format_mixture, parse_mixture, parse_stage
from antransformer.errors import CheckpointError
from antransformer.interop.gguf_tokenizer import gguf_tokenizer
from antransformer.interop.gguf_writer import check_sizes
from antransformer.models import ModelConfig, build
from antransformer.models.registry import get
from antransformer.training.checkpointing.checkpoint import Checkpoint
from antransformer.training.config import TrainConfig
from antransformer.training.defaults import parameter_count
from antransformer.training.learning_rates import format_rates
from antransformer.training.metrics import METRICS_FILE, MetricsLine, read_metrics
from antransformer.training.optimizer_registry import OPTIMIZERS
from antransformer.training.run_folder import run_folder_of, saved_config, saved_settings
from antransformer.wording import counted

Fact = tuple[str, str]

EVALUATION_FILE = "evaluation.json"  # in a run folder, written by antransformer evaluate

LABELS = {"exaone4": "EXAONE-4", "qwen3": "Qwen3"}

PAGE = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- antransformer
- {architecture}
---

# {name}

A language model with {parameters:,} parameters, trained with antransformer
([arXiv:2505.22014](https://arxiv.org/abs/2505.22014)). It continues text. It was not trained to follow instructions.
{notice}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{name}"
{loading}
inputs = tokenizer("Once", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100, do_sample=True)[0]))
```
{engines}
The model was trained on sequences of up to {context:,} tokens. Longer sequences work, but the quality drops.
In training, `{end}` (id {end_id}) separated documents. Put this id before a prompt that begins a document. The
tokenizer adds no tokens.

The export was {verification}.
{tuning}
## Training

| | |
|---|---|
{facts}
{evaluation}{experiment}"""

NATIVE_LOADING = """\
# trust_remote_code=True is not needed after import antransformer
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)"""

STOCK_LOADING = """\
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)"""

NOTICE = """
Only the layout of the tensors is that of {label}. The weights are this model's own: nothing in this folder comes from
the makers of {label}, and their licence does not apply to it.
"""

ENGINES = """
| engine | command |
|---|---|
| vLLM | `vllm serve {name} --dtype {dtype}` |
| MLX | `mlx_lm.generate --model {name} --prompt Once` |
"""

LLAMA_CPP = """\
| llama.cpp | `llama-server -m {name}.gguf`, with the file of `antransformer export --format gguf` |
| ollama | `ollama create {name} -f Modelfile`, where the Modelfile is `FROM ./{name}.gguf` |
"""

BOUNDS = """
Weight vectors were constrained to {norm} in training. To keep the constraint in further training with any optimizer:

```python
import antransformer

antransformer.bind(model, optimizer)  # with transformers.Trainer: Trainer(model, ..., optimizers=(optimizer, None))
```
"""

LIMITS = """
This folder is for inference. The interpolation of the residual stream is multiplied into the weights, and the bounds on
the norms of weight rows no longer hold, so fine-tuning it would not be training with the method. Fine-tune the folder
of `antransformer export --format native`. The root of the epsilon of all norms is large on purpose. Load the weights
in float32 or bfloat16; for float16 export with `--dtype float16`, which chooses scales that do not overflow.
"""

EVALUATION = """
## Evaluation

| task | metric | value | items |
|---|---|---|---|
{rows}
"""

EXPERIMENT = """
## Experiment

This run belongs to an experiment with the following result.

{summary}
{figures}"""


def engines(config: ModelConfig, tokenizer: Tokenizer, name: str, format: str, dtype: str) -> str:
    """Return the commands of engines that run a model in a standard architecture."""
    try:
        check_sizes(config, format, "f32", name)
        gguf_tokenizer(tokenizer, config.vocab_size, name)
    except CheckpointError:
        return ENGINES.format(name=name, dtype=dtype)
    return (ENGINES + LLAMA_CPP).format(name=name, dtype=dtype)


def card(
    checkpoint: Checkpoint,
    tokenizer: Tokenizer,
    name: str,
    format: str,
    dtype: str,
    verification: str,
    summary: str | None = None,
    figures: Sequence[str] = (),
) -> str:
    """Return the text of README.md.

    Args:
        checkpoint: verified checkpoint.
        tokenizer: tokenizer of its run.
        name: name of the model.
        format: native, exaone4 or qwen3.
        dtype: dtype of the exported weights.
        verification: result of the check of the weights.
        summary: summary of the experiment that the run belongs to.
        figures: file names of the experiment's figures.

    Raises:
        CheckpointError: evaluation.json is broken.
    """
    config, folder = checkpoint.model, run_folder_of(checkpoint)
    facts = [*model_facts(config, tokenizer, dtype), *training_facts(checkpoint, folder)]
    rows = list(evaluation_rows(folder, checkpoint.step))
    images = "".join(f"\n![{Path(figure).stem}]({figure})\n" for figure in figures)
    native = format == "native"
    return PAGE.format(
        name=name,
        architecture=config.architecture,
        parameters=parameter_count(config),
        notice="" if native else NOTICE.format(label=LABELS[format]),
        loading=NATIVE_LOADING if native else STOCK_LOADING,
        engines="" if native else engines(config, tokenizer, name, format, dtype),
        context=config.context,
        end=tokenizer.end_of_text_token,
        end_id=tokenizer.end_of_text,
        verification=verification,
        tuning=fine_tuning(config, format),
        facts="\n".join(f"| {label} | {text} |" for label, text in facts),
        evaluation=EVALUATION.format(rows="\n".join(rows)) if rows else "",
        experiment=EXPERIMENT.format(summary=summary, figures=images) if summary else "",
    )


def fine_tuning(config: ModelConfig, format: str) -> str:
    """Return the paragraph about further training; empty if it needs nothing special."""
    if format != "native":
        return LIMITS if format == "exaone4" else ""
    with torch.device("meta"):
        bounds = build(config).bounds()
    norm = "norm 1" if all(bound.strict for bound in bounds) else "a norm of at most 1"
    return BOUNDS.format(norm=norm) if bounds else ""


def model_facts(config: ModelConfig, tokenizer: Tokenizer, dtype: str) -> Iterator[Fact]:
    """Yield the rows of the table about the model."""
    architecture = get(config.architecture)
    source = f" (arXiv:{architecture.arxiv})" if architecture.arxiv else ""
    yield "architecture", architecture.description + source
    heads = f"{counted(config.heads, 'head')} of dimension {config.head_dim}"
    yield "size", f"width {config.width}, {counted(config.layers, 'layer')}, {heads}, context {config.context:,}"
    yield "weights", dtype
    yield "tokenizer", f"{tokenizer.vocab_size:,} ids"


def training_facts(checkpoint: Checkpoint, folder: Path) -> Iterator[Fact]:
    """Yield the rows of the table about training, or one row for imported weights, whose settings are unknown."""
    if "tokens" not in saved_settings(folder):
        yield "training", "unknown, since the weights were imported"
        return
    config = saved_config(folder)
    yield "data", _named(parse_mixture(config.data))
    if config.data_from:
        share, parts = parse_stage(config.data_from)
        yield "data for the end of training", f"after {share:.0%} of the run: {_named(parts)}"
    if config.init:
        yield "initial weights", Path(config.init).name
    step = checkpoint.step
    yield "tokens", f"{step * config.batch_tokens:,}, in {counted(step, 'step')} of {config.batch_tokens:,}"
    yield "learning rate", learning_rate(config)
    optimizer, blocks = OPTIMIZERS[config.optimizer], ""
    if optimizer.lr_setting:
        blocks = f"{optimizer.label} for the weight matrices inside the blocks; otherwise "
    yield (
        "optimizer",
        f"{blocks}AdamW, betas {config.beta1} and {config.beta2}, gradients clipped at {config.grad_clip:g}",
    )
    if config.ema:
        yield "averaging", f"exponential moving average of the weights, time constant {config.ema:.2g} of the run"
    yield "weight decay", f"{config.weight_decay:g}{', cautious' if config.cautious_weight_decay else ''}"
    yield "seed", str(config.seed)
    # The log may continue past the exported checkpoint.
    lines = [line for line in read_metrics(folder / METRICS_FILE) if line["step"] <= step and "loss" in line]
    if lines:
        yield "training loss", f"{lines[-1]['loss']:.4f} nats per token"
    evaluated = [line for line in lines if {"val_loss", "bits_per_byte"} <= line.keys()]
    if evaluated:
        yield validation_fact(evaluated[-1], step)


def _named(parts: Sequence[Part]) -> str:
    """Return a mixture with the names of its folders; their paths are private."""
    return format_mixture([Part(Path(part.source).name, part.weight) for part in parts])


def learning_rate(config: TrainConfig) -> str:
    """Return the peak learning rates and the schedule."""
    span = f"{config.initial_tokens:,} tokens" if config.initial_tokens else "the run"
    warmup = f"warm-up over {config.warmup_fraction:.0%} of {span}" if config.warmup_fraction else "no warm-up"
    if config.rewarm_steps:
        warmup += f", rewarmed over {counted(config.rewarm_steps, 'step')} from step {config.rewarm_from:,}"
    decayed = (config.steps - config.decay_start) * config.batch_tokens
    last = f"the last {decayed:,} of " if config.decay_start else ""
    decay = f"{config.schedule} decay to {config.min_lr_ratio:.0%} of the peak over {last}{config.tokens:,} tokens"
    return f"{format_rates(config)}, {warmup}, {decay}"


def validation_fact(line: MetricsLine, step: int) -> Fact:
    """Return the last validation loss, with its step if that is not the step of the checkpoint."""
    note = "" if line["step"] == step else f" (at step {line['step']:,})"
    return "validation loss", f"{line['val_loss']:.4f} nats per token, {line['bits_per_byte']:.4f} bits per byte{note}"


def evaluation_rows(folder: Path, step: int) -> Iterator[str]:
    """Yield the scores of the last evaluation in the run folder as table rows, if it was of this step.

    Raises:
        CheckpointError: evaluation.json is broken.
    """
    file = folder / EVALUATION_FILE
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        for result in content["results"] if content["step"] == step else ():
            scores = result["scores"]
            # Of a group only its own score, as in Result.summary.
            for score in [score for score in scores if score["task"] == result["name"]] or scores:
                if score["value"] is not None:
                    error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
                    task = Path(score["task"]).name  # of a text file; its path is private
                    yield f"| {task} | {score['metric']} | {score['value']:.4f}{error} | {score['items']:,} |"
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is broken: delete it or run antransformer evaluate again") from error
