"""The optimizer of a run, with its parameter groups and learning rates."""

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.learning_rates import peak_rates
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
    parameters, rates = split_parameters(model), peak_rates(config)
    groups: list[dict[str, Any]] = [
        {"params": parameters.embedding, "lr": rates.embedding, "weight_decay": config.weight_decay},
        {"params": parameters.head, "lr": rates.head, "weight_decay": config.weight_decay},
        {"params": parameters.vectors, "lr": rates.vectors, "weight_decay": 0.0},
    ]
    if include_blocks:
        blocks = list(parameters.blocks.values())
        groups.append({"params": blocks, "lr": rates.blocks, "weight_decay": config.weight_decay})
    return torch.optim.AdamW(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )


class ParameterSplit(NamedTuple):
    """Parameters of a model by their role.

    Attributes:
        embedding: matrices of ``model.embedding``.
        head: all other matrices outside the blocks.
        vectors: scales, biases and other parameters with one axis.
        blocks: weight matrices inside the blocks, by name.
    """

    embedding: list[Tensor]
    head: list[Tensor]
    vectors: list[Tensor]
    blocks: dict[str, Tensor]


def split_parameters(model: Decoder) -> ParameterSplit:
    """Split the parameters of a model by their role."""
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    return ParameterSplit(
        embedding=[parameter for name, parameter in matrices.items() if name.startswith("embedding.")],
        head=[parameter for name, parameter in matrices.items() if not name.startswith(("embedding.", "blocks."))],
        vectors=[parameter for parameter in model.parameters() if parameter.ndim < 2],
        blocks={name: parameter for name, parameter in matrices.items() if name.startswith("blocks.")},
    )


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
