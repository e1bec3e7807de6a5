"""How large the coordinates of activations are at each width, at the start and after a few steps.

The check of muP (arXiv:2203.03466; microsoft/mup, ``coord_check.py``): where they grow or shrink with the width in
training although they did not at the start, the learning rate is not that of all widths. The learning rate here is one
for all widths, and constant.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from antransformer.analysis.probes import stream
from antransformer.analysis.steps import unkept
from antransformer.analysis.sweep_results import Coordinates
from antransformer.analysis.worker import PROBE_TOKENS
from antransformer.data import Dataset, sequential
from antransformer.training.config import Count, TrainConfig
from antransformer.training.trainer import Trainer

STEPS = 10


def coordinates(config: TrainConfig, dataset: Dataset) -> list[Coordinates]:
    """Of a model before its first step and after the last of ``STEPS``; nothing is written.

    Args:
        config: of a run; its schedule is replaced by a constant learning rate.
        dataset: verified data.
    """
    tokens = Count(STEPS * config.batch_tokens)
    trainer = unkept(replace(config, tokens=tokens, warmup=0.0, lr_final=1.0), dataset)
    sequences = max(1, PROBE_TOKENS // config.model.context)
    text = next(sequential(trainer.validation, config.model.context, sequences))[0].to(trainer.device)
    found = [_measured(trainer, text, 0)]
    for step in range(STEPS):
        trainer.update(step + 1)
    return [*found, _measured(trainer, text, STEPS)]


@torch.no_grad()
def _measured(trainer: Trainer, text: Tensor, step: int) -> Coordinates:
    activations = list(stream(trainer.model, text))
    sizes = [_rms(activation) for activation in (*activations, trainer.model.logits(activations[-1]))]
    model = trainer.config.model
    return Coordinates(model.architecture, model.width, step, tuple(sizes[:-1]), sizes[-1])


def _rms(activation: Tensor) -> float:
    size = float(activation.float().square().mean().sqrt())
    return size if math.isfinite(size) else math.inf
