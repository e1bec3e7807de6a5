"""The optimizer of a run: Adam for everything, or Muon for the blocks' matrices and Adam for the rest.

Muon (https://kellerjordan.github.io/posts/muon) steps along the orthogonalized momentum. Scaled by
sqrt(max(1, fan_out / fan_in)), every row of a step has a length of about the rate: for the rows of anGPT, which have
norm 1, the rate is the angle in radians by which each turns. Embedding and head stay with Adam, as Muon's authors have
it.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from antransformer.models import Decoder
from antransformer.training.config import TrainConfig
from antransformer.training.distributed.parallel import full_tensor, shard_like

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of Muon's authors, for five steps


class Muon(Optimizer):
    """Muon, with q, k and v of a fused projection orthogonalized each by itself; for other matrices it is torch's.

    Together the three would share one set of directions, and the largest of them would take most of the step.

    Args:
        params: matrices, or groups of them; in a group with a ``head_dim`` the rows of each are head by head those of
            q, k and v, as ``functional.split_heads`` has them.
        lr: learning rate.
        weight_decay: decoupled.
        momentum: of Nesterov's kind.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "head_dim": None})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; a matrix that is shared by processes is gathered once."""
        loss = run_closure(closure)
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight.grad)
                state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
                update = full_tensor(weight.grad.lerp(state["momentum_buffer"], momentum))
                turn = (
                    newton_schulz(update) if group["head_dim"] is None else orthogonalize_qkv(update, group["head_dim"])
                )
                weight.mul_(1 - lr * group["weight_decay"]).sub_(shard_like(turn, weight), alpha=lr)
        return loss


def run_closure(closure: Callable[[], Any] | None) -> Any:
    """What a closure that was given to a step returns, with the gradients that it leaves."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def newton_schulz(matrix: Tensor) -> Tensor:
    """The nearest (fan_out, fan_in) matrix with all singular values alike, roughly, and rows of about unit length.

    Five steps of Newton-Schulz in bfloat16 bring the singular values between 0.7 and 1.2, which is near enough.
    """
    fan_out, fan_in = matrix.shape
    x = matrix.bfloat16() if fan_out <= fan_in else matrix.bfloat16().T
    x = x / x.norm().clamp_min(1e-7)
    first, second, third = NEWTON_SCHULZ
    for _ in range(5):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=second, alpha=third), x, beta=first)
    return (x if fan_out <= fan_in else x.T).to(matrix.dtype) * math.sqrt(max(1, fan_out / fan_in))


def orthogonalize_qkv(matrix: Tensor, head_dim: int) -> Tensor:
    """``orthogonal`` of q, k and v (heads * head_dim, fan_in) each, whose rows lie head by head in one matrix."""
    parts = matrix.unflatten(0, (-1, 3, head_dim)).unbind(1)
    turned = [newton_schulz(part.flatten(0, 1)).unflatten(0, (-1, head_dim)) for part in parts]
    return torch.stack(turned, dim=1).flatten(0, 2)


class CombinedOptimizer(Optimizer):
    """Optimizers of different parameters as one: their groups in a row, and one state that they share."""

    def __init__(self, *parts: Optimizer) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.state, part.param_groups, start = self.state, self.param_groups[start:end], end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any optimizer's, which puts a new state in the place of the old."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step each part, on the gradients that one call of the closure leaves."""
        loss = run_closure(closure)
        for part in self.parts:
            part.step()
        return loss


def optimizer_state_keys(group: dict[str, Any]) -> tuple[str, ...]:
    """Names of what an optimizer keeps for each parameter of a group."""
    return ("step", "exp_avg", "exp_avg_sq") if "betas" in group else ("momentum_buffer",)


def make_optimizer(model: Decoder, config: TrainConfig) -> Optimizer:
    """The optimizer that the config names, with decoupled weight decay on the matrices where the config has some.

    Each group knows the peak of its learning rate as ``initial_lr``.
    """
    matrices = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim >= 2}
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    outer = [parameter for name, parameter in matrices.items() if not name.startswith("blocks.")]
    blocks = {name: parameter for name, parameter in matrices.items() if name.startswith("blocks.")}
    outer_lr, blocks_lr = config.matrix_lrs
    groups: list[dict[str, Any]] = [
        {"params": outer, "lr": outer_lr, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.muon_lr is None:
        groups.append({"params": list(blocks.values()), "lr": blocks_lr, "weight_decay": config.weight_decay})
    optimizer: Optimizer = torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.adam_eps,
        fused=outer[0].device.type in ("cpu", "cuda"),
    )
    if config.muon_lr is not None:
        fused = [blocks.pop(name) for name in list(blocks) if name.endswith("qkv_proj.weight")]
        parts = [{"params": list(blocks.values())}, {"params": fused, "head_dim": config.model.head_dim}]
        optimizer = CombinedOptimizer(optimizer, Muon(parts, lr=config.muon_lr, weight_decay=config.weight_decay))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
