"""Run folders for tests of export and evaluation."""

import json

import torch

import antransformer
from antransformer.data import byte_tokenizer
from antransformer.interop.export import export
from antransformer.models import ModelConfig, build
from antransformer.training import run_folder as runs
from antransformer.training.checkpointing import checkpoint
from antransformer.training.config import resolve_config, to_mapping
from helpers.messages import mentions

SIZES = {"vocab_size": 257, "width": 64, "layers": 3, "context": 48, "head_dim": 16}


LINES = [
    {"step": 10, "loss": 3.25, "val_loss": 3.125, "bits_per_byte": 4.5},
    {"step": 20, "loss": 2.75, "val_loss": 2.875, "bits_per_byte": 4.25},
    {"step": 30, "loss": 1.0, "val_loss": 1.0, "bits_per_byte": 1.0},
]


def make_run(folder, architecture="angpt", tokenizer=None, **options):
    """Write a run folder interrupted at step 20, and return its model, which has no parameter at its initial value."""
    torch.manual_seed(0)
    model = build(ModelConfig(architecture=architecture, **{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1 + 0.3 * torch.randn_like(parameter)).add_(0.01 * torch.randn_like(parameter))
            if name.startswith(("lm_head", "logit_scale")):
                parameter.mul_(5)  # so that the argmax is not a matter of rounding
    antransformer.bounds.project_(model.bounds())
    settings = {"recipe": "paper", "data": "data/mine", "tokens": 9_600, "batch_tokens": 192}
    config = resolve_config({**settings, "model": model.config.mapping()}, 257)
    runs.write_run_folder(folder, to_mapping(config), tokenizer or byte_tokenizer())
    optimizer = torch.optim.Adam(model.parameters())
    checkpoint.save(folder / runs.CHECKPOINTS, 20, model, optimizer, {"seconds": 1.0}, keep=1)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return model


def exported(folder, architecture="angpt", tokenizer=None, model=(), **options):
    """Return the model of a run and the folder that it is exported to."""
    ours = make_run(folder / "run", architecture, tokenizer, **dict(model))
    export(*runs.open_checkpoint(folder / "run"), folder / "hf", **options)
    return ours, folder / "hf"


def load(folder, **options):
    """Return the exported model, loaded by transformers, which is imported here since it is optional."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options)


def some_tokens(batch=2, length=48, seed=0):
    """Random ids of bytes (batch, length)."""
    return torch.randint(0, 257, (batch, length), generator=torch.Generator().manual_seed(seed))


def rows(page):
    """Rows of the tables in a Markdown page."""
    return [line for line in page.splitlines() if line.startswith("|") and line.strip("|- ")]


def has_row(page, *parts):
    return any(mentions(row, *parts) for row in rows(page))
