"""Coordinate check of muP: how the size of activations depends on the width, and how far training rotates them.

Source: arXiv:2203.03466; microsoft/mup, ``coord_check.py``. If activations are equally large at all widths at
initialization, but grow or shrink with the width after a few steps, the learning rate does not transfer. A normalized
residual stream cannot grow, so the rotation is measured too.

The learning rate is constant over the steps. It is the same for all widths, or scaled per width by the config's
``lr_width``.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from antransformer.data import Dataset, eval_batches
from antransformer.diagnostics.probes import PROBE_TOKENS, residual_stream
from antransformer.settings import Count
from antransformer.training.config import TrainConfig
from antransformer.training.dry_run import dry_run_trainer
from antransformer.training.trainer import Trainer

STEPS = 10
MIN_ANGLE_DEG = 0.02  # float32 cosines cannot resolve smaller angles


@dataclass(frozen=True)
class CoordCheck:
    """Size of activations at one width and step, and their rotation since initialization.

    Attributes:
        architecture: architecture of the model.
        preset: preset of the model, which sets its depth.
        width: width of the model.
        batch: tokens of one step.
        peak_lr: ``lr`` of the config; infinite if an earlier release did not store it.
        step: number of training steps; 0 is initialization.
        stream: root mean square of the residual stream after the embedding and after each block (layers + 1 values);
            infinite if it overflowed.
        logits: root mean square of the logits; infinite if they overflowed.
        rotation_deg: mean angle in degrees between the residual stream now and at step 0 (layers + 1 values); empty
            at step 0.
    """

    architecture: str
    preset: str
    width: int
    batch: int
    peak_lr: float
    step: int
    stream: tuple[float, ...]
    logits: float
    rotation_deg: tuple[float, ...]

    @property
    def conditions(self) -> tuple[str, int, float]:
        """Settings that must be equal at all widths."""
        return self.preset, self.batch, self.peak_lr


def coord_check(config: TrainConfig, dataset: Dataset) -> list[CoordCheck]:
    """Measure a model at initialization and after ``STEPS`` training steps, without writing files.

    Args:
        config: settings of a run; its schedule is replaced by a constant learning rate.
        dataset: prepared data.
    """
    tokens = Count(STEPS * config.batch_tokens)
    trainer = dry_run_trainer(replace(config, tokens=tokens, warmup_fraction=0.0, min_lr_ratio=1.0), dataset)
    sequences = max(1, PROBE_TOKENS // config.model.context)
    text = next(eval_batches(trainer.validation, config.model.context, sequences))[0].to(trainer.device)
    start = _activations(trainer, text)
    for step in range(STEPS):
        trainer.update(step + 1)
    end = _activations(trainer, text)
    rotation = tuple(_mean_angle_deg(before, after) for before, after in zip(start[:-1], end[:-1], strict=True))
    return [_measurement(config, 0, start, ()), _measurement(config, STEPS, end, rotation)]


@torch.no_grad()
def _activations(trainer: Trainer, text: Tensor) -> list[Tensor]:
    """Residual stream after the embedding and after each block, then the logits, in float32."""
    hidden = list(residual_stream(trainer.model, text))
    return [activation.float() for activation in (*hidden, trainer.model.logits(hidden[-1]))]


def _measurement(config: TrainConfig, step: int, activations: list[Tensor], rotation: tuple[float, ...]) -> CoordCheck:
    *stream, logits = (_finite_or_inf(activation.square().mean().sqrt()) for activation in activations)
    return CoordCheck(
        architecture=config.model.architecture,
        preset=config.preset,
        width=config.model.width,
        batch=config.batch_tokens,
        peak_lr=config.lr,
        step=step,
        stream=tuple(stream),
        logits=logits,
        rotation_deg=rotation,
    )


def _mean_angle_deg(before: Tensor, after: Tensor) -> float:
    """Mean angle over the tokens in degrees, at least ``MIN_ANGLE_DEG``."""
    cosines = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return max(_finite_or_inf(cosines.arccos().mean().rad2deg()), MIN_ANGLE_DEG)


def _finite_or_inf(number: Tensor) -> float:
    """A float in which NaN counts as infinity, since both mean that the model diverged."""
    value = float(number)
    return value if math.isfinite(value) else math.inf
