"""The optimizer of a run."""

import torch
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig


def make_optimizer(model: Decoder, config: TrainConfig) -> Optimizer:
    """Adam, with decoupled weight decay on the matrices where the config has some."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=matrices[0].device.type in ("cpu", "cuda"),
    )
