"""The optimizer of a run, with its parameter groups and learning rates."""

import math
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.optimizer_registry import OPTIMIZERS


def make_optimizer(model: Decoder, config: TrainConfig) -> Optimizer:
    """Build the configured optimizer. Each group keeps its peak learning rate as ``initial_lr`` for the schedule."""
    optimizer: Optimizer = pkgutil.resolve_name(OPTIMIZERS[config.optimizer].builder)(model, config)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def build_adamw(model: Decoder, config: TrainConfig, include_blocks: bool = True) -> Optimizer:
    """AdamW with weight decay on matrices only.

    Args:
        model: model on the device where it trains.
        config: settings of the run.
        include_blocks: whether AdamW also trains the weight matrices inside the blocks.
    """
    outer, vectors, blocks = split_parameters(model)
    outer_lr, blocks_lr = matrix_lrs(config)
    groups: list[dict[str, Any]] = [
        {"params": outer, "lr": outer_lr, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if include_blocks:
        groups.append({"params": list(blocks.values()), "lr": blocks_lr, "weight_decay": config.weight_decay})
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=outer[0].device.type in ("cpu", "cuda"),
    )


class ParameterSplit(NamedTuple):
    """Parameters of a model by their role.

    Attributes:
        outer: embedding and head.
        vectors: scales, biases and other parameters with one axis.
        blocks: weight matrices inside the blocks, by name.
    """

    outer: list[Tensor]
    vectors: list[Tensor]
    blocks: dict[str, Tensor]


def split_parameters(model: Decoder) -> ParameterSplit:
    """Split the parameters of a model by their role."""
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    return ParameterSplit(
        outer=[parameter for name, parameter in matrices.items() if not name.startswith("blocks.")],
        vectors=[parameter for parameter in model.parameters() if parameter.ndim < 2],
        blocks={name: parameter for name, parameter in matrices.items() if name.startswith("blocks.")},
    )


def matrix_lrs(config: TrainConfig) -> tuple[float, float]:
    """Peak learning rates of AdamW for (embedding and head, weight matrices inside the blocks).

    Vectors use ``lr`` itself. ``lr_width`` is the width at which ``lr`` was tuned.
    """
    # AdamW moves each coordinate by about the learning rate. Coordinates of a row of norm 1 have size 1/sqrt(width),
    # so with lr ~ 1/sqrt(width) rows of any width rotate by the same angle. Inside the blocks 1/width, as in muP
    # (arXiv:2203.03466), was measured to be better, with and without bounds.
    ratio = config.lr_width / config.model.width if config.lr_width else 1.0
    return config.lr * math.sqrt(ratio), config.lr * ratio


def format_lrs(config: TrainConfig) -> str:
    """Peak learning rates of AdamW as text, with the rates of the matrices where they differ from ``lr``."""
    if not config.lr_width or config.lr_width == config.model.width:
        return f"{config.lr:g}"
    outer, blocks = (f"{rate:.3g}" for rate in matrix_lrs(config))
    blocks_text = "" if OPTIMIZERS[config.optimizer].lr_setting else f", block matrices {blocks}"
    return f"{config.lr:g} (embedding and head {outer}{blocks_text})"


def optimizer_state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of the state tensors that the optimizer keeps for each parameter of a group."""
    return ("step", "exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)


class CombinedOptimizer(Optimizer):
    """Several optimizers of disjoint parameters as one, with concatenated groups and a shared state."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share_state()

    def _share_state(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups, start = self.state, self.param_groups[start:end], end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as any optimizer does, then share it with the parts."""
        super().load_state_dict(state_dict)
        self._share_state()  # the base class has replaced the state and the groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part with the same gradients; the closure is called once."""
        loss = run_closure(closure)
        for part in self.parts:
            part.step()
        return loss


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """Call the closure of an optimizer step with gradients enabled; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
