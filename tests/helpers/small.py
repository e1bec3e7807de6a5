"""A small model, a small corpus, and observers of training."""

import sysconfig
from pathlib import Path

import torch

import antransformer
from antransformer.bounds import Bound, norms
from antransformer.data import prepare
from antransformer.training.dry_run import NullReporter

SMALL = {"width": 64, "layers": 2, "context": 32, "head_dim": 32}
SMALL_OPTIONS = [f"--model.{name.replace('_', '-')}={value}" for name, value in SMALL.items()]


def make_corpus(folder: Path) -> Path:
    """Prepare twenty modules of the standard library as bytes: about 300,000 tokens."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[10:30]
    prepare(files[4:], folder, tokenizer="byte", val_inputs=files[:4])
    return folder


class Notes(NullReporter, list):
    """Reporter that collects log messages."""

    def log(self, text):
        self.append(text)


class Watch:
    """Binds a model and checks the bounds at every optimizer step.

    Norms are at most 1, strict rows have norm 1, and rows that the optimizer left inside are bit-identical. Each rank
    checks its own rows of sharded weights.
    """

    def __init__(self, model, optimizer):
        self.steps, self.inside = 0, 0
        optimizer.register_step_post_hook(self.before)
        antransformer.bind(model, optimizer)
        optimizer.register_step_post_hook(self.after)
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self.bounds = [bound for bound in antransformer.bounds.collect_bounds(model) if id(bound.parameter) in stepped]

    def before(self, *_):
        self.stepped = [bound.parameter.detach().clone() for bound in self.bounds]

    def after(self, *_):
        self.steps += 1
        for bound, stepped in zip(self.bounds, self.stepped, strict=True):
            length = local(norms(bound))
            assert not length.numel() or length.max() <= 1 + 1e-6, bound.name
            if bound.strict:
                assert not length.numel() or length.min() >= 1 - 1e-6, bound.name
            else:
                inside = local(norms(Bound(bound.name, stepped, bound.axis))) <= 1
                inside = inside.expand_as(local(stepped))
                assert torch.equal(local(bound.parameter)[inside], local(stepped)[inside]), bound.name
                self.inside += int(inside.sum())


def local(tensor):
    """Local shard of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
