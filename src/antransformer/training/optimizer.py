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
    decay = {"weight_decay": config.weight_decay}
    if config.cautious_weight_decay:
        decay = {"weight_decay": 0.0, "cautious_weight_decay": config.weight_decay}
    groups: list[dict[str, Any]] = [
        {"params": parameters.embedding, "lr": rates.embedding, **decay},
        {"params": parameters.head, "lr": rates.head, **decay},
        {"params": parameters.vectors, "lr": rates.vectors, "weight_decay": 0.0},
    ]
    if include_blocks:
        blocks = list(parameters.blocks.values())
        groups.append({"params": blocks, "lr": rates.blocks, **decay})
    optimizer = torch.optim.AdamW(
        groups,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=next(model.parameters()).device.type in ("cpu", "cuda"),
    )
    if config.cautious_weight_decay:
        optimizer.register_step_pre_hook(_decay_before_adamw)
    return optimizer


@torch.no_grad()
def _decay_before_adamw(optimizer: Optimizer, *_: Any) -> None:
    """Apply cautious weight decay before a step of AdamW, whose own decay is 0."""
    for group in optimizer.param_groups:
        for weight in group["params"] if "cautious_weight_decay" in group else ():
            if weight.grad is not None:
                # The update will have the signs of the next first moment, at the first step of the gradient.
                moment = optimizer.state[weight].get("exp_avg")
                update = weight.grad if moment is None else moment.lerp(weight.grad, 1 - group["betas"][0])
                decay_cautiously_(weight, update, group["lr"] * group["cautious_weight_decay"])


def decay_cautiously_(weight: Tensor, update: Tensor, decay: float) -> None:
    """Shrink the coordinates of a weight that an update moves towards zero by a fraction ``decay``, in place.

    The update is subtracted from the weight later. Coordinates without an update are shrunk too (arXiv:2510.12402,
    algorithm 1).
    """
    weight.sub_(weight * (update * weight >= 0), alpha=decay)


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
    if "betas" in group:
        return ("step", "exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if group["beta2"] is None else ("momentum_buffer", "second_moment")


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
