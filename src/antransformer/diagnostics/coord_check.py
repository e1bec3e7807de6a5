"""How large the coordinates of activations are at each width, at the start and after a few steps, and how far it turned
them.

The check of muP (arXiv:2203.03466; microsoft/mup, ``coord_check.py``): where they grow or shrink with the width in
training although they did not at the start, the learning rate is not that of all widths. The learning rate here is one
for all widths, or of the matrices that which follows from the config's ``lr_width``, and constant. A normalized stream
can not grow: there it is the angle that tells.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from antransformer.data import Dataset, eval_batches
from antransformer.diagnostics.probes import PROBE_TOKENS, stream
from antransformer.training.config import Count, TrainConfig
from antransformer.training.dry_run import dry_run_trainer
from antransformer.training.trainer import Trainer

STEPS = 10
LEAST_ANGLE = 0.02  # degrees


@dataclass(frozen=True)
class Coordinates:
    """How large the coordinates of activations are at one width after so many steps, and how far they have turned.

    Attributes:
        architecture, width: of the model.
        step: 0 for the initial weights.
        stream: root mean square of the residual stream after the embedding and after each block; infinite where it is
            not finite.
        logits: the same of the logits.
        turned: mean angle in degrees between the stream at these places and what it was at step 0; empty there.
    """

    architecture: str
    width: int
    step: int
    stream: tuple[float, ...]
    logits: float
    turned: tuple[float, ...]


def coord_check(config: TrainConfig, dataset: Dataset) -> list[Coordinates]:
    """Of a model before its first step and after the last of ``STEPS``; nothing is written.

    Args:
        config: of a run; its schedule is replaced by a constant learning rate.
        dataset: verified data.
    """
    tokens = Count(STEPS * config.batch_tokens)
    trainer = dry_run_trainer(replace(config, tokens=tokens, warmup_fraction=0.0, min_lr_ratio=1.0), dataset)
    sequences = max(1, PROBE_TOKENS // config.model.context)
    text = next(eval_batches(trainer.validation, config.model.context, sequences))[0].to(trainer.device)
    start = _activations(trainer, text)
    for step in range(STEPS):
        trainer.update(step + 1)
    end = _activations(trainer, text)
    turned = tuple(_angle(before, after) for before, after in zip(start[:-1], end[:-1], strict=True))
    return [_measured(config, 0, start, ()), _measured(config, STEPS, end, turned)]


@torch.no_grad()
def _activations(trainer: Trainer, text: Tensor) -> list[Tensor]:
    """The residual stream after the embedding and after each block, and the logits."""
    activations = list(stream(trainer.model, text))
    return [activation.float() for activation in (*activations, trainer.model.logits(activations[-1]))]


def _measured(config: TrainConfig, step: int, activations: list[Tensor], turned: tuple[float, ...]) -> Coordinates:
    *sizes, logits = (_finite(activation.square().mean().sqrt()) for activation in activations)
    return Coordinates(config.model.architecture, config.model.width, step, tuple(sizes), logits, turned)


def _angle(before: Tensor, after: Tensor) -> float:
    """Mean over the tokens, in degrees, as far as float32 tells it from none."""
    cosines = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return max(_finite(cosines.arccos().mean().rad2deg()), LEAST_ANGLE)


def _finite(number: Tensor) -> float:
    value = float(number)
    return value if math.isfinite(value) else math.inf
